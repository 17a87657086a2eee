"""What is kept of a stream is what a look at everything at once would choose, whatever the order and the parts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from introspect_ray.features.collection import (
    NUM_SPLITS,
    Collector,
    Firings,
    Limits,
    joined,
    kept_rows,
    pool_of,
    sample_keys,
)
from introspect_ray.features.contexts import mixed, window_ids
from introspect_ray.features.picking import KINDS, QUANTILE, RANDOM, TOP, SilentFinder, pick_firing, pick_silent

LATENTS, WINDOWS, TOKENS = 13, 90, 6
LIMITS = Limits(top=4, sample=6, pool=8, seed=3, buffer=1)


class Corpus:
    """Random activations with many equal values, so that ties are common. Window w has `lengths[w]` tokens."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.ids = window_ids("corpus", WINDOWS)
        self.splits = rng.integers(0, NUM_SPLITS, WINDOWS)
        self.lengths = rng.integers(1, TOKENS + 1, WINDOWS)
        values = rng.integers(-6, 5, (WINDOWS, TOKENS, LATENTS)).clip(0) / 2
        self.values = [values[number, :length] for number, length in enumerate(self.lengths)]
        self.tokens = [rng.integers(0, 20, length) for length in self.lengths]

    def collect(self, order, parts: int, limits: Limits = LIMITS) -> list[Collector]:
        """Collectors that saw these windows in this order, each a part of them, three windows at a time."""
        found = []
        for part in np.array_split(order, parts):
            collector = Collector(LATENTS, limits)
            for start in range(0, len(part), 3):
                collector.add(*self.batch(part[start : start + 3]))
            found.append(collector)
        return found

    def batch(self, numbers, not_finite=()):
        values = np.concatenate([self.values[number] for number in numbers]).astype(np.float32)
        tokens, latents = np.nonzero(values)
        first = np.concatenate([[0], np.cumsum(self.lengths[numbers])])
        good = ~np.isin(tokens, not_finite)
        tokens, latents = tokens[good], latents[good]
        firings = Firings(tokens, latents, values[tokens, latents], np.array(not_finite, dtype=np.int64))
        return firings, self.ids[numbers], self.splits[numbers], first

    def ranked(self, latent, split, key):
        """Windows of a split in which a latent fires, by a key and then by id."""
        inside = [w for w in range(WINDOWS) if self.splits[w] == split and self.values[w][:, latent].any()]
        return sorted(inside, key=lambda w: (key(w), self.ids[w]))

    def pool(self, split, limits: Limits = LIMITS):
        salt = mixed(np.array([limits.seed], np.uint64))[0]
        inside = [w for w in range(WINDOWS) if self.splits[w] == split]
        return sorted(inside, key=lambda w: mixed(self.ids[w : w + 1] ^ salt)[0])[: limits.pool]

    def sample(self, latent, split):
        return self.ranked(latent, split, lambda w: self.key(w, latent))[: LIMITS.sample]

    def top(self, latent, split):
        return self.ranked(latent, split, lambda w: -self.values[w][:, latent].max())[: LIMITS.top]

    def key(self, window, latent):
        return sample_keys(self.ids[window : window + 1], np.array([latent], np.int32), LIMITS.seed)[0]


def merged(collectors, limits=LIMITS):
    parts = [collector.kept() for collector in collectors]
    pool = pool_of(
        np.concatenate([pool.windows for _, pool in parts]), np.concatenate([pool.splits for _, pool in parts]), limits
    )
    return kept_rows(joined([rows for rows, _ in parts]), pool, limits), pool


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.mark.parametrize(("parts", "buffer"), [(1, 1), (1, 10**6), (2, 40), (7, 1), (30, 1)])
def test_what_is_kept_is_what_brute_force_chooses(corpus, parts, buffer):
    order = np.random.default_rng(parts).permutation(WINDOWS)
    limits = Limits(**{**vars(LIMITS), "buffer": buffer})
    collectors = corpus.collect(order, parts, limits)
    rows, pool = merged(collectors, limits)
    expected = set()
    pooled = [w for split in range(NUM_SPLITS) for w in corpus.pool(split)]
    assert pool.windows.tolist() == corpus.ids[pooled].tolist()
    for latent in range(LATENTS):
        for split in range(NUM_SPLITS):
            kept = corpus.top(latent, split) + corpus.sample(latent, split)
            kept += [w for w in corpus.pool(split) if corpus.values[w][:, latent].any()]
            expected |= {(latent, int(corpus.ids[w])) for w in kept}
    assert sorted(zip(rows.latents.tolist(), rows.windows.tolist(), strict=True)) == sorted(expected)
    by_id = {int(window): number for number, window in enumerate(corpus.ids)}
    for row in range(len(rows)):
        values = corpus.values[by_id[int(rows.windows[row])]][:, rows.latents[row]]
        entries = slice(rows.offsets[row], rows.offsets[row + 1])
        assert rows.positions[entries].tolist() == np.flatnonzero(values).tolist()
        assert rows.values[entries].tolist() == values[values > 0].tolist()
        assert rows.peaks[row] == values.max()
    everything = np.concatenate(corpus.values)
    assert (sum(collector.counts for collector in collectors) == (everything > 0).sum(0)).all()
    assert (np.max([collector.maxima for collector in collectors], axis=0) == everything.max(0)).all()
    assert sum(collector.num_tokens for collector in collectors) == len(everything)


