"""Jobs about coders: what their latents respond to, training them, and vectors that no coder knows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ActorConfig, ModelConfig, SourceConfig
from introspect_ray.config.tasks import SplitConfig

# --- exemplars ------------------------------------------------------------------------------------------------------


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
    def _fits_together(self) -> Self:
        if self.texts_per_shard % self.texts_per_batch:
            raise ValueError(
                f"texts_per_shard must be a multiple of texts_per_batch, {self.texts_per_batch}:"
                f" found {self.texts_per_shard}"
            )
        if self.target.device_map != "none" and not self.actors.num_gpus:
            raise ValueError("target.device_map spreads layers over the GPUs of an actor: set actors.num_gpus, found 0")
        if len(set(self.coders)) < len(self.coders):
            raise ValueError(f"coders must differ, found {', '.join(self.coders)}")
        return self


class ImportExemplarsConfig(Config):
    """jobs/import_exemplars.py: exemplars from Neuronpedia's bulk files of one source."""

    source: str = "runs/neuronpedia"
    """Folder of one source, with `features/` and `activations/` (any fsspec URL), as in `v1/MODEL/SOURCE`."""
    output: str = "runs/exemplars"
    """A new folder (any fsspec URL)."""
    target: ModelConfig = ModelConfig()
    """The model that read the texts; its tokenizer gives the ids of their tokens."""
    kind: Literal["sae", "transcoder"] = "sae"
    split: SplitConfig = SplitConfig(train=0.6, validation=0.1, test=0.3)
    """Shares of the windows, by a hash of their text."""
    latents_per_block: Annotated[int, Field(ge=1)] = 1024
    """Consecutive latents that lie in one file, and are in memory at once."""


class BrowseConfig(Config):
    """jobs/browse_latents.py: a page from which the latents of one coder are looked at, from disk."""

    exemplars: str = "runs/exemplars"
    """Folder of one coder's exemplars (any fsspec URL); may stand alone, without `--exemplars`."""
    descriptions: tuple[str, ...] = ()
    """Files descriptions.jsonl, or folders that hold one."""
    score: str = "correlation"
    """The score that the candidates of a latent, and latents, are ranked by; those without it are listed apart."""
    output: str | None = None
    """Folder (any fsspec URL) for the page and its data; none: `page` in the folder of the exemplars."""
    top: Annotated[int, Field(ge=0)] = 10
    """Exemplars shown of a latent, of each kind at most; of `quantile` so many per range."""
    quantile: Annotated[int, Field(ge=0)] = 2
    random: Annotated[int, Field(ge=0)] = 5
    silent: Annotated[int, Field(ge=0)] = 3
    latents_per_file: Annotated[int, Field(ge=1)] = 64
    """Latents whose exemplars the page loads together."""


# --- training of coders, and out-of-distribution vectors ----------------------------------------------------------


class StreamConfig(Config):
    """Texts through the target: blocks of activations, shuffled in a bounded buffer."""

    texts_per_block: Annotated[int, Field(ge=1)] = 64
    """Texts that one call of an actor runs; the unit that is tried again."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """Longer texts are cut into pieces of so many tokens, each with its own begin-of-text token."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of activations on their way to the trainer and in its buffer."""
    buffer_batches: Annotated[int, Field(ge=1)] = 32
    """Batches that are shuffled together: the trainer holds so many, and Ray's object store twice as many, or 1 GB."""


class CoderTrainerConfig(Config):
    """The one process that trains."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints, of which the newest stays."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between lines of metrics.jsonl."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that the process may die before the run fails; a new checkpoint starts the count anew."""


