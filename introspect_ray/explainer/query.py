"""A query: one question to the explainer, as text and vectors side by side.

Vectors are parts of their own and never appear inside a string, so no text, however hostile, can stand for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Vector:
    """One continuous token: a residual-stream vector of the target.

    `values` has the target's width; `layers` are the target's decoder layers it stands for (one layer, or the block
    whose mean it is) and choose the projection.
    """

    values: Float[np.ndarray, " d_target"]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """Text pieces and vectors in reading order."""

    parts: tuple[str | Vector, ...]

    @property
    def vectors(self) -> tuple[Vector, ...]:
        return tuple(part for part in self.parts if isinstance(part, Vector))

    @property
    def text(self) -> str:
        """The text alone, vectors left out."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def map_vectors(self, change: Callable[[Vector], Vector | None]) -> Query:
        """The same query with every vector changed; `None` removes it together with its marker tokens."""
        parts = (change(part) if isinstance(part, Vector) else part for part in self.parts)
        return Query(tuple(part for part in parts if part is not None))
