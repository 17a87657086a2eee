"""Levels read off a language model: the 11 logits (or 10) of the level tokens, at chosen positions, and nothing else.

R rows, T tokens of a row, N positions read of one row, K levels, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.errors import UserError
from introspect_ray.models.tokens import single_token
from introspect_ray.simulator.base import MAX_LEVEL, NUM_LEVELS


@dataclass(frozen=True)
class LevelTokens:
    """K tokens that stand for levels, and the level in [0, 10] that each stands for."""

    ids: tuple[int, ...]
    values: tuple[float, ...]

    def expected(self, logits: Float[Tensor, "... K"]) -> Tensor:
        """Expected level under the softmax over the K tokens alone, in [0, 10]."""
        return logits.float().softmax(dim=-1) @ torch.tensor(self.values, device=logits.device)


def class_tokens(ids: Sequence[int]) -> LevelTokens:
    """One token per level 0..10: what a fine-tuned simulator reads."""
    assert len(ids) == NUM_LEVELS, f"{len(ids)} level tokens"
    return LevelTokens(tuple(ids), tuple(float(level) for level in range(NUM_LEVELS)))


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> LevelTokens:
    """The numbers 0..10, where each is one token; else the digits 0..9 as 10 even steps from 0 to 10.

    A tokenizer that spells ten as `1`, `0` gives no single token for it, and the probability of `1` would be that of
    one and ten together. Ten levels on the same scale keep the softmax exact (P2 asks for 0..9 as well).
    Raises UserError for a tokenizer that has no token of its own for a digit.
    """
    ids = [single_token(tokenizer, str(level)) for level in range(NUM_LEVELS)]
    if None in ids:
        ids = ids[:-1]
    known = [token for token in ids if token is not None]
    if len(known) < len(ids):
        raise UserError("the simulator's tokenizer has no single token for each digit 0..9, which levels are read from")
    return LevelTokens(tuple(known), tuple(MAX_LEVEL * step / (len(known) - 1) for step in range(len(known))))


class _LevelHead(nn.Module):
    """The rows of a language-model head that belong to the level tokens."""

    def __init__(self, head: nn.Module, ids: Sequence[int]):
        super().__init__()
        self._head = [head]  # not a part of this module: the model owns it
        self._ids = ids

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... K"]:
        head: Any = self._head[0]
        weight, bias = head.weight, getattr(head, "bias", None)
        ids = torch.tensor(self._ids, device=hidden.device)
        # Indexed, not sliced by a copy made once: in training the gradient reaches the whole head.
        return nn.functional.linear(hidden, weight[ids].to(hidden.dtype), None if bias is None else bias[ids])


@contextmanager
def levels_only(model: PreTrainedModel, tokens: LevelTokens) -> Iterator[None]:
    """Inside the block the model's logits are those of the level tokens alone, R x T x K.

    The model's own forward still does whatever it does to logits (soft caps, scales). The head over the whole
    vocabulary, most of a small model's work, is not computed.
    """
    head = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no language-model head"
    model.set_output_embeddings(_LevelHead(head, tokens.ids))
    try:
        yield
    finally:
        model.set_output_embeddings(head)
