"""Patched runs by plain hooks: whole prompts, one row per intervention. Right for every causal model, and slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from introspect_ray.interventions.edits import Edits
from introspect_ray.interventions.forward import (
    edited_layers,
    in_order,
    padded,
    padded_budget,
    run_padded,
    selected_logits,
)
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.types import CleanRun, Intervention


@torch.no_grad()
def hooked_logits(
    model: PreTrainedModel,
    runs: Sequence[CleanRun],
    interventions: Sequence[Intervention],
    budget: TokenBudget | None = None,
) -> Float[Tensor, "R V"]:
    """Last-position logits of R rows; row r is the prompt of `runs[r]` under `interventions[r]`."""

    def run_batch(batch: Sequence[int]) -> Tensor:
        return _batch_logits(model, [runs[index] for index in batch], [interventions[index] for index in batch])

    return in_order(run_padded([len(run) for run in runs], budget or padded_budget(model.device), run_batch))


def _batch_logits(
    model: PreTrainedModel, runs: Sequence[CleanRun], interventions: Sequence[Intervention]
) -> Float[Tensor, "R V"]:
    ids, last = padded([run.ids for run in runs], model.device)
    length = ids.shape[1]
    indices = [
        [row * length + position for position in intervention.positions]
        for row, intervention in enumerate(interventions)
    ]
    edits = Edits(interventions, indices, like=runs[0].residuals)

    def edit(layer: int, hidden: Tensor) -> Tensor:
        changed = hidden.clone(memory_format=torch.contiguous_format)
        edits.apply(layer, changed.view(-1, changed.shape[-1]))
        return changed

    every = torch.arange(len(runs), device=model.device)
    with edited_layers(model, edits.layers, edit):
        return selected_logits(model, every, last, input_ids=ids, use_cache=False)
