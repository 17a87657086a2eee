"""What jobs share: models, the actors that hold them, and source rows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config


class ModelConfig(Config):
    """A causal language model, by folder, by hub id, or `pocket:target_a` / `pocket:target_b`."""

    path: str = "pocket:target_a"
    """Folder, hub id, or `pocket:NAME` for a model that ships with the package."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in memory; `auto` takes the checkpoint's."""
    device: str = "auto"
    """`auto` takes a GPU if the process has one, else the CPU."""
    quantization: Literal["none", "nf4", "nf4_double"] = "none"
    """`nf4` keeps the weights of linear layers in 4 bits (bitsandbytes) and computes in `dtype`; `nf4_double` quantizes
    their scales as well."""
    device_map: Literal["none", "auto", "balanced", "sequential"] = "none"
    """How layers spread over the GPUs of one process when one does not hold the model (accelerate); `none` uses one."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    revision: str | None = None
    """Revision of a hub model."""
    trust_remote_code: bool = False
    """Run code that a checkpoint brings along."""

    @model_validator(mode="after")
    def _one_placement(self) -> Self:
        if self.device_map != "none" and self.device != "auto":
            raise ValueError(f"device_map {self.device_map} chooses devices itself: found device {self.device}")
        return self


class ActorConfig(Config):
    """The pool of Ray actors that hold a model."""

    min_size: Annotated[int, Field(ge=1)] = 1
    initial_size: Annotated[int, Field(ge=1)] = 1
    max_size: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min_size <= self.initial_size <= self.max_size:
            raise ValueError(
                "sizes must satisfy min_size <= initial_size <= max_size, "
                f"found {self.min_size}, {self.initial_size}, {self.max_size}"
            )
        return self


class SourceConfig(Config):
    """Where the rows come from that a task turns into records."""

    path: str = "pocket"
    """`pocket` for the embedded world, else a file (json, jsonl, csv, parquet, txt; local or any fsspec URL), a folder
    of files of one kind, or a glob such as `s3://bucket/facts/*.parquet`; rows count on in order of the names."""
    format: Literal["auto", "counterfact", "known_facts", "mmlu", "marked_text", "latent_labels", "vectors", "text"] = (
        "auto"
    )
    """Row format; `auto` reads it off the columns."""
    text_unit: Literal["auto", "paragraph", "line", "file"] = "auto"
    """What one text of a txt file is; `auto`: paragraphs where blank lines part them, else lines."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use at most so many source rows, taken in file order."""
    label_score: str | None = None
    """Of a descriptions.jsonl: the score that chooses between the candidates of a latent and counts as its label's;
    none takes the first candidate, without a score."""
