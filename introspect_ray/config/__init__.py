"""One validated, typed config per job: the only place where a default is written.

Every job takes `--config FILE.yaml` and `--section.field value` overrides; both end in one of the trees below.
Unknown keys and values out of range are refused here, before any model is touched. The resolved tree is saved beside
what the job writes, so that an output folder can say which config it belongs to.
"""

from introspect_ray.config.base import Config, Fraction, differences, resolved
from introspect_ray.config.cluster import CheckConfig, CheckedJob
from introspect_ray.config.datasets import ConvertConfig, GenerateConfig, InspectConfig
from introspect_ray.config.descriptions import (
    ChatConfig,
    ConvertDescriptionsConfig,
    DescribeConfig,
    DescriptionFormat,
    EndpointConfig,
    JudgeConfig,
    JudgeDescriptionsConfig,
    LocalChatConfig,
    PromptConfig,
)
from introspect_ray.config.evaluation import EvaluateConfig, EvaluationRun, Method
from introspect_ray.config.explainers import ExplainerConfig, ExportConfig, FitProjectionConfig, LoraConfig
from introspect_ray.config.features import (
    BrowseConfig,
    CoderTrainerConfig,
    CollectConfig,
    CollectVectorsConfig,
    ExemplarLimits,
    ImportExemplarsConfig,
    StreamConfig,
    TrainCoderConfig,
    TrainSaeConfig,
    TrainTranscoderConfig,
    VectorKindsConfig,
)
from introspect_ray.config.pocket import (
    BuildPocketConfig,
    PocketSparseConfig,
    PocketTargetConfig,
    QuickstartConfig,
    QuickstartTask,
)
from introspect_ray.config.resources import ActorConfig, ModelConfig, SourceConfig
from introspect_ray.config.rewriting import (
    P2_FRACTIONS,
    POCKET_LINES,
    DescriptionSourceConfig,
    RewriteConfig,
    RewriteLineConfig,
    RewriteSimulatorConfig,
    Selection,
)
from introspect_ray.config.simulators import ScoreDescriptionsConfig, SimulatorConfig, TrainSimulatorConfig
from introspect_ray.config.tasks import (
    POCKET_FEATURES,
    POCKET_QUESTIONS,
    ActivationPatchingConfig,
    FeatureDescriptionConfig,
    InputAblationConfig,
    SplitConfig,
    TaskName,
)
from introspect_ray.config.training import (
    HUB_IDS,
    EvaluationDuringConfig,
    GpuName,
    KnownModel,
    LoggingConfig,
    OptimizationConfig,
    PlanConfig,
    TrainConfig,
    TrainerConfig,
)

__all__ = [
    "HUB_IDS",
    "P2_FRACTIONS",
    "POCKET_FEATURES",
    "POCKET_LINES",
    "POCKET_QUESTIONS",
    "ActivationPatchingConfig",
    "ActorConfig",
    "BrowseConfig",
    "BuildPocketConfig",
    "ChatConfig",
    "CheckConfig",
    "CheckedJob",
    "CoderTrainerConfig",
    "CollectConfig",
    "CollectVectorsConfig",
    "Config",
    "ConvertConfig",
    "ConvertDescriptionsConfig",
    "DescribeConfig",
    "DescriptionFormat",
    "DescriptionSourceConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "EvaluationDuringConfig",
    "EvaluationRun",
    "ExemplarLimits",
    "ExplainerConfig",
    "ExportConfig",
    "FeatureDescriptionConfig",
    "FitProjectionConfig",
    "Fraction",
    "GenerateConfig",
    "GpuName",
    "ImportExemplarsConfig",
    "InputAblationConfig",
    "InspectConfig",
    "JudgeConfig",
    "JudgeDescriptionsConfig",
    "KnownModel",
    "LocalChatConfig",
    "LoggingConfig",
    "LoraConfig",
    "Method",
    "ModelConfig",
    "OptimizationConfig",
    "PlanConfig",
    "PocketSparseConfig",
    "PocketTargetConfig",
    "PromptConfig",
    "QuickstartConfig",
    "QuickstartTask",
    "RewriteConfig",
    "RewriteLineConfig",
    "RewriteSimulatorConfig",
    "ScoreDescriptionsConfig",
    "Selection",
    "SimulatorConfig",
    "SourceConfig",
    "SplitConfig",
    "StreamConfig",
    "TaskName",
    "TrainCoderConfig",
    "TrainConfig",
    "TrainSaeConfig",
    "TrainSimulatorConfig",
    "TrainTranscoderConfig",
    "TrainerConfig",
    "VectorKindsConfig",
    "differences",
    "resolved",
]