def test_picked_exemplars_are_the_definition(corpus):
    rows, pool = merged(corpus.collect(np.arange(WINDOWS), 3))
    picked = pick_firing(rows, pool, LIMITS, quantiles=3, num_random=5)
    found = defaultdict(list)
    for latent, split, window, kind, quantile in zip(
        picked.rows.latents, picked.rows.splits, picked.rows.windows, picked.kinds, picked.quantiles, strict=True
    ):
        found[int(latent), int(split), int(kind)].append((int(window), int(quantile)))
    for latent in range(LATENTS):
        for split in range(NUM_SPLITS):
            ids = [int(corpus.ids[w]) for w in corpus.top(latent, split)]
            assert found[latent, split, TOP] == [(window, -1) for window in ids]
            sample = sorted(
                corpus.sample(latent, split), key=lambda w: (corpus.values[w][:, latent].max(), corpus.ids[w])
            )
            expected = [(int(corpus.ids[w]), place * 3 // len(sample)) for place, w in enumerate(sample)]
            assert found[latent, split, QUANTILE] == expected
            fires = {int(corpus.ids[w]) for w in corpus.pool(split)[:5] if corpus.values[w][:, latent].any()}
            assert {window for window, _ in found[latent, split, RANDOM]} == fires


def test_silent_windows_share_rare_tokens_with_top_ones_and_never_fire(corpus):
    rows, pool = merged(corpus.collect(np.arange(WINDOWS), 2))
    by_id = {int(window): number for number, window in enumerate(corpus.ids)}
    finder = SilentFinder(pool, [corpus.tokens[by_id[int(window)]] for window in pool.windows])
    picked = pick_firing(rows, pool, LIMITS, quantiles=3, num_random=5)
    tokens = {window: corpus.tokens[number] for window, number in by_id.items()}
    silent = pick_silent(picked, rows, pool, finder, tokens, count=2)
    found = defaultdict(list)
    for latent, split, window in zip(silent.rows.latents, silent.rows.splits, silent.rows.windows, strict=True):
        found[int(latent), int(split)].append(int(window))
    pooled = [by_id[int(window)] for window in pool.windows]
    holders = Counter(token for w in pooled for token in set(corpus.tokens[w].tolist()))
    several = 0
    for latent in range(LATENTS):
        for split in range(NUM_SPLITS):
            top = corpus.top(latent, split)
            shares = Counter(token for w in top for token in set(corpus.tokens[w].tolist()))
            scores = {
                w: math.fsum(
                    shares[token] / len(top) * math.log(len(pooled) / holders[token])
                    for token in set(corpus.tokens[w].tolist())
                    if top
                )
                for w in corpus.pool(split)
                if not corpus.values[w][:, latent].any()
            }
            best = sorted(scores.values(), reverse=True)[:2]
            chosen = [by_id[window] for window in found[latent, split]]
            assert [round(scores[w], 9) for w in chosen] == [round(score, 9) for score in best if score > 0]
            several += len(chosen)
    assert several > LATENTS
    assert {KINDS[kind] for kind in silent.kinds.tolist()} == {"silent"}


def test_a_window_without_a_shared_token_is_not_silent_but_unlike():
    pool = pool_of(window_ids("x", 4), np.zeros(4, dtype=np.int64), LIMITS)
    finder = SilentFinder(pool, [np.array([number]) for number in range(4)])
    nothing = np.empty(0, np.uint64)
    assert finder.find([np.array([99, 77])], 0, nothing, 3).tolist() == []
    assert finder.find([np.array([2, 99])], 0, nothing, 3).tolist() == [pool.windows[2]]
    assert finder.find([np.array([2])], 0, pool.windows[2:3], 3).tolist() == []
    assert finder.find([np.array([2])], 1, nothing, 3).tolist() == []
    assert (
        SilentFinder(pool_of(nothing, np.empty(0, np.int64), LIMITS), []).find([np.array([1])], 0, nothing, 1).size == 0
    )


def test_windows_with_a_token_that_is_no_number_are_counted_and_not_kept(corpus):
    collector = Collector(LATENTS, LIMITS)
    numbers = np.arange(12)
    batch = corpus.batch(numbers, not_finite=[int(corpus.lengths[:2].sum())])  # the first token of window 2
    collector.add(*batch)
    rows, pool = collector.kept()
    assert collector.num_not_finite == 1
    assert collector.num_tokens == corpus.lengths[:12].sum() - 1
    assert corpus.ids[2] not in rows.windows and corpus.ids[2] not in pool.windows
    without = np.concatenate([corpus.values[2][1:], *(corpus.values[w] for w in numbers if w != 2)])
    assert (collector.counts == (without > 0).sum(0)).all()


def test_waiting_rows_are_bounded(corpus):
    limits = Limits(top=1, sample=1, pool=0, seed=0, buffer=20)
    collector = Collector(LATENTS, limits)
    for number in range(WINDOWS):
        collector.add(*corpus.batch(np.array([number])))
        assert len(collector._rows) <= 2 * LATENTS * NUM_SPLITS
        assert collector._num_waiting <= max(20, len(collector._rows))


def test_another_seed_draws_another_sample(corpus):
    samples = []
    for seed in (0, 1):
        rows, _ = merged(corpus.collect(np.arange(WINDOWS), 1, Limits(0, 3, 0, seed, 1)), Limits(0, 3, 0, seed, 1))
        samples.append(set(zip(rows.latents.tolist(), rows.windows.tolist(), strict=True)))
    assert samples[0] != samples[1]
    assert len(samples[0]) == len(samples[1])
