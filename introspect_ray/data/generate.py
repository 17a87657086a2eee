"""Generating a dataset on Ray Data.

    driver  prepare (no Ray, no model) -> claim folder, write plan/ -> orders of unfinished shards
              | one row per shard
    actors  ShardWorker x min..max: load target once; per order: write_shard -> shards/shard-k.parquet (renamed)
              | one summary row per shard, streamed back for progress
    driver  all shards done -> counts, selection -> dataset.json

A shard is written whole or not at all, and by anyone who is asked: a dead actor, a dead driver and a repeated order
all end in the same file. An item that kills its process every time ends as a failed record, see attempts.py. What an
actor raises travels as a row, because Ray keeps of an exception little more than its text.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TextIO

import ray
import ray.data

from introspect_ray.config import ActorConfig, GenerateConfig
from introspect_ray.data.attempts import ATTEMPTS, counted_loading, has_begun, last_fault
from introspect_ray.data.cluster import VERBOSE_VARIABLE, connect, is_elsewhere, is_verbose, quiet_stderr
from introspect_ray.data.dataset import holds_its_records
from introspect_ray.data.finish import finish
from introspect_ray.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from introspect_ray.data.prepare import Prepared, begin, prepare
from introspect_ray.data.shards import ShardInfo, ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.data.writer import DeviceFailed, write_shard
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.interventions.target import Target
from introspect_ray.tasks.base import OK, Task
from introspect_ray.tasks.registry import get_task

logger = logging.getLogger(__name__)

NO_PROGRESS_TIMEOUT_S = 4 * 3600
"""Ray Data gives up after 30 minutes without a finished block, which a large model on a new node may take to load."""
RETRIES_PER_SHARD = ATTEMPTS - 1
"""Times a shard is tried again after its actor died. Without a bound, a shard that kills actors never ends."""
NOTE_AFTER_S = 60
"""After so long without an actor, the user is told what it waits for."""
MAX_LOST_SHARDS = 3
"""Shards that may be lost to dying actors, and to errors, while the others are still completed; then the run fails all
the same."""


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
    """Holds a target and writes one shard per call: a row of its info, or of why it could not be written."""

    def __init__(
        self, task: Task, config: GenerateConfig, load_target: Callable[[GenerateConfig], Target], run_id: str
    ):
        self.task = task
        self.config = config
        self.run_id = run_id
        with counted_loading(Folder(config.output), run_id, ray.get_runtime_context().get_actor_id() or ""):
            self.target = load_target(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        orders = [
            ShardOrder(int(index), str(run_key))
            for index, run_key in zip(batch["index"], batch["run_key"], strict=True)
        ]
        rows = [self._row(order) for order in orders]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, order: ShardOrder) -> dict[str, Any]:
        row = {"index": order.index, "info": "", "error_kind": "", "error": ""}
        try:
            info = write_shard(self.task, self.target, self.config, order, self.run_id)
        except DeviceFailed:
            logger.exception("%s: the device failed, this process ends", order.name)
            os._exit(1)  # Ray starts another one and asks it again, at most RETRIES_PER_SHARD times
        except UserError as error:
            return row | {"error_kind": UserError.__name__, "error": str(error)}
        except Exception as error:
            logger.exception("%s cannot be written", order.name)
            return row | {"error_kind": type(error).__name__, "error": f"{type(error).__name__}: {error}"}
        return row | {"info": info.model_dump_json()}


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
            for order, info in _run(prepared, todo, load_target):
                done[order.index] = info
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


def check_resources(actors: ActorConfig) -> None:
    """Refuse actors that this machine can never place; a cluster elsewhere may grow, so nothing is said about it."""
    if is_elsewhere():
        return
    there = ray.cluster_resources()
    for key, wanted, resource in (("num_cpus", actors.num_cpus, "CPU"), ("num_gpus", actors.num_gpus, "GPU")):
        if wanted > there.get(resource, 0):
            raise UserError(f"actors.{key} is {wanted:g}, but this machine has {there.get(resource, 0):g} {resource}s")


def _run(
    prepared: Prepared, orders: list[ShardOrder], load_target: Callable[[GenerateConfig], Target]
) -> Iterator[tuple[ShardOrder, ShardInfo]]:
    """Every order's shard as it gets done, in any order. Raises UserError at once, RunFailed if a shard is lost."""
    left = {order.index: order for order in orders}
    lost: dict[str, str] = {}
    """Name of a shard -> what was raised."""
    run_id = uuid.uuid4().hex
    tell = partial(_tell_if_waiting, prepared, run_id)
    # Closed at once: what is left of a pool would keep its processors from the next run in this process.
    with run_context(), closing(_quietly(_pipeline(prepared, orders, load_target, run_id).iter_rows(), tell)) as rows:
        while len(lost) <= MAX_LOST_SHARDS and (row := _next_row(prepared, rows, left)) is not None:
            order = left[row["index"]]
            if row["error_kind"] == UserError.__name__:
                raise UserError(row["error"])
            if row["error_kind"]:
                lost[order.name] = row["error"]
            else:
                del left[order.index]
                yield order, ShardInfo.model_validate_json(row["info"])
    if left:
        name, reason = next(iter(lost.items()), (next(iter(left.values())).name, ""))
        reason = reason or last_fault(prepared.folder, list(left.values())) or "its processes died"
        raise RunFailed(
            f"{len(left)} shards were not written, the first is {name} ({reason}); the same command tries again"
        )


