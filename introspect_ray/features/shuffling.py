"""Batches from a stream of activations: texts in a seeded order, rows shuffled within bounded windows.

    text order (a permutation per epoch) -> blocks of texts -> rows of activations -> windows -> shuffled batches

What a step reads follows from the seed and the step, so a run that goes on needs only the place in the stream where its
window begins. R rows of a part, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_WINDOWS_PER_SEED = 1 << 31
"""Windows of two seeds are shuffled differently up to so many."""


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def block_texts(block: int, num_texts: int, size: int, seed: int | None) -> list[int]:
    """Numbers of the `size` texts of a block of an endless stream: every text once before any comes again.

    Without a seed the order is that of the texts, and they come once: the last block is shorter.
    """
    places = range(block * size, (block + 1) * size)
    if seed is None:
        return [place for place in places if place < num_texts]
    return [int(_permutation(num_texts, seed, place // num_texts)[place % num_texts]) for place in places]


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive rows of one block, all columns (what is read, and what is to be written) alike in length."""

    block: int
    first: int
    """Number of its first row within the block."""
    columns: tuple[Tensor, ...]
    lost: int = 0
    """Rows that are not there because they were not finite."""

    def __len__(self) -> int:
        return len(self.columns[0])


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive rows of the stream that are shuffled together."""

    block: int
    first: int
    """Where in the stream it begins: the number of its first row within `block`."""
    columns: tuple[Tensor, ...]
    lost: int
    """Rows lost in the parts that begin in it."""


def windows(parts: Iterable[Part], size: int) -> Iterator[Window]:
    """Windows of exactly `size` rows; what is left when the stream ends is dropped."""
    columns: list[Tensor] = []
    start, filled, lost = (0, 0), 0, 0
    for part in parts:
        taken = 0
        lost += part.lost
        while taken < len(part):
            if not filled:
                start = part.block, part.first + taken
                columns = [column.new_empty(size, *column.shape[1:]) for column in part.columns]
            count = min(size - filled, len(part) - taken)
            for column, source in zip(columns, part.columns, strict=True):
                column[filled : filled + count] = source[taken : taken + count]
            filled, taken = filled + count, taken + count
            if filled == size:
                yield Window(*start, tuple(columns), lost)
                columns, filled, lost = [], 0, 0


def window_batches(
    columns: Sequence[Tensor], batch_size: int, seed: int, number: int, skip: int
) -> Iterator[tuple[Tensor, ...]]:
    """The rows of window `number` in a seeded order, in float32, without the first `skip` batches."""
    generator = torch.Generator().manual_seed(seed * _WINDOWS_PER_SEED + number)
    order = torch.randperm(len(columns[0]), generator=generator)
    for rows in list(order.split(batch_size))[skip:]:
        yield tuple(column[rows].float() for column in columns)


def pieces(ids: Sequence[int], max_tokens: int, bos: int | None) -> list[list[int]]:
    """A text in pieces of at most `max_tokens` tokens; where it begins with `bos`, so does every piece."""
    if bos is None or not ids or ids[0] != bos:
        return [list(ids[start : start + max_tokens]) for start in range(0, len(ids), max_tokens)]
    rest, step = ids[1:], max_tokens - 1
    return [[bos, *rest[start : start + step]] for start in range(0, max(1, len(rest)), step)]
