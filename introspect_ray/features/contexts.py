"""Texts cut for collecting exemplars: contexts that the target reads, and windows of them that become exemplars.

A text's tokens are read in contexts of at most so many tokens. The first token of a context is read but not seen: its
residual stream is far longer than any other (see activations.py). It is begin-of-text where the tokenizer adds one;
else it is the token before, so that every token of a text but its very first is seen once. What is seen of a context is
cut into windows, the last one shorter. N tokens seen, W windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt64
from transformers import PreTrainedTokenizerBase

from introspect_ray.features.windows import Window
from introspect_ray.models.tokens import adds_bos


@dataclass(frozen=True)
class Text:
    """One text to collect from: its row in the source and the number of its split."""

    row: int
    split: int
    text: str


@dataclass(frozen=True, eq=False)
class Cuts:
    """Contexts of some texts, and the windows of their seen tokens, in the order of the texts."""

    contexts: list[list[int]]
    ids: UInt64[np.ndarray, " W"]
    """What windows are known by: a hash of the whole text and the window's number in it."""
    splits: Int[np.ndarray, " W"]
    first: Int[np.ndarray, " W_and_1"]
    """Number of each window's first seen token, and N at the end."""
    windows: list[Window]

    @property
    def num_tokens(self) -> int:
        return int(self.first[-1])


def cut(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, context_tokens: int, window_tokens: int) -> Cuts:
    """The contexts and windows of some texts. A text with nothing to see has none."""
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    encoded = tokenizer(
        [text.text for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    contexts: list[list[int]] = []
    windows: list[Window] = []
    ids: list[np.ndarray] = []
    splits: list[int] = []
    for text, tokens, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        pieces = _pieces(text.text, offsets)
        before = len(windows)
        # Without begin-of-text, the first token of all stands where it would.
        for start in range(0 if bos else 1, len(tokens), context_tokens - 1):
            stop = min(start + context_tokens - 1, len(tokens))
            contexts.append((bos or [tokens[start - 1]]) + tokens[start:stop])
            windows += [
                Window(
                    tuple(tokens[at : min(at + window_tokens, stop)]), tuple(pieces[at : min(at + window_tokens, stop)])
                )
                for at in range(start, stop, window_tokens)
            ]
        ids.append(window_ids(text.text, len(windows) - before))
        splits += [text.split] * (len(windows) - before)
    return Cuts(
        contexts=contexts,
        ids=np.concatenate([np.empty(0, np.uint64), *ids]),
        splits=np.array(splits, dtype=np.int64),
        first=np.concatenate([[0], np.cumsum([len(found) for found in windows], dtype=np.int64)]),
        windows=windows,
    )


def window_ids(text: str, count: int) -> UInt64[np.ndarray, " count"]:
    """Ids of the first `count` windows of a text; equal on every machine, in every run and order."""
    start = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u8").astype(np.uint64)
    return mixed(start + np.arange(count, dtype=np.uint64))


def mixed(numbers: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """A bijection of 64-bit numbers that scatters neighbours (splitmix64: Steele, Lea, Flood 2014)."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The text in one piece per token, as `windows.window` would cut it; joined they are the text up to its last token.

    What a tokenizer leaves out between two tokens goes with the second; a token of which the character goes on in the
    next one has an empty piece.
    """
    pieces: list[str] = []
    done = 0
    for number, (_, end) in enumerate(offsets):
        shared = number + 1 < len(offsets) and offsets[number + 1][0] < end
        pieces.append("" if shared else text[done:end])
        done = done if shared else end
    return pieces
