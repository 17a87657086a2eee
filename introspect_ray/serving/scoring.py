"""How well simulated levels follow a latent's true activations on one text. T tokens."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from introspect_ray.features.descriptions import Score
from introspect_ray.simulator.scores import CONSTANT, NEVER_FIRES, weighted_pearson


def pearson(simulated: Float[np.ndarray, " T"], true: Float[np.ndarray, " T"]) -> Score:
    """Pearson's r over the tokens, all alike; where it is not defined, the reason."""
    if not true.any():
        return Score(None, NEVER_FIRES)
    if np.ptp(true) == 0:
        return Score(None, "constant_activation")
    if np.ptp(simulated) <= 1e-6:
        return Score(None, CONSTANT)
    return Score(weighted_pearson(simulated, true, np.ones(len(true))))
