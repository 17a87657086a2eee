"""The pocket world: how it is built, and the quickstart on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.explainers import ExplainerConfig, FitProjectionConfig
from introspect_ray.config.resources import ActorConfig, ModelConfig, SourceConfig
from introspect_ray.config.tasks import (
    POCKET_FEATURES,
    POCKET_QUESTIONS,
    ActivationPatchingConfig,
    FeatureDescriptionConfig,
    InputAblationConfig,
    TaskName,
)
from introspect_ray.config.training import OptimizationConfig, TrainerConfig


class PocketTargetConfig(Config):
    """Shape and training of one pocket target."""

    architecture: Literal["llama", "qwen3"]
    layers: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=8)]
    mlp_width: Annotated[int, Field(ge=8)]
    heads: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)] = 2600
    rows: Annotated[int, Field(ge=1)] = 32
    row_length: Annotated[int, Field(ge=16)] = 96
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    checkpoint_every: Annotated[int, Field(ge=1)] = 250


class PocketSparseConfig(Config):
    """The pocket target's SAE and skip transcoder: where they read, their size, training, and labels."""

    sae_layer: Annotated[int, Field(ge=0)] = 1
    """Decoder layer whose residual output the SAE reads."""
    sae_latents: Annotated[int, Field(ge=1)] = 1536
    sae_active: Annotated[int, Field(ge=1)] = 8
    """Mean number of active latents per token."""
    transcoder_layer: Annotated[int, Field(ge=0)] = 1
    """Decoder layer whose MLP the transcoder stands for."""
    transcoder_latents: Annotated[int, Field(ge=1)] = 1024
    transcoder_active: Annotated[int, Field(ge=1)] = 8
    documents: Annotated[int, Field(ge=1)] = 12000
    """Documents of each of three samples: to train on, to choose labels on, to score labels on."""
    rows_per_word: Annotated[int, Field(ge=1)] = 200
    """Tokens of one word that train the coders at most; names are rare and would get no latents otherwise."""
    steps: Annotated[int, Field(ge=1)] = 2000
    batch_size: Annotated[int, Field(ge=1)] = 512
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    dead_after: Annotated[int, Field(ge=1)] = 100
    """Steps without firing after which a latent is trained on what the others leave over."""
    longest: Annotated[float, Field(gt=0)] = 2
    """Vectors longer than this multiple of the median are attention sinks and left out of labelling."""
    active_share: Fraction = 0.5
    """A latent counts as firing where its activation exceeds this share of its largest one."""
    minimum_firings: Annotated[int, Field(ge=1)] = 20
    """Latents that fire on fewer tokens of the sample count as dead and get no label."""
    minimum_tokens: Annotated[int, Field(ge=1)] = 10
    """Categories with fewer tokens in the sample describe nothing."""
    margin: Fraction = 0.03
    """The simplest category within this distance of the best F1 becomes the label."""
    accepted_score: Fraction = 0.7
    """F1 from which a description is accepted as right."""


class BuildPocketConfig(Config):
    """jobs/build_pocket.py: the pocket world's tokenizer, targets, SAE and transcoder."""

    output: str = "introspect_ray/pocket/artifacts"
    work: str = "runs/build_pocket"
    """Checkpoints and the tokenizer; may be deleted when the build is done."""
    vocabulary_size: Annotated[int, Field(ge=300)] = 2048
    target_a: PocketTargetConfig = PocketTargetConfig(architecture="llama", layers=4, width=160, mlp_width=448, heads=5)
    target_b: PocketTargetConfig = PocketTargetConfig(architecture="qwen3", layers=6, width=128, mlp_width=384, heads=4)
    sparse: PocketSparseConfig = PocketSparseConfig()
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of torch; another number changes the order of sums, and so the last digits of the weights."""
    seed: int = 0


class QuickstartTask(Config):
    """One task of the quickstart: its source and how long its explainer trains."""

    source: SourceConfig = SourceConfig()
    explainer: ExplainerConfig = ExplainerConfig()
    fit_projection: bool = False
    """Start the explainer's projections from maps fitted on plain text (see FitProjectionConfig)."""
    optimization: OptimizationConfig = OptimizationConfig()


class QuickstartConfig(Config):
    """jobs/quickstart.py: generate, train, evaluate and report for every task, on the pocket world by default."""

    output: str = "runs/quickstart"
    """Folder with `datasets/TASK`, `projections/TASK`, `explainers/TASK` and `evaluation`."""
    tasks: tuple[TaskName, ...] = ("feature_description", "activation_patching", "input_ablation")
    target: ModelConfig = ModelConfig()
    feature_description: QuickstartTask = QuickstartTask(
        explainer=ExplainerConfig(soft_tokens=30.0),
        fit_projection=True,
        optimization=OptimizationConfig(steps=120, learning_rate=1.5e-4),
    )
    activation_patching: QuickstartTask = QuickstartTask(
        explainer=ExplainerConfig(vector_scale=2.0),
        fit_projection=True,
        optimization=OptimizationConfig(steps=500),
    )
    input_ablation: QuickstartTask = QuickstartTask(optimization=OptimizationConfig(steps=500))
    features: FeatureDescriptionConfig = POCKET_FEATURES
    """Latents and layout of the queries of feature_description."""
    pairs: ActivationPatchingConfig = ActivationPatchingConfig(pairs_per_subject=6)
    """Prompt pairs of activation_patching."""
    questions: InputAblationConfig = POCKET_QUESTIONS
    """Layout of the questions of input_ablation."""
    texts: SourceConfig = FitProjectionConfig().source
    """Plain texts that projections are fitted on."""
    actors: ActorConfig = ActorConfig(initial_size=2, max_size=2)
    trainer: TrainerConfig = TrainerConfig(cpus_per_worker=2)
    max_examples: Annotated[int, Field(ge=1)] | None = 1000
    """Test records scored per task, spread evenly over the groups."""
    seed: int = 0
