"""From simulated levels to activations.

A simulator says levels 0..10; a latent's activation has its own unit and its own idea of how rare it is. N tokens,
S latents. Everything is fitted on text that is not evaluated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from introspect_ray.simulator.base import MAX_LEVEL

HALF_LEVEL = 0.5
"""A level counts as firing from here on: it rounds to a level above zero."""
P2_LEVELS = 10
"""P2's levels are 0..9."""


@runtime_checkable
class Scale(Protocol):
    """Maps levels to activations in the coder's units."""

    def values(self, levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N S"]:
        """Activations; `starts` says which tokens begin a window. A level that is `nan` stays `nan`."""


@dataclass(frozen=True, eq=False)
class Linear:
    """Level 10 is each latent's own unit times ten: its maximum (P2), one unit for all latents (`raw`), or what it is
    worth on the fit texts."""

    units: Float[np.ndarray, " S"]

    def values(self, levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N S"]:  # noqa: ARG002
        return levels * self.units


def linear(maximum: Float[np.ndarray, " S"]) -> Linear:
    """Linear in the level up to each latent's own maximum."""
    return Linear(maximum / MAX_LEVEL)


def raw(maximum: Float[np.ndarray, " S"]) -> Linear:
    """The same unit for all latents, of the median maximum: what a simulator says without knowing the latent."""
    return Linear(np.full_like(maximum, np.median(maximum) / MAX_LEVEL))


def fit_slopes(levels: Float[np.ndarray, "M S"], truth: Float[np.ndarray, "M S"]) -> Linear:
    """Each latent's own unit, of least squared error, as if there were one more token at its highest level on which it
    is silent: what a level is worth is little where the simulator is often wrong. Units are never negative."""
    levels = np.nan_to_num(levels).astype(np.float64)
    squares = (levels**2).sum(0) + (levels**2).max(0)
    units = np.divide((levels * truth).sum(0), squares, out=np.zeros(levels.shape[1]), where=squares > 0)
    return Linear(np.maximum(0.0, units))


@dataclass(frozen=True, eq=False)
class PaperScale:
    """P2 as coded: `linspace(0, maximum, 10)` interpolated at the expected level of 0..9 (interp-notes 4.2).

    Our levels 0..10 are its levels times 10/9. Two defects come with it: a reply that could not be parsed was -1, which
    its loop read as the maximum, and an expected level of 9 or more became 0.
    """

    maximum: Float[np.ndarray, " S"]

    def values(self, levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N S"]:  # noqa: ARG002
        return paper_activation(levels * (P2_LEVELS - 1) / MAX_LEVEL, self.maximum)


def paper_activation(expected: Float[np.ndarray, "N S"], maximum: Float[np.ndarray, " S"]) -> Float[np.ndarray, "N S"]:
    """P2's activation at an expected level of 0..9, defects included; -1 stands for a reply that was not parsed."""
    linear_part = expected / (P2_LEVELS - 1) * maximum
    return np.where(expected < 0, maximum, np.where(expected >= P2_LEVELS - 1, 0.0, linear_part))


@dataclass(frozen=True, eq=False)
class Detected:
    """First whether a latent fires, then how strongly: zero below its threshold, one height from there on."""

    thresholds: Float[np.ndarray, " S"]
    heights: Float[np.ndarray, " S"]

    def values(self, levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N S"]:  # noqa: ARG002
        fired = np.where(levels >= self.thresholds, self.heights, 0.0)
        return np.where(np.isnan(levels), np.nan, fired)


def fit_detected(levels: Float[np.ndarray, "N S"], truth: Float[np.ndarray, "N S"]) -> Detected:
    """Each latent's threshold and height of least squared error, among thresholds 0.5, 1, ... 10.

    With n predicted firings on which the true activations sum to t, the height is t / (n + 1), as if there were one
    more on which it is silent, and the squared error falls by t^2 / (n + 1) against saying nothing. A latent for which
    no threshold helps has the height 0. Of equally good thresholds the highest is taken.
    """
    levels = np.nan_to_num(levels)
    best = np.zeros(levels.shape[1])
    thresholds = np.full(levels.shape[1], np.inf)
    heights = np.zeros(levels.shape[1])
    for threshold in np.arange(MAX_LEVEL, 0.0, -HALF_LEVEL):
        fires = levels >= threshold
        count, total = fires.sum(0), np.where(fires, truth, 0.0).sum(0)
        gain = total**2 / (count + 1)
        better = gain > best
        best = np.where(better, gain, best)
        thresholds = np.where(better, threshold, thresholds)
        heights = np.where(better, total / (count + 1), heights)
    return Detected(thresholds, heights)


@dataclass(frozen=True, eq=False)
class InContext:
    """A threshold that depends on the token's context.

    A latent fires where a logistic model, one for all latents, says so from the level, the level before, how far the
    level is below the window's highest so far, how much all the line's latents together are said to fire at this
    token, and how rare the latent is. The line's latents are those up to its `max_fraction`, whatever the fraction that
    is replaced: one model serves all fractions.
    """

    weights: Float[np.ndarray, " features"]
    prior: Float[np.ndarray, " S"]
    """Log odds of firing."""
    cut: float
    heights: Float[np.ndarray, " S"]

    def values(self, levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N S"]:
        fires = _log_odds(np.nan_to_num(levels), starts, self.prior, self.weights) >= self.cut
        return np.where(np.isnan(levels), np.nan, np.where(fires, self.heights, 0.0))


def fit_in_context(
    levels: Float[np.ndarray, "N S"],
    truth: Float[np.ndarray, "M S"],
    starts: Bool[np.ndarray, " N"],
    measured: Int[np.ndarray, " M"],
    density: Float[np.ndarray, " S"],
    norms: Float[np.ndarray, " S"],
) -> InContext:
    """The logistic model by Newton's method (ridge 1), and the cut of least squared error of what is decoded.

    Args:
        measured: tokens of the windows at which `truth` is known; its rows belong to them.
        norms: length of each latent's decoder row, so that errors count as they do in the output.
    """
    known = ~np.isnan(levels[measured])
    levels = np.nan_to_num(levels)
    prior = np.log(density + 1e-6) - np.log1p(-np.minimum(density, 1 - 1e-6))
    features = _features(levels, starts, prior)[measured]
    weights = _logistic(features[known], (truth > 0)[known].astype(np.float64))
    odds = features @ weights
    best = (0.0, np.inf, np.zeros(truth.shape[1]))
    for cut in np.linspace(-4, 3, 15):
        said = (odds >= cut) & known
        total = np.where(said, truth, 0.0).sum(0)
        heights = total / (said.sum(0) + 1)
        gain = float((total * heights * norms**2).sum())
        if gain > best[0]:
            best = (gain, float(cut), heights)
    return InContext(weights, prior, best[1], best[2])


NUM_FEATURES = 6


def _features(
    levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"], prior: Float[np.ndarray, " S"]
) -> Float[np.ndarray, "N S features"]:
    before = np.vstack([np.zeros((1, levels.shape[1])), levels[:-1]])
    before[starts] = 0
    highest = levels.copy()
    bounds = [0, *np.flatnonzero(starts), len(levels)]
    for begin, end in pairwise(bounds):
        np.maximum.accumulate(levels[begin:end], axis=0, out=highest[begin:end])
    crowd = np.log1p((levels / MAX_LEVEL).sum(1, keepdims=True))
    columns = [
        np.ones_like(levels),
        levels / MAX_LEVEL,
        before / MAX_LEVEL,
        (levels - highest) / MAX_LEVEL,
        np.broadcast_to(crowd, levels.shape),
        np.broadcast_to(prior / 10, levels.shape),
    ]
    return np.stack(columns, axis=-1)


def _log_odds(
    levels: Float[np.ndarray, "N S"],
    starts: Bool[np.ndarray, " N"],
    prior: Float[np.ndarray, " S"],
    weights: Float[np.ndarray, " features"],
) -> Float[np.ndarray, "N S"]:
    return _features(levels, starts, prior) @ weights


def _logistic(
    features: Float[np.ndarray, "rows features"], fires: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " features"]:
    """Weights of a logistic regression with ridge 1, by 12 Newton steps from zero."""
    weights = np.zeros(features.shape[1])
    for _ in range(12):
        chance = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (fires - chance) - weights
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + np.eye(len(weights))
        step = np.linalg.solve(curvature, slope)
        weights = weights + step
        if np.abs(step).max() < 1e-6:
            break
    return weights


def contrasts(
    levels: Float[np.ndarray, "N S"], truth_levels: Float[np.ndarray, "N S"], pool: Float[np.ndarray, "N C"]
) -> Int[np.ndarray, " S"]:
    """For each latent the column of `pool` whose subtraction brings its levels closest to the truth; -1: none.

    "This, but not that": the description of another latent, where it is said to fire, takes back what the latent's own
    description says. Only tokens on which a latent is said to fire count, and the error must fall by a tenth; where
    `pool` is `nan`, it takes nothing back.
    """
    chosen = np.full(levels.shape[1], -1)
    for column in range(levels.shape[1]):
        said = np.flatnonzero(levels[:, column] >= HALF_LEVEL)
        if not len(said):
            continue
        own, true = levels[said, column], truth_levels[said, column]
        before = np.square(own - true)[:, None]
        after = np.square(np.maximum(0.0, own[:, None] - pool[said]) - true[:, None])
        errors = np.where(np.isnan(after), before, after).sum(0)
        best = int(errors.argmin())
        if errors[best] < 0.9 * np.square(own - true).sum():
            chosen[column] = best
    return chosen


def combined(levels: Sequence[Float[np.ndarray, " N"]], how: str) -> Float[np.ndarray, " N"]:
    """Levels of one latent under several descriptions as one: `max` or `mean`; `nan` where any is missing."""
    stacked = np.stack(levels)
    return stacked.max(0) if how == "max" else stacked.mean(0)
