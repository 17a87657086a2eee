"""What the losses of all texts say about each condition, with intervals.

Each measure is a ratio of sums over texts, so a resample of texts gives it anew: all conditions are resampled with the
same texts, which is what makes their differences paired. B texts, S latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from introspect_ray.evaluation.intervals import Bootstrap, Interval, ratio_interval
from introspect_ray.rewrite.measure import ORIGINAL, TRUE, ZERO


@dataclass(frozen=True, eq=False)
class Losses:
    """Sums per text, in nats, of every condition."""

    tokens: Float[np.ndarray, " B"]
    """Measured tokens of each text."""
    cross_entropy: Mapping[str, Float[np.ndarray, " B"]]
    divergence: Mapping[str, Float[np.ndarray, " B"]]
    complete: Mapping[str, Bool[np.ndarray, " B"]]
    """Texts in which every chosen latent was simulated; all others are left out of the condition's intervals."""


@dataclass(frozen=True)
class ConditionScores:
    """One condition. Intervals over texts; nats per token, except for shares."""

    increase: Interval
    """Cross-entropy above the original's."""
    divergence: Interval
    """KL from the original's next-token distributions."""
    recovered: Interval
    """Share of the gap between zero latents and true latents that is closed: 1 as good as true latents, 0 as bad as
    none at all. `nan` if true latents are no better than none."""
    regained: Interval | None
    """Share of what deleting the same latents costs that simulating them gets back: 1 as good as their true values, 0
    as bad as without them. `nan` if deleting them costs nothing: then whatever is said of them is no evidence. None if
    deleting them was not measured."""
    below_zero: Interval
    """How much lower its loss is than that of zero latents: positive is better than deleting all latents."""
    below_deleted: Interval | None
    """How much lower its loss is than with the same latents deleted; none if that was not measured."""
    divergence_below_deleted: Interval | None
    """The same of the divergences, which do not gain by chance."""
    coverage: float
    """Share of texts in which every chosen latent was simulated."""


def condition_scores(losses: Losses, name: str, deleted: str | None, options: Bootstrap) -> ConditionScores:
    """Scores of one condition on the texts that it covers; `deleted` names the condition to be compared with."""
    covered = losses.complete[name]

    def nats(minuend: str, subtrahend: str) -> Float[np.ndarray, " covered"]:
        return (losses.cross_entropy[minuend] - losses.cross_entropy[subtrahend])[covered]

    tokens = losses.tokens[covered]
    below_zero = nats(ZERO, name)
    regained = closer = None
    if deleted is not None:
        regained = ratio_interval(nats(deleted, name), nats(deleted, TRUE), options)
        closer = ratio_interval((losses.divergence[deleted] - losses.divergence[name])[covered], tokens, options)
    return ConditionScores(
        increase=ratio_interval(nats(name, ORIGINAL), tokens, options),
        divergence=ratio_interval(losses.divergence[name][covered], tokens, options),
        recovered=ratio_interval(below_zero, nats(ZERO, TRUE), options),
        regained=regained,
        below_zero=ratio_interval(below_zero, tokens, options),
        below_deleted=ratio_interval(nats(deleted, name), tokens, options) if deleted is not None else None,
        divergence_below_deleted=closer,
        coverage=float(covered.mean()) if len(covered) else math.nan,
    )


@dataclass(frozen=True)
class AgreementScores:
    """How well activations were simulated. A true positive is a token on which a latent truly fires at all and is
    said to fire at half a level or more."""

    specificity: float
    """Share of the silent (latent, token) pairs on which nothing is said to fire."""
    precision: float
    """Share of the pairs said to fire that do."""
    recall: float
    """Share of the firing pairs that are said to fire."""
    correlation: float
    """Pearson's r of said and true activations over tokens: of one latent, or the mean over those that have one."""


def agreement_scores(sums: Float[np.ndarray, "S 9"]) -> tuple[AgreementScores, list[AgreementScores]]:
    """Overall, pairs of all latents counted together, and for each latent; `nan` where there is nothing to divide by.

    `sums`: tokens, true and false positives, false negatives, and the sums of p, t, pp, tt, pt of each latent.
    """
    each = [_agreement(row, _correlation(row)) for row in sums]
    known = [scores.correlation for scores in each if math.isfinite(scores.correlation)]
    return _agreement(sums.sum(0), float(np.mean(known)) if known else math.nan), each


def _agreement(row: Float[np.ndarray, " 9"], correlation: float) -> AgreementScores:
    tokens, hits, alarms, misses = row[:4]
    return AgreementScores(
        specificity=_ratio(tokens - hits - alarms - misses, tokens - hits - misses),
        precision=_ratio(hits, hits + alarms),
        recall=_ratio(hits, hits + misses),
        correlation=correlation,
    )


def _correlation(row: Float[np.ndarray, " 9"]) -> float:
    tokens, predicted, true, squared, true_squared, product = row[0], *row[4:9]
    if not tokens:
        return math.nan
    spread = (squared - predicted**2 / tokens) * (true_squared - true**2 / tokens)
    return _ratio(product - predicted * true / tokens, math.sqrt(spread) if spread > 1e-18 else 0.0)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
