"""Answers of two parts, shared by the causal tasks: does it change, and to what (or what does it stay).

P1's own wording ("The output would remain unchanged from <<<X>>>.") belongs to its published checkpoints only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from introspect_ray.tasks.base import Answer


@dataclass(frozen=True)
class VerdictWording:
    """` French (changed)`: the content first, where the target itself would say it, then the verdict."""

    def render(self, answer: Answer) -> str:
        return f" {answer.content} ({'changed' if answer.changed else 'unchanged'})"

    def parse(self, text: str) -> Answer | None:
        """The whole text must have the form; anything else is unparsable, never a guess."""
        match = _FORM.fullmatch(text)
        return Answer(match[2] == "changed", match[1]) if match else None


_FORM = re.compile(r"\s*(.*?)\s*\((changed|unchanged)\)\s*", re.DOTALL)
