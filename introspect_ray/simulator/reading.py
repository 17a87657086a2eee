"""Which tokens a simulator reads for a window, and where it reads the level of each of the window's tokens.

A level is read where the window's token ends: there the simulator has seen all of it, and nothing after it. That is the
token's own position if both models cut text alike, and the last of the simulator's tokens that overlaps it if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from introspect_ray.features.windows import Window


@dataclass(frozen=True)
class Reading:
    """The simulator's own token ids, and per token of the window the index into them at which its level is read."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.ids and all(0 <= position < len(self.ids) for position in self.positions)


def read_window(window: Window, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """The window as the simulator reads it: its ids if they spell its text under `tokenizer`, else its text anew."""
    if max(window.ids) < len(tokenizer) and _spells(window, tokenizer):
        return Reading(window.ids, tuple(range(len(window))))
    encoded = tokenizer(window.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    starts = [start for start, _ in encoded.offset_mapping]
    # The last token that begins before the piece ends; bytes of one character share their offsets.
    positions = [max(0, int(np.searchsorted(starts, end, side="left")) - 1) for end in piece_ends(window.pieces)]
    return Reading(tuple(encoded.input_ids), tuple(positions))


def piece_ends(pieces: Sequence[str]) -> list[int]:
    """Character at which each piece ends. A token that is part of a character ends where the character does."""
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    for index in range(len(pieces) - 2, -1, -1):
        if not pieces[index]:
            ends[index] = ends[index + 1]
    return ends


def levels_at_positions(reading: Reading, levels: Float[np.ndarray, " T"]) -> tuple[list[int], Float[np.ndarray, " N"]]:
    """The N positions at which anything is read, and the largest level among the window's tokens read at each."""
    positions = sorted(set(reading.positions))
    place = {position: index for index, position in enumerate(positions)}
    found = np.zeros(len(positions))
    np.maximum.at(found, [place[position] for position in reading.positions], levels)
    return positions, found


def _spells(window: Window, tokenizer: PreTrainedTokenizerBase) -> bool:
    text = tokenizer.decode(list(window.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Some tokenizers drop the space before a text's first word.
    return window.text in (text, f" {text}")
