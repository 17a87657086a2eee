"""Metrics over scored rows, each a sum over rows followed by a formula.

Because every metric is a function of sums, `value(sum of row counts)` is all that a bootstrap over groups has to
recompute (intervals.py), and the reported value and its resamples can not drift apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from introspect_ray.tasks.base import Answer

Counts = tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    """One record with one method's answer to it.

    `predicted` is what `text` says, `None` if it does not have the form of an answer. `accepted` are contents that
    match beside the truth's own. `reference` is the answer text that the explainer is trained to give. `judged` is what
    an LM judge gave it, 0 to 1, `None` if none was asked or its answer was no rating.
    """

    record_id: str
    group: str
    truth: Answer
    accepted: tuple[str, ...]
    predicted: Answer | None
    text: str
    reference: str
    judged: float | None = None


@dataclass(frozen=True)
class Metric:
    """A metric: call it on rows for its value; `nan` where it is undefined (no rows, or none that count).

    `counts` gives one row's K counts; `value` maps summed counts `[*batch, K]` to values `[*batch]`. `is_hit` says
    whether one row is right by this metric, and is `None` for metrics that are no mean over rows.
    """

    name: str
    title: str
    definition: str
    counts: Callable[[Scored], Counts]
    value: Callable[[Float[np.ndarray, "*batch counts"]], Float[np.ndarray, "*batch"]]
    is_hit: Callable[[Scored], bool] | None = None

    def __call__(self, rows: Sequence[Scored]) -> float:
        if not rows:
            return float("nan")
        return self.of_sums(count_rows(self, rows).sum(axis=0))

    def of_sums(self, sums: Float[np.ndarray, " counts"]) -> float:
        """The value for one vector of summed counts."""
        return float(self.value(sums[None])[0])


def count_rows(metric: Metric, rows: Sequence[Scored]) -> Float[np.ndarray, "rows counts"]:
    """Counts of every row."""
    return np.array([metric.counts(row) for row in rows], dtype=np.float64)


def normalize(content: str) -> str:
    """Content as it is compared: Unicode NFC, case folded, outer whitespace and one trailing period removed.

    A content that is nothing but a period keeps it, or it would equal an empty one.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", content).casefold()).strip()
    return folded.removesuffix(".").strip() or folded


def _same(left: str, right: str) -> bool:
    return normalize(left) == normalize(right)


def _is_parsed(row: Scored) -> bool:
    """Share of rows whose answer has the form of an answer. Denominator: all rows."""
    return row.predicted is not None


def _is_content_match(row: Scored) -> bool:
    """Share of rows whose content equals the truth's, whatever the verdict. Denominator: all rows.

    Source: P1 2.3, "Content Match"; comparison by `normalize`.
    """
    return row.predicted is not None and _same(row.predicted.content, row.truth.content)


def _is_exact_match(row: Scored) -> bool:
    """Share of rows whose verdict and content both equal the truth's. Denominator: all rows.

    Source: P1 2.3, "Exact Match". Deviation: P1 compares whole answer strings, so that another wording of the right
    answer is wrong (`paper_compat_exact_match`).
    """
    return row.predicted is not None and row.predicted.changed == row.truth.changed and _is_content_match(row)


def _is_description_match(row: Scored) -> bool:
    """Share of rows whose content equals the truth's or any other accepted one. Denominator: all rows."""
    if row.predicted is None:
        return False
    return any(_same(row.predicted.content, content) for content in (row.truth.content, *row.accepted))


def _is_paper_exact_match(row: Scored) -> bool:
    """Share of rows whose whole answer string equals the reference string. Denominator: all rows.

    Source: the code of P1 (lower case, outer whitespace and all outer periods removed; verdicts equal as well). It
    deflates the score of every model that words its answers differently, such as the untrained one.
    """
    if row.predicted is None or row.predicted.changed != row.truth.changed:
        return False
    return row.text.lower().strip().strip(".") == row.reference.lower().strip().strip(".")


