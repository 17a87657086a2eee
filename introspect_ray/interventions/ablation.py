"""Ablation of input spans: the tokens, or the characters, are taken out."""

from __future__ import annotations

from collections.abc import Sequence

from introspect_ray.errors import UserError


def ablate_span(ids: Sequence[int], start: int, end: int) -> list[int]:
    """The token ids without those at `[start, end)`. Raises `UserError` if the span is empty or out of range."""
    _check_span(start, end, len(ids), "tokens")
    return [*ids[:start], *ids[end:]]


def ablate_text(text: str, start: int, end: int) -> str:
    """The text without its characters `[start, end)`. Raises `UserError` if the span is empty or out of range."""
    _check_span(start, end, len(text), "characters")
    return text[:start] + text[end:]


def _check_span(start: int, end: int, length: int, unit: str) -> None:
    if not 0 <= start < end <= length:
        raise UserError(f"span [{start}, {end}) is invalid: expected a non-empty part of {length} {unit}")
