"""Jobs about sparse coders: what their latents respond to, and pages to browse it."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ActorConfig, ModelConfig, SourceConfig
from introspect_ray.config.tasks import SplitConfig


class ExemplarLimits(Config):
    """How much is kept of each latent, and of all text; every number is per split."""

    top: Annotated[int, Field(ge=1)] = 20
    """Windows with the largest activations."""
    quantiles: Annotated[int, Field(ge=1, le=100)] = 4
    """Ranges of equally many windows that those in which a latent fires are parted into by their largest activation."""
    per_quantile: Annotated[int, Field(ge=1)] = 5
    """Windows drawn from each range."""
    random: Annotated[int, Field(ge=0)] = 50
    """Windows drawn from all text, the same for all latents."""
    silent: Annotated[int, Field(ge=0)] = 10
    """Windows that are like the top ones and in which the latent never fires."""
    pool: Annotated[int, Field(ge=0)] = 512
    """Windows drawn from all text in which random and silent ones are looked for."""

    @model_validator(mode="after")
    def _pool_holds_random(self) -> Self:
        if self.random > self.pool:
            raise ValueError(
                f"random windows are taken from the pool: expected at most {self.pool}, found {self.random}"
            )
        return self


class CollectConfig(Config):
    """jobs/collect_exemplars.py: what every latent of some coders responds to, over many texts."""

    output: str = "runs/exemplars"
    """Folder (any fsspec URL); every coder has its own inside."""
    target: ModelConfig = ModelConfig()
    coders: Annotated[tuple[str, ...], Field(min_length=1)] = ("pocket:sae",)
    """SAEs and transcoders of the target, all read in one pass."""
    source: SourceConfig = SourceConfig()
    split: SplitConfig = SplitConfig(train=0.6, validation=0.1, test=0.3)
    """Shares of the texts: describe latents with exemplars of one split, and score descriptions with another's."""
    limits: ExemplarLimits = ExemplarLimits()
    actors: ActorConfig = ActorConfig()
    context_tokens: Annotated[int, Field(ge=2)] = 256
    """Tokens that the target reads at once, the first of which is not seen; longer texts give several contexts."""
    window_tokens: Annotated[int, Field(ge=1, le=65536)] = 32
    """Tokens of an exemplar; the last of a context may have fewer."""
    texts_per_batch: Annotated[int, Field(ge=1)] = 64
    """Texts that go through the target together. The last bits of activations depend on it, and on nothing below."""
    texts_per_shard: Annotated[int, Field(ge=1)] = 4096
    """Texts per shard, the unit that is written, skipped and redone; a multiple of `texts_per_batch`."""
    latents_per_block: Annotated[int, Field(ge=1)] = 1024
    """Consecutive latents that are merged at once and lie in one file."""
    buffer_rows: Annotated[int, Field(ge=1)] = 1 << 20
    """Pairs of a latent and a window that may wait before they are cut back to what is kept: bounds memory."""
    max_error_share: Fraction = 0.05
    """The run fails if the target raised, or ended its process, at a larger share of the texts."""
    seed: int = 0

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.texts_per_shard % self.texts_per_batch:
            raise ValueError(
                f"texts_per_shard must be a multiple of texts_per_batch, {self.texts_per_batch}:"
                f" found {self.texts_per_shard}"
            )
        if len(set(self.coders)) < len(self.coders):
            raise ValueError(f"coders must differ, found {', '.join(self.coders)}")
        return self
