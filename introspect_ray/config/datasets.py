"""Jobs that write, inspect and convert datasets."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ActorConfig, ModelConfig, SourceConfig
from introspect_ray.config.tasks import (
    ActivationPatchingConfig,
    FeatureDescriptionConfig,
    InputAblationConfig,
    SplitConfig,
    TaskName,
)


class GenerateConfig(Config):
    """jobs/generate_dataset.py: run one task's procedure on a target and write a sharded dataset."""

    task: TaskName = "activation_patching"
    output: str = "runs/dataset"
    """Dataset folder (any fsspec URL)."""
    target: ModelConfig = ModelConfig()
    source: SourceConfig = SourceConfig()
    split: SplitConfig = SplitConfig()
    feature_description: FeatureDescriptionConfig = FeatureDescriptionConfig()
    activation_patching: ActivationPatchingConfig = ActivationPatchingConfig()
    input_ablation: InputAblationConfig = InputAblationConfig()
    actors: ActorConfig = ActorConfig()
    items_per_shard: Annotated[int, Field(ge=1)] = 256
    """Work items (prompt pairs, questions, latents) per shard: the unit that is written, skipped and redone."""
    vector_dtype: Literal["float16", "float32"] = "float16"
    """Dtype of vectors on disk."""
    max_failed_share: Fraction = 0.98
    """The run fails if a larger share of its records ends with a reason instead of a truth."""
    max_error_share: Fraction = 0.05
    """The run fails if the procedure raised, or ended its process, for a larger share of its work items: that is a
    defect or a broken device, while other reasons are truths that do not exist."""
    seed: int = 0

    @model_validator(mode="after")
    def _gpus_to_spread_over(self) -> Self:
        if self.target.device_map != "none" and not self.actors.num_gpus:
            raise ValueError(
                f"target.device_map {self.target.device_map} spreads layers over the GPUs of an actor:"
                " set actors.num_gpus, found 0"
            )
        return self


class InspectConfig(Config):
    """jobs/inspect_dataset.py: verify and summarise a finished dataset."""

    dataset: str = "runs/dataset"
    """Dataset folder (any fsspec URL); may stand alone, without `--dataset`."""
    page: str | None = None
    """HTML page to write (any fsspec URL); none writes `inspection.html` into the dataset folder."""
    num_examples: Annotated[int, Field(ge=0)] = 4
    """Records of every split that the page shows."""


class ConvertConfig(Config):
    """jobs/convert_dataset.py: between our datasets and the layouts that P1 published."""

    action: Literal["to_published", "from_published", "pickles"] = "to_published"
    """`to_published`: a dataset as published Parquet files; `from_published`: such files as a dataset; `pickles`:
    published pickles, or a tar of them, as safetensors and Parquet."""
    source: str = "runs/dataset"
    """What is converted: a folder, or for pickles a file (any fsspec URL)."""
    output: str = "runs/converted"
    """A new folder (any fsspec URL)."""
    target: ModelConfig = ModelConfig()
    """The model that the records are about; only its tokenizer and config are read."""
    records_per_shard: Annotated[int, Field(ge=1)] = 4096
    """Records of one shard, or of one published file; so many are in memory at once."""
    vector_dtype: Literal["float16", "float32"] = "float16"
    """Dtype of vectors in such a dataset."""
