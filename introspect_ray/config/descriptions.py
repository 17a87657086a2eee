"""Language models that are asked in words, and the jobs that write and convert descriptions of latents."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ActorConfig, ModelConfig
from introspect_ray.config.tasks import FeatureDescriptionConfig

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class EndpointConfig(Config):
    """An OpenAI-compatible `/v1/chat/completions` endpoint."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")] = "http://127.0.0.1:8000/v1"
    """Base URL, with its version: `/chat/completions` is added."""
    model: str = "default"
    """Model name that the endpoint is asked for."""
    api_key_variable: EnvironmentName | None = None
    """Environment variable that holds the API key; the key itself is never written anywhere. None sends no key."""
    concurrency: Annotated[int, Field(ge=1)] = 16
    """Calls under way at once."""
    attempts: Annotated[int, Field(ge=1)] = 5
    """Tries of one call, where the endpoint is busy, broken or not reached."""
    timeout_s: Annotated[float, Field(gt=0)] = 120
    """Longest one try may take, the whole answer included."""
    first_wait_s: Annotated[float, Field(ge=0)] = 1.0
    """Wait before the second try; doubled before each further one, with a random share of it less."""
    longest_wait_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait before a try; a call that the endpoint asks to come back later than that has failed."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the longest answer; newer models of OpenAI want the second."""
    input_price: Annotated[float, Field(ge=0)] = 0
    """Price of a million tokens that are sent, in the currency of `max_cost`."""
    output_price: Annotated[float, Field(ge=0)] = 0
    """Price of a million tokens that are answered."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """No call is made that could cost more than what is left of this; none sets no limit."""

    @model_validator(mode="after")
    def _cap_has_prices(self) -> Self:
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise ValueError("max_cost needs input_price and output_price, found 0 for both")
        return self


class LocalChatConfig(Config):
    """A causal language model that answers in this process or on Ray actors."""

    model: ModelConfig = ModelConfig()
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Conversations that one actor answers at once."""


class ChatConfig(Config):
    """A language model that is asked in words."""

    kind: Literal["local", "endpoint"] = "local"
    local: LocalChatConfig = LocalChatConfig()
    endpoint: EndpointConfig = EndpointConfig()
    max_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest answer; several candidates of one latent need more."""

    @property
    def name(self) -> str:
        """What descriptions by this model are called after `llm:`."""
        return self.endpoint.model if self.kind == "endpoint" else self.local.model.path


class PromptConfig(Config):
    """What a language model is shown of a latent."""

    num_top: Annotated[int, Field(ge=1)] = 8
    """Windows with the largest activations."""
    num_per_quantile: Annotated[int, Field(ge=0)] = 1
    """Windows from each range of its activations."""
    max_window_tokens: Annotated[int, Field(ge=1)] = 48
    """Tokens around the largest activation that are shown of a window."""
    mark_share: Fraction = 0.3
    """Tokens are marked whose activation is above this share of the latent's maximum (delphi: 0.3); in each window the
    largest is marked at least."""
    max_words: Annotated[int, Field(ge=1)] = 20
    """Longest description that is asked for."""


class DescribeConfig(Config):
    """jobs/describe_latents.py: candidate descriptions of latents from exemplars, an explainer, or the lexicon."""

    method: Literal["chat", "explainer", "lexicon"] = "lexicon"
    """`chat`: a language model sees exemplars; `explainer`: a trained explainer is asked about the decoder row;
    `lexicon`: the labels that ship with the pocket SAE and transcoder."""
    output: str = "runs/descriptions"
    """Folder for descriptions.jsonl, failed.jsonl and summary.json (any fsspec URL)."""
    exemplars: str = "runs/exemplars"
    """Folder that collect_exemplars.py wrote; what `chat` shows, and with `limit` what is described."""
    features: FeatureDescriptionConfig = FeatureDescriptionConfig()
    """The coder whose latents are described, and the explainer's question."""
    explainer: str = "runs/explainer"
    vectors: str | None = None
    """Folder that collect_vectors.py wrote: the explainer is asked about its vectors in place of decoder rows, and a
    vector's number is that of its row."""
    chat: ChatConfig = ChatConfig()
    prompt: PromptConfig = PromptConfig()
    num_candidates: Annotated[int, Field(ge=1)] = 1
    """Answers that `chat` is asked for per latent; equal ones count once."""
    latents: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Latents to describe; none describes all that there are."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Describe at most so many, the first by number."""
    latents_per_shard: Annotated[int, Field(ge=1)] = 128
    """Latents that are written, skipped and redone together."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Queries that an explainer answers at once."""
    retry_failed: bool = False
    """Ask again about latents that failed in an earlier run; those that a cost cap left out are asked anyway."""
    max_failed_share: Fraction = 0.2
    """The run fails if more of its latents have no description."""
    actors: ActorConfig = ActorConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _candidates_differ(self) -> Self:
        if self.method == "chat" and self.num_candidates > 1 and not self.chat.temperature:
            raise ValueError(f"num_candidates {self.num_candidates} needs chat.temperature above 0, found 0")
        return self

    @model_validator(mode="after")
    def _vectors_are_for_explainers(self) -> Self:
        if self.vectors is not None and self.method != "explainer":
            raise ValueError(f"vectors are for method explainer, found {self.method}")
        return self


