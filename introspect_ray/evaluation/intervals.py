"""Bootstrap intervals over groups (subjects, questions, latents), the independent units of a split.

Rows of one group share a subject and rise or fall together, so resampling rows would pretend to more evidence than
there is. Groups are resampled instead: the "pairs cluster" bootstrap (Davison and Hinkley 1997, section 3.8; Cameron,
Gelbach and Miller 2008), with percentile limits (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from introspect_ray.evaluation.metrics import Metric, Scored, count_rows

_WEIGHTS_PER_CHUNK = 4_000_000
"""Group weights held at once: bounds memory at about 100 MB whatever the number of groups."""


@dataclass(frozen=True)
class Interval:
    """A value between its lower and upper limit, from `n` rows in `num_groups` groups."""

    value: float
    low: float
    high: float
    n: int
    num_groups: int


@dataclass(frozen=True)
class Bootstrap:
    """How many resamples, the confidence level, and the seed of their own random generator."""

    samples: int
    confidence: float
    seed: int


def bootstrap_intervals(rows: Sequence[Scored], metrics: Sequence[Metric], options: Bootstrap) -> dict[str, Interval]:
    """Each metric's value and limits at level `confidence` = 1 - a.

    G groups are drawn with replacement from the G groups, `samples` times; the limits are the a/2 and 1 - a/2
    quantiles of the metric over these resamples, undefined ones left out. All metrics, and all methods scored on the
    same rows, see the same draws. Two cases where percentiles would be dishonest:

    - One group says nothing about variation between groups: the limits are 0 and 1.
    - All rows right (value 1) or all wrong (value 0): every resample is equal, and the limits would coincide. The far
      limit is the exact binomial one with the groups as trials instead: (a/2)^(1/G) or 1 - (a/2)^(1/G) (Clopper and
      Pearson 1934; about 1 - 3.7/G and 3.7/G at 95%).

    No rows give `nan` throughout.
    """
    if not rows:
        return {metric.name: Interval(np.nan, np.nan, np.nan, 0, 0) for metric in metrics}
    sums = [_group_sums(rows, metric) for metric in metrics]
    num_groups = len(sums[0]) if sums else 0
    resampled = _resample(sums, num_groups, options)
    result = {}
    for metric, group_sums, resamples in zip(metrics, sums, resampled, strict=True):
        value = metric.of_sums(group_sums.sum(axis=0))
        low, high = _limits(value, metric.value(resamples), num_groups, options.confidence)
        result[metric.name] = Interval(value, low, high, len(rows), num_groups)
    return result


def bootstrap_mean(values: Sequence[float], options: Bootstrap, groups: Sequence[int] | None = None) -> Interval:
    """Mean of the values, and its percentile limits over resamples of the groups.

    Without `groups` (one per value) every value is a group of its own. The mean of a resample is over its values, of
    which it may have more or fewer than there are. No values give `nan` throughout; a single group says nothing about
    variation between groups, and its limits are `nan`.
    """
    column = np.asarray(values, dtype=np.float64)
    names, index = np.unique(np.arange(len(column)) if groups is None else np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return Interval(float(column.mean()) if len(column) else np.nan, np.nan, np.nan, len(column), len(names))
    sums, counts = np.bincount(index, weights=column), np.bincount(index)
    means = np.concatenate([(weights @ sums) / (weights @ counts) for weights in _group_weights(len(names), options)])
    low, high = _quantiles(means, options.confidence)
    return Interval(float(column.mean()), low, high, len(column), len(names))


def paired_difference(a: Sequence[Scored], b: Sequence[Scored], metric: Metric, options: Bootstrap) -> Interval:
    """Metric of `a` minus metric of `b`, two methods' answers to the same records, with percentile limits.

    Both sides of a resample hold the same groups, so what makes records hard for both methods cancels. The limits are
    -1 and 1 if there is only one group, `nan` if there are no rows. Where the difference is the same in all resamples
    (two methods that are always right) the limits coincide with it.
    """
    assert sorted(row.record_id for row in a) == sorted(row.record_id for row in b), "methods answered other records"
    if not a:
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    sums = [_group_sums(a, metric), _group_sums(b, metric)]
    num_groups = len(sums[0])
    value = metric.of_sums(sums[0].sum(axis=0)) - metric.of_sums(sums[1].sum(axis=0))
    if num_groups == 1:
        return Interval(value, -1.0, 1.0, len(a), 1)
    left, right = _resample(sums, num_groups, options)
    low, high = _quantiles(metric.value(left) - metric.value(right), options.confidence)
    return Interval(value, low, high, len(a), num_groups)


def ratio_interval(
    numerators: Float[np.ndarray, " groups"], denominators: Float[np.ndarray, " groups"], options: Bootstrap
) -> Interval:
    """Sum of the numerators over sum of the denominators, one of each per group, with percentile limits over groups.

    Both sums of a resample are over the same groups, and calls with equally many groups and the same options draw the
    same ones. A ratio whose denominator is not positive is undefined: `nan` throughout if it is the whole sum, left out
    if it is a resample's. The limits are infinite for one group, which says nothing about others.
    """
    assert numerators.shape == denominators.shape
    num_groups = len(numerators)
    if not num_groups or denominators.sum() <= 0:
        return Interval(np.nan, np.nan, np.nan, num_groups, num_groups)
    value = float(numerators.sum() / denominators.sum())
    if num_groups == 1:
        return Interval(value, -np.inf, np.inf, 1, 1)
    above, below = _resample([numerators[:, None], denominators[:, None]], num_groups, options)
    defined = below[:, 0] > 0
    ratios = np.where(defined, above[:, 0] / np.where(defined, below[:, 0], 1.0), np.nan)
    low, high = _quantiles(ratios, options.confidence)
    return Interval(value, low, high, num_groups, num_groups)


def _group_sums(rows: Sequence[Scored], metric: Metric) -> Float[np.ndarray, "groups counts"]:
    """Counts summed over the rows of each group, groups in text order, so that row order does not matter."""
    names, index = np.unique([row.group for row in rows], return_inverse=True)
    counts = count_rows(metric, rows)
    sums = np.zeros((len(names), counts.shape[1]))
    np.add.at(sums, index, counts)
    return sums


def _resample(
    sums: Sequence[Float[np.ndarray, "groups _"]], num_groups: int, options: Bootstrap
) -> list[Float[np.ndarray, "samples _"]]:
    """Summed counts of every resample, for several metrics under the same draws."""
    chunks = [[weights @ group_sums for group_sums in sums] for weights in _group_weights(num_groups, options)]
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def _group_weights(num_groups: int, options: Bootstrap) -> Iterator[Float[np.ndarray, "chunk groups"]]:
    """How often each group was drawn in each resample: multinomial, G draws over G equally likely groups."""
    generator = np.random.default_rng(options.seed)
    chunk = max(1, _WEIGHTS_PER_CHUNK // num_groups)
    for start in range(0, options.samples, chunk):
        size = min(chunk, options.samples - start)
        drawn = generator.integers(num_groups, size=(size, num_groups)) + num_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups).astype(np.float64)


def _limits(
    value: float, resamples: Float[np.ndarray, " samples"], num_groups: int, confidence: float
) -> tuple[float, float]:
    if np.isnan(value):
        return np.nan, np.nan
    if num_groups == 1:
        return 0.0, 1.0
    if value in (0.0, 1.0) and np.nanmin(resamples) == np.nanmax(resamples):
        far = float(((1 - confidence) / 2) ** (1 / num_groups))
        return (far, 1.0) if value == 1.0 else (0.0, 1 - far)
    return _quantiles(resamples, confidence)


def _quantiles(resamples: Float[np.ndarray, " samples"], confidence: float) -> tuple[float, float]:
    if np.isnan(resamples).all():
        return np.nan, np.nan
    low, high = np.nanquantile(resamples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
