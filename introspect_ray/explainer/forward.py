"""Padded batches, and logits at chosen positions only, for any causal language model of transformers.

Legend: B rows, T padded length, N vectors of the batch, M target width, P loss positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from introspect_ray.explainer.encoding import Encoded


@dataclass(frozen=True)
class Collated:
    """Encoded queries side by side. `loss_positions` index the flattened B * T grid and point at the token before."""

    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    """Place of every token in its own example, from 0. In packed rows padding stays at 0, and counts on elsewhere."""
    vector_rows: Int[Tensor, " N"]
    vector_columns: Int[Tensor, " N"]
    vectors: Float[Tensor, "N M"]
    layers: list[tuple[int, ...]]
    loss_positions: Int[Tensor, " P"]
    loss_targets: Int[Tensor, " P"]


def collate(
    batch: Sequence[Encoded], side: Literal["left", "right"], pad_id: int, target_width: int, device: torch.device
) -> Collated:
    """One padded batch: padded on the right for training, on the left for generation."""
    length = max(len(one.ids) for one in batch)
    ids = np.full((len(batch), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(batch), length), dtype=bool)
    is_packed = any(len(one.starts) > 1 for one in batch)
    # Where nothing is packed, positions count on through padding: then attention is causal and needs no mask at all.
    places = np.tile(np.zeros(length, dtype=np.int64) if is_packed else np.arange(length), (len(batch), 1))
    rows, columns, positions, targets = [], [], [], []
    for row, one in enumerate(batch):
        start = length - len(one.ids) if side == "left" else 0
        ids[row, start : start + len(one.ids)] = one.ids
        mask[row, start : start + len(one.ids)] = True
        rows += [row] * len(one.vector_positions)
        columns += [start + position for position in one.vector_positions]
        if side == "left" or is_packed:
            places[row, start : start + len(one.ids)] = _own_places(one)
            places[row, :start] = 0
        answer = np.flatnonzero(one.loss_mask)
        positions.append(row * length + start + answer - 1)
        targets.append(np.asarray(one.ids, dtype=np.int64)[answer])
    vectors = [vector for one in batch for vector in one.vectors]
    values = np.stack([v.values for v in vectors]) if vectors else np.zeros((0, target_width))

    def tensor(array: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype).to(device)

    return Collated(
        ids=tensor(ids, torch.long),
        mask=tensor(mask, torch.bool),
        positions=tensor(places, torch.long),
        vector_rows=tensor(rows, torch.long),
        vector_columns=tensor(columns, torch.long),
        vectors=tensor(values, torch.float32),
        layers=[vector.layers for vector in vectors],
        loss_positions=tensor(np.concatenate(positions), torch.long),
        loss_targets=tensor(np.concatenate(targets), torch.long),
    )


def _own_places(one: Encoded) -> np.ndarray:
    """Every token's distance from the start of its example."""
    starts = np.asarray(one.starts)
    return np.arange(len(one.ids)) - np.repeat(starts, np.diff([*starts, len(one.ids)]))


def scaled(vectors: Float[Tensor, "N M"], norm: float | None) -> Float[Tensor, "N M"]:
    """Every vector at Euclidean length `norm`; none leaves them as they are. Zero has no direction and stays zero."""
    if norm is None:
        return vectors
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors * (norm / norms.clamp(min=torch.finfo(norms.dtype).tiny))


def soft_tokens(
    vectors: Float[Tensor, "N E"], embeddings: Float[Tensor, "V E"], sharpness: float
) -> Float[Tensor, "N E"]:
    """Every vector as a mixture of token embeddings, weighted by softmax(sharpness * cosine). Zero gives their mean."""
    directions = nn.functional.normalize(embeddings.to(vectors.dtype), dim=-1)
    weights = (sharpness * nn.functional.normalize(vectors, dim=-1) @ directions.T).softmax(dim=-1)
    return weights @ embeddings.to(vectors.dtype)


def logits_at(
    model: nn.Module, causal: PreTrainedModel, positions: Int[Tensor, " P"], **inputs: Any
) -> Float[Tensor, "P V"]:
    """Logits at positions of the flattened B * T grid, in the model's own arithmetic (soft-capping, scaling and all).

    The stock forward pass runs; only what enters its language-model head is cut down to the positions, so that the
    head's cost is P * V and whatever the architecture does to logits afterwards is still done. A model without a
    separate head computes all logits.

    Args:
        model: the callable model (`causal` itself, or a wrapper around it such as PEFT's).
        causal: the language model whose head is used.
    """
    head = causal.get_output_embeddings()
    if head is None:
        logits = model(use_cache=False, **inputs).logits
        return logits.flatten(0, 1)[positions]

    def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.flatten(0, 1)[positions].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        return model(use_cache=False, **inputs).logits.squeeze(0)
    finally:
        handle.remove()
