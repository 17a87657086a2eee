"""One shard, from work items to a file: what an actor does per call, without Ray."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from introspect_ray.config import GenerateConfig
from introspect_ray.data.attempts import TOGETHER, Attempt
from introspect_ray.data.shards import ShardInfo, ShardOrder, read_items, vector_columns, write_records
from introspect_ray.data.storage import Folder
from introspect_ray.interventions.memory import is_device_error
from introspect_ray.interventions.target import Target
from introspect_ray.tasks.base import Item, Record, Task, failed

logger = logging.getLogger(__name__)

GENERATION_ERROR = "generation_error"
"""Status of an item whose procedure raised."""
PROCESS_DIED = "process_died"
"""Status of an item that ended the process it ran in, more than once."""
ERRORS = (GENERATION_ERROR, PROCESS_DIED)
"""Statuses of items of which nothing is known, not even that there is no truth."""
VECTOR_NOT_FINITE = "vector_not_finite"
"""Status of a record whose vector has a NaN, or overflows in the dtype on disk."""


class DeviceFailed(Exception):
    """The device of this process failed, and would fail all that follows: the process is to be ended."""

    def __init__(self, reason: Exception):
        super().__init__(f"{type(reason).__name__}: {reason}")
        self.reason = reason


def write_shard(task: Task, target: Target, config: GenerateConfig, order: ShardOrder, run_id: str) -> ShardInfo:
    """Generate and write all records of one shard; every work item ends as at least one record.

    The folder is `config.output`; `run_id` is one of each run of the driver. Nothing is written if the procedure raises
    for every item alike, which is raised then, or if it raises DeviceFailed.
    """
    folder = Folder(config.output)
    items = read_items(folder, order)
    schema = task.schema(target.width, config)
    attempt = Attempt(folder, order, run_id)
    try:
        records = generate_records(task, target, items, config, attempt)
    except DeviceFailed as error:
        attempt.device_failed(error.reason)
        raise
    records = finite_records(records, items, schema)
    info = write_records(folder, order, records, schema, target.take_slow_reasons())
    attempt.succeeded()
    return info


def generate_records(
    task: Task, target: Target, items: Sequence[Item], config: GenerateConfig, attempt: Attempt | None = None
) -> list[Record]:
    """Records of all items, in item order. If the batch raises, items run alone; those that raise again are failed.

    Items run alone as well if earlier attempts ended with their process; those to blame are failed without a try. The
    others then run once more as a batch, because the last bits of a vector depend on what runs with it: a shard that
    was disturbed ends like one that was not.
    """
    careful = attempt if attempt and attempt.is_careful else None
    by_item = None
    if careful:
        logger.warning("earlier attempts at a shard of %d items killed their process; they run one by one", len(items))
    else:
        by_item = _as_batch(task, target, items, config)
    if by_item is None:
        by_item = _one_by_one(task, target, items, config, careful)
        sound = [item for item in items if by_item[item["item_id"]][0]["status"] not in ERRORS]
        if len(sound) > 1 and not (careful and careful.is_deadly(TOGETHER)):
            with announced(careful, TOGETHER):
                by_item |= _as_batch(task, target, sound, config) or {}
    return [record for item in items for record in by_item[item["item_id"]]]


def _as_batch(
    task: Task, target: Target, items: Sequence[Item], config: GenerateConfig
) -> dict[str, list[Record]] | None:
    """Records of all items by item id; `None` if the procedure raises."""
    try:
        records = task.generate(target, items, config)
    except Exception as error:
        check_device(error)
        logger.warning("a batch of %d items raised %r", len(items), error)
        return None
    return _check(records, items)


def _one_by_one(
    task: Task, target: Target, items: Sequence[Item], config: GenerateConfig, attempt: Attempt | None
) -> dict[str, list[Record]]:
    """Records of every item run alone; each is announced to `attempt`, which knows those that must not run.

    Raises the error if the procedure raises the same kind for each of several items: then it is not about an item.
    """
    records: list[Record] = []
    errors: list[Exception] = []
    num_run = 0
    for item in items:
        if attempt and attempt.is_deadly(item["item_id"]):
            deaths = attempt.deaths_of(item["item_id"])
            records.append(failed(item, PROCESS_DIED, f"{deaths} processes ended while this item ran alone"))
            continue
        num_run += 1
        with announced(attempt, item["item_id"]):
            try:
                records += task.generate(target, [item], config)
            except Exception as error:
                check_device(error)
                errors.append(error)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                records.append(failed(item, GENERATION_ERROR, reason))
    if num_run > 1 and len(errors) == num_run and len(set(map(type, errors))) == 1:
        raise errors[0]
    return _check(records, items)


@contextmanager
def announced(attempt: Attempt | None, what: str) -> Iterator[None]:
    """Notes what runs inside the block, so that it is known if the process ends in it."""
    if attempt:
        attempt.runs_alone(what)
    yield
    if attempt:
        attempt.runs_alone(None)


def check_device(error: Exception) -> None:
    """Raises DeviceFailed if the error is one that the device will not recover from."""
    if is_device_error(error):
        raise DeviceFailed(error) from error


def _check(records: Sequence[Record], items: Sequence[Item]) -> dict[str, list[Record]]:
    """Records by item id; asserts what every task promises."""
    by_item: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_item[record["item_id"]].append(record)
    assert set(by_item) == {item["item_id"] for item in items}, "a task gives every item a record, and no other item"
    for item in items:
        for record in by_item[item["item_id"]]:
            assert (record["split"], record["group"]) == (item["split"], item["group"]), (
                "a record keeps its item's split"
            )
    assert len({record["record_id"] for record in records}) == len(records), "record ids are unique"
    return by_item


def finite_records(records: Sequence[Record], items: Sequence[Item], schema: pa.Schema) -> list[Record]:
    """Records with every vector that is not finite in its dtype on disk replaced by a failed record."""
    by_id = {item["item_id"]: item for item in items}
    kinds = {name: schema.field(name).type.value_type.to_pandas_dtype() for name in vector_columns(schema)}
    return [_finite(record, by_id[record["item_id"]], kinds) for record in records]


def _finite(record: Record, item: Item, kinds: dict[str, type[np.generic]]) -> Record:
    for name, kind in kinds.items():
        vector = record.get(name)
        if vector is None:
            continue
        with np.errstate(over="ignore"):
            stored = np.asarray(vector).astype(kind)
        if not np.isfinite(stored).all():
            found = "holds a NaN or infinity" if not np.isfinite(vector).all() else f"overflows in {np.dtype(kind)}"
            # Several records of one item may fail so: the id of each stays its own.
            return {**failed(item, VECTOR_NOT_FINITE, f"{name} {found}"), "record_id": record["record_id"]}
    return record
