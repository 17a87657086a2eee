"""Answers of two parts: what is written is read back, and nothing else is taken for an answer."""

import pytest

from introspect_ray.tasks.base import Answer
from introspect_ray.tasks.verdict import VerdictWording

OUTPUT, ANSWER = VerdictWording("output"), VerdictWording("answer")


def test_the_very_words():
    assert OUTPUT.render(Answer(True, "Rome")) == "The output changes to: Rome"
    assert ANSWER.render(Answer(False, "B")) == "The answer stays: B"


@pytest.mark.parametrize("content", ["Rome", "", ":", "a: b", "changes to: x", "one\ntwo", "]]", "É", "The answer stays: A"])
@pytest.mark.parametrize("changed", [True, False])
def test_round_trip(content, changed):
    for wording in (OUTPUT, ANSWER):
        assert wording.parse(wording.render(Answer(changed, content))) == Answer(changed, content)


def test_blanks_around_an_answer_say_nothing():
    assert OUTPUT.parse("\n The output stays:  Rome \n") == OUTPUT.parse("The output stays:Rome") == Answer(False, "Rome")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Rome",
        "The output changes",
        "The output stays Rome",
        "the output stays: Rome",
        "The output  stays: Rome",
        "The answer stays: Rome",
        "I think: The output stays: Rome",
        "The output does not change: Rome",
        "The output changes to Rome",
    ],
)
def test_anything_else_is_no_answer(text):
    assert OUTPUT.parse(text) is None
