"""Which examples make up which optimizer step: a function of the seed and the step alone, so resuming loses nothing.

The order is one permutation per epoch, read on end to end; step `s` takes the next `batch_size` places. With weights an
epoch has as many places as the datasets have examples; a dataset gets its share of them and fills it with its own
permutations, read on from epoch to epoch. Within a step the examples are dealt to the workers, joined into rows and
cut into micro-batches. None of this changes the loss, the sum over all answer tokens of the step over their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROWS_TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Rows per micro-batch for which a layout is worked out."""

Row = list[int]
"""Indices of the examples that stand in one row."""


def num_steps(epochs: float, num_examples: int, batch_size: int) -> int:
    """Optimizer steps that go through all examples so often."""
    return max(1, math.ceil(epochs * num_examples / batch_size))


def step_indices(
    step: int, batch_size: int, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None
) -> list[int]:
    """Examples of one optimizer step (counted from 0), in the order of the epochs' permutations.

    Args:
        sizes: examples of each dataset; an index counts through all datasets.
        weights: how often each dataset is drawn from, in relation to the others; none draws all examples equally often.
    """
    count = sum(sizes)
    assert count > 0
    start = step * batch_size
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, offset = divmod(start + len(indices), count)
        indices += _epoch(epoch, seed, tuple(sizes), _weights(sizes, weights))[
            offset : offset + batch_size - len(indices)
        ].tolist()
    return indices


def _weights(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """One dataset has nothing to be weighed against."""
    return None if weights is None or len(sizes) == 1 else tuple(weights)


@lru_cache(maxsize=2)  # a step may reach into the next epoch
def _epoch(epoch: int, seed: int, sizes: tuple[int, ...], weights: tuple[float, ...] | None) -> np.ndarray:
    """All places of one epoch in their order."""
    count = sum(sizes)
    order = np.random.default_rng((seed % 2**32, epoch)).permutation(count)
    if weights is None:
        return order
    drawn = []
    for number, (size, places) in enumerate(zip(sizes, epoch_places(count, weights), strict=True)):
        own_epochs, own_places = np.divmod(np.arange(epoch * places, (epoch + 1) * places), size)
        chosen = np.empty(places, dtype=np.int64)
        for own_epoch in np.unique(own_epochs):
            own_order = np.random.default_rng((seed % 2**32, number, int(own_epoch))).permutation(size)
            here = own_epochs == own_epoch
            chosen[here] = own_order[own_places[here]]
        drawn.append(sum(sizes[:number]) + chosen)
    return np.concatenate(drawn)[order]


def epoch_places(count: int, weights: Sequence[float]) -> list[int]:
    """How many of the `count` places of an epoch each dataset gets: largest remainders, but none is left out."""
    assert count >= len(weights)
    exact = count * np.asarray(weights, dtype=np.float64) / sum(weights)
    places = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (missing := count - places.sum()) != 0:
        # Too few: to whom most is due. Too many, because some were lifted to one: from whom has most above its due.
        due = exact - places
        places[int(np.argmax(due)) if missing > 0 else int(np.argmin(np.where(places > 1, due, np.inf)))] += np.sign(
            missing
        )
    return [int(number) for number in places]


def share(indices: Sequence[int], lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """One worker's examples of a step: dealt out in order of length, so that all workers get about equal work.

    Args:
        lengths: tokens of every example of the dataset.
    """
    ranked = sorted(indices, key=lambda index: (lengths[index], index))
    return ranked[rank::world_size]


@dataclass(frozen=True)
class Packing:
    """What rows of several examples cost a model."""

    width: int
    """Width of the residual stream: attending over `6 * width` places is as much work as all else in a layer, whose
    matrices have about `12 * width**2` weights. Measured on CPUs, widths 160 and 512: 8 and 6 times the width."""
    one_row: bool = False
    """One row per micro-batch, over which attention costs nothing beside the examples' own (flash attention)."""

    def work(self, row_length: int, is_packed: bool) -> float:
        """Of one token in a row, in units of what it costs beside attention. Plain rows are causal: half is skipped."""
        return 1 + row_length / (6 * self.width) * (1 if is_packed else 0.5)


def arrange(
    indices: Sequence[int], lengths: Sequence[int], max_tokens: int, packing: Packing | None
) -> list[list[Row]]:
    """Micro-batches of rows whose padded size stays within `max_tokens`; a longer example goes alone.

    Longer rows leave less padding and attend over more that is not theirs; the cheapest row length is taken.
    """
    plain = micro_batches([[index] for index in indices], lengths, max_tokens)
    if packing is None or not indices:
        return plain
    if packing.one_row:
        return [[row] for row in pack_rows(indices, lengths, max_tokens)]
    shortest = min(lengths[index] for index in indices)
    capacities = [max_tokens // rows for rows in ROWS_TRIED if max_tokens // rows >= 2 * shortest]
    layouts = [plain]
    layouts += [micro_batches(pack_rows(indices, lengths, capacity), lengths, max_tokens) for capacity in capacities]
    return min(layouts, key=lambda layout: sum(_work(batch, lengths, packing) for batch in layout))


def pack_rows(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[Row]:
    """Rows of at most `capacity` tokens, the longest example first, each into the first row with room for it.

    An example longer than that has a row of its own.
    """
    rows: list[Row] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        place = next((number for number, left in enumerate(room) if lengths[index] <= left), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def micro_batches(rows: Sequence[Row], lengths: Sequence[int], max_tokens: int) -> list[list[Row]]:
    """Runs of rows of similar length whose padded size stays within `max_tokens`; a row longer than that goes alone."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (row_length(row, lengths), row)):
        # Sorted by length, the newest row is the longest: it sets the padded length of the whole group.
        if groups and (len(groups[-1]) + 1) * row_length(row, lengths) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def row_length(row: Row, lengths: Sequence[int]) -> int:
    """Tokens of one row."""
    return sum(lengths[index] for index in row)


def _work(batch: Sequence[Row], lengths: Sequence[int], packing: Packing) -> float:
    longest = max(row_length(row, lengths) for row in batch)
    return len(batch) * longest * packing.work(longest, any(len(row) > 1 for row in batch))


def step_seed(step: int, seed: int, rank: int) -> int:
    """Seed of one worker's random draws (dropout) in one step."""
    return int(np.random.SeedSequence((seed % 2**32, step, rank)).generate_state(1, np.uint64)[0] >> 1)
