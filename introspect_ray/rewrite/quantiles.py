"""Quantile normalisation of simulated levels: activations that are distributed like the true ones, zeros included.

N tokens, M of them measured, S latents. Fitted on text that is not evaluated on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from introspect_ray.simulator.calibration import QuantileCalibration


@dataclass(frozen=True, eq=False)
class Quantiles:
    """Quantile normalisation of each latent by itself (`QuantileCalibration`)."""

    calibrations: tuple[QuantileCalibration, ...]

    def values(self, levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N S"]:  # noqa: ARG002
        columns = [
            calibration.apply(np.nan_to_num(levels[:, column])) for column, calibration in enumerate(self.calibrations)
        ]
        mapped = np.stack(columns, axis=1) if columns else np.zeros_like(levels)
        return np.where(np.isnan(levels), np.nan, mapped)


def fit_quantiles(levels: Float[np.ndarray, "M S"], truth: Float[np.ndarray, "M S"]) -> Quantiles:
    """Fitted on measured tokens; zeros count, so that calibrated latents are as rare as true ones. A token whose level
    is `nan` is left out; a latent without any other stays silent."""
    return Quantiles(tuple(_fit_known(*column) for column in zip(levels.T, truth.T, strict=True)))


def _fit_known(levels: Float[np.ndarray, " M"], truth: Float[np.ndarray, " M"]) -> QuantileCalibration:
    known = ~np.isnan(levels)
    if not known.any():
        return QuantileCalibration.fit(np.zeros(1), np.zeros(1))
    return QuantileCalibration.fit(levels[known].astype(np.float64), truth[known].astype(np.float64))


@dataclass(frozen=True, eq=False)
class Shrunk:
    """Quantile-normalised values times one factor per latent: how far they can be trusted."""

    quantiles: Quantiles
    factors: Float[np.ndarray, " S"]

    def values(self, levels: Float[np.ndarray, "N S"], starts: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N S"]:
        return self.quantiles.values(levels, starts) * self.factors


def fit_shrunk(levels: Float[np.ndarray, "M S"], truth: Float[np.ndarray, "M S"]) -> Shrunk:
    """Each latent's factor in [0, 1] of least squared error, as if there were one more firing in which it is wrong.

    Values of the right distribution at the wrong tokens do more harm than none; a factor of 0 leaves the latent out.
    """
    quantiles = fit_quantiles(levels, truth)
    said = np.nan_to_num(quantiles.values(levels, np.zeros(len(levels), dtype=bool)).astype(np.float64))
    squares = (said**2).sum(0) * (1 + 1 / np.maximum(1, (said > 0).sum(0)))
    slopes = np.divide((said * truth).sum(0), squares, out=np.zeros(said.shape[1]), where=squares > 0)
    return Shrunk(quantiles, np.clip(slopes, 0, 1))
