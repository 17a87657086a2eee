"""Learning rate and optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from introspect_ray.config import OptimizationConfig


def learning_rate(step: int, config: OptimizationConfig) -> float:
    """Rate of one optimizer step (counted from 0): linear up to the full rate, then constant or cosine to 0."""
    warmup = round(config.warmup_share * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(config.steps - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW over the given parameters; matrices decay, biases and normalisation gains do not."""
    kept = list(parameters)
    groups = [
        {"params": [p for p in kept if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in kept if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
