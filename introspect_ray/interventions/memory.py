"""How many tokens run at once: as many as the memory measured so far allows, halved when it was not enough.

A batch costs memory in proportion to its tokens, by a factor that depends on the model, its dtype and its attention,
and that nobody wants to look up. So a budget starts small, learns the factor from what batches took, and grows as long
as the next size fits; when the device refuses all the same (others use it too), the batch is halved and tried again,
and the size that failed is remembered for a while.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

FIRST_TOKENS = 512
"""Tokens of the first batch on a GPU: small enough for any model that fits at all."""
FREE_SHARE = 0.8
"""Share of the free memory that a batch may take by what earlier ones took; the rest is for what cannot be foreseen."""
PATIENCE = 16
"""Batches that a refusal is remembered for, before the budget grows again."""

_REFUSED_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_DEVICE_FAILED = ("CUDA error", "CUDA driver error", "HIP error", "CUBLAS_STATUS", "cuDNN error")

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused memory.

    torch raises a plain RuntimeError for the host's, and another one where a CUDA library allocates by itself.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _REFUSED_MEMORY)


def is_device_error(error: BaseException) -> bool:
    """Whether a device failed otherwise. Most such faults stay: all later calls of the process raise as well."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _DEVICE_FAILED)
    )


class TokenBudget:
    """Tokens that one batch may have. Not for several threads at once."""

    def __init__(self, most: int, device: torch.device):
        """At most `most` tokens: where more at once are no faster. The host's memory is not measured, only refusals."""
        self.tokens = min(most, FIRST_TOKENS) if device.type == "cuda" else most
        self._most = most
        self._device = device
        self._waiting = 0
        """Batches that must work before the budget grows again."""

    def run(
        self, batches: Iterable[Sequence[int]], tokens_of: Callable[[Sequence[int]], int], call: Callable[..., Result]
    ) -> Iterator[tuple[Sequence[int], Result]]:
        """`call(batch)` for every batch of indices, or for its halves where memory does not allow it at once.

        `batches` may be a generator that looks at `tokens` anew for each batch. Raises what `call` raises, and its
        out-of-memory error only for a batch of a single index.
        """
        for whole in batches:
            parts = [whole]
            while parts:
                part = parts.pop()
                result = self._attempt(part, tokens_of(part), call)
                if result is None:
                    half = len(part) // 2
                    parts += [part[half:], part[:half]]
                else:
                    yield part, result[0]

    def _attempt(self, part: Sequence[int], tokens: int, call: Callable[..., Result]) -> tuple[Result] | None:
        """The result in a tuple; `None` if memory was refused and the part can be halved."""
        before = self._begin()
        try:
            result = call(part)
        except Exception as error:
            if not is_out_of_memory(error) or len(part) == 1:
                raise
            self._shrink(tokens, error)
        else:
            self._grow(tokens, before)
            return (result,)
        # Outside of the handler, because the error's traceback holds the tensors that did not fit.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _shrink(self, tokens: int, error: Exception) -> None:
        self._waiting = PATIENCE
        self.tokens = min(self.tokens, max(1, tokens // 2))
        logger.warning(
            "%d tokens at once were too many (%s); going on with %d", tokens, type(error).__name__, self.tokens
        )

    def _grow(self, tokens: int, before: int | None) -> None:
        """After a batch that worked: at most twice as many, if the memory measured allows it."""
        self._waiting = max(0, self._waiting - 1)
        if self._waiting or 2 * tokens < self.tokens:
            return  # a refusal is remembered, or so small a batch says nothing about a larger one
        fitting = 2 * self.tokens
        if before is not None:
            fitting = min(fitting, self._fitting(tokens, before))
        self.tokens = max(self.tokens, min(fitting, self._most))

    def _begin(self) -> int | None:
        """Bytes in use before a batch, with the peak counter set back; `None` where they are not counted."""
        if self._device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _fitting(self, tokens: int, before: int) -> int:
        """Tokens that would fit by the bytes per token of the batch of `tokens` that has just run."""
        per_token = max(1, torch.cuda.max_memory_allocated(self._device) - before) / tokens
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(FREE_SHARE * (torch.cuda.mem_get_info(self._device)[0] + unused) / per_token)
