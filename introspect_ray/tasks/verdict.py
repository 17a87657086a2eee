"""Answers of two parts, shared by the causal tasks: does it change, and to what (or what does it stay).

P1's own wording ("The output would remain unchanged from <<<X>>>.") belongs to its published checkpoints only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from introspect_ray.tasks.base import Answer, Record

NO_TEXT = "answer_has_no_text"
"""Status of a record whose answer, with or without the intervention, is blank or a part of a character."""


def has_text(answer: str) -> bool:
    """Whether what a target says, outer blanks removed, can be told: not blank, and no part of a character."""
    return bool(answer) and "\ufffd" not in answer


@dataclass(frozen=True)
class VerdictWording:
    """` French (changed)`: the content first, where the target itself would say it, then the verdict."""

    def render(self, answer: Answer) -> str:
        return f" {answer.content} ({'changed' if answer.changed else 'unchanged'})"

    def parse(self, text: str) -> Answer | None:
        """The whole text must have the form; anything else is unparsable, never a guess."""
        match = _FORM.fullmatch(text)
        return Answer(match[2] == "changed", match[1]) if match else None


class VerdictTask:
    """What the causal tasks share: an answer of two parts, in one wording, with one content that is right."""

    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "has_changed_f1", "content_match", "parse_rate")
    wording: ClassVar[VerdictWording] = VerdictWording()

    def truth(self, record: Record) -> Answer:
        return Answer(record["changed"], record["content"])

    def accepted(self, record: Record) -> tuple[str, ...]:  # noqa: ARG002 - one content is right
        return ()

    def parse(self, text: str) -> Answer | None:
        return self.wording.parse(text)


_FORM = re.compile(r"\s*(.*?)\s*\((changed|unchanged)\)\s*", re.DOTALL)
