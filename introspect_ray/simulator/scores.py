"""What a description is worth by simulation: predicted levels against true activations, token by token.

    train windows (top, or at the natural base rate) -> calibration, threshold
    held-out windows at the natural base rate        -> correlation, specificity, precision, recall, F1

Held-out windows lie in texts that neither the description, the simulator nor the calibration has seen; they count by
their natural weights (base_rate.py), so a score says what the description is worth on plain text, where almost all
tokens are silent. What is not defined has a reason instead of a value. N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from introspect_ray.features.descriptions import Score
from introspect_ray.features.exemplars import Exemplar
from introspect_ray.simulator.base_rate import NO_WINDOWS, natural_weights, unweighted
from introspect_ray.simulator.calibration import LinearCalibration

PAPER_EXEMPLARS = 20
"""P1 scores the 20 top exemplars of its training text."""
NEVER_FIRES, CONSTANT, NOTHING_PREDICTED, NOT_FINITE = (
    "never_fires",
    "constant_prediction",
    "nothing_predicted",
    "not_finite",
)
METRICS = ("correlation", "paper_compat", "specificity", "precision", "recall", "f1")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Predictions and truth of the tokens of some windows, each with how much it counts."""

    predicted: Float[np.ndarray, " N"]
    true: Float[np.ndarray, " N"]
    weights: Float[np.ndarray, " N"]
    """Sum to one, or are all zero."""

    def __len__(self) -> int:
        return len(self.true)


def tokens_of(
    exemplars: Sequence[Exemplar], levels: Sequence[Float[np.ndarray, " T"]], weights: Float[np.ndarray, " windows"]
) -> Tokens:
    """The tokens of windows, one after the other. `weights`: of every token of each window."""
    if not exemplars:
        return Tokens(np.empty(0), np.empty(0), np.empty(0))
    return Tokens(
        np.concatenate([np.asarray(row, dtype=np.float64) for row in levels]),
        np.concatenate([exemplar.activations.astype(np.float64) for exemplar in exemplars]),
        np.repeat(weights, [len(exemplar.window) for exemplar in exemplars]).astype(np.float64),
    )


def simulation_scores(
    density: float,
    train: Sequence[Exemplar],
    train_levels: Sequence[Float[np.ndarray, " T"]],
    held_out: Sequence[Exemplar],
    held_out_levels: Sequence[Float[np.ndarray, " T"]],
    all_skipped: bool = False,
) -> dict[str, Score]:
    """All `METRICS` of one description, given the levels that were simulated for it. `density`: of the latent.

    `all_skipped`: a first stage let none of the held-out windows pass. Where the latent fires in them that is a total
    miss, which is worth nothing, and no description whose score nobody knows.

    A level that is NaN or infinite leaves none of them defined: nobody knows what the simulator meant there.
    """
    if not all(np.isfinite(levels).all() for levels in (*train_levels, *held_out_levels)):
        return dict.fromkeys(METRICS, Score(None, NOT_FINITE))
    weights, held_out_weights = natural_weights(density, train), natural_weights(density, held_out)
    top = [index for index, exemplar in enumerate(train) if exemplar.kind == "top"][:PAPER_EXEMPLARS]
    best = tokens_of([train[i] for i in top], [train_levels[i] for i in top], np.ones(len(top)))
    paper = {"paper_compat": paper_correlation(best)}
    for windows, counts in ((held_out, held_out_weights), (train, weights)):
        if not counts.any():
            return dict.fromkeys(METRICS, Score(None, unweighted(windows))) | paper
    at_base_rate = tokens_of(train, train_levels, weights)
    scored = tokens_of(held_out, held_out_levels, held_out_weights)
    if all_skipped and (scored.true[scored.weights > 0] > 0).any():
        missed = dict.fromkeys(("precision", "recall", "f1"), Score(0.0))
        return {"correlation": Score(0.0), **paper, "specificity": Score(1.0), **missed}
    return {"correlation": correlation(at_base_rate, scored), **paper, **detection(at_base_rate, scored)}


def paper_correlation(tokens: Tokens) -> Score:
    """P1's protocol: a line fitted on all tokens of the top training exemplars, and Pearson's r on the same tokens.

    A fitted line turns a negative correlation over, so this is |r|; it is of windows in which the latent fires, all
    tokens alike.
    """
    if reason := _undefined(tokens.predicted, tokens.true, np.ones(len(tokens))):
        return Score(None, reason)
    calibrated = LinearCalibration.fit(tokens.predicted, tokens.true).apply(tokens.predicted)
    if np.ptp(calibrated) == 0:
        return Score(0.0)  # uncorrelated to the last digit: the line is level
    return Score(weighted_pearson(calibrated, tokens.true, np.ones(len(tokens))))


