"""Jobs that train explainers, and the plan of a run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.explainers import ExplainerConfig, LoraConfig
from introspect_ray.config.tasks import TaskName

GpuName = Literal["A10G-24", "A100-40", "A100-80", "B200-180", "H100-80", "H200-141", "L4-24", "L40S-48", "RTX4090-24"]


KnownModel = Literal["llama-3.1-8b", "llama-3-8b", "llama-3.1-8b-instruct", "qwen3-8b", "llama-3.1-70b"]
HUB_IDS: dict[KnownModel, str] = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
}
"""Models whose shape ships with the package (models/shapes.py)."""


class OptimizationConfig(Config):
    """AdamW with linear warm-up and a constant or cosine rate afterwards."""

    steps: Annotated[int, Field(ge=1)] = 600
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training records, in place of `steps`; none takes `steps`."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Examples per optimizer step, over all workers."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_share: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class TrainerConfig(Config):
    """Ray Train: workers, checkpoints, recovery."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that stay; at least two, so that the newest is never the only one."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between lines of metrics.jsonl."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 1024
    """Largest size of one forward pass on one worker, padding included; more is faster on a GPU, less on a CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures that are recovered from before the run fails; a new checkpoint starts the count anew."""
    sharding: Literal["none", "fsdp2"] = "none"
    """`fsdp2` shards weights, gradients and optimizer state per decoder layer over the workers; `none` keeps a whole
    copy on each."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping what it computed."""
    packing: bool = True
    """Put several examples into one row with attention kept apart, instead of padding them to one length."""
    compile: bool = False
    """torch.compile of every decoder layer."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """Go on with fewer workers, down to so many, when the cluster has lost some; none waits for all of them."""
    compute_dtype: Literal["model", "bfloat16"] = "model"
    """`bfloat16`: master weights in the model's dtype, computation in bfloat16, gradients summed in float32."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}, expected at most num_workers {self.num_workers}")
        return self


class EvaluationDuringConfig(Config):
    """Evaluation on held-out groups while training."""

    every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between evaluations on the validation split; 0 does none."""
    max_examples: Annotated[int, Field(ge=1)] = 200
    """Records per dataset, spread evenly over the groups."""
    metric: str = "exact_match"
    """What `patience` watches and the best checkpoint is kept by, averaged over the datasets that have it."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better one; none never stops early."""


class LoggingConfig(Config):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = True
    """Event files under the output folder's `tensorboard/`."""
    wandb_project: str | None = None
    """Weights & Biases project; none logs nothing there."""
    mlflow_uri: str | None = None
    """MLflow tracking server or folder; none logs nothing there."""


class PlanConfig(Config):
    """`--plan`: what a run needs, worked out from its config without weights, is printed in place of the run."""

    show: bool = False
    """Print the plan and stop; `--plan` alone says the same."""
    gpu: GpuName = "H100-80"
    """GPU that memory and time are worked out for; its number is `trainer.num_workers`."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    usable_share: Annotated[float, Field(gt=0, le=1)] = 0.92
    """Share of a GPU's memory that tensors may take; the rest is for the CUDA context, communication buffers and holes
    between tensors."""
    share_of_peak: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of the GPU's peak arithmetic that matrix products reach."""
    node_gbit_per_s: Annotated[float, Field(gt=0)] = 400
    """Network of one node."""
    price_per_gpu_hour: Annotated[float, Field(gt=0)] | None = None
    """What one GPU costs in an hour, in any currency; none leaves the cost out."""
    task: TaskName = "feature_description"
    """Whose lengths are assumed where the datasets are not there yet."""
    num_examples: Annotated[int, Field(ge=1)] | None = None
    """Training records where the datasets are not there yet; none assumes the task's number in P1."""
    target: str | None = None
    """Model that the vectors come from where the datasets are not there yet; none: the explainer's own."""


class TrainConfig(Config):
    """jobs/train_explainer.py: fine-tune an explainer on datasets that generate_dataset.py wrote."""

    datasets: tuple[str, ...] = ("runs/dataset",)
    """Dataset folders; their records are mixed in proportion to their size, or by `weights`."""
    output: str = "runs/explainer"
    explainer: ExplainerConfig = ExplainerConfig()
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """How often each dataset is drawn from, in relation to the others; none draws every record equally often."""
    method: Literal["full", "lora", "qlora"] = "full"
    """`qlora`: adapters on a base in 4 bits (NF4 with double quantisation)."""
    lora: LoraConfig = LoraConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationDuringConfig = EvaluationDuringConfig()
    logging: LoggingConfig = LoggingConfig()
    plan: PlanConfig = PlanConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _one_weight_per_dataset(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.datasets):
            raise ValueError(f"weights has {len(self.weights)} numbers for {len(self.datasets)} datasets")
        return self
