"""The cheap first stage: pairs of a description and a window that cannot fire are not simulated, and count zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from introspect_ray.features.exemplars import Exemplar
from introspect_ray.features.windows import Window
from introspect_ray.simulator.base import Simulator


@runtime_checkable
class FirstStage(Protocol):
    """Says in an instant which pairs are worth simulating."""

    def may_fire(self, description: str, window: Window) -> bool: ...


class TokenLookup:
    """A latent may fire in a window that holds a token on which it was seen to fire, compared by the token's text.

    What a description's latents were seen to fire on comes from exemplars, so what is simulated behind this stage is
    told more than the description; its recall is measured on windows that the table was not made of (`recall`).
    """

    def __init__(self, tokens: Mapping[str, frozenset[str]]):
        """`tokens`: description -> pieces of text; a description that is not in it may fire anywhere."""
        self.tokens = tokens

    @classmethod
    def fit(cls, seen: Iterable[tuple[str, Sequence[Exemplar]]], minimum_share: float = 0.0) -> TokenLookup:
        """The table of descriptions and their latents' exemplars.

        Args:
            minimum_share: of the largest activation in the exemplars; smaller ones do not count as seen.
        """
        tokens: dict[str, set[str]] = {}
        for description, exemplars in seen:
            known = tokens.setdefault(description, set())
            largest = max((float(exemplar.activations.max()) for exemplar in exemplars), default=0.0)
            for exemplar in exemplars:
                fires = exemplar.activations > minimum_share * largest
                known.update(exemplar.window.pieces[index] for index in np.flatnonzero(fires))
        return cls({description: frozenset(known) for description, known in tokens.items()})

    def may_fire(self, description: str, window: Window) -> bool:
        known = self.tokens.get(description)
        return known is None or not known.isdisjoint(window.pieces)


class FilteredSimulator:
    """The levels of another simulator where the first stage sees a chance, zeros elsewhere."""

    def __init__(self, simulator: Simulator, stage: FirstStage):
        self.simulator = simulator
        self.stage = stage

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`."""
        pairs = list(zip(descriptions, windows, strict=True))
        kept = [index for index, pair in enumerate(pairs) if self.stage.may_fire(*pair)]
        levels = [np.zeros(len(window)) for window in windows]
        found = self.simulator.simulate([descriptions[index] for index in kept], [windows[index] for index in kept])
        for index, row in zip(kept, found, strict=True):
            levels[index] = row
        return levels


@dataclass(frozen=True)
class StageReport:
    """What a first stage costs and saves on windows whose activations are known."""

    recall: float | None
    """Share of the windows that fire, weighted as given, that it lets pass; None if none fires."""
    activation_recall: float | None
    """Share of the sum of all activations that lies in windows that it lets pass."""
    skipped: float
    """Share of all windows, weighted as given, that it skips."""


def measure(
    stage: FirstStage, pairs: Sequence[tuple[str, Exemplar]], weights: Float[np.ndarray, " pairs"]
) -> StageReport:
    """`weights`: how much each pair counts, such as its natural weight times its length."""
    passes = np.array([stage.may_fire(description, exemplar.window) for description, exemplar in pairs], dtype=bool)
    sums = np.array([float(exemplar.activations.sum()) for _, exemplar in pairs])
    fires = weights * (sums > 0)
    mass = weights * sums
    return StageReport(
        recall=float(fires @ passes / fires.sum()) if fires.sum() > 0 else None,
        activation_recall=float(mass @ passes / mass.sum()) if mass.sum() > 0 else None,
        skipped=float(weights @ ~passes / weights.sum()),
    )
