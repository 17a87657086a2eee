"""A judge's ratings beside the other metrics: the mean over rated rows, and how many were not rated."""

import math

import pytest
from evaluation_helpers import row
from exemplar_helpers import Failure, ScriptedChat

from introspect_ray.evaluation.evaluate import TaskEvaluation, answer_directly
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.evaluation.judge import Judge
from introspect_ray.evaluation.judged import with_judgements
from introspect_ray.evaluation.metrics import METRICS

ROWS = [
    row((None, "cats"), (None, "felines"), "g0", "r0", accepted=("cats", "lions")),
    row((None, "dogs"), (None, "cars"), "g1", "r1"),
    row((None, "towns"), None, "g2", "r2"),
    row((None, "rain"), (None, "wet"), "g3", "r3"),
]


def evaluation(rows):
    return TaskEvaluation(
        "feature_description", ("exact_match",), {"explainer": rows, "zero_shot": rows[:1]},
        {"explainer": {}, "zero_shot": {}}, {}, Bootstrap(samples=100, confidence=0.95, seed=0),
    )  # fmt: skip


def judge(answers):
    """Rates by (reference, candidate)."""

    def answer(text):
        reference, candidate = (text.split(f"{name}: ")[1].split("\n")[0] for name in ("Reference", "Candidate"))
        return answers[reference, candidate]

    chat = ScriptedChat(answer)
    return Judge(chat), chat


RATINGS = {
    ("cats", "felines"): "4",
    ("lions", "felines"): "2",
    ("dogs", "cars"): "1",
    ("rain", "wet"): Failure("timeout"),
}


def test_ratings_become_metrics_and_failures_a_rate():
    rater, chat = judge(RATINGS)
    found = with_judgements(evaluation(ROWS), rater, 8, answer_directly)
    assert found.metrics == ("exact_match", "judge", "judge_failure_rate")
    values = {name: found.intervals["explainer"][name].value for name in found.metrics[1:]}
    # 0.75 of the best label, 0, 0 of the row that says nothing; the failed call is in no mean.
    assert values == pytest.approx({"judge": 0.25, "judge_failure_rate": 0.25})
    assert [one.judged for one in found.predictions["explainer"]] == [0.75, 0.0, 0.0, None]
    assert found.intervals["zero_shot"]["judge"].value == 0.75
    assert len(chat.asked) == 4 + 2  # the row without an answer is not asked about


def test_as_many_labels_are_judged_as_asked_for():
    rater, chat = judge({("cats", "felines"): "4"})
    found = with_judgements(evaluation(ROWS[:1]), rater, 1, answer_directly)
    assert found.predictions["explainer"][0].judged == 0.75 and len(chat.asked) == 2


def test_kept_verdicts_are_not_asked_for_again():
    kept = {}

    def keep(name, compute):
        return kept.setdefault(name, None) or kept.update({name: compute()}) or kept[name]

    rater, chat = judge(RATINGS)
    first = with_judgements(evaluation(ROWS), rater, 8, keep)
    asked = len(chat.asked)
    again = with_judgements(evaluation(ROWS), rater, 8, keep)
    assert len(chat.asked) == asked and again.predictions == first.predictions
    assert kept["explainer@judge"] == ["0.75", "0.0", "0.0", "failed: timeout"]


def test_without_a_single_rating_there_is_no_mean():
    assert math.isnan(METRICS["judge"](ROWS)) and METRICS["judge_failure_rate"](ROWS) == 1
