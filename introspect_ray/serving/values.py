"""What passes between the gateway and the processes that hold models, beside the API's own types."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from introspect_ray.explainer.query import Query
from introspect_ray.serving.api import Clean, Token, Truth


@dataclass(frozen=True, eq=False)
class VectorAt:
    """A vector of the target, as it were at a layer."""

    values: Float[np.ndarray, " D"]
    layer: int


@dataclass(frozen=True, eq=False)
class Question:
    """A question about an intervention, and the truth about it."""

    query: Query
    clean: Clean
    truth: Truth


@dataclass(frozen=True, eq=False)
class TrueActivations:
    """A latent's activation at every token of a text, begin-of-text left out."""

    tokens: list[Token]
    activations: Float[np.ndarray, " T"]
