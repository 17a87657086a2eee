"""A journal of endpoint calls in a run's output folder, so that no answer that was paid for is lost or paid for twice.

OUTPUT/calls/RUN-00000000.jsonl    entries (models/journal.py) of calls that began or ended at about the same time

A file is written whole before a call is sent, and again before its answer is used. Entries that come while a file is
being written go into the next one together. Of entries of one name the last one holds. Now and then one file takes the
place of many; it says of which in its first line, so that a stop before they are gone does no harm.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.models.journal import Entry, Journal, lines

CALLS_FOLDER = "calls"
_REPLACES = "replaces"
FILES_TOGETHER = 256
"""Files after which one takes their place."""


def open_journal(output: Folder) -> FolderJournal:
    """The journal of an output folder, empty if there was no call. Raises UserError if it cannot be read."""
    folder = Folder(f"{output.url.rstrip('/')}/{CALLS_FOLDER}")
    names = [name for name in folder.names() if not name.startswith(TEMPORARY)]
    files = {name: list(_rows(folder, name)) for name in names}
    replaced = {name for rows in files.values() for row in rows for name in row.get(_REPLACES, ())}
    entries: dict[str, Entry] = {}
    for name in names:
        for row in files[name] if name not in replaced else ():
            if _REPLACES in row:
                continue
            try:
                entry = Entry.from_json(row)
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(folder, name, error) from None
            entries[entry.name] = entry
    return FolderJournal(folder, names, entries.values())


def _rows(folder: Folder, name: str) -> Iterator[dict[str, Any]]:
    try:
        for line in folder.read(name).decode().split("\n")[:-1]:  # answers may hold other ends of lines
            yield dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise _damaged(folder, name, error) from None


def _damaged(folder: Folder, name: str, error: Exception) -> UserError:
    return UserError(
        f"{folder.url}/{name} holds something else than calls ({error}), so what was spent is not known:"
        " delete it to count nothing for it"
    )


class FolderJournal(Journal):
    """A journal whose entries are in files before they count."""

    def __init__(self, folder: Folder, names: Sequence[str], entries: Iterable[Entry]):
        super().__init__(entries)
        self._folder = folder
        self._names = list(names)
        """All files."""
        self._run = uuid.uuid4().hex[:12]
        self._number = 0
        self._waiting: list[Entry] = []
        self._recent: dict[str, Entry] = {}
        """Entries by name in the newest files, which one is to take the place of."""
        self._num_recent = 0
        """Those files."""
        self._writing = threading.Lock()

    def _keep(self, entry: Entry) -> None:
        with self._lock:
            self._waiting.append(entry)
        with self._writing:  # whoever comes first writes what waits, for all
            with self._lock:
                batch, self._waiting = self._waiting, []
            if not batch:
                return
            try:
                self._write(lines(batch))
            except BaseException:
                with self._lock:
                    self._waiting = batch + self._waiting
                raise
            self._recent |= {one.name: one for one in batch}
            self._num_recent += 1
            if self._num_recent >= FILES_TOGETHER:
                self._replace(self._names[-self._num_recent :], self._recent.values())

    def _keep_only(self, entry: Entry) -> None:
        with self._writing:
            if self._names:
                self._replace(list(self._names), [entry])

    def _replace(self, names: Sequence[str], entries: Iterable[Entry]) -> None:
        """Put one file in the place of others."""
        self._write(json.dumps({_REPLACES: list(names)}).encode() + b"\n" + lines(entries))
        for name in names:
            self._folder.remove(name)
            self._names.remove(name)
        self._recent, self._num_recent = {}, 0

    def _write(self, content: bytes) -> None:
        name = f"{self._run}-{self._number:08d}.jsonl"
        self._number += 1
        self._folder.write(name, content)
        self._names.append(name)
