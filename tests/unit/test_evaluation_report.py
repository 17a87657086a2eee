"""The page, the scores and the table, rendered from a small evaluation with hostile text in it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluation_helpers import ColourTask, record

from introspect_ray.evaluation.charts import curve_plot
from introspect_ray.evaluation.evaluate import TaskEvaluation, evaluate_task
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.evaluation.report import Report, TaskReport, build_task_report, render_report
from introspect_ray.evaluation.scores import format_table, format_value, scores_json
from introspect_ray.explainer.query import Query

HOSTILE = "</script><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> & \u2028 {{ 7*7 }}"
TEST = [
    record(index, ("red", HOSTILE)[index % 2], [1.0, float(index)], note=HOSTILE, kind=HOSTILE if index < 4 else "b")
    for index in range(10)
]
TRAIN = [record(index, "red", [1.0, 0.0]) for index in range(3)]


def explain(queries: Sequence[Query]) -> list[str]:
    return ["It is red" if query.vectors else HOSTILE for query in queries]


@pytest.fixture(scope="module")
def evaluation() -> TaskEvaluation:
    return evaluate_task(
        ColourTask(),
        TRAIN,
        TEST,
        explain,
        explain,
        methods=("explainer", "majority", "no_vector", "swapped_vector", "self_scales"),
        scales=(1.0, 2.0),
        bootstrap=Bootstrap(200, 0.95, 0),
    )


@pytest.fixture(scope="module")
def page(evaluation: TaskEvaluation) -> str:
    curve = [(step, 5.0 / step) for step in range(1, 200)]
    task = build_task_report(
        ColourTask(), [{**test, "layers": [index % 2]} for index, test in enumerate(TEST)], evaluation, curve, 6
    )
    return render_report(Report(HOSTILE, "today", [("Target", HOSTILE)], [task]))


class Tags(HTMLParser):
    """Every start tag with its attributes, and the contents of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def parse(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    return parser


def test_page_refers_to_nothing_outside(page: str) -> None:
    tags = parse(page).tags
    assert not [tag for tag, _ in tags if tag in ("link", "img", "iframe", "object", "base")]
    assert not [attrs for _, attrs in tags if "src" in attrs]
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in tags)
    styles = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert styles and "url(" not in styles[1] and "@import" not in styles[1]


def test_hostile_text_stays_text(page: str) -> None:
    parsed = parse(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 2  # the examples and the code
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert "alert('x')</script>" not in page and "{{ 7*7 }}" in page
    assert "&lt;/script&gt;&lt;script&gt;" in page


def test_examples_survive_the_trip_into_the_page(page: str, evaluation: TaskEvaluation) -> None:
    examples = json.loads(parse(page).scripts[0])["examples"]
    assert len(examples) == 6
    by_id = {test["record_id"]: test for test in TEST}
    for example in examples:
        test = by_id[example["id"]]
        assert example["pieces"] == [["the ", False], [test["colour"], True], [" one", False]]
        assert example["details"] == [["note", HOSTILE]] and example["truth"] == f"It is {test['colour']}"
        answers = {label: (text, right) for label, text, right in example["answers"]}
        assert answers["Trained explainer"] == ("It is red", test["colour"] == "red")
        assert answers["Vector removed"] == (HOSTILE, False)
        assert next(iter(answers)) == "Trained explainer"
        assert len(answers) == len(evaluation.predictions)


def test_page_without_the_explainer_and_without_curve(page: str) -> None:
    evaluation = evaluate_task(
        ColourTask(), TRAIN, TEST, explain, explain, methods=("majority",), scales=(), bootstrap=Bootstrap(200, 0.9, 0)
    )
    task = build_task_report(ColourTask(), TEST, evaluation, [], 0)
    assert task.grid is None  # one value of Layers only
    other = render_report(Report("t", "c", [], [task]))
    assert "Training loss" not in other and 'class="browser' not in other and "90% intervals" in other
    assert "Training loss" in page and "Layers by kind" in page


def test_empty_report_renders() -> None:
    assert "<h1>nothing</h1>" in render_report(Report("nothing", "now", [], []))


def test_scores_have_the_published_shape(evaluation: TaskEvaluation) -> None:
    scores = json.loads(scores_json([evaluation]))
    assert list(scores) == ["feature_description"]
    methods = scores["feature_description"]
    assert set(methods) == {"explainer", "majority", "no_vector", "swapped_vector", "self_scales"}
    assert set(methods["explainer"]) == {"description_match", "exact_match", "parse_rate"}
    cell = methods["explainer"]["exact_match"]
    assert set(cell) == {"value", "low", "high", "n"} and cell["value"] == 0.5 and cell["n"] == 10


def test_undefined_scores_are_null_not_nan(evaluation: TaskEvaluation) -> None:
    broken = TaskEvaluation(
        "t",
        ("exact_match",),
        {"explainer": []},
        {
            "explainer": {
                "exact_match": type(evaluation.intervals["explainer"]["exact_match"])(np.nan, np.nan, np.nan, 0, 0)
            }
        },
        {},
        evaluation.bootstrap,
    )
    assert json.loads(scores_json([broken]))["t"]["explainer"]["exact_match"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
    }
    assert "n/a [n/a, n/a]" in format_table([broken])
    page = render_report(Report("t", "c", [], [TaskReport(broken, {}, None, [], [])]))
    assert "n/a" in page and "nan%" not in page


def test_table_is_aligned(evaluation: TaskEvaluation) -> None:
    head, names, *lines = format_table([evaluation]).splitlines()
    assert head == "feature_description: 10 records in 5 groups"
    assert names.split() == ["method", "description_match", "exact_match", "parse_rate"]
    assert len({len(line) for line in (names, *lines)}) == 1 and len(lines) == 5
    assert "0.50 [" in lines[0] and lines[0].split()[0] == "explainer"


def test_values_do_not_round_to_a_negative_zero() -> None:
    assert [format_value(value) for value in (-0.001, 0.005001, float("nan"))] == ["0.00", "0.01", "n/a"]


def test_curve_geometry() -> None:
    plot = curve_plot([(10, 4.0), (0, 8.0), (20, float("nan")), (40, 2.0)])
    assert plot is not None and not plot.is_log
    points = [tuple(map(float, point.split())) for point in plot.raw[1:].split("L")]
    assert [x for x, _ in points] == [0, 25, 100]
    top = 8 * 1.05
    assert [y for _, y in points] == pytest.approx([100 - 100 * loss / top for loss in (8, 4, 2)], abs=0.01)
    assert {tick.label: tick.place for tick in plot.y_ticks}["4"] == pytest.approx(100 * 4 / top)
    assert [tick.label for tick in plot.x_ticks] == ["0", "10", "20", "30", "40"]


def test_steep_curve_is_logarithmic_and_short_ones_are_left_out() -> None:
    plot = curve_plot([(step, 10.0 ** (1 - step / 50)) for step in range(101)])
    assert plot is not None and plot.is_log and [tick.label for tick in plot.y_ticks][-1] == "10"
    places = [tick.place for tick in plot.y_ticks]
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 100
    assert curve_plot([]) is None and curve_plot([(1, 2.0)]) is None
    flat = curve_plot([(0, 1.0), (1, 1.0)])
    assert flat is not None and "nan" not in flat.raw
