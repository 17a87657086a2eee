"""Forward passes of padded batches, and the two temporary changes to a model that everything here is made of.

Rows of a batch are padded on the right: a causal model's real tokens never see the padding, so no mask is needed, and
positions count from 0 as they do for a prompt alone. B rows, T tokens, D width, N selected positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from introspect_ray.interventions.memory import Result, TokenBudget
from introspect_ray.models.structure import block_output, decoder_layers, with_block_output

TOKENS_PER_BATCH = 8192
"""Padded tokens per batch at most: enough to fill a GPU, and bounds what a batch keeps for later."""

Edit = Callable[[int, Float[Tensor, "B T D"]], Float[Tensor, "B T D"] | None]
"""(layer, its output) -> what replaces the output, or `None` to keep it."""


@contextmanager
def edited_layers(model: PreTrainedModel, layers: Sequence[int], edit: Edit) -> Iterator[None]:
    """`edit` sees, and may replace, the output of each of `layers`; the hooks are gone afterwards, come what may."""
    stack = decoder_layers(model)
    with ExitStack() as hooks:
        for layer in layers:

            def hook(_module: nn.Module, _inputs: Any, output: Any, layer: int = layer) -> Any:
                hidden = edit(layer, block_output(output))
                return None if hidden is None else with_block_output(output, hidden)

            hooks.callback(stack[layer].register_forward_hook(hook).remove)
        yield


def selected_logits(
    model: PreTrainedModel, rows: Int[Tensor, " N"], positions: Int[Tensor, " N"], **inputs: Any
) -> Float[Tensor, "N V"]:
    """Logits at N (row, position) pairs of the model's output for `inputs`.

    The head over the vocabulary is most of a small model's work. transformers' `logits_to_keep` keeps the same
    positions in every row, so the pairs are picked just before the head instead.
    """

    def select(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # The head of a model that is spread over several devices may be on another one than its input.
        device = arguments[0].device
        return (arguments[0][rows.to(device), positions.to(device)][:, None], *arguments[1:])

    head = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no language-model head"
    hook = head.register_forward_pre_hook(select)
    try:
        return model(**inputs).logits[:, 0]
    finally:
        hook.remove()


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """Ids padded on the right, and the last real position of every row.

    A row is padded with its own last token, because some models warn about, or treat apart, the padding token.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], device=device)
    return ids, torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)


def padded_budget(device: torch.device) -> TokenBudget:
    """How many tokens, with padding, a batch on this device may have."""
    return TokenBudget(TOKENS_PER_BATCH, device)


def run_padded(
    lengths: Sequence[int], budget: TokenBudget, call: Callable[[Sequence[int]], Result]
) -> Iterator[tuple[Sequence[int], Result]]:
    """`call(batch)` for batches of indices of similar length, as large as memory allows."""
    return budget.run(batches(lengths, budget), lambda batch: len(batch) * max(lengths[index] for index in batch), call)


def in_order(found: Iterable[tuple[Sequence[int], Tensor]], dim: int = 0) -> Tensor:
    """What came of all batches as one tensor, rows along `dim` in the order of the indices that the batches name."""
    order: list[int] = []
    pieces: list[Tensor] = []
    for batch, piece in found:
        order += batch
        pieces.append(piece)
    inverse = torch.tensor(order, device=pieces[0].device).argsort()
    return torch.cat(pieces, dim).index_select(dim, inverse)


def batches(lengths: Sequence[int], budget: TokenBudget) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each within the budget of its time, or of one item."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget.tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
