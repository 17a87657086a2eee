"""The check of a running cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from introspect_ray.config.base import Config
from introspect_ray.config.resources import ActorConfig
from introspect_ray.config.training import TrainerConfig

CheckedJob = Literal[
    "generate_dataset",
    "train_explainer",
    "evaluate_explainer",
    "rewrite_transformer",
    "train_8b_explainer",
    "train_70b_explainer",
]


class CheckConfig(Config):
    """cluster/check.py: what a running cluster offers, and what would stop each job on it."""

    jobs: tuple[CheckedJob, ...] = ("generate_dataset", "train_explainer", "evaluate_explainer", "rewrite_transformer")
    """Jobs that must be able to run for the check to pass; the others are only reported."""
    storage: tuple[str, ...] = ()
    """Folders (any fsspec URL) that every node must be able to write and to read."""
    models: tuple[str, ...] = ()
    """Models (folder, hub id, or pocket:NAME) that every node must be able to open; their weights are not loaded."""
    actors: ActorConfig = ActorConfig()
    """What generate_dataset.py, evaluate_explainer.py and, of each kind, rewrite_transformer.py will be given."""
    trainer: TrainerConfig = TrainerConfig()
    """What train_explainer.py will be given; the jobs of 8 B and 70 B bring their own."""
    transfer_mb: Annotated[int, Field(ge=0)] = 64
    """Size of what each node fetches from its neighbour to measure bandwidth, in 10^6 bytes; 0 measures none."""
    scale_up_s: Annotated[int, Field(ge=0)] = 0
    """Ask the autoscaler for what `jobs` need and wait so many seconds for it; 0 takes the cluster as it is."""
    timeout_s: Annotated[int, Field(ge=1)] = 300
    """Longest time that one node may take to answer."""
