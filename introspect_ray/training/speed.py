"""How fast training is, in tokens and as a share of what the device can do."""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from introspect_ray.explainer.model import Explainer
from introspect_ray.training.hardware import gpu_of


def peak_of(device: torch.device) -> float | None:
    """Operations per second in bfloat16 that the device is built for; none where that is not known, as on CPUs."""
    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.bf16_flops


def operations_per_token(explainer: Explainer) -> float:
    """Floating-point operations of one token's forward and backward pass through the linear layers, from their shapes.

    2 per weight forward, 2 backward to the input, 2 more where the weight is trained. Attention scores (small for
    short rows), embeddings, the head (computed at answers only) and recomputation are left out, so that the share of
    the peak is a lower bound.
    """
    head = explainer.causal.get_output_embeddings()
    total = 0.0
    for module in explainer.causal.modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            size = module.nx * module.nf
        else:
            continue
        total += size * (6 if module.weight.requires_grad else 4)
    return total


class Speed:
    """Tokens per second over all workers since `start`, and the share of their devices' peak."""

    def __init__(self, explainer: Explainer, num_workers: int):
        self._peak = peak_of(explainer.device)
        self._operations = operations_per_token(explainer)
        self._num_workers = num_workers
        self._since, self._tokens = time.monotonic(), 0

    def start(self, tokens: int) -> None:
        """A new window begins; `tokens` were read before it."""
        self._since, self._tokens = time.monotonic(), tokens

    def metrics(self, tokens: int) -> dict[str, float]:
        """What a line of metrics says; the share is left out where the peak is not known."""
        speed = (tokens - self._tokens) / (time.monotonic() - self._since)
        metrics = {"tokens_per_second": round(speed, 1)}
        if self._peak is not None:
            metrics["share_of_peak"] = round(speed * self._operations / (self._peak * self._num_workers), 4)
        return metrics
