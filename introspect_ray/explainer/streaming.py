"""An answer as it is written: pieces of text that joined are the answer, told token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class AnswerStreamer(BaseStreamer):
    """Hears the tokens of one answer while it is generated, tells their text, and may end the answer early.

    A token that is part of a character is told with the one that makes it whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], tell: Callable[[str], None], stop: Callable[[], bool]):
        """`decode`: ids so far -> the answer so far. `stop`: asked after every token."""
        self._decode = decode
        self._tell = tell
        self._stop = stop
        self._ids: list[int] = []
        self._told = ""

    def put(self, value: Tensor) -> None:
        """Ids that were generated; at the start those of the prompt, of which there are none beside its embeddings."""
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell_up_to(text)

    def end(self) -> None:
        self._tell_up_to(self._decode(self._ids))

    def _tell_up_to(self, text: str) -> None:
        if len(text) > len(self._told) and text.startswith(self._told):
            self._tell(text[len(self._told) :])
            self._told = text

    def is_stopped(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002 - a stopping criterion
        """Stopping criterion: one verdict per row."""
        return torch.full((ids.shape[0],), self._stop(), dtype=torch.bool, device=ids.device)
