"""Plain texts that are too many to hold: one pass says which rows are usable, further passes read them again.

Texts that are exactly equal count once, as everywhere: 8 bytes of each text are kept.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from introspect_ray.config import SourceConfig
from introspect_ray.data.sources import iter_texts
from introspect_ray.errors import UserError

DUPLICATE = "duplicate_row"


@dataclass(frozen=True, eq=False)
class Texts:
    """What a first pass over the source found; the texts themselves are read again when shards are written."""

    source: SourceConfig
    usable: np.ndarray
    """Whether each row is a text that did not come before."""
    reasons: dict[str, int]
    """Why the other rows are none -> how many."""
    digest: str
    """Changes with the texts and with their order."""

    @cached_property
    def num_used(self) -> int:
        return int(self.usable.sum())

    def rows(self) -> Iterator[tuple[int, str, str]]:
        """(row, text, "") of the usable rows and (row, "", reason) of the others, in file order.

        Raises UserError if the source has another number of rows by now.
        """
        row = -1
        for row, (text, reason) in enumerate(iter_texts(self.source)):
            if row >= len(self.usable):
                raise UserError(f"source {self.source.path} has become longer while it was read")
            yield (row, text, "") if self.usable[row] else (row, "", reason or DUPLICATE)
        if row + 1 < len(self.usable):
            raise UserError(f"source {self.source.path} has become shorter while it was read")

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """(row, text) of the usable rows, in file order."""
        return ((row, text) for row, text, reason in self.rows() if not reason)


def read_texts(source: SourceConfig) -> Texts:
    """Look at every row of the source once. Raises UserError if there is no usable text."""
    hashes = array("Q")
    good = array("b")
    reasons: Counter[str] = Counter()
    digest = hashlib.blake2b(digest_size=16)
    for text, reason in iter_texts(source):
        key = hashlib.blake2b(text.encode(), digest_size=8).digest()
        digest.update(key)
        hashes.frombytes(key)
        good.append(not reason)
        if reason:
            reasons[reason] += 1
    usable = np.frombuffer(good, np.int8).astype(bool) if good else np.zeros(0, bool)
    rows = np.flatnonzero(usable)
    first = np.unique(np.frombuffer(hashes, np.uint64)[rows], return_index=True)[1] if len(rows) else rows
    if len(first) < len(rows):
        reasons[DUPLICATE] = len(rows) - len(first)
    usable[:] = False
    usable[rows[first]] = True
    if not usable.any():
        found = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise UserError(f"source {source.path} has no usable text among {len(usable)} rows ({found})")
    return Texts(source, usable, dict(sorted(reasons.items())), digest.hexdigest())
