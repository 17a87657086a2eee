"""Geometry of the training-loss plot: paths and ticks in percent of the plot's box, drawn by the report template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LOG_FROM = 10.0
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""
_TICK_DIGITS = (1, 2, 5)


@dataclass(frozen=True)
class Tick:
    """A label at a place: percent from the left or from the bottom."""

    place: float
    label: str


@dataclass(frozen=True)
class CurvePlot:
    """SVG path data in a box of 100 x 100 with y downwards: every logged value, and their moving mean."""

    raw: str
    smooth: str
    window: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    is_log: bool
    first: float
    last: float


def curve_plot(curve: Sequence[tuple[int, float]]) -> CurvePlot | None:
    """The plot of (step, loss) points; points that are not finite are left out; `None` with fewer than two left."""
    points = [(step, loss) for step, loss in sorted(curve) if math.isfinite(loss)]
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return None
    steps = np.array([step for step, _ in points], dtype=np.float64)
    losses = np.array([loss for _, loss in points], dtype=np.float64)
    is_log = bool(losses.min() > 0 and losses.max() / losses.min() > _LOG_FROM)
    window = max(1, len(points) // 20)
    smooth = _moving_mean(losses, window)
    low, high = _limits(losses, is_log)

    def up(values: np.ndarray) -> np.ndarray:
        if is_log:
            return 100 * (np.log(values) - math.log(low)) / (math.log(high) - math.log(low))
        return 100 * (values - low) / (high - low)

    def across(values: np.ndarray) -> np.ndarray:
        return 100 * (values - steps[0]) / (steps[-1] - steps[0])

    x_values = np.array(_ticks(float(steps[0]), float(steps[-1]), False))
    y_values = np.array(_ticks(low, high, is_log))
    return CurvePlot(
        raw=_path(across(steps), 100 - up(losses)),
        smooth=_path(across(steps), 100 - up(smooth)),
        window=window,
        x_ticks=[Tick(float(x), f"{value:,.0f}") for x, value in zip(across(x_values), x_values, strict=True)],
        y_ticks=[Tick(float(y), f"{value:g}") for y, value in zip(up(y_values), y_values, strict=True)],
        is_log=is_log,
        first=float(smooth[0]),
        last=float(smooth[-1]),
    )


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and its `window - 1` predecessors, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _limits(losses: np.ndarray, is_log: bool) -> tuple[float, float]:
    """Axis limits with a little air; a linear axis starts at zero, as a loss does, unless it goes below."""
    low, high = float(losses.min()), float(losses.max())
    if is_log:
        return low / 1.15, high * 1.15
    low = min(0.0, 1.05 * low)
    return low, high * 1.05 if high > low else low + 1.0


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round numbers within the limits: 1, 2 and 5 times powers of ten (logarithmic), or about five even steps."""
    if is_log:
        powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        inside = [digit * power for power in powers for digit in _TICK_DIGITS if low <= digit * power <= high]
        return inside if len(inside) <= 6 else [power for power in powers if low <= power <= high]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((digit * power for digit in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{left:.2f} {down:.2f}" for left, down in zip(x, y, strict=True))
