"""How well a coder does on held-out vectors, summed part by part. N vectors of a part, D width, F latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from introspect_ray.features.coder import SparseCoder


@dataclass(frozen=True)
class Quality:
    """All are of the same held-out tokens."""

    tokens: int
    unexplained: float
    """Fraction of variance unexplained."""
    unexplained_without_latents: float
    """The same with all latents at zero: for a skip transcoder, what its skip alone leaves."""
    active_per_token: float
    """Mean number of latents that are not zero (L0)."""
    dead_share: float
    """Share of the latents that fire on none of these tokens."""


class QualitySums:
    """Adds up over parts, in float64."""

    def __init__(self, coder: SparseCoder):
        self._coder = coder
        self.tokens = 0
        self._errors = {True: 0.0, False: 0.0}
        self._squares = 0.0
        self._sum = torch.zeros(coder.width, dtype=torch.float64, device=coder.decoder.device)
        self._active = 0
        self._fired = torch.zeros(coder.num_latents, dtype=torch.bool, device=coder.decoder.device)

    def add(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N D_out"]) -> None:
        """What the coder makes of inputs `x`, against what it should make of them."""
        latents = self._coder.encode(x)
        predicted = self._coder.decode(latents, x)
        without = self._coder.decode(torch.zeros_like(latents), x)
        for with_latents, found in ((True, predicted), (False, without)):
            self._errors[with_latents] += (found - y).double().square().sum().item()
        self._squares += y.double().square().sum().item()
        self._sum += y.double().sum(0)
        self._active += int((latents != 0).sum())
        self._fired |= (latents != 0).any(0)
        self.tokens += len(x)

    def quality(self) -> Quality:
        assert self.tokens > 1, "quality is that of two tokens or more"
        variance = self._squares - (self._sum.square().sum() / self.tokens).item()
        return Quality(
            tokens=self.tokens,
            unexplained=self._errors[True] / variance,
            unexplained_without_latents=self._errors[False] / variance,
            active_per_token=self._active / self.tokens,
            dead_share=int((~self._fired).sum()) / len(self._fired),
        )
