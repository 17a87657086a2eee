"""From what was kept of all texts to exemplars: which row is of which kind, and which windows are silent.

R rows, W windows of the pool; windows have any number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from introspect_ray.features.collection import NUM_SPLITS, Limits, Pool, Rows, group_of, no_rows, peak_keys, ranked
from introspect_ray.features.collection import sample_keys as hash_keys
from introspect_ray.features.exemplars import ExemplarKind

KINDS: tuple[ExemplarKind, ...] = ("top", "quantile", "random", "silent")
"""As numbered on disk."""
TOP, QUANTILE, RANDOM, SILENT = range(len(KINDS))


@dataclass(frozen=True, eq=False)
class Picked:
    """Exemplars of some latents. A window may be of several kinds; a random one where it is silent has no row."""

    rows: Rows
    kinds: Int[np.ndarray, " R"]
    quantiles: Int[np.ndarray, " R"]
    """-1 where the kind is another one."""


def pick_firing(rows: Rows, pool: Pool, limits: Limits, quantiles: int, num_random: int) -> Picked:
    """The `top`, `quantile` and `random` exemplars among the rows kept of all texts.

    Quantile q of Q holds the members of a latent's sample whose peaks are at ranks [q n / Q, (q + 1) n / Q) of all n
    in its split: as the sample is uniform, these are its estimate of the quantiles of all peaks.
    """
    groups = group_of(rows.latents, rows.splits)
    by_peak = ranked(groups, peak_keys(rows.peaks), rows.windows)
    by_hash = ranked(groups, hash_keys(rows.windows, rows.latents, limits.seed), rows.windows)
    top = np.flatnonzero(by_peak < limits.top)
    top = top[np.lexsort((by_peak[top], groups[top]))]
    sample = np.flatnonzero(by_hash < limits.sample)
    rank = ranked(groups[sample], ~peak_keys(rows.peaks[sample]), rows.windows[sample])
    sizes = np.bincount(groups[sample], minlength=1)[groups[sample]]
    order = np.lexsort((rank, groups[sample]))
    quantile = (rank * quantiles // sizes)[order]
    chosen = random_windows(pool, num_random)
    random = np.flatnonzero(np.isin(rows.windows, pool.windows[chosen]))
    picked = np.concatenate([top, sample[order], random])
    kinds = np.repeat([TOP, QUANTILE, RANDOM], [len(top), len(sample), len(random)])
    quantile = np.concatenate([np.full(len(top), -1), quantile, np.full(len(random), -1)])
    return Picked(rows.take(picked), kinds, quantile)


def random_windows(pool: Pool, num_random: int) -> Bool[np.ndarray, " W"]:
    """Which windows of the pool are the random ones: the first of each split."""
    chosen = np.zeros(len(pool.windows), dtype=bool)
    for split in range(NUM_SPLITS):
        chosen[np.flatnonzero(pool.splits == split)[:num_random]] = True
    return chosen


class SilentFinder:
    """Finds windows of the pool that are like a latent's top ones, and in which it never fires.

    Alike is what shares many tokens that are rare otherwise: a window's score is the sum, over its different tokens, of
    the share of the latent's top windows that hold the token, times log(W / windows of the pool that hold it). The
    tokens on which a latent fires are in most of its top windows and so count most. A window without any such token is
    never taken.
    """

    def __init__(self, pool: Pool, tokens: Sequence[Int[np.ndarray, " _"]]):
        """`tokens` are those of the pool's windows."""
        self._pool = pool
        self._vocabulary, numbers = np.unique(np.concatenate([np.empty(0, np.int64), *tokens]), return_inverse=True)
        nothing = len(self._vocabulary)  # stands for padding and for a token that is there already
        longest = max(map(len, tokens), default=0)
        self._tokens = np.full((len(tokens), longest), nothing, dtype=np.int64)
        start = 0
        for row, window in enumerate(tokens):
            found = np.unique(numbers[start : start + len(window)])
            self._tokens[row, : len(found)] = found
            start += len(window)
        holders = np.bincount(self._tokens.ravel(), minlength=nothing + 1)[:nothing]
        self._rarity = np.log(max(1, len(tokens)) / np.maximum(holders, 1))

    def find(
        self, top: Sequence[Int[np.ndarray, " _"]], split: int, fires: UInt64[np.ndarray, " windows"], count: int
    ) -> UInt64[np.ndarray, " found"]:
        """Ids of the `count` most similar windows of a split at most, the most similar first.

        Args:
            top: tokens of the latent's top windows.
            fires: windows in which the latent fires.
        """
        of_split = np.flatnonzero(self._pool.splits == split)
        if not len(top) or not len(of_split):
            return np.empty(0, np.uint64)
        scores = self._scores(top)[of_split]
        scores[np.isin(self._pool.windows[of_split], fires)] = 0
        best = np.argsort(-scores, kind="stable")[:count]
        return self._pool.windows[of_split[best[scores[best] > 0]]]

    def _scores(self, top: Sequence[Int[np.ndarray, " _"]]) -> Float[np.ndarray, " W"]:
        tokens = np.concatenate([np.unique(window) for window in top])
        place = np.searchsorted(self._vocabulary, tokens)
        known = np.append(self._vocabulary, -1)[place] == tokens
        shares = np.bincount(place[known], minlength=len(self._vocabulary)) / len(top)
        return np.append(shares * self._rarity, 0.0)[self._tokens].sum(axis=1)


def pick_silent(
    picked: Picked,
    kept: Rows,
    pool: Pool,
    finder: SilentFinder,
    tokens: Mapping[int, Int[np.ndarray, " _"]],
    count: int,
) -> Picked:
    """Rows without activations: the silent windows of every latent and split that has top ones.

    Args:
        kept: all rows of these latents, among them all that lie in the pool.
        tokens: of every top window, by its id.
    """
    top = np.flatnonzero(picked.kinds == TOP)
    groups = group_of(picked.rows.latents[top], picked.rows.splits[top])
    inside = kept.take(np.flatnonzero(pool.has(kept.windows)))
    by_latent = np.argsort(inside.latents, kind="stable")
    latents: list[int] = []
    splits: list[int] = []
    found: list[np.ndarray] = []
    for members in np.split(top, np.flatnonzero(np.diff(groups)) + 1):
        if not len(members):
            continue
        latent, split = int(picked.rows.latents[members[0]]), int(picked.rows.splits[members[0]])
        low, high = np.searchsorted(inside.latents[by_latent], [latent, latent + 1])
        examples = [tokens[int(window)] for window in picked.rows.windows[members]]
        windows = finder.find(examples, split, inside.windows[by_latent[low:high]], count)
        latents += [latent] * len(windows)
        splits += [split] * len(windows)
        found.append(windows)
    empty = no_rows()
    rows = Rows(
        np.array(latents, dtype=np.int32),
        np.array(splits, dtype=np.int8),
        np.concatenate([empty.windows, *found]),
        np.zeros(len(latents), dtype=np.float32),
        np.zeros(len(latents) + 1, dtype=np.int64),
        empty.positions,
        empty.values,
    )
    return Picked(rows, np.full(len(rows), SILENT), np.full(len(rows), -1))