def correlation(train: Tokens, held_out: Tokens) -> Score:
    """Pearson's r on held-out tokens at the natural base rate, after a line that was fitted on the training tokens.

    The line decides about the sign alone: a description whose predictions are turned over scores as high as one whose
    predictions are right, but only if the sign holds on text that it was not fitted on.
    """
    if reason := _undefined(held_out.predicted, held_out.true, held_out.weights):
        return Score(None, reason)
    fitted = _weighted_slope(train)
    sign = 1.0 if fitted >= 0 else -1.0
    return Score(sign * weighted_pearson(held_out.predicted, held_out.true, held_out.weights))


def detection(train: Tokens, held_out: Tokens) -> dict[str, Score]:
    """Does it fire? A token is predicted to fire above the level that gave the best F1 on the training tokens.

    Shares of held-out tokens at the natural base rate. Specificity: of the silent tokens, those predicted silent.
    Precision: of those predicted to fire, those that do. Recall: of those that fire, those predicted to. F1 = 2 TP /
    (2 TP + FP + FN).
    """
    names = ("specificity", "precision", "recall", "f1")
    if not (train.true[train.weights > 0] > 0).any():
        return dict.fromkeys(names, Score(None, NEVER_FIRES))
    if np.ptp(train.predicted[train.weights > 0]) == 0:
        return dict.fromkeys(names, Score(None, CONSTANT))
    return detection_at(best_threshold(train), held_out)


def detection_at(threshold: float, tokens: Tokens) -> dict[str, Score]:
    """The four scores where a level above `threshold` means that the latent fires.

    One whose denominator is zero has a reason. A latent that never fires here still has a specificity, and every token
    that is claimed is a false alarm: rare latents are the ones that false alarms hurt (P2).
    """
    claimed, fires, weights = tokens.predicted > threshold, tokens.true > 0, tokens.weights
    hits, alarms = float(weights @ (claimed & fires)), float(weights @ (claimed & ~fires))
    misses, silent = float(weights @ (~claimed & fires)), float(weights @ (~claimed & ~fires))
    return {
        "specificity": _share(silent, silent + alarms, "never_silent"),
        "precision": _share(hits, hits + alarms, NOTHING_PREDICTED),
        "recall": _share(hits, hits + misses, NEVER_FIRES),
        "f1": _share(2 * hits, 2 * hits + alarms + misses, NEVER_FIRES),
    }


def _share(part: float, whole: float, reason: str) -> Score:
    return Score(part / whole) if whole > 0 else Score(None, reason)


def best_threshold(tokens: Tokens) -> float:
    """The predicted level above which calling a token firing gives the largest F1; of equals the highest."""
    order = np.argsort(-tokens.predicted, kind="stable")
    levels, weights = tokens.predicted[order], tokens.weights[order]
    fires: Bool[np.ndarray, " N"] = tokens.true[order] > 0
    hits, claimed = np.cumsum(weights * fires), np.cumsum(weights)
    f1 = 2 * hits / (claimed + hits[-1])
    # Tokens of one level are claimed together: only the last of them is a cut.
    cuts = np.flatnonzero(np.append(levels[1:] < levels[:-1], True))
    best = cuts[int(np.argmax(f1[cuts]))]
    below = levels[best + 1] if best + 1 < len(levels) else levels[best] - 1.0
    return float((levels[best] + below) / 2)


def weighted_pearson(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"]) -> float:
    """Pearson's r of N pairs that count `weights` each."""
    weights = weights / weights.sum()
    x, y = x - weights @ x, y - weights @ y
    return float(weights @ (x * y) / np.sqrt((weights @ x**2) * (weights @ y**2)))


def _weighted_slope(tokens: Tokens) -> float:
    """Sign of the least-squares slope: that of the covariance."""
    weights = tokens.weights / tokens.weights.sum()
    return float(weights @ ((tokens.predicted - weights @ tokens.predicted) * tokens.true))


def _undefined(predicted: np.ndarray, true: np.ndarray, weights: np.ndarray) -> str | None:
    """Why no correlation is defined on these tokens; None if one is."""
    counts = weights > 0
    if not counts.any():
        return NO_WINDOWS
    if not (true[counts] > 0).any():
        return NEVER_FIRES
    if np.ptp(true[counts]) == 0:
        return "constant_activation"
    return CONSTANT if np.ptp(predicted[counts]) <= 1e-6 else None


def reasons(scores: Sequence[Mapping[str, Score]]) -> dict[str, dict[str, int]]:
    """Metric -> reason -> how many descriptions have no value because of it."""
    found: dict[str, dict[str, int]] = {}
    for row in scores:
        for name, score in row.items():
            if score.reason is not None:
                counts = found.setdefault(name, {})
                counts[score.reason] = counts.get(score.reason, 0) + 1
    return found
