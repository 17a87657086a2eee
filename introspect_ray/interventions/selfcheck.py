"""Whether the ladder is right for a model: found out by trying, once, before it is trusted."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from introspect_ray.interventions.clean import clean_runs, reusable_cache
from introspect_ray.interventions.hooked import hooked_logits
from introspect_ray.interventions.ladder import Ladder
from introspect_ray.interventions.types import CleanRun, Intervention
from introspect_ray.models.structure import num_layers, text_config

PROMPT_LENGTHS = (8, 5)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.25}
"""Largest allowed difference between the two ways, as a share of what the intervention changes. A wrong mask, position
or layer costs about 1; seen for correct ladders over 24 layers: 2e-6 in float32, 6e-3 in float16, 5e-2 in bfloat16."""


def checked_ladder(model: PreTrainedModel) -> tuple[Ladder | None, str]:
    """A ladder that agrees with plain hooks on two small prompts; else `None` and the reason."""
    reusable, reason = reusable_cache(model)
    if not reusable:
        return None, reason
    try:
        ladder = Ladder(model)
        difference = _relative_difference(model, ladder)
    except Exception as error:  # what a model's own code raises when its layers are not plain cannot be foreseen
        return None, f"the self-check failed with {type(error).__name__}: {error}"
    tolerance = TOLERANCE.get(model.dtype, 0.0)
    if not difference <= tolerance:
        return None, f"the self-check differs by {difference:.2g} of the effect, allowed are {tolerance:g}"
    return ladder, ""


def _relative_difference(model: PreTrainedModel, ladder: Ladder) -> float:
    """Largest difference in logits between ladder and hooks, in units of each row's own effect on the logits."""
    vocabulary = text_config(model).vocab_size
    limit = min(ladder.window or PROMPT_LENGTHS[0], PROMPT_LENGTHS[0])
    lengths = [max(1, min(length, limit - shorter)) for shorter, length in enumerate(PROMPT_LENGTHS)]
    prompts = [[(7 * position + 3 + length) % vocabulary for position in range(length)] for length in lengths]
    runs = [run for run in clean_runs(model, prompts, keep_cache=True) for _ in range(3)]
    rows = [row for run in runs[::3] for row in _interventions(run, num_layers(model))]
    expected, found = hooked_logits(model, runs, rows).float(), ladder.logits(runs, rows).float()
    clean = torch.stack([run.logits for run in runs]).float()
    effect = (expected - clean).abs().amax(1)
    return ((found - expected).abs().amax(1) / effect).max().item()


def _interventions(run: CleanRun, num_layers: int) -> list[Intervention]:
    """Three with a large effect: low and in the middle of the prompt, on two positions of a block, at the very end."""
    last, middle = len(run) - 1, len(run) // 2
    block = tuple(range(num_layers // 2, num_layers))
    return [
        Intervention((0,), (middle,), vectors=_vectors(run, 1)),
        Intervention(block, tuple({middle, last}), vectors=_vectors(run, len({middle, last})), mode="add"),
        Intervention((num_layers - 1,), (last,), vectors=_vectors(run, 1)),
    ]


def _vectors(run: CleanRun, count: int) -> Tensor:
    """Random directions, four times as long as the prompt's typical residual."""
    generator = torch.Generator().manual_seed(count)
    directions = torch.randn(count, run.residuals.shape[-1], generator=generator)
    scale = 4 * run.residuals.float().square().mean().sqrt()
    return (directions.to(scale.device) * scale).to(run.residuals.dtype)
