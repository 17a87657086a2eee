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

import os
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.data

from introspect_ray.config import ActorConfig, GenerateConfig
from introspect_ray.data.attempts import ATTEMPTS, counted_loading
from introspect_ray.data.cluster import ADDRESS_VARIABLE, VERBOSE_VARIABLE, connect, is_verbose, quiet_stderr
from introspect_ray.data.finish import finish
from introspect_ray.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from introspect_ray.data.prepare import Prepared, begin, prepare
from introspect_ray.data.shards import ShardInfo, ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.data.writer import write_shard
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.interventions.target import Target
from introspect_ray.tasks.base import OK, Task
from introspect_ray.tasks.registry import get_task

NO_PROGRESS_TIMEOUT_S = 4 * 3600
"""Ray Data gives up after 30 minutes without a finished block, which a large model on a new node may take to load."""
RETRIES_PER_SHARD = ATTEMPTS - 1
"""Times a shard is tried again after its actor died. Without a bound, a shard that kills actors never ends."""
MAX_LOST_SHARDS = 3
"""Shards that may be lost to dying actors while the others are still completed; then the run fails all the same."""


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


class ShardWorker:
    """Holds a target and writes one shard per call."""

    def __init__(
        self, task: Task, config: GenerateConfig, load_target: Callable[[GenerateConfig], Target], run_id: str
    ):
        self.task = task
        self.config = config
        self.run_id = run_id
        with counted_loading(Folder(config.output), ray.get_runtime_context().get_actor_id() or ""):
            self.target = load_target(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        orders = [
            ShardOrder(int(index), str(run_key))
            for index, run_key in zip(batch["index"], batch["run_key"], strict=True)
        ]
        infos = [write_shard(self.task, self.target, self.config, order, self.run_id) for order in orders]
        rows = [{"index": order.index, **info.model_dump()} for order, info in zip(orders, infos, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}


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
    todo = [order for order in prepared.orders if order.index not in done]
    if not todo and (manifest := _complete(prepared, done)) is not None:
        return Summary(config.output, manifest, 0)
    begin(prepared, todo)
    if todo:
        records_written = 0
        _report(prepared, done, records_written, progress)
        with connect():
            check_resources(config.actors)
            for order, info in _run(prepared, todo, load_target):
                done[order.index] = info
                records_written += info.num_rows
                _report(prepared, done, records_written, progress)
    missing = [order.name for order in prepared.orders if order.index not in done]
    if missing:
        raise RunFailed(
            f"{len(missing)} shards were not written, the first is {missing[0]}; the same command tries again"
        )
    return Summary(config.output, finish(prepared, done), len(todo))


def _complete(prepared: Prepared, done: dict[int, ShardInfo]) -> Manifest | None:
    """The manifest if it describes exactly this run's shards, else None."""
    if prepared.folder.size(MANIFEST_NAME) is None:
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


def check_resources(actors: ActorConfig) -> None:
    """Refuse actors that this machine can never place; a cluster elsewhere may grow, so nothing is said about it."""
    if os.environ.get(ADDRESS_VARIABLE):
        return
    there = ray.cluster_resources()
    for key, wanted, resource in (("num_cpus", actors.num_cpus, "CPU"), ("num_gpus", actors.num_gpus, "GPU")):
        if wanted > there.get(resource, 0):
            raise UserError(f"actors.{key} is {wanted:g}, but this machine has {there.get(resource, 0):g} {resource}s")


def _run(
    prepared: Prepared, orders: list[ShardOrder], load_target: Callable[[GenerateConfig], Target]
) -> Iterator[tuple[ShardOrder, ShardInfo]]:
    """Every order's shard as it gets done, in any order. Raises UserError or RunFailed for what actors raised."""
    with _context():
        rows = _pipeline(prepared, orders, load_target)
        try:
            for row in _quietly(rows.iter_rows()):
                order = ShardOrder(row.pop("index"), prepared.run_key)
                yield order, ShardInfo(**row)
        except Exception as error:
            raise _translated(error) from (error if is_verbose() else None)


def _quietly(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows; standard error is silent while waiting for one, and open while it is used."""
    waiting = iter(rows)
    while True:
        with quiet_stderr():
            row = next(waiting, None)
        if row is None:
            return
        yield row


def _pipeline(
    prepared: Prepared, orders: list[ShardOrder], load_target: Callable[[GenerateConfig], Target]
) -> ray.data.Dataset:
    """Orders as rows through the pool of actors; nothing runs yet."""
    actors = prepared.config.actors
    rows = ray.data.from_items([asdict(order) for order in orders], override_num_blocks=len(orders))
    with warnings.catch_warnings():
        # No named arguments replace the last two yet (Ray 2.60; they go in 2.64, hence the pin).
        warnings.simplefilter("ignore")
        return rows.map_batches(
            ShardWorker,
            fn_constructor_kwargs={
                "task": prepared.task,
                "config": prepared.config,
                "load_target": load_target,
                "run_id": uuid.uuid4().hex,
            },
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=actors.min_size, max_size=actors.max_size, initial_size=actors.initial_size
            ),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus or None,
            max_restarts=-1,
            max_task_retries=RETRIES_PER_SHARD,
        )


@contextmanager
def _context() -> Iterator[None]:
    """Ray Data's settings for this run, put back afterwards."""
    context = ray.data.DataContext.get_current()
    wanted = {
        "execution_no_progress_timeout_s": NO_PROGRESS_TIMEOUT_S,
        "max_errored_blocks": MAX_LOST_SHARDS,
        "print_on_execution_start": is_verbose(),
        "enable_progress_bars": is_verbose(),
    }
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _translated(error: BaseException) -> Exception:
    """What an actor raised, in one line: the user's error if there is one at the bottom, else a failed run."""
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        following = getattr(following, "cause", None) or following.__cause__ or following.__context__
    for cause in reversed(causes):
        if isinstance(cause, UserError | RunFailed):
            return (UserError if isinstance(cause, UserError) else RunFailed)(str(cause))
    # Actors that die while starting leave no exception, only its traceback as text.
    last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
    for kind in (UserError, RunFailed):
        _, found, said = last[0].partition(f"{kind.__module__}.{kind.__name__}: ")
        if found:
            return kind(said)
    return RunFailed(f"an actor failed: {last[0]} (details in Ray's logs, or with {VERBOSE_VARIABLE}=1)")
