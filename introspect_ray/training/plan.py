"""What a training run needs, before it runs: memory of one worker, arithmetic, time. No weights are read; no Ray here.

config + model's config.json --skeleton (meta device)--> parameters by kind
                             --footprint (traced)------> activations
datasets, or assumed lengths --workload----------------> tokens of a step
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from introspect_ray.config import TrainConfig, resolved
from introspect_ray.errors import UserError
from introspect_ray.explainer.projections import resolve_kind
from introspect_ray.models.shapes import model_shape
from introspect_ray.training.census import Census, arithmetic_of, count
from introspect_ray.training.footprint import Batch, Footprint, Projecting, footprint
from introspect_ray.training.hardware import GPUS
from introspect_ray.training.needs import GIB, Memory, Pace, host_bytes, memory_of, pace_of
from introspect_ray.training.workload import Workload, find_workload, largest_batch

MOST_WORKERS = 256


@dataclass(frozen=True)
class Plan:
    """A run's needs, and whether they can be met."""

    config: TrainConfig
    census: Census
    workload: Workload
    batch: Batch
    memory: Memory
    host_bytes: int
    """Of one worker while it loads."""
    pace: Pace

    @property
    def has_gpus(self) -> bool:
        return self.config.trainer.gpus_per_worker > 0

    @property
    def usable_bytes(self) -> float | None:
        """Of one GPU, or of a worker's share of it; None where the workers have none."""
        plan, share = self.config.plan, min(1.0, self.config.trainer.gpus_per_worker)
        return GPUS[plan.gpu].memory_gib * GIB * plan.usable_share * share if self.has_gpus else None

    @property
    def fits(self) -> bool:
        return self.usable_bytes is None or self.memory.peak <= self.usable_bytes

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.config.trainer.num_workers / self.config.plan.gpus_per_node)


def plan_run(config: TrainConfig, workload: Workload | None = None) -> Plan:
    """Work out the plan.

    Args:
        workload: the run's examples, where they are known already.

    Raises:
        UserError: the model has no shape that is known, or a dataset is damaged.
    """
    shape = model_shape(config.explainer.model)
    workload = workload or find_workload(config)
    projecting = _projecting(config, shape, workload)
    arithmetic = arithmetic_of(config, shape)
    census = count(shape, arithmetic)
    projection = projecting.num_weights(shape.hidden_size)
    batch = largest_batch(workload, config, getattr(shape, "sliding_window", None))
    traced = footprint(shape, arithmetic, projecting, batch)
    memory = memory_of(config, shape, census, projection, traced, workload)
    return Plan(
        config=config,
        census=census,
        workload=workload,
        batch=batch,
        memory=memory,
        host_bytes=host_bytes(config, shape, census, memory),
        pace=pace_of(config, shape, census, projection, workload, batch),
    )


def _projecting(config: TrainConfig, shape: PretrainedConfig, workload: Workload) -> Projecting:
    is_linear = resolve_kind(config.explainer, workload.target_width, shape.hidden_size) == "linear"
    num_layers = workload.target_layers if is_linear else 0
    return Projecting(num_layers, workload.target_width, workload.layers_per_vector)


def _fits_between_steps(config: TrainConfig, workload: Workload, usable_bytes: float) -> bool:
    """Whether a worker holds the run as long as it computes nothing: quick to say, because nothing is traced."""
    shape = model_shape(config.explainer.model)
    census = count(shape, arithmetic_of(config, shape))
    projection = _projecting(config, shape, workload).num_weights(shape.hidden_size)
    return memory_of(config, shape, census, projection, Footprint(0, 0, 0, 0), workload).peak <= usable_bytes


def check_plan(plan: Plan) -> None:
    """Raise UserError for a plan that does not fit, in one line that says which settings would."""
    if plan.fits:
        return
    assert plan.usable_bytes is not None, "without a GPU every plan fits"
    needed, there = plan.memory.peak / GIB, plan.usable_bytes / GIB
    line = f"the plan does not fit: a worker needs {needed:.1f} GiB, of a {plan.config.plan.gpu} {there:.1f} are usable"
    for settings in remedies(plan):
        config = changed(plan.config, settings)
        if not _fits_between_steps(config, plan.workload, plan.usable_bytes):
            continue
        other = plan_run(config, plan.workload)
        if other.fits:
            words = " and ".join(f"{name} {str(value).lower()}" for name, value in settings.items())
            raise UserError(f"{line}; it would fit with {words} ({other.memory.peak / GIB:.1f} GiB)")
    raise UserError(f"{line}, and no sharding, adapter or batch of up to {MOST_WORKERS} workers makes it fit")


def remedies(plan: Plan) -> Iterator[dict[str, Any]]:
    """Settings that need less memory, by their full names: first what keeps the result, then what trains less, then
    what needs more workers."""
    trainer = plan.config.trainer
    saving: list[dict[str, Any]] = [{}]
    if not trainer.activation_checkpointing:
        saving.append({"trainer.activation_checkpointing": True})
    tokens = trainer.micro_batch_tokens // 2
    while tokens >= max(plan.workload.longest, trainer.micro_batch_tokens // 16):
        saving.append(saving[-1] | {"trainer.micro_batch_tokens": tokens})
        tokens //= 2
    sharding: list[dict[str, Any]] = [{}]
    if trainer.sharding == "none":
        if trainer.num_workers > 1:
            sharding.append({"trainer.sharding": "fsdp2"})
        spread = {"trainer.sharding": "fsdp2"}
    else:
        spread = {}
    lighter = {"full": ("full", "lora", "qlora"), "lora": ("lora", "qlora"), "qlora": ("qlora",)}[plan.config.method]
    for method in lighter:
        other = {} if method == plan.config.method else {"method": method}
        for shards in sharding:
            for saved in saving:
                if other or shards or saved:
                    yield other | shards | saved
    workers = 2 * trainer.num_workers
    while workers <= MOST_WORKERS:
        for saved in saving:
            yield spread | {"trainer.num_workers": workers} | saved
        workers *= 2


def changed(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The config with other values under the full names given."""
    tree = resolved(config)
    for name, value in settings.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    return type(config).model_validate(tree)