def _next_row(
    prepared: Prepared, rows: Iterator[dict[str, Any]], left: Mapping[int, ShardOrder]
) -> dict[str, Any] | None:
    """The next row, or `None`. Raises UserError or RunFailed for what Ray or an actor at its start raises."""
    try:
        return next(rows, None)
    except Exception as error:
        fault = last_fault(prepared.folder, list(left.values()))
        raise translated(error, fault) from (error if is_verbose() else None)


def _quietly(rows: Iterable[dict[str, Any]], tell: Callable[[TextIO], None]) -> Generator[dict[str, Any], None, None]:
    """The same rows; standard error is silent while waiting for one, and open while it is used.

    If the first row takes longer than `NOTE_AFTER_S`, `tell` may say on standard error why.
    """
    waiting = iter(rows)
    late: Callable[[TextIO], None] | None = tell
    while True:
        with quiet_stderr() as past, _timer(NOTE_AFTER_S, late, past):
            row = next(waiting, None)
        late = None
        if row is None:
            return
        yield row


@contextmanager
def _timer(seconds: float, call: Callable[[TextIO], None] | None, stream: TextIO) -> Iterator[None]:
    """Calls from another thread if the block takes longer; on leaving, that is over."""
    if call is None:
        yield
        return
    timer = threading.Timer(seconds, call, (stream,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _tell_if_waiting(prepared: Prepared, run_id: str, stream: TextIO) -> None:
    """Say what an actor needs and what there is, unless one has started."""
    if has_begun(prepared.folder, run_id):
        return
    actors, there, free = prepared.config.actors, ray.cluster_resources(), ray.available_resources()
    wanted = f"{actors.num_cpus:g} CPUs and {actors.num_gpus:g} GPUs"
    found = " and ".join(f"{there.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))
    stream.write(f"\nno actor has started yet: one needs {wanted}, the cluster has {found}; waiting\n")
    stream.flush()


def _pipeline(
    prepared: Prepared, orders: list[ShardOrder], load_target: Callable[[GenerateConfig], Target], run_id: str
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
                "run_id": run_id,
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
def run_context() -> Iterator[None]:
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


def translated(error: BaseException, fault: str) -> Exception:
    """What an actor raised, in one line: the user's error if there is one at the bottom, else a failed run.

    `fault` is what a device said, if one failed.
    """
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
    return RunFailed(f"an actor failed: {fault or last[0]} (details in Ray's logs, or with {VERBOSE_VARIABLE}=1)")
