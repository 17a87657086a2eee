"""What a latent responds to: text windows with its activation at every token. T tokens of a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from introspect_ray.features.windows import Window

ExemplarKind = Literal["top", "quantile", "random", "silent"]
"""`top`: the largest activations; `quantile`: drawn from one range of its activations; `random`: any window, at the
natural base rate; `silent`: windows like the top ones in which it never fires."""


@dataclass(frozen=True, eq=False)
class Exemplar:
    """One window and the true activations of one latent in it, in the coder's units; zero where it does not fire."""

    window: Window
    activations: Float[np.ndarray, " T"]
    kind: ExemplarKind
    quantile: int | None = None
    """Range that the window's largest activation lies in, 0 the lowest; only of `quantile` exemplars."""


@dataclass(frozen=True, eq=False)
class LatentExemplars:
    """All that was collected about one latent."""

    layer: int
    latent: int
    density: float
    """Share of all tokens seen on which it fires."""
    maximum: float
    """Largest activation seen."""
    exemplars: Sequence[Exemplar] = field(default_factory=tuple)
    """`top` ones in descending order of their largest activation, then the other kinds."""

    def of_kind(self, kind: ExemplarKind) -> list[Exemplar]:
        return [exemplar for exemplar in self.exemplars if exemplar.kind == kind]
