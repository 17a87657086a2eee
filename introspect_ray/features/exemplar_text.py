"""Exemplars as text for a language model to read: one line each, strong tokens between marks that no text can forge.

T tokens of a window.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from introspect_ray.features.exemplars import Exemplar
from introspect_ray.features.windows import Window

OPEN, CLOSE = "⟦", "⟧"
LINE_BREAK = "↵"
NUM_LEVELS = 10

_SHOWN = {"\n": LINE_BREAK, "\r": "", "\t": " ", OPEN: "[[", CLOSE: "]]"}
_UNSEEN = ("Cc", "Cf", "Zl", "Zp")
_JOINERS = "\u200c\u200d"
"""Unseen, but some scripts and emoji are not written without them."""


def one_line(text: str) -> str:
    """The text without line breaks, marks and characters that are not seen, so that it can only be what it is."""
    return "".join(map(_shown, text))


def _shown(one: str) -> str:
    if one in _SHOWN:
        return _SHOWN[one]
    is_unseen = unicodedata.category(one) in _UNSEEN and one not in _JOINERS
    return "\N{REPLACEMENT CHARACTER}" if is_unseen else one


def cut(exemplar: Exemplar, max_tokens: int) -> Exemplar:
    """The `max_tokens` tokens around the largest activation; around the middle of a window that has none."""
    length = len(exemplar.window)
    if length <= max_tokens:
        return exemplar
    centre = int(exemplar.activations.argmax()) if exemplar.activations.any() else length // 2
    start = min(max(0, centre - max_tokens // 2), length - max_tokens)
    part = slice(start, start + max_tokens)
    window = Window(exemplar.window.ids[part], exemplar.window.pieces[part])
    return Exemplar(window, exemplar.activations[part], exemplar.kind, exemplar.quantile)


def strong_tokens(activations: Float[np.ndarray, " T"], maximum: float, share: float) -> Bool[np.ndarray, " T"]:
    """Tokens above `share` of the latent's maximum, and the strongest of a window in which it fires at all."""
    strong = (activations > share * maximum) & (activations > 0)
    if activations.any() and not strong.any():
        strong[int(activations.argmax())] = True
    return strong


def marked_text(pieces: Sequence[str], marked: Bool[np.ndarray, " T"]) -> str:
    """The text in one line, each run of marked tokens between marks.

    A token that is only part of a character has no text; its mark goes to the token that completes the character.
    """
    parts: list[str] = []
    inside = waiting = False
    for piece, is_marked in zip(pieces, marked.tolist(), strict=True):
        waiting = waiting or is_marked
        if not piece:
            continue
        if waiting != inside:
            parts.append(OPEN if waiting else CLOSE)
            inside = waiting
        parts.append(one_line(piece))
        waiting = False
    if inside:
        parts.append(CLOSE)
    return "".join(parts).strip()


def activation_list(exemplar: Exemplar, marked: Bool[np.ndarray, " T"], maximum: float) -> str:
    """The marked tokens, quoted, each with its activation from 1 to 10, 10 being the latent's maximum."""
    levels = [
        (
            _text_at(exemplar.window.pieces, place),
            max(1, round(NUM_LEVELS * float(exemplar.activations[place]) / maximum)),
        )
        for place in np.flatnonzero(marked).tolist()
    ]
    return ", ".join(f"{json.dumps(one_line(piece), ensure_ascii=False)} {level}" for piece, level in levels)


def _text_at(pieces: Sequence[str], place: int) -> str:
    """What a token says; for a part of a character, the token that completes it."""
    return next((piece for piece in pieces[place:] if piece), "")
