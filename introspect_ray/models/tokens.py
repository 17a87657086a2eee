"""Text to token ids and back to characters. Text never becomes a special token, whatever it spells."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

Offset = tuple[int, int]
"""Characters `[start, end)` of the text that a token stands for."""


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts a begin-of-text token before a text on its own."""
    if tokenizer.bos_token_id is None:
        return False
    first = tokenizer("a", add_special_tokens=True).input_ids[:1]
    return first == [tokenizer.bos_token_id]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, add_bos: bool) -> list[int]:
    """Token ids of `text`, special tokens in it spelled out; a begin-of-text token first if `add_bos`."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return _bos(tokenizer) + ids if add_bos else ids


def encode_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Offset]]:
    """Token ids of `text`, and the characters each stands for.

    Begins with the begin-of-text token, at `(0, 0)`, where the tokenizer adds one on its own.
    """
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    bos = _bos(tokenizer) if adds_bos(tokenizer) else []
    offsets = [(0, 0)] * len(bos) + [(start, end) for start, end in encoded.offset_mapping]
    return bos + encoded.input_ids, offsets


def position_of(offsets: Sequence[Offset], start: int, end: int) -> int:
    """Index of the last token that overlaps characters `[start, end)`; asserts that one does."""
    for position in range(len(offsets) - 1, -1, -1):
        token_start, token_end = offsets[position]
        if token_start < end and token_end > start:
            return position
    raise AssertionError(f"no token overlaps characters [{start}, {end})")


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of the one token that `text` is, or `None` if it takes none or several."""
    ids = encode_text(tokenizer, text, add_bos=False)
    return ids[0] if len(ids) == 1 else None


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token without surrounding white space: what a next token says."""
    text = tokenizer.decode([token])
    assert isinstance(text, str)
    return text.strip()


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    assert tokenizer.bos_token_id is not None, "this tokenizer has no begin-of-text token"
    return [tokenizer.bos_token_id]
