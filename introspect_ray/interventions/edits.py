"""Many interventions applied at once to the flattened residual stream of a batch.

N tokens of the batch in a row, D width, K layers of a block, M tokens that a group of interventions changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from introspect_ray.interventions.types import Intervention


class Edits:
    """Interventions of a batch, each with the flat indices of its positions, grouped by (layers, mode).

    Interventions of a sweep share few blocks of layers, so a layer costs a few indexed writes, not one per row.
    """

    def __init__(
        self,
        interventions: Sequence[Intervention],
        indices: Sequence[Sequence[int]],
        like: Tensor,
    ):
        grouped: dict[tuple[tuple[int, ...], str], tuple[list[int], list[Tensor]]] = {}
        for intervention, where in zip(interventions, indices, strict=True):
            flat, values = grouped.setdefault((intervention.layers, intervention.mode), ([], []))
            flat.extend(where)
            values.append(intervention.values())
        self._groups = [
            (
                layers,
                mode,
                torch.tensor(flat, device=like.device),
                torch.cat([value.to(device=like.device, dtype=like.dtype) for value in values], dim=1),
            )
            for (layers, mode), (flat, values) in grouped.items()
        ]

    @property
    def layers(self) -> list[int]:
        """Every layer that some intervention changes, lowest first."""
        return sorted({layer for layers, *_ in self._groups for layer in layers})

    def apply(self, layer: int, hidden: Float[Tensor, "N D"]) -> None:
        """Change, in place, the output of `layer` at every token that an intervention on this layer names."""
        for layers, mode, flat, values in self._groups:
            if layers[0] <= layer <= layers[-1]:
                value, flat = values[layer - layers[0]].to(hidden.device), flat.to(hidden.device)
                if mode == "replace":
                    hidden.index_copy_(0, flat, value)
                else:
                    hidden.index_add_(0, flat, value)
