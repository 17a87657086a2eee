"""Linear maps from the target's residual stream into the explainer's input space, one per target layer.

Legend: N vectors, M target width, E explainer width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from introspect_ray.config import ExplainerConfig
from introspect_ray.errors import UserError

ProjectionKind = Literal["none", "linear"]


def resolve_kind(config: ExplainerConfig, target_width: int, width: int) -> ProjectionKind:
    """`none` or `linear` from the config's choice; `auto` projects where the widths differ or maps were fitted.

    Raises:
        UserError: no projection was asked for and the widths differ.
    """
    if config.projection == "none" and target_width != width:
        raise UserError(f"vector width {target_width} does not fit an explainer of width {width} without a projection")
    is_linear = config.projection == "linear" or config.fitted_projection is not None or target_width != width
    return "linear" if is_linear else "none"


class Projections(nn.ModuleDict):
    """`Pi_l`, E x M, for every target layer `l`; no parameters at all where the kind is `none`.

    State keys are `{l}.weight`. All layers start from one map, because layers share most residual directions, and
    because the mean over a block of independent random maps would shrink a block's vectors.
    """

    def __init__(self, kind: ProjectionKind, num_layers: int, target_width: int, width: int):
        super().__init__()
        assert kind == "linear" or target_width == width
        self.kind = kind
        self.num_layers = num_layers
        self.target_width = target_width
        self.width = width
        if kind == "linear":
            for layer in range(num_layers):
                self[str(layer)] = nn.Linear(target_width, width, bias=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """The identity where the widths are equal; else a Gaussian map that keeps a vector's norm in expectation."""
        if self.target_width == self.width:
            start = torch.eye(self.width)
        else:
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(self.width, self.target_width, generator=generator) / self.width**0.5
        for linear in self.values():
            cast(nn.Linear, linear).weight.copy_(start)

    @torch.no_grad()
    def start_from(self, maps: Mapping[int, Float[Tensor, "E M"]]) -> None:
        """Take over the maps of the layers that are given; the others stay as they are."""
        for layer, weight in maps.items():
            cast(nn.Linear, self[str(layer)]).weight.copy_(weight)

    def forward(self, vectors: Float[Tensor, "N M"], layers: Sequence[tuple[int, ...]]) -> Float[Tensor, "N E"]:
        """Each vector under the mean of the maps of the layers that it stands for."""
        if self.kind == "none":
            return vectors
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, block in enumerate(layers):
            rows_of.setdefault(block, []).append(row)
        projected, order = [], []
        for block, rows in rows_of.items():
            maps = [cast(nn.Linear, self[str(layer)]).weight for layer in block]
            weight = maps[0] if len(maps) == 1 else torch.stack(maps).mean(dim=0)
            projected.append(vectors[rows].to(weight.dtype) @ weight.T)
            order += rows
        back = torch.empty(len(order), dtype=torch.long, device=vectors.device)
        back[torch.tensor(order, device=vectors.device)] = torch.arange(len(order), device=vectors.device)
        return torch.cat(projected)[back]
