"""Every method end to end through `evaluate_task`, with explainers that read the vector."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from evaluation_helpers import ColourTask, TextTask, record
from pydantic import ValidationError

from introspect_ray.config import EvaluateConfig, Method
from introspect_ray.errors import UserError
from introspect_ray.evaluation.evaluate import TaskEvaluation, breakdown, column_label, cross_breakdown, evaluate_task
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.evaluation.report import Report, build_task_report, render_report
from introspect_ray.evaluation.scores import format_table, scores_json
from introspect_ray.explainer.query import Query

COLOURS = ("red", "green", "blue")
METHODS: tuple[Method, ...] = (
    "explainer",
    "majority",
    "nearest_neighbor",
    "zero_shot",
    "no_vector",
    "zero_vector",
    "swapped_vector",
    "self_scales",
)
BOOTSTRAP = Bootstrap(samples=200, confidence=0.95, seed=0)
TRAIN = [record(index, COLOURS[index % 2], np.eye(3)[index % 2].tolist()) for index in range(5)]
TEST = [
    record(index, COLOURS[index % 3], (2 * np.eye(3)[index % 3]).tolist(), layers=[index % 2, index % 2 + 1])
    for index in range(12)
]


def trained(queries: Sequence[Query]) -> list[str]:
    """Reads the largest entry of the vector; without one it says red, from zeros it says nothing that parses."""
    answers = []
    for query in queries:
        if not query.vectors:
            answers.append("It is red")
        elif not query.vectors[0].values.any():
            answers.append("no idea")
        else:
            answers.append(f"It is {COLOURS[int(query.vectors[0].values.argmax())]}")
    return answers


def untrained(queries: Sequence[Query]) -> list[str]:
    """Understands only vectors of norm 5."""
    return [
        text if abs(float(np.linalg.norm(query.vectors[0].values)) - 5) < 1e-3 else "It is what ?"
        for query, text in zip(queries, trained(queries), strict=True)
    ]


def evaluate(task: ColourTask, **changes: object) -> TaskEvaluation:
    settings = {"methods": METHODS, "scales": (1.0, 5.0, 10.0), "bootstrap": BOOTSTRAP, **changes}
    return evaluate_task(task, TRAIN, TEST, trained, untrained, **settings)  # type: ignore[arg-type]


def test_every_method_scores_what_it_should() -> None:
    evaluation = evaluate(ColourTask())
    value = {method: intervals["description_match"].value for method, intervals in evaluation.intervals.items()}
    assert tuple(value) == METHODS
    assert value["explainer"] == 1 and value["no_vector"] == pytest.approx(1 / 3) and value["zero_vector"] == 0
    assert value["majority"] == pytest.approx(1 / 3)  # red: three of five training answers, a third of the test
    assert value["nearest_neighbor"] == pytest.approx(2 / 3)  # blue is not in training; the first neighbour is red
    assert value["zero_shot"] == 0 and value["self_scales"] == 1 and evaluation.best_scale == 5
    assert evaluation.scale_scores == {1: 0, 5: 1, 10: 0}
    assert evaluation.intervals["zero_vector"]["parse_rate"].value == 0
    assert {interval.n for intervals in evaluation.intervals.values() for interval in intervals.values()} == {12}
    assert evaluation.ahead["no_vector"].value == pytest.approx(2 / 3) and "explainer" not in evaluation.ahead


def test_swapped_vector_answers_for_the_donor() -> None:
    rows = evaluate(ColourTask()).predictions["swapped_vector"]
    assert sorted(row.text for row in rows) == sorted(f"It is {test['colour']}" for test in TEST)
    assert [row.record_id for row in rows] == [test["record_id"] for test in TEST]


def test_task_without_vectors_has_no_vector_controls() -> None:
    evaluation = evaluate_task(
        TextTask(), TRAIN, TEST, trained, trained, methods=METHODS, scales=(), bootstrap=BOOTSTRAP
    )
    assert tuple(evaluation.predictions) == ("explainer", "majority", "nearest_neighbor", "zero_shot")


def test_kept_texts_are_neither_computed_nor_changed() -> None:
    stored: dict[str, list[str]] = {}
    computed: list[str] = []

    def keep(name: str, compute: Callable[[], list[str]]) -> list[str]:
        if name not in stored:
            computed.append(name)
            stored[name] = compute()
        return stored[name]

    first = evaluate(ColourTask(), keep=keep)
    names = [*METHODS[:-1], "self_scales@1", "self_scales@5", "self_scales@10"]
    assert computed == names

    def refuse(queries: Sequence[Query]) -> list[str]:
        raise AssertionError(f"asked {len(queries)} queries again")

    settings = {"methods": METHODS, "scales": (1.0, 5.0, 10.0), "bootstrap": BOOTSTRAP}
    again = evaluate_task(ColourTask(), TRAIN, TEST, refuse, refuse, keep=keep, **settings)  # type: ignore[arg-type]
    assert again == first and computed == names


def test_answers_must_match_the_records_one_to_one() -> None:
    with pytest.raises(AssertionError, match="11 answers to 12 records"):
        evaluate_task(
            ColourTask(),
            TRAIN,
            TEST,
            lambda queries: trained(queries)[1:],
            untrained,
            methods=("explainer",),
            scales=(),
            bootstrap=BOOTSTRAP,
        )


def test_failed_records_are_never_scored() -> None:
    with pytest.raises(AssertionError, match="records without a truth"):
        evaluate_task(
            ColourTask(),
            TRAIN,
            [record(0, "red", [1, 0, 0], status="no_position_found")],
            trained,
            untrained,
            methods=("explainer",),
            scales=(),
            bootstrap=BOOTSTRAP,
        )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"methods": ()}, "feature_description: none of the methods (none given) applies to it"),
        ({"scales": ()}, "scales: self_scales needs at least 1 vector norm, found none"),
    ],
)
def test_settings_that_leave_nothing_to_do(changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(ColourTask(), **changes)
    assert str(caught.value) == line


def test_empty_test_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"^feature_description: no record with a truth in the test split"):
        evaluate_task(
            ColourTask(), TRAIN, [], trained, untrained, methods=("explainer",), scales=(), bootstrap=BOOTSTRAP
        )


def test_breakdowns_split_the_main_metric_by_value_in_order() -> None:
    task = ColourTask()
    records = [{**test, "kind": "new_option" if test["colour"] == "blue" else None} for test in TEST]
    rows = evaluate(task).predictions["no_vector"]
    layers = breakdown(task, records, rows, "layers", BOOTSTRAP)
    assert [(label, interval.n) for label, interval in layers] == [("0 to 1", 6), ("1 to 2", 6)]
    kinds = breakdown(task, records, rows, "kind", BOOTSTRAP)
    assert [(label, interval.value) for label, interval in kinds] == [("new option", 0), ("none", 0.5)]
    cells = cross_breakdown(task, records, rows, ("layers", "kind"), BOOTSTRAP)
    assert sum(interval.n for interval in cells.values()) == 12 and next(iter(cells)) == ("0 to 1", "new option")


def test_numbers_sort_as_numbers() -> None:
    task = ColourTask()
    records = [{**test, "kind": 10 - index % 3} for index, test in enumerate(TEST)]
    rows = evaluate(task).predictions["explainer"]
    assert [label for label, _ in breakdown(task, records, rows, "kind", BOOTSTRAP)] == ["8", "9", "10"]


@pytest.mark.parametrize(
    ("value", "label"),
    [(None, "none"), (True, "yes"), ([3], "3"), (np.array([2, 3, 4]), "2 to 4"), ((1, 5), "1, 5"), ("a_b", "a b")],
)
def test_column_labels(value: object, label: str) -> None:
    assert column_label(value) == label


def test_further_explainers_stand_beside_the_first_and_change_nothing_else() -> None:
    alone = evaluate(ColourTask())
    blind, right = ["It is red"] * 12, [f"It is {test['colour']}" for test in TEST]
    together = evaluate(ColourTask(), name="self", others={"B random": blind, "B fitted": right})
    assert list(together.intervals)[:3] == ["explainer", "B random", "B fitted"]
    assert {name: together.intervals[name] for name in alone.intervals} == alone.intervals
    assert together.intervals["B random"]["description_match"].value == pytest.approx(1 / 3)
    assert together.ahead["B random"].value == pytest.approx(2 / 3) and together.ahead["B fitted"].value == 0
    scores = json.loads(scores_json([together]))["feature_description"]
    assert list(scores)[:3] == ["self", "B random", "B fitted"] and "explainer" not in scores
    assert [line.split("  ")[1].strip() for line in format_table([together]).splitlines()[2:5]] == list(scores)[:3]
    report = build_task_report(ColourTask(), TEST, together, [], 3)
    assert [answer.method for answer in report.examples[0].answers][:3] == ["explainer", "B random", "B fitted"]
    page = render_report(Report("t", "c", [], [report]))
    assert '<th scope="row">self</th>' in page and '<th scope="row">B random</th>' in page
    assert '["B fitted", "It is' in page and "Trained explainer" not in page


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((None, None), "dataset d has several explainers: name each after the first"),
        (("a", "a"), "dataset d has two explainers with the name 'a'"),
        (("a", "majority"), "name 'majority' is that of a method"),
        (("a", "../b"), "string should match pattern"),
        ((), "runs is empty"),
    ],
)
def test_explainers_must_be_told_apart(names: tuple[str | None, ...], message: str) -> None:
    runs = [{"dataset": "d", "explainer": f"e{place}", "name": name} for place, name in enumerate(names)]
    with pytest.raises(ValidationError, match=re.compile(message, re.IGNORECASE)):
        EvaluateConfig.model_validate({"runs": runs})