class TrainCoderConfig(Config):
    """What training an SAE and training a transcoder share."""

    output: str = "runs/coder"
    """Folder for the coder, in sae-lens format."""
    target: ModelConfig = ModelConfig()
    source: SourceConfig = SourceConfig()
    """Texts: rows with a field `text`, or `pocket`. They are repeated, in another order each time, while steps last."""
    layer: Annotated[int, Field(ge=0)] = 1
    num_latents: Annotated[int, Field(ge=1)] = 1536
    num_active: Annotated[int, Field(ge=1)] = 8
    """Latents per token that stay, in the mean (k of TopK)."""
    steps: Annotated[int, Field(ge=1)] = 2000
    batch_size: Annotated[int, Field(ge=1)] = 512
    """Tokens per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    dead_after: Annotated[int, Field(ge=1)] = 100
    """Steps without firing after which a latent is trained on what the others leave over."""
    hold_out_every: Annotated[int, Field(ge=2)] = 20
    """Every so many-th text is not trained on but measured on, at the end."""
    held_out_tokens: Annotated[int, Field(ge=2)] = 100_000
    """Tokens that are measured on, at most."""
    max_lost_share: Fraction = 0.01
    """The run fails if a larger share of the tokens has activations that are not finite in the stream's dtype."""
    stream: StreamConfig = StreamConfig()
    actors: ActorConfig = ActorConfig()
    trainer: CoderTrainerConfig = CoderTrainerConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _latents_fit(self) -> Self:
        if self.num_active > self.num_latents:
            raise ValueError(f"num_active is {self.num_active}, expected at most num_latents {self.num_latents}")
        if self.num_latents > (rows := self.stream.buffer_batches * self.batch_size):
            raise ValueError(
                f"num_latents is {self.num_latents}, but latents begin as tokens of the first buffer, which holds"
                f" {rows} (stream.buffer_batches x batch_size): expected at least as many"
            )
        if self.target.device_map != "none" and not self.actors.num_gpus:
            raise ValueError("target.device_map spreads layers over the GPUs of an actor: set actors.num_gpus, found 0")
        return self


class TrainSaeConfig(TrainCoderConfig):
    """jobs/train_sae.py: an SAE of one place of the target."""

    output: str = "runs/sae"
    place: Literal["residual", "residual_mid", "mlp_input", "mlp_output", "mlp_added"] = "residual"
    """What it reads in the layer: its output, the residual stream before the MLP, what the MLP reads, returns, adds."""
    architecture: Literal["batchtopk", "topk", "jumprelu", "standard"] = "batchtopk"
    """As sae-lens calls it; batchtopk becomes a jumprelu SAE."""
    sparsity: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the penalty on latents (jumprelu: on their number; standard: on their sum); the others have none."""


class TrainTranscoderConfig(TrainCoderConfig):
    """jobs/train_transcoder.py: a skip transcoder of one MLP of the target."""

    output: str = "runs/transcoder"
    num_latents: Annotated[int, Field(ge=1)] = 1024


class VectorKindsConfig(Config):
    """How many vectors of each kind, and where they are read."""

    activations: Annotated[int, Field(ge=0)] = 200
    """Residual vectors of single tokens of held-out texts, per layer."""
    differences: Annotated[int, Field(ge=0)] = 200
    """Differences between the residual vectors of two prompts that differ in their subject, per layer."""
    position: Literal["subject", "last"] = "subject"
    """Of a prompt pair: the last token of either subject, or of either prompt."""


class CollectVectorsConfig(Config):
    """jobs/collect_vectors.py: vectors that are no SAE features, with the texts that lie most in their direction."""

    output: str = "runs/vectors"
    target: ModelConfig = ModelConfig()
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1,)
    kinds: VectorKindsConfig = VectorKindsConfig()
    texts: SourceConfig = SourceConfig()
    """Plain texts: those of the test split give activations, all others the exemplars."""
    facts: SourceConfig = SourceConfig()
    """Facts that prompt pairs are made of, as for activation_patching."""
    split: SplitConfig = SplitConfig()
    window: Annotated[int, Field(ge=2)] = 32
    """Tokens of one exemplar."""
    top: Annotated[int, Field(ge=1)] = 20
    """Exemplars per vector and split in which its projection is largest; at most one per text."""
    quantiles: Annotated[int, Field(ge=1, le=100)] = 4
    """Ranges that further windows drawn from all are parted into by their largest projection, those above zero."""
    per_quantile: Annotated[int, Field(ge=0)] = 5
    """Windows of each range, per split."""
    random: Annotated[int, Field(ge=0)] = 50
    """Windows drawn from all, per split, the same for every vector of a layer; scores by simulation need some."""
    center: bool = True
    """Take the corpus' mean vector off whatever is projected: it is a large part of all residual vectors, and would be
    most of what two of them share."""
    texts_per_block: Annotated[int, Field(ge=1)] = 256
    """Texts of one part file: the unit that is written, skipped and redone."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """Longer texts are cut into pieces of so many tokens, each with its own begin-of-text token."""
    max_lost_share: Fraction = 0.01
    """The run fails if a larger share of the tokens, or of the vectors, is not finite."""
    actors: ActorConfig = ActorConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.kinds.activations + self.kinds.differences:
            raise ValueError("kinds asks for no vectors: expected activations or differences above 0")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers has one twice: {list(self.layers)}")
        return self
