"""Generating a dataset on Ray Data.

    driver  prepare (no Ray, no model) -> claim folder, write plan/ -> orders of unfinished shards
              | one row per shard
    actors  ShardWorker x min..max: load target once; per order: write_shard -> shards/shard-k.parquet (renamed)
              | one summary row per shard, streamed back for progress
    driver  all shards done -> counts, selection -> dataset.json

A shard is written whole or not at all, and by anyone who is asked: a dead actor, a dead driver and a repeated order
all end in the same file. An item that kills its process every time ends as a failed record, see attempts.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

import ray

from introspect_ray.config import GenerateConfig
from introspect_ray.data.attempts import counted_loading
from introspect_ray.data.cluster import connect
from introspect_ray.data.dataset import holds_its_records
from introspect_ray.data.finish import finish
from introspect_ray.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from introspect_ray.data.pool import OrderWorker, Pool, check_resources, run_orders
from introspect_ray.data.prepare import Prepared, begin, prepare
from introspect_ray.data.shards import ShardInfo, ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.data.writer import write_shard
from introspect_ray.errors import UserError
from introspect_ray.interventions.target import Target
from introspect_ray.tasks.base import OK, Task
from introspect_ray.tasks.registry import get_task


@dataclass(frozen=True)
class Progress:
    """How far a run is: shards and work items, those of earlier runs included, and records of this run."""

    shards_done: int
    num_shards: int
    items_done: int
    num_items: int
    records_written: int


@dataclass(frozen=True)
class Summary:
    """What a run left in its output folder."""

    output: str
    manifest: Manifest
    shards_written: int
    """By this run; the others were there."""

    @property
    def line(self) -> str:
        """One line for people."""
        if not self.shards_written:
            start = f"{self.output} was already complete"
        else:
            start = f"wrote {self.output} ({self.shards_written} of {len(self.manifest.shards)} shards in this run)"
        source = self.manifest.source
        selected = ", ".join(f"{count} {split}" for split, count in self.manifest.selected.items())
        rejected = f" and {source.rows - source.used} rejected" if source.rows > source.used else ""
        records = f"{self.manifest.num_records} records from {source.used} source rows{rejected}{self._failures}"
        slow = "".join(f"; slow in {count} shards: {reason}" for reason, count in self.manifest.slow_shards.items())
        return f"{start}: {records}; selected {selected}{slow}"

    @property
    def _failures(self) -> str:
        """Records that ended with a reason instead of a truth, by reason."""
        reasons: Counter[str] = Counter()
        for counts in self.manifest.counts.values():
            reasons.update({status: count for status, count in counts.items() if status != OK})
        return f" ({', '.join(f'{count} {reason}' for reason, count in reasons.most_common())})" if reasons else ""


class ShardWorker(OrderWorker):
    """Holds a target and writes one shard of records per order."""

    def __init__(
        self, task: Task, config: GenerateConfig, load_target: Callable[[GenerateConfig], Target], run_id: str
    ):
        self.task = task
        self.config = config
        self.run_id = run_id
        with counted_loading(Folder(config.output), run_id, ray.get_runtime_context().get_actor_id() or ""):
            self.target = load_target(config)

    def make(self, order: ShardOrder) -> str:
        return write_shard(self.task, self.target, self.config, order, self.run_id).model_dump_json()


def _load_target(config: GenerateConfig) -> Target:
    return Target.load(config.target)


def generate_dataset(
    config: GenerateConfig,
    progress: Callable[[Progress], None],
    task: Task | None = None,
    load_target: Callable[[GenerateConfig], Target] = _load_target,
) -> Summary:
    """Write the dataset that `config` describes, or what is left of it; the same call after any interruption goes on.

    Connects to Ray only if there are shards to write. Raises UserError before that for bad input, RunFailed if a
    shard cannot be written or too many records fail. `task` and `load_target` stand in for those the config names.
    """
    prepared = prepare(config, task or get_task(config.task))
    done = prepared.finished()
    manifest = _manifest(prepared, done)
    if manifest is not None:
        done = {index: info for index, info in done.items() if holds_its_records(prepared.folder, info)}
        if len(done) == len(prepared.orders):
            return Summary(config.output, manifest, 0)
    todo = [order for order in prepared.orders if order.index not in done]
    begin(prepared, todo)
    if todo:
        records_written = 0
        _report(prepared, done, records_written, progress)
        with connect():
            check_resources(config.actors)
            arguments = {"task": prepared.task, "config": config, "load_target": load_target}
            pool: Pool[ShardOrder] = Pool(prepared.folder, config.actors, ShardWorker, arguments)
            for order, account in run_orders(pool, todo):
                done[order.index] = info = ShardInfo.model_validate_json(account)
                records_written += info.num_rows
                _report(prepared, done, records_written, progress)
    return Summary(config.output, finish(prepared, done), len(todo))


def _manifest(prepared: Prepared, done: dict[int, ShardInfo]) -> Manifest | None:
    """The manifest if all shards are done and it describes exactly them, else None."""
    if len(done) < len(prepared.orders) or prepared.folder.size(MANIFEST_NAME) is None:
        return None
    try:
        manifest = read_manifest(prepared.folder)
    except UserError:
        return None
    wanted = tuple(done[order.index] for order in prepared.orders)
    return manifest if (manifest.run_key, manifest.shards) == (prepared.run_key, wanted) else None


def _report(
    prepared: Prepared, done: Collection[int], records_written: int, progress: Callable[[Progress], None]
) -> None:
    progress(
        Progress(
            shards_done=len(done),
            num_shards=len(prepared.orders),
            items_done=prepared.num_items(done),
            num_items=len(prepared.plan.items),
            records_written=records_written,
        )
    )
