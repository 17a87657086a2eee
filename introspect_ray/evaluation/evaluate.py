"""One task's test records answered by every method, scored, with intervals.

    records --render--> queries --method--> texts --parse--> Scored --metrics, bootstrap--> intervals

An explainer enters as a callable, so that this runs equally on a loaded model, a pool of actors, or a fake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from introspect_ray.config import Method
from introspect_ray.errors import UserError
from introspect_ray.evaluation.baselines import NearestNeighbor, majority
from introspect_ray.evaluation.controls import scaled_vector, swapped_vectors, without_vector, zero_vector
from introspect_ray.evaluation.intervals import Bootstrap, Interval, bootstrap_intervals, paired_difference
from introspect_ray.evaluation.metrics import METRICS, Metric, Scored
from introspect_ray.explainer.query import Query
from introspect_ray.tasks.base import OK, Example, Record, Task

Explain = Callable[[Sequence[Query]], list[str]]
"""Answer texts, one per query, in order."""
Keep = Callable[[str, Callable[[], list[str]]], list[str]]
"""`keep(name, compute)` gives the texts stored under `name`, or calls `compute()` and stores what it returns."""

VECTOR_CONTROLS: tuple[Method, ...] = ("no_vector", "zero_vector", "swapped_vector")


@dataclass(frozen=True)
class TaskEvaluation:
    """Every method's answers to the same test records, in record order, and its metrics with limits."""

    task: str
    metrics: tuple[str, ...]
    """The task's metrics, the main one first."""
    predictions: dict[str, list[Scored]]
    """By method; further explainers of the same dataset stand under their own names."""
    intervals: dict[str, dict[str, Interval]]
    ahead: dict[str, Interval]
    """Main metric of the explainer minus that of every other method, paired over groups."""
    bootstrap: Bootstrap
    name: str | None = None
    """What the explainer is called beside others."""
    others: tuple[str, ...] = ()
    """Names of further explainers."""
    scale_scores: dict[float, float] = field(default_factory=dict)
    """Main metric of the untrained model by vector norm; `self_scales` is the best of them, chosen on these records."""

    @property
    def main_metric(self) -> Metric:
        return METRICS[self.metrics[0]]

    @property
    def featured(self) -> str:
        """The method that breakdowns and examples are about: the explainer, or the first one if it was left out."""
        return "explainer" if "explainer" in self.predictions else next(iter(self.predictions))

    def shown(self, method: str) -> str:
        """What a method is called in scores: the explainer by its name if it has one."""
        return self.name if method == "explainer" and self.name is not None else method

    @property
    def best_scale(self) -> float | None:
        """The vector norm that `self_scales` reports."""
        return _best_scale(self.scale_scores) if self.scale_scores else None


def _best_scale(scores: Mapping[float, float]) -> float:
    """The norm with the highest score, of equal ones the smallest."""
    return max(sorted(scores), key=lambda scale: scores[scale])


def answer_directly(name: str, compute: Callable[[], list[str]]) -> list[str]:  # noqa: ARG001
    """The `Keep` that keeps nothing."""
    return compute()


def applicable(task: Task, methods: Sequence[Method]) -> tuple[Method, ...]:
    """The methods that mean something for the task: vector controls need vectors; the scales are P1's for task 1."""

    def applies(method: Method) -> bool:
        if method in VECTOR_CONTROLS:
            return task.has_vectors
        return method != "self_scales" or (task.has_vectors and task.name == "feature_description")

    return tuple(method for method in methods if applies(method))


def evaluate_task(
    task: Task,
    train: Sequence[Record],
    test: Sequence[Record],
    explain: Explain,
    untrained: Explain,
    *,
    methods: Sequence[Method],
    scales: Sequence[float],
    bootstrap: Bootstrap,
    keep: Keep = answer_directly,
    name: str | None = None,
    others: Mapping[str, Sequence[str]] | None = None,
) -> TaskEvaluation:
    """Predictions and intervals of every applicable method on the ok records of `test`.

    `explain` is the trained explainer, `untrained` the same model before training; both get queries as they are, and
    `untrained` must leave vector norms alone. `keep` is called with the method's name (for `self_scales` with
    `self_scales@NORM`) before anything is computed for it, so that a job can store texts and skip what is done.
    `name` is what the explainer is called beside `others`, further explainers by name and their answers to `test`.
    """
    chosen = applicable(task, methods)
    if not chosen:
        raise UserError(f"{task.name}: none of the methods {', '.join(methods) or '(none given)'} applies to it")
    if "self_scales" in chosen and not scales:
        raise UserError("scales: self_scales needs at least 1 vector norm, found none")
    if not test:
        raise UserError(f"{task.name}: no record with a truth in the test split, nothing to score")
    answerer = _Answerer(task, train, test, explain, untrained, bootstrap.seed)
    metrics = [METRICS[name] for name in task.metrics]
    predictions: dict[str, list[Scored]] = {}
    scale_scores: dict[float, float] = {}
    for method in chosen:
        if method == "self_scales":
            by_scale = {
                scale: answerer.score(keep(f"{method}@{scale:g}", partial(answerer.at_scale, scale)))
                for scale in scales
            }
            scale_scores = {scale: metrics[0](rows) for scale, rows in by_scale.items()}
            predictions[method] = by_scale[_best_scale(scale_scores)]
        else:
            predictions[method] = answerer.score(keep(method, partial(answerer.texts, method)))
        if method == chosen[0]:
            predictions |= {other: answerer.score(texts) for other, texts in (others or {}).items()}
    intervals = {method: bootstrap_intervals(rows, metrics, bootstrap) for method, rows in predictions.items()}
    ahead: dict[str, Interval] = {
        method: paired_difference(predictions["explainer"], rows, metrics[0], bootstrap)
        for method, rows in predictions.items()
        if "explainer" in predictions and method != "explainer"
    }
    return TaskEvaluation(
        task.name, task.metrics, predictions, intervals, ahead, bootstrap, name, tuple(others or ()), scale_scores
    )


