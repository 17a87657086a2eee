"""The job that scores explainers."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from introspect_ray.config.base import Config
from introspect_ray.config.descriptions import JudgeConfig
from introspect_ray.config.resources import ActorConfig

Method = Literal[
    "explainer",
    "majority",
    "nearest_neighbor",
    "zero_shot",
    "no_vector",
    "zero_vector",
    "swapped_vector",
    "self_scales",
]


class EvaluationRun(Config):
    """One dataset's test split, answered by the explainer trained for it."""

    dataset: str = "runs/dataset"
    explainer: str = "runs/explainer"
    name: Annotated[str, Field(pattern=r"^\w[\w .+()-]{0,39}$")] | None = None
    """What scores and report call the explainer. Several explainers of one dataset stand side by side; the first is
    the one that controls and breakdowns are of, the others need names."""


class EvaluateConfig(Config):
    """jobs/evaluate_explainer.py: answers, baselines, controls, scores.json and report.html."""

    runs: tuple[EvaluationRun, ...] = (EvaluationRun(),)
    output: str = "runs/evaluation"
    methods: tuple[Method, ...] = get_args(Method)
    """Methods that do not apply to a task (a vector control where no vector exists) are left out there."""
    scales: tuple[float, ...] = (1.0, 5.0, 10.0, 25.0, 50.0)
    """Norms at which `self_scales` asks the untrained model (P1: SelfIE, best of these)."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Score at most so many records per dataset, spread evenly over the groups; none scores the whole split."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    num_browsable: Annotated[int, Field(ge=0)] = 200
    """Examples per task that the report lets a reader browse."""
    judge: JudgeConfig | None = None
    """A language model that rates descriptions of task 1 against the labels; none asks none."""
    actors: ActorConfig = ActorConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _names_tell_apart(self) -> Self:
        if not self.runs:
            raise ValueError("runs is empty, expected at least one")
        seen: dict[str, list[str | None]] = {}
        for run in self.runs:
            others = seen.setdefault(run.dataset, [])
            if run.name in get_args(Method):
                raise ValueError(f"runs: name {run.name!r} is that of a method: choose another")
            if others and run.name is None:
                raise ValueError(f"runs: dataset {run.dataset} has several explainers: name each after the first")
            if run.name in others and run.name is not None:
                raise ValueError(f"runs: dataset {run.dataset} has two explainers with the name {run.name!r}")
            others.append(run.name)
        return self