def _confusion(row: Scored) -> Counts:
    """One-hot over truth (changed, unchanged) x prediction (changed, unchanged, none)."""
    assert row.truth.changed is not None, f"record {row.record_id} has no changed/unchanged verdict"
    verdict = None if row.predicted is None else row.predicted.changed
    column = 2 if verdict is None else int(not verdict)
    cells = [0.0] * 6
    cells[3 * int(not row.truth.changed) + column] = 1.0
    return tuple(cells)


def _macro_f1(confusion: Float[np.ndarray, "*batch 6"]) -> Float[np.ndarray, "*batch"]:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN); classes with no truth and no prediction are left out."""
    cells = confusion.reshape(*confusion.shape[:-1], 2, 3)
    hits = np.stack([cells[..., 0, 0], cells[..., 1, 1]], axis=-1)
    false_positives = np.stack([cells[..., 1, 0], cells[..., 0, 1]], axis=-1)
    false_negatives = cells.sum(axis=-1) - hits
    size = 2 * hits + false_positives + false_negatives
    present = size > 0
    f1 = np.divide(2 * hits, size, out=np.zeros_like(size), where=present)
    num_present = present.sum(axis=-1)
    return np.where(num_present > 0, f1.sum(axis=-1) / np.maximum(num_present, 1), np.nan)


def _macro_f1_of_valid(confusion: Float[np.ndarray, "*batch 6"]) -> Float[np.ndarray, "*batch"]:
    """`_macro_f1` with the column of rows without a verdict emptied."""
    return _macro_f1(confusion * np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0]))


def _ratio(sums: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch"]:
    """Hits over rows."""
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _share(name: str, title: str, is_hit: Callable[[Scored], bool]) -> Metric:
    """A metric that is a mean of yes and no over all rows."""
    return Metric(name, title, is_hit.__doc__ or "", lambda row: (float(is_hit(row)), 1.0), _ratio, is_hit)


exact_match = _share("exact_match", "Exact match", _is_exact_match)
content_match = _share("content_match", "Content match", _is_content_match)
parse_rate = _share("parse_rate", "Parse rate", _is_parsed)
description_match = _share("description_match", "Description match", _is_description_match)
has_changed_f1 = Metric(
    "has_changed_f1",
    "Has-changed F1",
    """Macro F1 over the classes changed and unchanged. Denominator: all rows.

    An answer without a verdict is a false negative of its true class and a true positive of none. A class that is
    absent from truths and predictions has no F1 and is left out of the mean.
    Source: P1 2.3. Deviation: P1 drops rows without a verdict (`paper_compat_has_changed_f1`).
    """,
    _confusion,
    _macro_f1,
)
paper_compat_exact_match = _share("paper_compat_exact_match", "Exact match (as in P1)", _is_paper_exact_match)
paper_compat_has_changed_f1 = Metric(
    "paper_compat_has_changed_f1",
    "Has-changed F1 (as in P1)",
    """Macro F1 over the classes changed and unchanged. Denominator: only the rows whose answer has a verdict.

    Source: the code of P1. It rewards a model for being silent where it would be wrong.
    """,
    _confusion,
    _macro_f1_of_valid,
)

judge = Metric(
    "judge",
    "Judge",
    """Mean rating of an LM judge, 1 to 5 as 0 to 1, the best over all labels. Denominator: rows that have a rating.

    An answer that has not the form of one counts as 0. Source: P1 2.1. Deviation: a call that failed is left out and
    counted (`judge_failure_rate`), where P1 takes the lowest rating.
    """,
    lambda row: (row.judged or 0.0, float(row.judged is not None)),
    _ratio,
)
judge_failure_rate = Metric(
    "judge_failure_rate",
    "Judge failures",
    "Share of rows of which the judge gave no rating. Denominator: all rows.",
    lambda row: (float(row.judged is None), 1.0),
    _ratio,
)

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        exact_match,
        has_changed_f1,
        content_match,
        parse_rate,
        description_match,
        paper_compat_exact_match,
        paper_compat_has_changed_f1,
        judge,
        judge_failure_rate,
    )
}
"""Every metric by name. A task names those that are reported for it; `paper_compat_*` are never among them."""