@dataclass
class _Answerer:
    """The texts of each method; records are rendered once, the training ones only if a method needs them."""

    task: Task
    train: Sequence[Record]
    test: Sequence[Record]
    explain: Explain
    untrained: Explain
    seed: int

    def __post_init__(self) -> None:
        not_ok = [record["record_id"] for record in (*self.train, *self.test) if record["status"] != OK]
        assert not not_ok, f"records without a truth: {not_ok[:3]}"

    @cached_property
    def examples(self) -> list[Example]:
        return [self.task.render(record) for record in self.test]

    @cached_property
    def train_examples(self) -> list[Example]:
        return [self.task.render(record) for record in self.train]

    @property
    def queries(self) -> list[Query]:
        return [example.query for example in self.examples]

    def texts(self, method: Method) -> list[str]:
        """Answers of one method, `self_scales` excepted."""
        train_answers = [example.answer for example in self.train_examples] if method in _NEED_TRAIN else []
        match method:
            case "explainer":
                return self.explain(self.queries)
            case "zero_shot":
                return self.untrained(self.queries)
            case "no_vector":
                return self.explain([without_vector(query) for query in self.queries])
            case "zero_vector":
                return self.explain([zero_vector(query) for query in self.queries])
            case "swapped_vector":
                groups = [record["group"] for record in self.test]
                return self.explain(swapped_vectors(self.queries, groups, self.seed))
            case "majority":
                return [majority(train_answers)] * len(self.test)
            case "nearest_neighbor":
                train_queries = [example.query for example in self.train_examples]
                return NearestNeighbor(train_queries, train_answers, "per_layer").answer(self.queries)
        raise AssertionError(f"no answers for method {method}")

    def at_scale(self, scale: float) -> list[str]:
        """Answers of the untrained model with all vectors at one norm."""
        return self.untrained([scaled_vector(query, scale) for query in self.queries])

    def score(self, texts: Sequence[str]) -> list[Scored]:
        """One `Scored` per test record."""
        return score_texts(self.task, self.test, self.examples, texts)


_NEED_TRAIN: tuple[Method, ...] = ("majority", "nearest_neighbor")


def score_texts(
    task: Task, records: Sequence[Record], examples: Sequence[Example], texts: Sequence[str]
) -> list[Scored]:
    """One `Scored` per record; `examples` are the records rendered, `texts` what was answered to them."""
    assert len(texts) == len(records), f"{len(texts)} answers to {len(records)} records"
    return [
        Scored(
            record_id=record["record_id"],
            group=record["group"],
            truth=task.truth(record),
            accepted=tuple(task.accepted(record)),
            predicted=task.parse(text),
            text=text,
            reference=example.answer,
        )
        for record, example, text in zip(records, examples, texts, strict=True)
    ]


def breakdown(
    task: Task, records: Sequence[Record], scored: Sequence[Scored], column: str, bootstrap: Bootstrap
) -> list[tuple[str, Interval]]:
    """Main metric for each value of a record column, in the values' order: (label, interval)."""
    cells = cross_breakdown(task, records, scored, (column,), bootstrap)
    return [(labels[0], interval) for labels, interval in cells.items()]


def cross_breakdown(
    task: Task, records: Sequence[Record], scored: Sequence[Scored], columns: Sequence[str], bootstrap: Bootstrap
) -> dict[tuple[str, ...], Interval]:
    """Main metric for each combination of values of some record columns that occurs, in the values' order."""
    by_id: Mapping[str, Record] = {record["record_id"]: record for record in records}
    cells: dict[tuple[str, ...], list[Scored]] = {}
    order: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for row in scored:
        values = [by_id[row.record_id].get(column) for column in columns]
        labels = tuple(column_label(value) for value in values)
        cells.setdefault(labels, []).append(row)
        order[labels] = tuple(column_order(value) for value in values)
    metric = METRICS[task.metrics[0]]
    return {
        labels: bootstrap_intervals(cells[labels], [metric], bootstrap)[metric.name]
        for labels in sorted(cells, key=lambda labels: order[labels])
    }


def column_label(value: Any) -> str:
    """A column value as a short text: consecutive integers as `0 to 3`, null as `none`, underscores as spaces."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        numbers = list(value)
        whole = len(numbers) > 1 and all(isinstance(number, int) for number in numbers)
        if whole and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{numbers[0]} to {numbers[-1]}"
        return ", ".join(str(number) for number in numbers)
    return str(value).replace("_", " ")


def column_order(value: Any) -> tuple[Any, ...]:
    """Numbers and lists of numbers by value, then texts, nulls last."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
        return (0, tuple(value))
    if isinstance(value, int | float):
        return (0, (value,))
    return (2, "") if value is None else (1, str(value))
