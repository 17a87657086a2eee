"""Serving: which models answer, how many processes hold them, and what a request may ask for."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config
from introspect_ray.config.resources import ModelConfig
from introspect_ray.config.simulators import SimulatorConfig
from introspect_ray.config.tasks import FeatureDescriptionConfig, InputAblationConfig, TaskName

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
ServedName = Annotated[str, Field(pattern=NAME_PATTERN)]
"""What a request calls a model; never a path."""
TOKEN_VARIABLE = "INTROSPECT_RAY_TOKEN"


class ReplicaConfig(Config):
    """The processes (replicas) of one deployment: their number, what each takes, and what may wait for them."""

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """Serve starts and stops replicas between the two by the number of requests under way."""
    target_ongoing: Annotated[float, Field(gt=0)] = 8
    """Requests under way per replica that autoscaling aims at."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one replica; a fraction shares a GPU with other replicas."""
    max_ongoing: Annotated[int, Field(ge=1)] = 32
    """Requests that one replica works on or holds for its next batch."""
    max_queued: Annotated[int, Field(ge=1)] = 64
    """Requests that wait for a replica; the next one is refused at once (503, Retry-After)."""
    surge_percent: Annotated[int, Field(ge=0, le=100)] = 100
    """Replicas that an update may start beside the old ones; 0, where there is no room, ends old ones first."""
    health_check_period_s: Annotated[float, Field(gt=0)] = 2
    health_check_timeout_s: Annotated[float, Field(gt=0)] = 30

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, expected at most max_replicas {self.max_replicas}")
        return self


class ServedCoder(Config):
    """An SAE or transcoder of a target."""

    name: ServedName = "sae"
    path: str = "pocket:sae"


class ServedTarget(Config):
    """A target, and the coders whose latents may be asked about."""

    name: ServedName = "target_a"
    model: ModelConfig = ModelConfig()
    coders: tuple[ServedCoder, ...] = ()
    replicas: ReplicaConfig = ReplicaConfig()


class ServedExplainer(Config):
    """A trained explainer, what it was trained for, and the layout of its queries."""

    name: ServedName = "explainer"
    folder: str = "runs/explainer"
    """Folder of jobs/train_explainer.py or a published explainer."""
    target: ServedName = "target_a"
    """Name of the served target that it explains."""
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = ("feature_description",)
    features: FeatureDescriptionConfig = FeatureDescriptionConfig()
    """Layout of the question about a vector, as in training."""
    questions: InputAblationConfig = InputAblationConfig()
    """Layout of the questions of input_ablation: a span that has the wording of a hint is asked about as a hint."""


class ServedSimulator(Config):
    """A simulator, and the target whose tokens it gives levels for."""

    name: ServedName = "simulator"
    kind: Literal["model", "lexicon"] = "model"
    """`lexicon` reads descriptions of the pocket world exactly; it knows that world's plain texts and no others."""
    simulator: SimulatorConfig = SimulatorConfig()
    target: ServedName = "target_a"
    replicas: ReplicaConfig = ReplicaConfig()


class BatchingConfig(Config):
    """Dynamic batching: requests that come close together, or while the models run, are one batch."""

    max_size: Annotated[int, Field(ge=1)] = 16
    """Items in one batch at most; 1 runs requests one by one. A request of more items is a batch by itself."""
    wait_s: Annotated[float, Field(ge=0)] = 0.01
    """Time that a batch which is not full waits for more, once the models are free."""


class LimitsConfig(Config):
    """What one request may ask for; beyond, it is refused before a model sees it."""

    body_bytes: Annotated[int, Field(ge=1)] = 4_000_000
    """Size of a request's body, checked before it is parsed."""
    body_s: Annotated[float, Field(gt=0)] = 10
    """Time in which a request's body must have come."""
    text_characters: Annotated[int, Field(ge=1)] = 20_000
    text_tokens: Annotated[int, Field(ge=1)] = 4096
    """The target's tokens of one text, begin-of-text included."""
    items: Annotated[int, Field(ge=1)] = 64
    """Items of one request."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    vector_entries: Annotated[int, Field(ge=1)] = 4_000_000
    """Numbers in the vectors of one answer (layers x positions x width)."""
    seconds: Annotated[float, Field(gt=0)] = 60
    """Time for one request, after which it is answered with 503."""
    in_flight: Annotated[int, Field(ge=1)] = 256
    """Requests under way in one gateway; the next one is refused at once (503, Retry-After)."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Times that a call is made again whose replica died under it; all calls are safe to repeat."""
    drain_s: Annotated[float, Field(ge=0)] = 30
    """Time that requests under way are given when a replica or the whole service stops."""


class AuthConfig(Config):
    """Where the bearer token comes from; the token itself is never part of a config."""

    token_variable: str = TOKEN_VARIABLE
    """Environment variable that holds the token."""
    token_file: str | None = None
    """File that holds the token, instead of the variable."""


class ServeConfig(Config):
    """jobs/serve.py: targets, explainers and simulators on Ray Serve, behind one HTTP API."""

    host: str = "127.0.0.1"
    """Address to listen on; without a token only a loopback one is allowed."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one."""
    quickstart: str | None = "runs/quickstart"
    """Folder of jobs/quickstart.py; the explainers that are finished there are served too. None serves none of them."""
    targets: tuple[ServedTarget, ...] = (
        ServedTarget(coders=(ServedCoder(), ServedCoder(name="transcoder", path="pocket:transcoder"))),
        ServedTarget(name="target_b", model=ModelConfig(path="pocket:target_b")),
    )
    explainers: tuple[ServedExplainer, ...] = ()
    explainer_replicas: ReplicaConfig = ReplicaConfig()
    """All explainers are held by one deployment; adapters of one base share its weights."""
    explainers_per_replica: Annotated[int, Field(ge=1)] = 4
    """Explainers that one replica holds at a time; the one unused for longest makes room."""
    simulators: tuple[ServedSimulator, ...] = (ServedSimulator(name="lexicon", kind="lexicon"),)
    gateway: ReplicaConfig = ReplicaConfig(max_ongoing=512, max_queued=512, target_ongoing=128)
    batching: BatchingConfig = BatchingConfig()
    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    log_texts: bool = False
    """Write the bodies of requests into the log."""

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty, expected at least one")
        coders = [coder.name for target in self.targets for coder in target.coders]
        targets = [target.name for target in self.targets]
        explainers, simulators = ([one.name for one in group] for group in (self.explainers, self.simulators))
        for kind, names in (
            ("targets", targets),
            ("coders", coders),
            ("explainers", explainers),
            ("simulators", simulators),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{kind} must have different names, found {twice[0]!r} twice")
        wanted = [(one.name, one.target) for one in self.explainers]
        wanted += [(one.name, one.target) for one in self.simulators]
        for name, target in wanted:
            if target not in targets:
                raise ValueError(f"{name} names target {target!r}, expected one of {', '.join(targets)}")
        return self
