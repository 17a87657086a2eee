"""Answers of two parts, shared by the causal tasks: does it change, and to what (or what does it stay).

P1's own wording ("The output would remain unchanged from <<<X>>>.") belongs to its published checkpoints only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from introspect_ray.tasks.base import Answer


@dataclass(frozen=True)
class VerdictWording:
    """`noun` is what changes: "output" or "answer"."""

    noun: str

    def render(self, answer: Answer) -> str:
        verb = "changes to" if answer.changed else "stays"
        return f"The {self.noun} {verb}: {answer.content}"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\s*The {self.noun} (changes to|stays): ?(.*?)\s*", re.DOTALL)

    def parse(self, text: str) -> Answer | None:
        """The whole text must have the form; anything else is unparsable, never a guess."""
        match = self._pattern.fullmatch(text)
        return Answer(match[1] == "changes to", match[2]) if match else None
