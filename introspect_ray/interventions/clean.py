"""Clean runs: residual stream, keys and values, and next-token logits of unchanged prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from introspect_ray.errors import UserError
from introspect_ray.interventions.forward import (
    edited_layers,
    in_order,
    padded,
    padded_budget,
    run_padded,
    selected_logits,
)
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.types import CleanRun, KeysValues
from introspect_ray.models.structure import max_positions, num_layers, text_config


def reusable_cache(model: PreTrainedModel) -> tuple[bool, str]:
    """Whether keys and values of every layer can be kept and reused; if not, why."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return False, f"its cache cannot be built ({error})"
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        return False, f"its cache has layers of kind {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if layers and len(layers) != num_layers(model):
        return False, f"its cache has {len(layers)} layers for {num_layers(model)} decoder layers"
    return True, ""


def attention_window(model: PreTrainedModel) -> int | None:
    """Tokens that the shortest attention window of any layer spans; `None` if every layer sees the whole prompt."""
    config = text_config(model)
    named = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    windows = [window for window in named if isinstance(window, int)]
    return min(windows) if windows else None


@torch.no_grad()
def clean_runs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], keep_cache: bool, budget: TokenBudget | None = None
) -> list[CleanRun]:
    """One clean run per prompt; keys and values are kept if `keep_cache` and the model uses them."""
    check_prompts(model, prompts)
    runs: list[CleanRun | None] = [None] * len(prompts)

    def run_batch(batch: Sequence[int]) -> list[CleanRun]:
        return _run_batch(model, [prompts[index] for index in batch], keep_cache)

    lengths = [len(prompt) for prompt in prompts]
    for batch, found in run_padded(lengths, budget or padded_budget(model.device), run_batch):
        for index, run in zip(batch, found, strict=True):
            runs[index] = run
    return [run for run in runs if run is not None]


@torch.no_grad()
def next_token_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], budget: TokenBudget | None = None
) -> Float[Tensor, "P V"]:
    """Logits at the last position of each of P prompts."""
    check_prompts(model, prompts)

    def run_batch(batch: Sequence[int]) -> Tensor:
        ids, last = padded([prompts[index] for index in batch], model.device)
        every = torch.arange(len(batch), device=model.device)
        return selected_logits(model, every, last, input_ids=ids, use_cache=False)

    lengths = [len(prompt) for prompt in prompts]
    return in_order(run_padded(lengths, budget or padded_budget(model.device), run_batch))


def check_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raises `UserError` if a prompt is empty, longer than the model's positions, or holds an unknown token id."""
    config = text_config(model)
    limit = max_positions(model)
    if not prompts:
        raise UserError("no prompts given: expected at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty: expected at least one token")
        if limit is not None and len(prompt) > limit:
            raise UserError(f"prompt {index} has {len(prompt)} tokens: the model takes at most {limit}")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"prompt {index} holds a token id outside the model's 0 to {config.vocab_size - 1}")


def _run_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], keep_cache: bool) -> list[CleanRun]:
    ids, last = padded(prompts, model.device)
    outputs: dict[int, Tensor] = {}

    def record(layer: int, hidden: Tensor) -> None:
        outputs[layer] = hidden.to(model.device)  # of a model on several devices, the first

    # A cache without a config keeps all keys and values, also those that a sliding-window layer would drop.
    extra: dict[str, Any] = {"use_cache": keep_cache, **({"past_key_values": DynamicCache()} if keep_cache else {})}
    every = torch.arange(len(prompts), device=model.device)
    with edited_layers(model, range(num_layers(model)), record):
        logits = selected_logits(model, every, last, input_ids=ids, **extra)
    residuals = torch.stack([outputs[layer] for layer in range(num_layers(model))])
    cache = extra.get("past_key_values")
    return [
        CleanRun(
            ids=tuple(prompt),
            residuals=residuals[:, row, : len(prompt)],
            logits=logits[row],
            cache=None if cache is None else _row_of(cache, row, len(prompt)),
        )
        for row, prompt in enumerate(prompts)
    ]


def _row_of(cache: Cache, row: int, length: int) -> KeysValues:
    layers: list[Any] = cache.layers
    return tuple((layer.keys[row : row + 1, :, :length], layer.values[row : row + 1, :, :length]) for layer in layers)
