"""The report: one self-contained HTML page.

It loads nothing: its style, script and plots are inline (see page.py). Text reaches the script as JSON, which it writes
as text, never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from introspect_ray.config import Method
from introspect_ray.evaluation.charts import CurvePlot, curve_plot
from introspect_ray.evaluation.evaluate import TaskEvaluation, breakdown, column_label, cross_breakdown
from introspect_ray.evaluation.intervals import Interval
from introspect_ray.evaluation.metrics import METRICS, Metric, exact_match
from introspect_ray.evaluation.page import render_page
from introspect_ray.tasks.base import Record, Task, stable_id

MAX_GRID_SIDE = 12
"""A heatmap with more rows or columns than this is left out."""

TASK_PHRASES: Mapping[str, str] = {
    "feature_description": "Which feature does this vector of the target encode?",
    "activation_patching": "If this vector replaced the target's own at the marked token, would its output change, "
    "and to what?",
    "input_ablation": "If the marked hint were removed from the prompt, would the target's answer change, and to what?",
}


@dataclass(frozen=True)
class MethodText:
    """How the report names a method, and what it is in one phrase."""

    label: str
    phrase: str


METHOD_TEXTS: Mapping[Method, MethodText] = {
    "explainer": MethodText("Trained explainer", "answers from the query, its vector included"),
    "no_vector": MethodText("Vector removed", "the vector and its markers are cut from the query"),
    "zero_vector": MethodText("Vector zeroed", "the vector's place is kept, all its entries are zero"),
    "swapped_vector": MethodText("Vector swapped", "the vector of another, independent query"),
    "nearest_neighbor": MethodText("Nearest neighbour", "the answer of the most similar training query"),
    "majority": MethodText("Majority answer", "the most frequent training answer, always"),
    "zero_shot": MethodText(
        "Untrained explainer",
        "the same model and query before training, without fitted maps",
    ),
    "self_scales": MethodText(
        "Untrained, best scale", "asked at several vector norms; the best is picked on these records"
    ),
}
METHOD_GROUPS: tuple[tuple[str, str, tuple[Method, ...]], ...] = (
    ("Explainer", "", ("explainer",)),
    (
        "Controls",
        "the trained explainer without the vector it needs: what it scores here, it owes to the text and to habit",
        ("no_vector", "zero_vector", "swapped_vector"),
    ),
    (
        "Baselines",
        "what can be had without training an explainer",
        ("nearest_neighbor", "majority", "zero_shot", "self_scales"),
    ),
)


@dataclass(frozen=True)
class MethodAnswer:
    """One method's answer to a browsable example."""

    method: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class BrowsableExample:
    """A record as a reader sees it. `pieces` are (text, marked); `labels` are its values of the broken-down columns."""

    record_id: str
    pieces: list[tuple[str, bool]]
    details: dict[str, str]
    truth: str
    answers: list[MethodAnswer]
    labels: dict[str, str]


@dataclass(frozen=True)
class Grid:
    """Main metric of the explainer over two record columns: title and values of each, and the cells that occur."""

    titles: tuple[str, str]
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, ...], Interval]


@dataclass(frozen=True)
class TaskReport:
    """What the report shows of one task. `curve` holds (step, training loss)."""

    evaluation: TaskEvaluation
    breakdowns: dict[str, list[tuple[str, Interval]]]
    grid: Grid | None
    curve: list[tuple[int, float]]
    examples: list[BrowsableExample]


@dataclass(frozen=True)
class Report:
    """A whole report. `summary` are labelled facts for its head, such as the target, the sizes and the seed."""

    title: str
    created: str
    summary: list[tuple[str, str]]
    tasks: list[TaskReport]


def build_task_report(
    task: Task,
    records: Sequence[Record],
    evaluation: TaskEvaluation,
    curve: Sequence[tuple[int, float]],
    num_browsable: int,
) -> TaskReport:
    """The report of one task from its test records, their evaluation and its explainer's training curve.

    Breakdowns are of the explainer (of the first method where it was not evaluated). At most `num_browsable` examples
    are shown, picked by a hash of the record id, so neither the best nor the worst.
    """
    scored = evaluation.predictions[evaluation.featured]
    tables = {
        title: breakdown(task, records, scored, column, evaluation.bootstrap)
        for title, column in task.breakdowns.items()
    }
    grid = None
    if len(tables) >= 2:
        (row_title, row_column), (column_title, column_column) = list(task.breakdowns.items())[:2]
        rows, columns = ([label for label, _ in tables[title]] for title in (row_title, column_title))
        if 2 <= len(rows) <= MAX_GRID_SIDE and 2 <= len(columns) <= MAX_GRID_SIDE:
            cells = cross_breakdown(task, records, scored, (row_column, column_column), evaluation.bootstrap)
            grid = Grid((row_title, column_title), rows, columns, cells)
    examples = _browsable(task, records, evaluation, num_browsable)
    return TaskReport(evaluation, tables, grid, list(curve), examples)


