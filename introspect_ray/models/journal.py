"""What was asked of an endpoint that charges, and what it cost: the one owner of what was spent.

    begin: nothing is sent before it is known what it may cost, at most     end: what it did cost, and the answer if any

A call that was begun and not ended counts with the most it may cost: nobody knows whether it was charged. Entries are
found by their request, so that an answer that is there is not paid for again.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from introspect_ray.models.chat import Completion, Failure


@dataclass(frozen=True)
class Entry:
    """One call; calls before this one that need no answer any more may be one entry together."""

    name: str
    request: str
    cost: float
    """While it is under way: the most it may cost."""
    answer: Completion | Failure | None = None
    """None while it is under way, and where asking again may help."""

    def to_json(self) -> dict[str, Any]:
        kind = {Completion: "completion", Failure: "failure"}.get(type(self.answer))
        said = {kind: asdict(self.answer)} if kind and self.answer else {}
        return {"name": self.name, "request": self.request, "cost": self.cost, **said}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Entry:
        """Raises ValueError, KeyError or TypeError for what is none."""
        answer: Completion | Failure | None = None
        if "completion" in row:
            answer = Completion(**row["completion"])
        elif "failure" in row:
            answer = Failure(**row["failure"])
        return cls(str(row["name"]), str(row["request"]), float(row["cost"]), answer)


class Journal:
    """Calls of this run and, as `entries`, of earlier ones. Safe to use from many threads; nothing outlives the process
    unless `_keep` sees to it."""

    def __init__(self, entries: Iterable[Entry] = ()):
        self._lock = threading.Lock()
        self._answers: dict[str, Completion | Failure] = {}
        self._spent = 0.0
        for entry in entries:
            self._spent += entry.cost
            if entry.answer is not None:
                self._answers[entry.request] = entry.answer

    @property
    def spent(self) -> float:
        """What all calls cost, those under way with the most that they may."""
        return self._spent

    def find(self, request: str) -> Completion | Failure | None:
        """The answer to a request, if it is there."""
        with self._lock:
            return self._answers.get(request)

    def begin(self, request: str, most: float, cap: float | None) -> Entry | None:
        """A call that may be made now; `end` has to follow. None if it could bring what is spent above the cap."""
        with self._lock:
            if cap is not None and self._spent + most > cap:
                return None
            self._spent += most
        entry = Entry(uuid.uuid4().hex, request, most)
        if most:
            self._keep(entry)
        return entry

    def end(self, entry: Entry, cost: float, answer: Completion | Failure | None) -> None:
        """What a call came to; `answer` is what the same request is told from now on."""
        with self._lock:
            self._spent += cost - entry.cost
            if answer is not None:
                self._answers[entry.request] = answer
        if entry.cost or cost or answer is not None:
            self._keep(replace(entry, cost=cost, answer=answer))

    def settle(self) -> None:
        """All answers so far are kept elsewhere: only what they cost is remembered. No call may be under way."""
        with self._lock:
            self._answers = {}
            total = Entry(uuid.uuid4().hex, "", self._spent)
        self._keep_only(total)

    def _keep(self, entry: Entry) -> None:
        """Make an entry outlive the process, in place of an earlier one of its name."""

    def _keep_only(self, entry: Entry) -> None:
        """The same, in place of all others."""


def lines(entries: Iterable[Entry]) -> bytes:
    """Entries as JSON, one per line."""
    return "".join(json.dumps(entry.to_json(), ensure_ascii=False) + "\n" for entry in entries).encode()
