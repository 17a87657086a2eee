"""Geometry of plots: paths and ticks in percent of the plot's box, drawn by the templates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_LOG_FROM = 10.0
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""
_TICK_DIGITS = (1, 2, 5)
_LABEL_WIDTH = 9.0
"""Percent of a plot that a label below it needs on a narrow screen."""


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


@dataclass(frozen=True)
class PlotLine:
    """One line of a plot: SVG path data in a box of 100 x 100 with y downwards, and the places of its points."""

    name: str
    path: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class LinesPlot:
    """Several lines over one logarithmic x axis; `levels` are horizontal lines that hold for every x."""

    lines: list[PlotLine]
    levels: list[Tick]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    is_cut: bool
    """Whether a line leaves the picture."""


def lines_plot(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    levels: Mapping[str, float],
    is_log: bool,
    highest: float = math.inf,
) -> LinesPlot | None:
    """The plot of (x, y) points by name of their line, x above 0; `None` with no two different x.

    Args:
        is_log: a logarithmic y axis, on which values that are not positive are left out.
        highest: values above it do not stretch the y axis; lines leave the picture there.
    """
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not is_log)]
        for name, points in lines.items()
    }
    flat = {name: y for name, y in levels.items() if math.isfinite(y) and (y > 0 or not is_log)}
    xs = sorted({x for points in shown.values() for x, _ in points})
    if len(xs) < 2:
        return None
    ys = np.array([y for points in shown.values() for _, y in points] + list(flat.values()))
    low, high = _limits(np.minimum(ys, highest), is_log)

    def up(value: float) -> float:
        if is_log:
            return 100 * (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return 100 * (value - low) / (high - low)

    def across(value: float) -> float:
        return 100 * (math.log(value) - math.log(xs[0])) / (math.log(xs[-1]) - math.log(xs[0]))

    drawn = []
    for name, points in shown.items():
        places = [(across(x), 100 - up(y)) for x, y in points]
        path = _path(np.array([x for x, _ in places]), np.array([y for _, y in places])) if places else ""
        drawn.append(PlotLine(name, path, places))
    return LinesPlot(
        lines=drawn,
        levels=[Tick(up(y), name) for name, y in flat.items()],
        x_ticks=_apart([Tick(across(x), f"{x:g}") for x in xs]),
        y_ticks=[Tick(up(value), f"{value:g}") for value in _ticks(low, high, is_log)],
        is_cut=bool((ys > highest).any()),
    )


def _apart(ticks: Sequence[Tick]) -> list[Tick]:
    """The last tick, and before it those whose labels do not run into the next one."""
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if kept[0].place - tick.place >= _LABEL_WIDTH:
            kept.insert(0, tick)
    return kept


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
