"""What an explainer starts from, its projections, its export."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ModelConfig, SourceConfig


class LoraConfig(Config):
    """Low-rank adapters; P1 patching defaults."""

    rank: Annotated[int, Field(ge=1)] = 128
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Fraction = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ExplainerConfig(Config):
    """What an explainer starts from and how vectors enter it."""

    model: ModelConfig = ModelConfig()
    projection: Literal["auto", "none", "linear"] = "auto"
    """`auto`: a linear map per target layer where the widths differ, none where they are equal."""
    vector_scale: Annotated[float, Field(gt=0)] | None = None
    """Scale every projected vector to this multiple of the mean token-embedding norm; none leaves it as it is."""
    soft_tokens: Annotated[float, Field(gt=0)] | None = None
    """Replace every projected vector by a mixture of token embeddings, weighted by softmax of this factor times the
    cosine to each; none leaves it as it is. An explainer reads embeddings well that it saw in all its training."""
    fitted_projection: str | None = None
    """Folder that fit_projection.py wrote; the linear maps start from it instead of the identity or chance."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 24
    """Longest answer that is generated."""

    @model_validator(mode="after")
    def _fit_is_used(self) -> Self:
        if self.fitted_projection is not None and self.projection == "none":
            raise ValueError("fitted_projection needs projection linear or auto, found none")
        if self.soft_tokens is not None and self.vector_scale is not None:
            raise ValueError(
                "soft_tokens and vector_scale exclude each other: a mixture of embeddings has its own length"
            )
        return self


class FitProjectionConfig(Config):
    """jobs/fit_projection.py: fit the map from the target's residual stream to the explainer's input embeddings."""

    output: str = "runs/projection"
    target: ModelConfig = ModelConfig()
    explainer: ModelConfig = ModelConfig()
    """The model that the explainer starts from."""
    source: SourceConfig = SourceConfig(limit=4000)
    """Texts: rows with a field `text`, or `pocket`."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Layers of the target to fit; none fits all."""
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    """Penalty, relative to the mean squared entry of the residual vectors."""
    hold_out_every: Annotated[int, Field(ge=2)] = 10
    """Every so many-th text is not fitted on; the share of variance explained is measured there."""


class ExportConfig(Config):
    """jobs/export_explainer.py: an explainer for others to load, ours or one that P1 published."""

    explainer: str = "runs/explainer"
    """Folder (any fsspec URL, `hf://OWNER/NAME` for one of the hub)."""
    output: str = "runs/exported"
    """A new folder (any fsspec URL)."""
    merge: bool = False
    """Add an adapter to the weights that it adapts, so that no base model is needed."""
    evaluation: str | None = None
    """Folder that evaluate_explainer.py wrote; its scores go into the model card."""
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in memory and in the output; `auto` takes the checkpoint's."""
    target: str | None = None
    """Published checkpoints: the model that is explained, where their name does not say it."""
    base: str | None = None
    """Published adapters: the model that they belong to, where the name that they say leads nowhere."""
    alignment: str | None = None
    """Published checkpoints without projections: file with keys alignments.LAYER.weight."""
