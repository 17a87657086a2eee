"""Which windows are kept of each latent while a stream of activations passes. Arrays only: no model, no files.

    activations of some texts -> Collector.add -> at most so many rows per latent -> Collector.kept -> merged

A row says that one latent fires in one window, and how. Three rules decide which rows are kept, each of them by window
alone, so that what is kept of a union is what is kept of the union of what is kept of its parts:

- `top`: per latent and split, the windows with the largest peak; of equal peaks those with the smaller id;
- `sample`: per latent and split, the windows that come first by a hash of (window, latent, seed): a uniform sample of
  the windows in which it fires, whatever the order in which they come;
- `pool`: per split, the windows that come first by a hash of (window, seed), the same for all latents: a uniform sample
  of all windows, each with every latent that fires in it.

R rows, E activations, F latents, W windows, N tokens, S splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16, UInt32, UInt64

from introspect_ray.features.contexts import mixed

NUM_SPLITS = 3
"""S: train, validation, test (data/splits.py)."""


@dataclass(frozen=True)
class Limits:
    """How much is kept, each per split."""

    top: int
    """Rows of a latent by peak."""
    sample: int
    """Rows of a latent by hash."""
    pool: int
    """Windows of the pool."""
    seed: int
    buffer: int
    """Rows that may wait before all are cut back to what is kept."""


@dataclass(frozen=True, eq=False)
class Rows:
    """R pairs of a latent and a window in which it fires; row i has activations `offsets[i]` to `offsets[i + 1]`."""

    latents: Int[np.ndarray, " R"]
    splits: Int[np.ndarray, " R"]
    windows: UInt64[np.ndarray, " R"]
    peaks: Float[np.ndarray, " R"]
    offsets: Int[np.ndarray, " R_and_1"]
    positions: UInt16[np.ndarray, " E"]
    """Tokens of the window, counted from 0, in order."""
    values: Float[np.ndarray, " E"]

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, chosen: Int[np.ndarray, " chosen"]) -> Rows:
        """These rows, in this order."""
        lengths = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Rows(
            self.latents[chosen],
            self.splits[chosen],
            self.windows[chosen],
            self.peaks[chosen],
            offsets,
            self.positions[entries],
            self.values[entries],
        )


def no_rows() -> Rows:
    return Rows(
        latents=np.empty(0, np.int32),
        splits=np.empty(0, np.int8),
        windows=np.empty(0, np.uint64),
        peaks=np.empty(0, np.float32),
        offsets=np.zeros(1, np.int64),
        positions=np.empty(0, np.uint16),
        values=np.empty(0, np.float32),
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """All rows, part after part."""
    if not parts:
        return no_rows()
    starts = np.cumsum([0, *(len(part.values) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    return Rows(
        np.concatenate([part.latents for part in parts]),
        np.concatenate([part.splits for part in parts]),
        np.concatenate([part.windows for part in parts]),
        np.concatenate([part.peaks for part in parts]),
        np.concatenate([*offsets, starts[-1:]]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.values for part in parts]),
    )


def in_order(rows: Rows) -> Rows:
    """The rows by latent, split and window."""
    return rows.take(np.lexsort((rows.windows, rows.splits, rows.latents)))


@dataclass(frozen=True, eq=False)
class Pool:
    """Windows of all splits, in order of their split, then of their priority."""

    windows: UInt64[np.ndarray, " W"]
    splits: Int[np.ndarray, " W"]

    def has(self, windows: UInt64[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        return np.isin(windows, self.windows)


def pool_of(windows: UInt64[np.ndarray, " W"], splits: Int[np.ndarray, " W"], limits: Limits) -> Pool:
    """The pool that these windows, no two of them equal, give."""
    priority = mixed(windows ^ _salt(limits.seed))
    order = np.lexsort((priority, splits))
    kept = order[_ranks(splits[order]) < limits.pool]
    return Pool(windows[kept], splits[kept])


# --- the three rules --------------------------------------------------------------------------------------------


def peak_keys(peaks: Float[np.ndarray, " R"]) -> UInt32[np.ndarray, " R"]:
    """Smaller for larger peaks, equal for equal ones: the bits of positive floats are in the order of the floats."""
    return ~np.ascontiguousarray(peaks, np.float32).view(np.uint32)


def sample_keys(
    windows: UInt64[np.ndarray, " R"], latents: Int[np.ndarray, " R"], seed: int
) -> UInt32[np.ndarray, " R"]:
    """Random over (window, latent), always the same for the same."""
    by_latent = mixed(latents.astype(np.uint64) + _salt(seed))
    return (mixed(windows ^ by_latent) >> np.uint64(32)).astype(np.uint32)


def ranked(
    groups: Int[np.ndarray, " R"], keys: UInt32[np.ndarray, " R"], windows: UInt64[np.ndarray, " R"]
) -> Int[np.ndarray, " R"]:
    """Place of every row in its group, from 0, by key and then by window."""
    both = (groups.astype(np.uint64) << np.uint64(32)) | keys.astype(np.uint64)
    order = np.argsort(both)
    found = both[order]
    tied = np.zeros(len(both), dtype=bool)
    tied[1:] = found[1:] == found[:-1]
    tied[:-1] |= tied[1:]
    if tied.any():
        rows = order[tied]
        order[tied] = rows[np.lexsort((windows[rows], both[rows]))]
    ranks = np.empty(len(both), dtype=np.int64)
    ranks[order] = _ranks(groups[order])
    return ranks


def group_of(latents: Int[np.ndarray, " R"], splits: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """Number of (latent, split)."""
    return latents.astype(np.int64) * NUM_SPLITS + splits


def kept_rows(rows: Rows, pool: Pool, limits: Limits) -> Rows:
    """The rows that any of the three rules keeps, in their order."""
    return rows.take(np.flatnonzero(_top_and_sample(rows, limits)[0] | pool.has(rows.windows)))


def _top_and_sample(rows: Rows, limits: Limits) -> tuple[Bool[np.ndarray, " R"], tuple[np.ndarray, np.ndarray]]:
    """Whether top or sample keeps each row, and the ranks by both."""
    groups = group_of(rows.latents, rows.splits)
    by_peak = ranked(groups, peak_keys(rows.peaks), rows.windows)
    by_hash = ranked(groups, sample_keys(rows.windows, rows.latents, limits.seed), rows.windows)
    return (by_peak < limits.top) | (by_hash < limits.sample), (by_peak, by_hash)


def _ranks(groups: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """Place in its group of every row, where rows of a group are neighbours."""
    begins = np.ones(len(groups), dtype=bool)
    begins[1:] = groups[1:] != groups[:-1]
    starts = np.flatnonzero(begins)
    return np.arange(len(groups)) - np.repeat(starts, np.diff([*starts, len(groups)]))


def _salt(seed: int) -> np.uint64:
    return mixed(np.array([seed % 2**64], dtype=np.uint64))[0]


# --- streaming --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Firings:
    """E activations above 0 of N tokens that lie in W windows; those in the same window are ordered by token."""

    tokens: Int[np.ndarray, " E"]
    latents: Int[np.ndarray, " E"]
    values: Float[np.ndarray, " E"]
    not_finite: Int[np.ndarray, " tokens"]
    """Tokens at which the coder read or wrote something that is no number; none of `tokens` is among them."""


class Collector:
    """What is kept of one coder's activations. Memory grows with `limits` and F, not with the tokens that pass."""

    def __init__(self, num_latents: int, limits: Limits):
        self.limits = limits
        self.counts = np.zeros(num_latents, dtype=np.int64)
        """Tokens at which each latent fires."""
        self.maxima = np.zeros(num_latents, dtype=np.float32)
        self.num_tokens = 0
        """Tokens seen whose activations are numbers."""
        self.num_not_finite = 0
        """Tokens seen whose activations are not."""
        self._pool = Pool(np.empty(0, np.uint64), np.empty(0, np.int64))
        self._rows = no_rows()
        self._waiting: list[Rows] = []
        self._num_waiting = 0
        groups = num_latents * NUM_SPLITS
        # A row whose key is larger is behind so many of its group already that it cannot be kept.
        self._worst_peak = np.full(groups, np.iinfo(np.uint32).max, dtype=np.uint32)
        self._worst_sample = np.full(groups, np.iinfo(np.uint32).max, dtype=np.uint32)

    def add(
        self,
        firings: Firings,
        windows: UInt64[np.ndarray, " W"],
        splits: Int[np.ndarray, " W"],
        first: Int[np.ndarray, " W_and_1"],
    ) -> None:
        """Take in the tokens of W whole windows, none of which was there before; `first` as in `Cuts`.

        A window with a token that is not finite counts with its other tokens, but is not kept: nobody knows what the
        latents do there.
        """
        window_of = np.repeat(np.arange(len(windows)), np.diff(first))
        good = np.ones(len(windows), dtype=bool)
        good[window_of[firings.not_finite]] = False
        self.num_tokens += int(first[-1]) - len(firings.not_finite)
        self.num_not_finite += len(firings.not_finite)
        self.counts += np.bincount(firings.latents, minlength=len(self.counts))
        self._pool = pool_of(
            np.concatenate([self._pool.windows, windows[good]]),
            np.concatenate([self._pool.splits, splits[good]]),
            self.limits,
        )
        if len(firings.tokens) == 0:
            return
        pairs = firings.latents.astype(np.int64) * len(windows) + window_of[firings.tokens]
        order = np.argsort(pairs, kind="stable")  # tokens of a pair stay in order
        pairs, values, tokens = pairs[order], firings.values[order].astype(np.float32), firings.tokens[order]
        starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
        latents, numbers = np.divmod(pairs[starts], len(windows))
        peaks = np.maximum.reduceat(values, starts)
        np.maximum.at(self.maxima, latents, peaks)
        rows = Rows(
            latents.astype(np.int32),
            splits[numbers].astype(np.int8),
            windows[numbers],
            peaks,
            np.concatenate([starts, [len(values)]]),
            (tokens - np.repeat(first[numbers], np.diff([*starts, len(values)]))).astype(np.uint16),
            values,
        )
        self._keep(rows.take(np.flatnonzero(good[numbers] & self._may_stay(rows))))

    def kept(self) -> tuple[Rows, Pool]:
        """The rows kept of all that passed, by latent, split and window; and the pool."""
        self._cut_back()
        return in_order(self._rows), self._pool

    def _may_stay(self, rows: Rows) -> Bool[np.ndarray, " R"]:
        groups = group_of(rows.latents, rows.splits)
        by_peak = peak_keys(rows.peaks) <= self._worst_peak[groups]
        by_hash = sample_keys(rows.windows, rows.latents, self.limits.seed) <= self._worst_sample[groups]
        return by_peak | by_hash | self._pool.has(rows.windows)

    def _keep(self, rows: Rows) -> None:
        self._waiting.append(rows)
        self._num_waiting += len(rows)
        if self._num_waiting > max(self.limits.buffer, len(self._rows)):
            self._cut_back()

    def _cut_back(self) -> None:
        rows = joined([self._rows, *self._waiting])
        self._waiting, self._num_waiting = [], 0
        stays, (by_peak, by_hash) = _top_and_sample(rows, self.limits)
        groups = group_of(rows.latents, rows.splits)
        last = by_peak == self.limits.top - 1
        self._worst_peak[groups[last]] = peak_keys(rows.peaks[last])
        last = by_hash == self.limits.sample - 1
        self._worst_sample[groups[last]] = sample_keys(rows.windows[last], rows.latents[last], self.limits.seed)
        self._rows = rows.take(np.flatnonzero(stays | self._pool.has(rows.windows)))
