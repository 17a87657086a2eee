"""Scores as numbers: JSON for machines, a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from introspect_ray.evaluation.evaluate import TaskEvaluation
from introspect_ray.evaluation.intervals import Interval


def scores_json(evaluations: Sequence[TaskEvaluation]) -> str:
    """`{task: {method: {metric: {"value", "low", "high", "n"}}}}` as JSON text; undefined values are null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    scores = {
        evaluation.task: {
            evaluation.shown(method): {
                name: {
                    "value": number(interval.value),
                    "low": number(interval.low),
                    "high": number(interval.high),
                    "n": interval.n,
                }
                for name, interval in intervals.items()
            }
            for method, intervals in evaluation.intervals.items()
        }
        for evaluation in evaluations
    }
    return json.dumps(scores, indent=2, allow_nan=False) + "\n"


def format_table(evaluations: Sequence[TaskEvaluation]) -> str:
    """One block of text per task: a line per method, a column `value [low, high]` per metric."""
    blocks = []
    for evaluation in evaluations:
        first = evaluation.intervals[evaluation.featured][evaluation.metrics[0]]
        head = f"{evaluation.task}: {first.n} records in {first.num_groups} groups"
        lines = [["method", *evaluation.metrics]]
        for method, intervals in evaluation.intervals.items():
            lines.append([evaluation.shown(method), *(_cell(intervals[name]) for name in evaluation.metrics)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        rows = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in lines
        ]
        blocks.append("\n".join([head, *(f"  {row}" for row in rows)]))
    return "\n\n".join(blocks)


def format_value(value: float) -> str:
    """Two decimals, or n/a; nothing rounds to a negative zero."""
    return f"{round(value, 2) + 0.0:.2f}" if math.isfinite(value) else "n/a"


def _cell(interval: Interval) -> str:
    return f"{format_value(interval.value)} [{format_value(interval.low)}, {format_value(interval.high)}]"
