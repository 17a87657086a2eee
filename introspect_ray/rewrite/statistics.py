"""What is known about latents from text that is not evaluated on: how often, how strongly, and what for.

F latents, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from introspect_ray.features.coder import ActiveLatents, SparseCoder

PRODUCTS_AT_ONCE = 1 << 18
"""Entries of a code whose decoder rows are gathered at a time."""


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Of every latent over N tokens. Statistics of several parts of a text add up by `pooled`."""

    num_tokens: int
    firings: Int[np.ndarray, " F"]
    """Tokens on which it is active at all."""
    maximum: Float[np.ndarray, " F"]
    total: Float[np.ndarray, " F"]
    """Sum of its activations."""
    contribution: Float[np.ndarray, " F"]
    """Nats that the text would lose without it, to first order; negative where the loss would fall."""
    output_sum: Float[np.ndarray, " D"]
    """Sum of what the site truly writes."""

    @property
    def mean_output(self) -> Float[np.ndarray, " D"]:
        return self.output_sum / max(1, self.num_tokens)

    @property
    def density(self) -> Float[np.ndarray, " F"]:
        """Share of tokens on which it fires."""
        return self.firings / max(1, self.num_tokens)


def latent_statistics(
    coder: SparseCoder, code: ActiveLatents, y: Float[Tensor, "N D"], gradient: Float[Tensor, "N D"]
) -> LatentStatistics:
    """Statistics of one batch; `gradient` is the derivative of the loss by what the true latents decode to."""
    latents, values = code.latents.cpu(), code.values.double().cpu()
    size = coder.num_latents
    maximum = torch.zeros(size, dtype=torch.float64).scatter_reduce_(0, latents, values, "amax")
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, latents, values)
    costs = torch.zeros(size, dtype=torch.float64).index_add_(0, latents, (-values * _slopes(coder, code, gradient)))
    return LatentStatistics(
        num_tokens=code.num_vectors,
        firings=torch.bincount(latents, minlength=size).numpy(),
        maximum=maximum.numpy(),
        total=total.numpy(),
        contribution=costs.numpy(),
        output_sum=y.double().sum(0).cpu().numpy(),
    )


def _slopes(coder: SparseCoder, code: ActiveLatents, gradient: Float[Tensor, "N D"]) -> Float[Tensor, " entries"]:
    """Derivative of the loss by the value of every entry of the code."""
    rows = coder.decoder / coder.decoder.norm(dim=-1, keepdim=True) if coder.rescale else coder.decoder
    found = [
        (gradient[code.vectors[part]] * rows[code.latents[part]]).sum(-1).double().cpu()
        for part in (slice(start, start + PRODUCTS_AT_ONCE) for start in range(0, len(code), PRODUCTS_AT_ONCE))
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def slopes_of(coder: SparseCoder, chosen: Int[Tensor, " S"], gradient: Float[Tensor, "N D"]) -> Float[Tensor, "N S"]:
    """Derivative of the loss by the value of each chosen latent at each vector."""
    rows = coder.decoder[chosen]
    if coder.rescale:
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return gradient @ rows.T


def pooled(parts: Sequence[LatentStatistics]) -> LatentStatistics:
    """Statistics of all parts together."""
    return LatentStatistics(
        num_tokens=sum(part.num_tokens for part in parts),
        firings=np.sum([part.firings for part in parts], axis=0),
        maximum=np.max([part.maximum for part in parts], axis=0),
        total=np.sum([part.total for part in parts], axis=0),
        contribution=np.sum([part.contribution for part in parts], axis=0),
        output_sum=np.sum([part.output_sum for part in parts], axis=0),
    )
