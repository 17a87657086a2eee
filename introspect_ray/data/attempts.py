"""What earlier attempts at a shard, which ended with their process, tell the next one.

    plan/shard-00002.attempts.json    there while a shard is being made: how often its process died, and on which item

Nothing that a dying process could say reaches anybody (the kernel kills without a word, and so does a GPU driver), so
it is written down before: that an attempt begins, and, once a batch has proved deadly, which item runs next. A shard
that loses its process a few times is then run item by item; an item that is found running alone at two deaths is to
blame, and is left out. Only deaths within one run of the driver count, because those of a stopped driver's actors say
nothing about their items. The verdict stays for later runs, unless no item ran through alone: then the device is to
blame. A process whose device failed ends itself, which counts as any other death; what the device said is noted too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, ValidationError

from introspect_ray.data.shards import ATTEMPTS_SUFFIX, ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed

BATCH_DEATHS = 2
"""Deaths after which a shard runs item by item. Not at the first: batches are faster, and death has many causes."""
ITEM_DEATHS = 2
"""Deaths of an item that ran alone after which it is left out."""
ATTEMPTS = BATCH_DEATHS + 5 * ITEM_DEATHS + 1
"""Attempts at a shard in one run: enough for five deadly items, or for four and that the others together are deadly."""
LOADS = 3
"""Times in a row that an actor may die while it loads its target. Ray itself would start it again for ever."""
TOGETHER = "together"
"""Stands for an item id where all items that are not deadly run as one batch."""


class _Notes(BaseModel):
    """The content of an attempt file."""

    model_config = ConfigDict(extra="forbid")

    run_id: str = ""
    """Which run of the driver wrote this."""
    begun: int = 0
    """Attempts of that run."""
    running: str | None = None
    """Id of the item that runs alone, or `TOGETHER`."""
    deaths: dict[str, int] = {}
    """Item id -> processes that ended while it ran alone."""
    survived: bool = False
    """Whether any item ran through alone."""
    fault: str = ""
    """What the device said when it failed last."""


class Attempt:
    """One attempt at a shard, told apart from earlier ones by what they left in the output folder."""

    def __init__(self, folder: Folder, order: ShardOrder, run_id: str):
        """Begins the attempt. `run_id` is one of each run of the driver."""
        self._folder, self._name = folder, order.attempts_name
        before = _read(folder, self._name)
        same_run = before.run_id == run_id
        deaths = dict(before.deaths)
        if same_run and before.running is not None:
            deaths[before.running] = deaths.get(before.running, 0) + 1
        if not same_run:
            deaths = {item_id: count for item_id, count in deaths.items() if before.survived and count >= ITEM_DEATHS}
        self._notes = _Notes(
            run_id=run_id,
            begun=before.begun + 1 if same_run else 1,
            deaths=deaths,
            survived=before.survived,
            fault=before.fault if same_run else "",
        )
        self._write()

    @property
    def is_careful(self) -> bool:
        """Whether the items are to run one by one, each announced by `runs_alone`."""
        return self._notes.begun > BATCH_DEATHS or bool(self._notes.deaths)

    def deaths_of(self, item_id: str) -> int:
        """Processes that ended while this item (or all of them, `TOGETHER`) ran alone."""
        return self._notes.deaths.get(item_id, 0)

    def is_deadly(self, item_id: str) -> bool:
        """Whether this item is to be left out."""
        return self.deaths_of(item_id) >= ITEM_DEATHS

    def runs_alone(self, item_id: str | None) -> None:
        """Note which item runs next, or `TOGETHER`; `None` when the last one is through."""
        self._notes.survived |= self._notes.running is not None
        self._notes.running = item_id
        self._write()

    def device_failed(self, error: Exception) -> None:
        """Note why the process is about to end."""
        self._notes.fault = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        self._write()

    def succeeded(self) -> None:
        """The shard is written; nothing needs to be known any more."""
        self._folder.remove(self._name)

    def _write(self) -> None:
        self._folder.write(self._name, self._notes.model_dump_json().encode())


def _read(folder: Folder, name: str) -> _Notes:
    try:
        return _Notes.model_validate(json.loads(folder.read(name)))
    except (FileNotFoundError, ValueError, ValidationError):
        return _Notes()


def last_fault(folder: Folder, orders: Sequence[ShardOrder]) -> str:
    """What a device said when it failed at one of these shards, none of which is written; empty if none did."""
    there = set(Folder(f"{folder.url.rstrip('/')}/plan").names())
    noted = (_read(folder, order.attempts_name) for order in orders if order.attempts_name.partition("/")[2] in there)
    return next((notes.fault for notes in noted if notes.fault), "")


def has_begun(folder: Folder, run_id: str) -> bool:
    """Whether any actor of this run loads a target or makes a shard right now."""
    names = Folder(f"{folder.url.rstrip('/')}/plan").names()
    if any(name.startswith(f"actor-{run_id}") for name in names):
        return True
    return any(_read(folder, f"plan/{name}").run_id == run_id for name in names if name.endswith(ATTEMPTS_SUFFIX))


@contextmanager
def counted_loading(folder: Folder, run_id: str, actor_id: str) -> Iterator[None]:
    """Around the loading of an actor's target. Raises RunFailed if the actor died in it `LOADS` times in a row."""
    name = f"plan/actor-{run_id}-{actor_id}{ATTEMPTS_SUFFIX}"
    deaths = folder.size(name) or 0
    if deaths >= LOADS:
        raise RunFailed(f"{deaths} processes ended while they loaded the target; it may need more memory than there is")
    folder.write(name, b"x" * (deaths + 1))
    try:
        yield
    finally:
        folder.remove(name)