DescriptionFormat = Literal["descriptions", "neuronpedia", "delphi", "lexicon"]


class ConvertDescriptionsConfig(Config):
    """jobs/convert_descriptions.py: descriptions from any of the known layouts to any other."""

    source: str = "pocket:sae"
    """descriptions.jsonl or a folder with it; a folder of Neuronpedia's batches or delphi's results; a coder with
    labels.jsonl, such as `pocket:sae` (any fsspec URL)."""
    source_format: DescriptionFormat = "lexicon"
    output: str = "runs/descriptions"
    """A new folder (any fsspec URL)."""
    output_format: Literal["descriptions", "neuronpedia", "delphi"] = "descriptions"
    model_id: str = "pocket"
    """Neuronpedia's name of the target, in lower case."""
    source_set: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "introspect-ray"
    """Neuronpedia's name of the coders: a source is called `LAYER-` and this."""
    author_id: str = "introspect-ray"
    """Neuronpedia's id of the user whom the explanations belong to."""
    delphi_module: Annotated[str, Field(pattern=r"^[^{}]*\{layer\}[^{}]*$")] = "layers.{layer}"
    """delphi's name of what the coder is of."""
    delphi_best_by: str | None = None
    """Of several candidates of a latent delphi's layout holds one: the best by this score, or none: the first."""
    delphi_simulation: str = "simulation/correlation"
    """The score that is written as delphi's correlation of simulation, as read from delphi; of score_descriptions.py it
    is `correlation`."""


class JudgeConfig(Config):
    """A language model that says how well an explanation fits a label, from 1 to 5."""

    chat: ChatConfig = ChatConfig(max_tokens=8)
    max_labels: Annotated[int, Field(ge=1)] = 8
    """Labels of one latent that are judged; the best counts."""


class JudgeDescriptionsConfig(Config):
    """jobs/judge_descriptions.py: scores of descriptions that a language model, or embeddings, give."""

    exemplars: str = "runs/exemplars"
    """Folder that collect_exemplars.py wrote."""
    descriptions: tuple[str, ...] = ("runs/descriptions",)
    """Files or folders of descriptions; a latent may have several candidates, of several sources."""
    output: str = "runs/judgements"
    methods: Annotated[tuple[Literal["detection", "fuzz", "judge", "embedding"], ...], Field(min_length=1)] = (
        "detection",
        "fuzz",
    )
    """`detection`, `fuzz`: can the model tell the latent's held-out windows from others; `judge`, `embedding`: how like
    a label is the description."""
    labels: tuple[str, ...] = ()
    """Files or folders of descriptions that count as labels; `judge` and `embedding` need them."""
    chat: ChatConfig = ChatConfig(max_tokens=8)
    embedder: ModelConfig = ModelConfig()
    """Model whose hidden states `embedding` compares."""
    held_out: Literal["validation", "test"] = "test"
    """Split of the texts that windows are of."""
    windows: Annotated[int, Field(ge=1)] = 10
    """Windows in which the latent is active that are judged, and as many in which it is not."""
    max_window_tokens: Annotated[int, Field(ge=1)] = 64
    mark_share: Fraction = 0.3
    """`fuzz` marks tokens above this share of the latent's maximum (delphi: 0.3)."""
    max_labels: Annotated[int, Field(ge=1)] = 8
    """Labels of one latent that a description is compared with; the best counts."""
    controls: tuple[Literal["shuffled", "empty"], ...] = ("shuffled", "empty")
    """What is scored beside the descriptions: another latent's, and none."""
    max_latents: Annotated[int, Field(ge=1)] | None = None
    """Score at most so many latents, drawn by a hash."""
    latents_per_shard: Annotated[int, Field(ge=1)] = 64
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    max_failed_share: Fraction = 0.2
    """The run fails if a larger share of the calls gave no answer that can be used."""
    actors: ActorConfig = ActorConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _labels_where_needed(self) -> Self:
        compared = [name for name in ("judge", "embedding") if name in self.methods]
        if compared and not self.labels:
            raise ValueError(f"method {compared[0]} needs labels, found none")
        return self
