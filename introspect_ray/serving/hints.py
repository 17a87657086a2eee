"""Whether a span of a question has the wording of a hint."""

from __future__ import annotations

import re

from introspect_ray.config import InputAblationConfig

_SLOT = re.compile(r"(\{letter\}|\{choice\})")


def is_hint(span: str, layout: InputAblationConfig) -> bool:
    """Whether `span` is the hint of that layout with one letter, or some choice, put in."""
    pieces = (
        r"[A-Z]" if piece == "{letter}" else r"[^\n]+" if piece == "{choice}" else re.escape(piece)
        for piece in _SLOT.split(layout.hint)
    )
    return re.fullmatch("".join(pieces), span) is not None
