"""What coders read and write, from a running model: places of one decoder layer at every token of many texts.

The forward pass ends where the layer ends; what follows is never computed. D width, N tokens in all, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from introspect_ray.errors import UserError
from introspect_ray.features.places import Place
from introspect_ray.interventions.forward import padded, padded_budget, run_padded
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.models.structure import block_output, decoder_layers

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class _LayerDone(Exception):
    """The layer has run: nothing later is needed."""


@torch.no_grad()
def read_places(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    layer: int,
    places: Sequence[Place],
    budget: TokenBudget | None = None,
) -> list[Float[Tensor, "N D"]]:
    """The vectors at each of `places` of decoder layer `layer`, in float32, texts in order.

    The first token of each text, begin-of-text, is left out: its residual stream is far longer than any other and
    carries no text. Raises `UserError` if the model has no such place.
    """
    rows: list[tuple[Tensor, ...]] = [()] * len(texts)

    def run_batch(batch: Sequence[int]) -> list[Tensor]:
        ids, _ = padded([texts[index] for index in batch], model.device)
        return [found.float() for found in _run(model, layer, places, ids)]

    budget = budget or padded_budget(model.device)
    for batch, found in run_padded([len(text) for text in texts], budget, run_batch):
        for row, index in enumerate(batch):
            rows[index] = tuple(values[row, 1 : len(texts[index])].clone() for values in found)
    return [torch.cat(of_place) for of_place in zip(*rows, strict=True)]


def check_places(model: PreTrainedModel, layer: int, places: Sequence[Place]) -> None:
    """Raises `UserError` if a place is not found in this model; runs two tokens up to the layer."""
    with torch.no_grad():
        _run(model, layer, places, torch.zeros(1, 2, dtype=torch.long, device=model.device))


def _run(model: PreTrainedModel, layer: int, places: Sequence[Place], ids: Tensor) -> list[Float[Tensor, "B T D"]]:
    found = read_sites(model, [(layer, place) for place in places], ids)
    return [found[layer, place] for place in places]


Site = tuple[int, Place]
"""A decoder layer and a place in it."""


def read_sites(
    model: PreTrainedModel, sites: Collection[Site], ids: Int[Tensor, "B T"]
) -> dict[Site, Float[Tensor, "B T D"]]:
    """The vectors at places of one or more layers, from one forward pass that ends with the last of these layers."""
    blocks = {layer: decoder_layers(model)[layer] for layer in sorted({layer for layer, _ in sites})}
    mlps = {layer: _mlp_name(model, layer, blocks[layer], sites) for layer in blocks}
    with ExitStack() as stack:
        calls = {layer: stack.enter_context(_recorded(block, layer == max(blocks))) for layer, block in blocks.items()}
        try:
            model.base_model(input_ids=ids, use_cache=False)
        except _LayerDone:
            pass
        else:
            raise AssertionError("a forward pass calls every decoder layer")
    return {(layer, place): _at(place, blocks[layer], calls[layer], mlps[layer]) for layer, place in sites}


def _mlp_name(model: PreTrainedModel, layer: int, block: nn.Module, sites: Collection[Site]) -> str:
    parts = dict(block.named_children())
    mlp = next((name for name in MLP_NAMES if name in parts), "")
    if not mlp and any(place != "residual" for at, place in sites if at == layer):
        raise UserError(
            f"decoder layer {layer} of {type(model).__name__} has no part named {' or '.join(MLP_NAMES)}, which"
            " the coder needs"
        )
    return mlp


_Call = tuple[Tensor, Tensor]
"""What a module was given, and what it returned."""
_WHOLE = ""


@contextmanager
def _recorded(block: nn.Module, ends_pass: bool) -> Iterator[dict[str, _Call]]:
    """The calls of the direct parts of a layer, by name, and of the layer itself, which then may end the pass."""
    calls: dict[str, _Call] = {}
    with ExitStack() as hooks:
        for name, module in (*block.named_children(), (_WHOLE, block)):

            def hook(
                _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any, name: str = name
            ) -> None:
                given = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
                returned = block_output(output)
                if given and isinstance(returned, Tensor):
                    calls[name] = given[0], returned
                if name == _WHOLE and ends_pass:
                    raise _LayerDone

            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield calls


def _at(place: Place, block: nn.Module, calls: dict[str, _Call], mlp: str) -> Float[Tensor, "B T D"]:
    """The vectors at one place. Norms around the MLP are told by what they pass on, not by their names."""
    if place == "residual":
        return calls[_WHOLE][1]
    given, returned = calls[mlp]
    if place == "mlp_input":
        return given
    if place == "mlp_output":
        return returned
    parts = {name: call for name, call in calls.items() if name not in (mlp, _WHOLE)}
    if place == "mlp_added":
        return next((after for before, after in parts.values() if before is returned), returned)
    norm = next((name for name, (_, after) in parts.items() if after is given), None)
    if norm is None:
        raise UserError(f"{type(block).__name__} has no norm whose output its MLP reads: {place} cannot be located")
    before = parts[norm][0]
    return before if place == "residual_mid" else _without_gain(block.get_submodule(norm), before)


def _without_gain(norm: nn.Module, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """What a LayerNorm or an RMS norm makes of x before its gain and bias."""
    epsilon = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    if not isinstance(epsilon, float):
        raise UserError(f"{type(norm).__name__} has no eps: what it does before its gain cannot be told")
    exact = x.float()
    if isinstance(norm, nn.LayerNorm):
        exact = exact - exact.mean(dim=-1, keepdim=True)
    return exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + epsilon)
