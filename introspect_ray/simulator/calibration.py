"""From predicted levels to activations: what a latent's predictions are worth, fitted on one set of tokens.

Each calibration is fitted on tokens that it is not judged on (P1 judges on the same ones, see scores.py), applies to
any others, and goes into JSON. N tokens to fit on, M to apply to.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict


@runtime_checkable
class Calibration(Protocol):
    """Maps predicted levels of one latent to activations."""

    def apply(self, predicted: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]: ...


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearCalibration(_Saved):
    """Least squares: activation = slope * level + intercept (P1)."""

    kind: Literal["linear"] = "linear"
    slope: float
    intercept: float

    @classmethod
    def fit(cls, predicted: Float[np.ndarray, " N"], true: Float[np.ndarray, " N"]) -> LinearCalibration:
        """The line of least squared error; a level line at the mean where all predictions are equal."""
        centred = predicted - predicted.mean()
        spread = float(centred @ centred)
        slope = float(centred @ (true - true.mean())) / spread if spread > 0 else 0.0
        return cls(slope=slope, intercept=float(true.mean() - slope * predicted.mean()))

    def apply(self, predicted: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
        return self.slope * predicted + self.intercept


class QuantileCalibration(_Saved):
    """Rank map: predictions take the values that true activations have at the same rank, zeros included.

    A prediction that exceeds a share u of the predictions fitted on becomes the u-quantile of the true activations
    fitted on, so that calibrated predictions are distributed like true activations: a latent that is silent on 99.9%
    of the tokens stays silent on as many. This is our definition of P2's quantile normalisation, of which the exact
    procedure is not published. Predictions that tie span a range of ranks: `average` takes its middle, `jitter` draws
    one for each, which keeps the distribution exact whatever the ties.

    Only what lies above the true zeros is kept: all lower ranks are zero.
    """

    kind: Literal["quantile"] = "quantile"
    ties: Literal["average", "jitter"] = "average"
    seed: int = 0
    num_tokens: int
    """N"""
    num_below: int
    """Predictions fitted on that are less than `predicted[0]`."""
    predicted: tuple[float, ...]
    """Distinct predictions whose ranks reach above the true zeros, in order."""
    counts: tuple[int, ...]
    """How often each of them occurred."""
    true: tuple[float, ...]
    """True activations that are not zero, in order; the other N - len(true) are zero."""

    @classmethod
    def fit(
        cls,
        predicted: Float[np.ndarray, " N"],
        true: Float[np.ndarray, " N"],
        ties: Literal["average", "jitter"] = "average",
        seed: int = 0,
    ) -> QuantileCalibration:
        assert len(predicted) == len(true) > 0
        assert (true >= 0).all(), "activations below zero have no quantile above the zeros"
        values, counts = np.unique(predicted, return_counts=True)
        active = np.sort(true[true > 0])
        num_zero = len(true) - len(active)
        after = np.cumsum(counts)
        first = int(np.searchsorted(after, num_zero, side="right"))
        return cls(
            ties=ties,
            seed=seed,
            num_tokens=len(true),
            num_below=int(after[first - 1]) if first else 0,
            predicted=tuple(values[first:].tolist()),
            counts=tuple(counts[first:].tolist()),
            true=tuple(active.tolist()),
        )

    def apply(self, predicted: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
        if not self.true:
            return np.zeros(len(predicted))
        after = self.num_below + np.concatenate([[0], np.cumsum(self.counts)])
        low = after[np.searchsorted(self.predicted, predicted, side="left")].astype(np.float64)
        high = after[np.searchsorted(self.predicted, predicted, side="right")].astype(np.float64)
        if self.ties == "jitter":
            share = np.random.default_rng((self.seed % 2**32, len(predicted))).random(len(predicted))
        else:
            share = np.full(len(predicted), 0.5)
        # Ranks count from 0: the middle of a single place is itself, and the largest rank is N - 1.
        rank = np.floor(low + share * np.maximum(high - low, 0)).astype(np.int64)
        place = np.minimum(rank, self.num_tokens - 1) - (self.num_tokens - len(self.true))
        # Below all that were kept nothing says where the rank is, and nothing has to: it is that of a zero.
        below = predicted < self.predicted[0] if self.predicted else np.ones(len(predicted), dtype=bool)
        return np.where(below | (place < 0), 0.0, np.asarray(self.true)[np.maximum(place, 0)])
