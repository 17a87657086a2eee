"""The natural base rate: how much each collected window counts, so that sums over them are those of plain text.

Windows are collected where a latent fires, and at random; together they are nothing like plain text, in which most
latents are silent on 99.9% of the tokens. Two strata are put back into proportion: windows in which the latent fires
count f together, windows in which it does not 1 - f, where f is the share of windows of plain text in which it fires.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from introspect_ray.features.exemplars import Exemplar
from introspect_ray.features.windows import Window

NO_WINDOWS, NO_RANDOM_WINDOWS = "no_windows", "no_random_windows"


def firing_share(density: float, exemplars: Sequence[Exemplar]) -> float:
    """f: share of windows in which the latent fires, from its density and how much of a firing window is firing tokens.

    A window in which it fires has it firing on a share m of the tokens, on average, so f = density / m.
    """
    firing = [exemplar for exemplar in exemplars if exemplar.activations.max() > 0]
    tokens = sum(len(exemplar.window) for exemplar in firing)
    active = sum(int((exemplar.activations > 0).sum()) for exemplar in firing)
    return min(1.0, density * tokens / active) if active else 0.0


def natural_weights(density: float, exemplars: Sequence[Exemplar]) -> Float[np.ndarray, " exemplars"]:
    """Weight of every window; the weights of all tokens, each window's on every one of its tokens, sum to one.

    Firing windows are those of quantiles and of random draws, one that is of both counted once; the top ones, which are
    no fair draw, count only where there are no others. Windows without firing are the random ones; those chosen for
    being like the top ones count nothing. Where every random window fires, the few silent ones that the density speaks
    of have no window to stand for them, and firing windows take their share; so do silent ones where none fires.
    Without random windows nothing says what silence is like: no window counts, and `unweighted` says why.
    """
    if not any(exemplar.kind == "random" for exemplar in exemplars):
        return np.zeros(len(exemplars))
    fires = np.array([bool(exemplar.activations.max() > 0) for exemplar in exemplars], dtype=bool)
    kinds = np.array([exemplar.kind for exemplar in exemplars], dtype="<U8")
    lengths = np.array([len(exemplar.window) for exemplar in exemplars], dtype=np.float64)
    quantile = {_identity(one) for one in exemplars if one.kind == "quantile"}
    again = np.array([one.kind == "random" and _identity(one) in quantile for one in exemplars], dtype=bool)
    firing = fires & ((kinds == "quantile") | (kinds == "random")) & ~again
    if not firing.any():
        firing = fires
    silent = ~fires & (kinds == "random")
    share = firing_share(density, [exemplar for exemplar, there in zip(exemplars, firing, strict=True) if there])
    weights = np.zeros(len(exemplars))
    for stratum, part in ((firing, share), (silent, 1 - share)):
        if stratum.any():
            weights[stratum] = part / lengths[stratum].sum()
    total = float(weights @ lengths)
    return weights / total if total > 0 else weights


def _identity(exemplar: Exemplar) -> tuple[Window, bytes]:
    return exemplar.window, exemplar.activations.tobytes()


def unweighted(exemplars: Sequence[Exemplar]) -> str:
    """Why none of the windows counts, given that none does."""
    return NO_RANDOM_WINDOWS if exemplars else NO_WINDOWS
