"""Orders on a pool of Ray actors: each is made whole or not at all, by anyone who is asked, as often as it takes.

    driver  orders -> one row per order
    actors  OrderWorker x min..max: load once; per order: make -> files in the output folder
              | one summary row per order, streamed back for progress
    driver  every order and what its maker says of it, in any order

A dead actor, a dead driver and a repeated order all end in the same files. What an actor raises travels as a row,
because Ray keeps of an exception little more than its text.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TextIO, TypeVar

import ray
import ray.data

from introspect_ray.config import ActorConfig
from introspect_ray.data.attempts import ATTEMPTS, has_begun, last_fault
from introspect_ray.data.cluster import VERBOSE_VARIABLE, is_elsewhere, is_verbose, quiet_stderr
from introspect_ray.data.shards import ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.data.writer import DeviceFailed
from introspect_ray.errors import RunFailed, UserError

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
PIPELINES = 3
"""Times that a pool is made in one run. Ray Data ends with an error if it takes an actor back that has no place yet."""
NEVER_RAN = "The actor never ran"
"""What Ray says of such an actor (2.60); there is no exception of its own for it."""


Order = TypeVar("Order", bound=ShardOrder)


class OrderWorker:
    """Makes one order per call: a row of what there is to say of it, or of why it could not be made."""

    order_class: ClassVar[type[ShardOrder]] = ShardOrder

    def make(self, order: Any) -> str:
        """Write what the order asks for and return its account as JSON; a DeviceFailed ends the process."""
        raise NotImplementedError

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        orders = [
            self.order_class(int(index), str(run_key))
            for index, run_key in zip(batch["index"], batch["run_key"], strict=True)
        ]
        rows = [self._row(order) for order in orders]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, order: ShardOrder) -> dict[str, Any]:
        row = {"index": order.index, "info": "", "error_kind": "", "error": ""}
        try:
            info = self.make(order)
        except DeviceFailed:
            logger.exception("%s: the device failed, this process ends", order.name)
            os._exit(1)  # Ray starts another one and asks it again, at most RETRIES_PER_SHARD times
        except UserError as error:
            return row | {"error_kind": UserError.__name__, "error": str(error)}
        except Exception as error:
            logger.exception("%s cannot be written", order.name)
            return row | {"error_kind": type(error).__name__, "error": f"{type(error).__name__}: {error}"}
        return row | {"info": info}


@dataclass(frozen=True)
class Pool(Generic[Order]):
    """Which actors make which orders."""

    folder: Folder
    """Where `plan/` has the notes of attempts."""
    actors: ActorConfig
    worker: type[OrderWorker]
    arguments: Mapping[str, Any]
    """Of the worker's constructor, beside `run_id`."""


def check_resources(actors: ActorConfig) -> None:
    """Refuse actors that this machine can never place; a cluster elsewhere may grow, so nothing is said about it."""
    if is_elsewhere():
        return
    there = ray.cluster_resources()
    for key, wanted, resource in (("num_cpus", actors.num_cpus, "CPU"), ("num_gpus", actors.num_gpus, "GPU")):
        if wanted > there.get(resource, 0):
            raise UserError(f"actors.{key} is {wanted:g}, but this machine has {there.get(resource, 0):g} {resource}s")


class _NeverRan(Exception):
    """Ray Data took back an actor that was still waiting for a place, and ended its run with that."""


def run_orders(pool: Pool[Order], orders: Sequence[Order]) -> Iterator[tuple[Order, str]]:
    """Every order as it gets done, in any order, and its account. Raises UserError at once, RunFailed if one is lost.

    Ray must be connected.
    """
    left = {order.index: order for order in orders}
    lost: dict[str, str] = {}
    """Name of a shard -> what was raised."""
    run_id = uuid.uuid4().hex
    tell = partial(_tell_if_waiting, pool, run_id)
    for begun in range(1, PIPELINES + 1):
        # Closed at once: what is left of a pool would keep its processors from the next run in this process.
        waiting = [order for order in left.values() if order.name not in lost]
        with run_context(), closing(_quietly(_pipeline(pool, waiting, run_id).iter_rows(), tell)) as rows:
            try:
                while len(lost) <= MAX_LOST_SHARDS and (row := _next_row(pool, rows, left)) is not None:
                    order = left[row["index"]]
                    if row["error_kind"] == UserError.__name__:
                        raise UserError(row["error"])
                    if row["error_kind"]:
                        lost[order.name] = row["error"]
                    else:
                        del left[order.index]
                        yield order, row["info"]
                break
            except _NeverRan as ended:
                if begun == PIPELINES:
                    raise RunFailed(str(ended)) from ended
                logger.warning("%s; %d shards are left and go on with other actors", ended, len(left))
    if left:
        name, reason = next(iter(lost.items()), (next(iter(left.values())).name, ""))
        reason = reason or last_fault(pool.folder, list(left.values())) or "its processes died"
        raise RunFailed(
            f"{len(left)} shards were not written, the first is {name} ({reason}); the same command tries again"
        )


def _next_row(pool: Pool[Order], rows: Iterator[dict[str, Any]], left: Mapping[int, Order]) -> dict[str, Any] | None:
    """The next row, or `None`. Raises UserError or RunFailed for what Ray or an actor at its start raises."""
    try:
        return next(rows, None)
    except Exception as error:
        if NEVER_RAN in str(error):
            raise _NeverRan("an actor was cancelled before it started") from error
        fault = last_fault(pool.folder, list(left.values()))
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


def _tell_if_waiting(pool: Pool[Any], run_id: str, stream: TextIO) -> None:
    """Say what an actor needs and what there is, unless one has started."""
    if has_begun(pool.folder, run_id):
        return
    actors, there, free = pool.actors, ray.cluster_resources(), ray.available_resources()
    wanted = f"{actors.num_cpus:g} CPUs and {actors.num_gpus:g} GPUs"
    found = " and ".join(f"{there.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))
    stream.write(f"\nno actor has started yet: one needs {wanted}, the cluster has {found}; waiting\n")
    stream.flush()


def _pipeline(pool: Pool[Order], orders: Sequence[Order], run_id: str) -> ray.data.Dataset:
    """Orders as rows through the pool of actors; nothing runs yet."""
    actors = pool.actors
    rows = ray.data.from_items([asdict(order) for order in orders], override_num_blocks=len(orders))
    with warnings.catch_warnings():
        # No named arguments replace the last two yet (Ray 2.60; they go in 2.64, hence the pin).
        warnings.simplefilter("ignore")
        return rows.map_batches(
            pool.worker,
            fn_constructor_kwargs={**pool.arguments, "run_id": run_id},
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
