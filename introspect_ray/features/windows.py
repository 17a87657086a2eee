"""Text windows: consecutive tokens of a text, as ids and as the pieces of text that they are. T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """T consecutive tokens of one text under the target's tokenizer.

    `pieces` are what another model reads, whose tokenizer cuts the same text elsewhere: joined they are the text, and
    a token that is only part of a character has an empty piece until the character is whole.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.pieces), f"{len(self.ids)} ids for {len(self.pieces)} pieces"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def __len__(self) -> int:
        return len(self.ids)


def window(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Window:
    """The window of these ids. Special tokens are pieces too, written as the tokenizer writes them.

    A token is decoded after the one before it, because some tokenizers drop the space before a text's first word.
    """
    pieces: list[str] = []
    before: list[int] = []
    waiting: list[int] = []
    for token in map(int, ids):
        waiting.append(token)
        text = _decode(tokenizer, before + waiting)[len(_decode(tokenizer, before)) :]
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        pieces.append(text if whole else "")
        if whole:
            before, waiting = waiting, []
    if waiting:
        pieces[-1] = _decode(tokenizer, before + waiting)[len(_decode(tokenizer, before)) :]
    return Window(tuple(map(int, ids)), tuple(pieces))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