def groups_of(evaluation: TaskEvaluation) -> list[tuple[str, str, list[str]]]:
    """Groups of methods that were evaluated: (title, phrase, methods); further explainers follow the first."""
    groups = []
    for title, phrase, names in METHOD_GROUPS:
        present: list[str] = [name for name in names if name in evaluation.intervals]
        if title == "Explainer":
            present += evaluation.others
        if present:
            groups.append((title, phrase, present))
    return groups


def text_of(evaluation: TaskEvaluation, method: str) -> MethodText:
    """How a method of an evaluation is presented; an explainer that has a name by that."""
    if method in evaluation.others:
        return MethodText(method, "another explainer, asked the same")
    text = METHOD_TEXTS[cast(Method, method)]
    return MethodText(evaluation.shown(method), text.phrase) if evaluation.shown(method) != method else text


def _browsable(
    task: Task, records: Sequence[Record], evaluation: TaskEvaluation, num_browsable: int
) -> list[BrowsableExample]:
    is_right = evaluation.main_metric.is_hit or exact_match.is_hit
    assert is_right is not None, "exact match is a mean over rows"
    rows = {method: {row.record_id: row for row in scored} for method, scored in evaluation.predictions.items()}
    chosen = sorted(records, key=lambda record: stable_id("browse", record["record_id"]))[:num_browsable]
    examples = []
    for record in chosen:
        record_id = record["record_id"]
        pieces, details = task.display(record)
        answers = [
            MethodAnswer(method, rows[method][record_id].text, is_right(rows[method][record_id]))
            for _, _, methods in groups_of(evaluation)
            for method in methods
        ]
        labels = {title: column_label(record.get(column)) for title, column in task.breakdowns.items()}
        truth = rows[evaluation.featured][record_id].reference
        examples.append(BrowsableExample(record_id, pieces, details, truth, answers, labels))
    return examples


def render_report(report: Report) -> str:
    """The page as HTML text."""
    tasks = [_TaskView(task) for task in report.tasks]
    return render_page("report.html", report=report, summary=report.summary, tasks=tasks)


class _TaskView:
    """What the template asks of one task."""

    def __init__(self, report: TaskReport):
        self.report = report
        self.evaluation = report.evaluation
        self.id = report.evaluation.task
        self.title = report.evaluation.task.replace("_", " ").capitalize()
        self.phrase = TASK_PHRASES.get(report.evaluation.task, "")
        self.metrics: list[Metric] = [METRICS[name] for name in report.evaluation.metrics]
        self.main = report.evaluation.main_metric
        self.featured = report.evaluation.featured
        self.best = self.evaluation.intervals[self.featured][self.main.name]
        self.curve: CurvePlot | None = curve_plot(report.curve)

    @property
    def groups(self) -> list[tuple[str, str, list[str]]]:
        return groups_of(self.evaluation)

    def label(self, method: str) -> str:
        return text_of(self.evaluation, method).label

    def rival(self, title: str) -> str | None:
        """The best method of a group by the main metric."""
        names = [name for group, _, members in self.groups if group == title for name in members]
        return max(names, key=lambda name: self.evaluation.intervals[name][self.main.name].value, default=None)

    def phrase_of(self, method: str) -> str:
        phrase = text_of(self.evaluation, method).phrase
        if method == "self_scales":
            return f"{phrase}: norm {self.evaluation.best_scale:g}, an upper bound"
        return phrase

    @property
    def data(self) -> dict[str, Any]:
        """The browsable examples as JSON types."""
        return {
            "examples": [
                {
                    "id": example.record_id,
                    "pieces": example.pieces,
                    "details": list(example.details.items()),
                    "truth": example.truth,
                    "answers": [
                        [self.label(answer.method), answer.text, answer.is_right] for answer in example.answers
                    ],
                    "labels": example.labels,
                }
                for example in self.report.examples
            ]
        }
