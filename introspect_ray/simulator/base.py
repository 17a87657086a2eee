"""What a simulator is: descriptions and text windows in, activations out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from introspect_ray.features.windows import Window

NUM_LEVELS = 11
"""Levels 0..10 that a simulator chooses between; 10 is the latent's maximum (P1: observatory's simulator)."""

MAX_LEVEL = NUM_LEVELS - 1


@runtime_checkable
class Simulator(Protocol):
    """Predicts from words alone how strongly a latent with that description is active at every token of a window."""

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """Expected level, in [0, 10], at every token of the i-th window under the i-th description.

        The expectation is over the exact softmax of the levels at each token; nothing is parsed, so nothing can fail
        to parse. Both sequences have the same length; order, batching and what else is asked for change no value by
        more than float rounding.
        """
