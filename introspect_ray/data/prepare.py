"""Everything about a generation run that needs neither Ray nor a model: checks, source rows, plan, shards, resumption.

Output folder:  config.json (first)  plan/  shards/  rejected.jsonl  [selection.parquet]  dataset.json (last)
"""

from __future__ import annotations

import hashlib
import json
import logging
import typing
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from introspect_ray.config import GenerateConfig, TaskName, resolved
from introspect_ray.data.claim import Claim
from introspect_ray.data.identity import folder_digest, identify_target
from introspect_ray.data.manifest import SCHEMA_VERSION, SourceAccount, TargetIdentity
from introspect_ray.data.shards import ShardInfo, ShardOrder, finished_shard, write_items
from introspect_ray.data.sources import Source, load_source
from introspect_ray.data.splits import SPLITS, splitter
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.features.card import coder_folder
from introspect_ray.features.sae import check_sae
from introspect_ray.tasks.base import Plan, Task, stable_id

logger = logging.getLogger(__name__)
_READERS = 4
"""Shards of earlier runs that are read at once."""


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check, and which of its shards are left to do."""

    config: GenerateConfig
    task: Task
    folder: Folder
    target: TargetIdentity
    source: Source
    plan: Plan
    rejected: list[tuple[int, str]]
    """(row, reason) of all source rows that gave no work item, in file order."""
    inputs: dict[str, str]
    """Digests of what the records follow from beside the config, by what it is."""

    @cached_property
    def run_key(self) -> str:
        """16 hex digits, equal for runs that write the same records into the same shards."""
        return stable_id(SCHEMA_VERSION, relevant(self.config), self.inputs)

    @property
    def claim(self) -> Claim:
        """What the output folder is to be of."""
        return Claim(self.folder, "dataset", self.config, self.run_key, self.inputs, relevant)

    @cached_property
    def orders(self) -> list[ShardOrder]:
        count = -(-len(self.plan.items) // self.config.items_per_shard)
        return [ShardOrder(index, self.run_key) for index in range(count)]

    def items(self, order: ShardOrder) -> list[dict[str, Any]]:
        """Work items of one shard."""
        size = self.config.items_per_shard
        return self.plan.items[order.index * size : (order.index + 1) * size]

    def num_items(self, shards: Collection[int]) -> int:
        """Work items of some shards, by index; all shards but the last are full."""
        size, last = self.config.items_per_shard, len(self.orders) - 1
        return len(shards) * size - (len(self.orders) * size - len(self.plan.items) if last in shards else 0)

    def finished(self) -> dict[int, ShardInfo]:
        """Shards that are done already and undamaged, by index. Reads them all, a few at a time."""
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(partial(finished_shard, self.folder), self.orders)
            return {
                order.index: info
                for order, info in zip(self.orders, found, strict=True)
                if info is not None and info.num_rows >= len(self.items(order))
            }

    @property
    def account(self) -> SourceAccount:
        """What became of the source rows."""
        reasons = Counter(reason for _, reason in self.rejected)
        used = self.source.num_rows - len(self.rejected)
        assert used + sum(reasons.values()) == self.source.num_rows
        return SourceAccount(
            name=self.source.name,
            format=self.source.format,
            rows=self.source.num_rows,
            used=used,
            rejected=dict(sorted(reasons.items())),
        )


def prepare(config: GenerateConfig, task: Task) -> Prepared:
    """Check a run from end to end and plan it. Raises UserError; reads no weights and writes nothing."""
    target = identify_target(config.target)
    _check_blocks(config, target)
    source = load_source(config.source, task.name, task.source_formats)
    needs_sae = config.task == "feature_description" and any(row.get("vector") is None for row in source.rows)
    if needs_sae:
        _check_sae(config, target)
    _check_layers(source, target)
    plan = task.plan(source.rows, config, splitter(config.split))
    rejected = _account(source, plan, task)
    inputs = {
        f"target {target.path}": stable_id(target.model_dump()),
        f"source {source.name}": plan_digest(plan),
    }
    if needs_sae:
        inputs[f"SAE {config.feature_description.sae}"] = folder_digest(coder_folder(config.feature_description.sae))
    prepared = Prepared(config, task, Folder(config.output), target, source, plan, rejected, inputs)
    prepared.claim.check()
    return prepared


def begin(prepared: Prepared, orders: list[ShardOrder]) -> None:
    """Claim the output folder for this run and write the work items of the shards that are to be done."""
    prepared.claim.write()
    for order in orders:
        write_items(prepared.folder, order, prepared.items(order))


def relevant(config: GenerateConfig) -> dict[str, Any]:
    """The resolved config without what cannot change the records: where and how it runs, and other tasks' sections."""
    aside = {"actors", "output", "max_failed_share", "max_error_share", *typing.get_args(TaskName)} - {config.task}
    return {name: value for name, value in resolved(config).items() if name not in aside}


def plan_digest(plan: Plan) -> str:
    """32 hex digits over all work items in order: changes with the source's content."""
    digest = hashlib.blake2b(digest_size=16)
    for item in plan.items:
        digest.update(json.dumps(item, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _check_blocks(config: GenerateConfig, target: TargetIdentity) -> None:
    blocks = config.activation_patching.num_blocks
    if config.task == "activation_patching" and blocks > target.num_layers:
        raise UserError(
            f"activation_patching.num_blocks is {blocks}, but {target.path} has {target.num_layers} layers:"
            f" expected 1 to {target.num_layers}"
        )


def _check_sae(config: GenerateConfig, target: TargetIdentity) -> None:
    path = config.feature_description.sae
    card = check_sae(path, target.width)
    if card.layer >= target.num_layers:
        raise UserError(
            f"SAE path '{path}' is of layer {card.layer}, but {target.path} has {target.num_layers} layers:"
            f" expected 0 to {target.num_layers - 1}"
        )
    if note := card.other_model(target.path):
        logger.warning("SAE path '%s': %s", path, note)


def _check_layers(source: Source, target: TargetIdentity) -> None:
    for row in source.rows:
        if row.get("layer", 0) >= target.num_layers:
            raise UserError(
                f"source {source.name}, row {row['row']} names layer {row['layer']}, but {target.path} has"
                f" {target.num_layers} layers: expected 0 to {target.num_layers - 1}"
            )


# --- plan -------------------------------------------------------------------------------------------------------


def _account(source: Source, plan: Plan, task: Task) -> list[tuple[int, str]]:
    """(row, reason) of every source row without a work item; asserts that no row is lost or counted twice."""
    usable = {row["row"] for row in source.rows}
    unplanned = [row for row, _ in plan.rejected]
    assert plan.num_source_rows == len(source.rows), "a plan accounts for every row it was given"
    assert len(set(unplanned)) == len(unplanned), "a plan rejects a row at most once"
    assert usable.issuperset(unplanned), "a plan rejects rows it was given"
    ids = [item["item_id"] for item in plan.items]
    assert len(set(ids)) == len(ids), "item ids are unique"
    assert all(item["split"] in SPLITS for item in plan.items)
    rejected = sorted([*source.rejected, *plan.rejected])
    if not plan.items:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in Counter(reason for _, reason in rejected).items())
        raise UserError(
            f"source {source.name} gives task {task.name} nothing to do: of {source.num_rows} rows none is usable"
            f" ({reasons})"
        )
    return rejected
