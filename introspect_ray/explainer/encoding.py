"""Queries to token ids, loss mask and vector positions, all built in the same pass.

    frame.prefix | text | begin vector end | text ... | frame.suffix | answer, end token
    (trusted)     (specials off)                        (trusted)      (loss here only)

Only the frame, which comes from the tokenizer's own chat template, is tokenized with special tokens enabled. Text is
tokenized with them disabled and vectors never pass through a string, so text that spells a marker stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from introspect_ray.errors import UserError
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.models.tokens import encode_text

USER_MARK = "introspect-ray-user-text"
ANSWER_MARK = "introspect-ray-answer-text"
BASE_SUFFIX = "\n"
"""What separates query and answer where a tokenizer has no chat template."""


@dataclass(frozen=True)
class PlaceholderTokens:
    """The three tokens of one continuous token: begin marker, placeholder, end marker."""

    begin: str
    vector: str
    end: str

    @property
    def all(self) -> tuple[str, str, str]:
        return self.begin, self.vector, self.end


OWN_TOKENS = PlaceholderTokens("<|vector_begin|>", "<|vector|>", "<|vector_end|>")
KNOWN_TOKENS = (
    OWN_TOKENS,
    # The choices of the paper's published checkpoints (Llama 3, Qwen 3), spare tokens where there is only text.
    PlaceholderTokens(
        begin="<|reserved_special_token_10|>",
        vector="<|reserved_special_token_12|>",
        end="<|reserved_special_token_11|>",
    ),
    PlaceholderTokens(begin="<|vision_start|>", vector="<|vision_pad|>", end="<|vision_end|>"),
)


def choose_placeholders(tokenizer: PreTrainedTokenizerBase) -> PlaceholderTokens:
    """The first of `KNOWN_TOKENS` that the tokenizer has as special tokens; otherwise `OWN_TOKENS`, added to it.

    Whoever calls this compares `len(tokenizer)` with the rows of the embedding matrix afterwards.
    """
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    for tokens in KNOWN_TOKENS:
        if special.issuperset(tokens.all):
            return tokens
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in OWN_TOKENS.all], True)
    return OWN_TOKENS


@dataclass(frozen=True)
class Frame:
    """Trusted text around a query: what opens it, what stands between it and the answer, and the token that ends it.

    An explainer stores its frame, because some chat templates change with the date or with a library's version.
    """

    prefix: str
    suffix: str
    end: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """The frame of the tokenizer's chat template (reasoning switched off), or a plain one where it has none."""
        if not tokenizer.chat_template:
            begins = tokenizer("")["input_ids"][:1]
            prefix = tokenizer.convert_ids_to_tokens(begins)[0] if begins == [tokenizer.bos_token_id] else ""
            return cls(prefix, BASE_SUFFIX, _end_of_text(tokenizer))
        messages = [{"role": "user", "content": USER_MARK}]
        prefix, suffix = _split(_render(tokenizer, messages, answer_follows=True), USER_MARK)
        messages.append({"role": "assistant", "content": ANSWER_MARK})
        _, tail = _split(_render(tokenizer, messages, answer_follows=False), ANSWER_MARK)
        tail_ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if tail_ids and tail_ids[0] in special:
            return cls(prefix, suffix, str(tokenizer.convert_ids_to_tokens(tail_ids[:1])[0]))
        return cls(prefix, suffix, _end_of_text(tokenizer))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answer_follows: bool) -> str:
    # `enable_thinking` is read by templates of reasoning models and ignored by all others.
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_follows, enable_thinking=False
        )
    )


def _split(rendered: str, mark: str) -> tuple[str, str]:
    pieces = rendered.split(mark)
    if len(pieces) != 2:
        raise UserError(f"the tokenizer's chat template repeats or drops a message: found it {len(pieces) - 1} times")
    return pieces[0], pieces[1]


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, expected one to end answers")
    return str(tokenizer.eos_token)


@dataclass(frozen=True)
class Encoded:
    """One query, with or without its answer, as a model reads it.

    `loss_mask` marks the answer's tokens and the end token. `vector_positions` are the indices of the placeholder ids
    and `vectors` what replaces their embeddings, in the same order. Several joined into one row (see packing.py) begin
    at `starts`.
    """

    ids: list[int]
    loss_mask: list[bool]
    vector_positions: list[int]
    vectors: tuple[Vector, ...]
    starts: tuple[int, ...] = (0,)

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.loss_mask)


class Encoder:
    """Turns queries into token ids for one tokenizer, one choice of placeholder tokens and one frame."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, placeholders: PlaceholderTokens, frame: Frame):
        self.tokenizer = tokenizer
        self.placeholders = placeholders
        self.frame = frame
        self.begin_id, self.vector_id, self.close_id = (self._token_id(token) for token in placeholders.all)
        self.end_id = self._token_id(frame.end)
        self._prefix = self._trusted(frame.prefix)
        self._suffix = self._trusted(frame.suffix)

    def encode(self, query: Query, answer: str | None) -> Encoded:
        """Ids of frame and query, and of the answer and the end token if there is an answer."""
        ids = list(self._prefix)
        vector_positions = []
        for part in query.parts:
            if isinstance(part, Vector):
                vector_positions.append(len(ids) + 1)
                ids += [self.begin_id, self.vector_id, self.close_id]
            else:
                ids += encode_text(self.tokenizer, part, add_bos=False)
        ids += self._suffix
        loss_mask = [False] * len(ids)
        if answer is not None:
            answer_ids = [*encode_text(self.tokenizer, answer, add_bos=False), self.end_id]
            ids += answer_ids
            loss_mask += [True] * len(answer_ids)
        return Encoded(ids, loss_mask, vector_positions, query.vectors)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text: everything before the end token, special tokens dropped, edges stripped."""
        ids = list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _trusted(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _token_id(self, token: str) -> int:
        number = self.tokenizer.get_vocab().get(token)
        if number is None:
            raise UserError(f"tokenizer {self.tokenizer.name_or_path!r} has no token {token!r}, which explainers need")
        return int(number)
