"""Answers of two parts: what is written is read back, and nothing else is taken for an answer."""

import pytest

from introspect_ray.tasks.base import Answer
from introspect_ray.tasks.verdict import VerdictWording

WORDING = VerdictWording()
CONTENTS = [
    "Rome",
    "",
    ":",
    "a: b",
    "one\ntwo",
    "]]",
    "É",
    "(",
    ")",
    "(changed)",
    "Rome (unchanged)",
    "changed",
    "\ufffd",
]


def test_the_very_words():
    """Explainers are trained on these, so a change of wording makes their answers unparsable."""
    assert WORDING.render(Answer(True, "Rome")) == " Rome (changed)"
    assert WORDING.render(Answer(False, "B")) == " B (unchanged)"


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("changed", [True, False])
def test_round_trip(content, changed):
    assert WORDING.parse(WORDING.render(Answer(changed, content))) == Answer(changed, content)


def test_blanks_around_an_answer_say_nothing():
    for text in ("Rome (changed)", "\n Rome (changed) \n", "Rome(changed)", "  Rome\n (changed)"):
        assert WORDING.parse(text) == Answer(True, "Rome")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Rome",
        "Rome changed",
        "Rome (Changed)",
        "Rome ( changed )",
        "Rome (changed",
        "Rome (changed).",
        "Rome (unchanged) because",
        "Rome (not changed)",
        "(changed) Rome",
    ],
)
def test_anything_else_is_no_answer(text):
    assert WORDING.parse(text) is None
