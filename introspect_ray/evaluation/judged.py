"""Task 1's answers as an LM judge sees them, beside the metrics that compare words.

evaluation --answers, labels--> judge --> judged rows --> judge, judge_failure_rate, with intervals
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from introspect_ray.evaluation.evaluate import Keep, TaskEvaluation
from introspect_ray.evaluation.intervals import bootstrap_intervals
from introspect_ray.evaluation.judge import Judge
from introspect_ray.evaluation.metrics import METRICS, Scored

JUDGED_TASK = "feature_description"
JUDGE_METRICS = ("judge", "judge_failure_rate")
_FAILED = "failed: "


def with_judgements(evaluation: TaskEvaluation, judge: Judge, max_labels: int, keep: Keep) -> TaskEvaluation:
    """The evaluation with the judge's metrics after its own; `keep` gets the name of a method and `@judge`.

    An answer that is none has the score 0 without a call. A call that failed leaves its row without a score.
    """
    predictions: dict[str, list[Scored]] = {}
    for method, rows in evaluation.predictions.items():
        verdicts = keep(f"{method}@judge", partial(_verdicts, rows, judge, max_labels))
        predictions[method] = [
            replace(row, judged=None if verdict.startswith(_FAILED) else float(verdict))
            for row, verdict in zip(rows, verdicts, strict=True)
        ]
    metrics = [METRICS[name] for name in JUDGE_METRICS]
    intervals = {
        method: bootstrap_intervals(rows, metrics, evaluation.bootstrap) for method, rows in predictions.items()
    }
    return replace(
        evaluation,
        predictions=predictions,
        metrics=(*evaluation.metrics, *JUDGE_METRICS),
        intervals={method: {**known, **intervals[method]} for method, known in evaluation.intervals.items()},
    )


def _verdicts(rows: Sequence[Scored], judge: Judge, max_labels: int) -> list[str]:
    """Each row's score as text, or why there is none."""
    asked = [place for place, row in enumerate(rows) if row.predicted is not None]
    pairs = [(_said(rows[place]), _labels(rows[place], max_labels)) for place in asked]
    verdicts = ["0.0"] * len(rows)
    for place, score in zip(asked, judge.score(pairs), strict=True):
        verdicts[place] = f"{_FAILED}{score.reason}" if score.value is None else repr(score.value)
    return verdicts


def _said(row: Scored) -> str:
    assert row.predicted is not None
    return row.predicted.content


def _labels(row: Scored, count: int) -> list[str]:
    return list(dict.fromkeys((row.truth.content, *row.accepted)))[:count]
