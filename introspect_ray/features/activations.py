"""What sparse coders read: activations of a model at every token of many texts. D model width, N tokens in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from introspect_ray.errors import UserError
from introspect_ray.interventions.forward import edited_layers, padded, padded_budget, run_padded
from introspect_ray.models.structure import decoder_layers


def residual_outputs(model: PreTrainedModel, texts: Sequence[Sequence[int]], layer: int) -> Float[Tensor, "N D"]:
    """Output of decoder layer `layer` at every token but the first of each text, texts in order.

    The first token, begin-of-text, is left out: its residual stream is far longer than any other and carries no text.
    """
    found: list[Tensor] = []

    def record(_layer: int, hidden: Tensor) -> None:
        found.append(hidden)

    with edited_layers(model, [layer], record):
        return _by_text(model, texts, lambda: found.pop())


def mlp_inputs_outputs(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], layer: int
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
    """Input (after its norm) and output of the MLP of decoder layer `layer`, at the tokens of `residual_outputs`."""
    found: list[Tensor] = []

    def record(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found.append(torch.cat([inputs[0], output], dim=-1))

    with _hooked(_mlp(model, layer), record):
        both = _by_text(model, texts, lambda: found.pop())
    inputs, outputs = both.chunk(2, dim=-1)
    return inputs.contiguous(), outputs.contiguous()


def _mlp(model: PreTrainedModel, layer: int) -> nn.Module:
    mlp = getattr(decoder_layers(model)[layer], "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise UserError(
            f"decoder layer {layer} of {type(model).__name__} has no part named mlp, which a transcoder needs"
        )
    return mlp


@contextmanager
def _hooked(module: nn.Module, record: Callable[..., None]) -> Iterator[None]:
    hook = module.register_forward_hook(record)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _by_text(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], take: Callable[[], Tensor]
) -> Float[Tensor, "N D"]:
    """One batch after another through the model, `take` after each; rows put back into the order of the texts."""
    rows: list[Tensor | None] = [None] * len(texts)
    body = model.base_model

    def run_batch(batch: Sequence[int]) -> Tensor:
        ids, _ = padded([texts[index] for index in batch], model.device)
        body(input_ids=ids, use_cache=False)
        return take().float()

    for batch, hidden in run_padded([len(text) for text in texts], padded_budget(model.device), run_batch):
        for row, index in enumerate(batch):
            rows[index] = hidden[row, 1 : len(texts[index])].clone()
    return torch.cat([row for row in rows if row is not None])
