"""The two values everything here is about: a clean run, and an intervention on one.

L decoder layers, T tokens of a prompt, D model width, V vocabulary, K layers of an intervention's block, P its
positions. "Layer l" is the output of decoder block l, 0 <= l < L.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from introspect_ray.errors import UserError

KeysValues = tuple[tuple[Tensor, Tensor], ...]
"""Per decoder layer: keys and values [1, heads, T, head width] of one prompt."""


@dataclass(frozen=True, eq=False)
class CleanRun:
    """One forward pass without intervention."""

    ids: tuple[int, ...]
    residuals: Float[Tensor, "L T D"]
    """Output of every decoder block, also the last one's: before the final norm, unlike transformers' hidden states."""
    logits: Float[Tensor, " V"]
    """At the last position."""
    cache: KeysValues | None = field(default=None, repr=False)
    """Keys and values for reuse; `None` where the model keeps none that can be reused."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class CleanSource:
    """Vectors that come from another clean run.

    `reduce` "mean" gives every layer of the block the mean over the block's layers (P1 section 2.3), "per_layer" gives
    each layer its own.
    """

    run: CleanRun
    positions: tuple[int, ...]
    reduce: Literal["mean", "per_layer"]

    def check(self, layers: tuple[int, ...]) -> None:
        """Raises `UserError` if a layer of the block, or a position, is out of the run's range."""
        check_layers(layers, len(self.run.residuals))
        check_positions(self.positions, len(self.run), "source position")

    def vectors(self, layers: tuple[int, ...]) -> Float[Tensor, "K P D"]:
        """The vectors for a block of consecutive layers. Raises `UserError` as `check` does."""
        self.check(layers)
        block = self.run.residuals[layers[0] : layers[-1] + 1, list(self.positions)]
        return block.mean(0, keepdim=True).expand_as(block) if self.reduce == "mean" else block


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change to one forward pass: at `positions`, after every layer of the block `layers`.

    "replace" puts the vectors in place of the residual stream, "add" adds them to it. The vectors are given ([P, D] for
    the same ones at every layer, [K, P, D] for each layer its own) or come from another run; exactly one of the two.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    vectors: Float[Tensor, "P D"] | Float[Tensor, "K P D"] | None = None
    source: CleanSource | None = None
    mode: Literal["replace", "add"] = "replace"

    def __post_init__(self) -> None:
        layers, positions = self.layers, self.positions
        if not layers or layers != tuple(range(layers[0], layers[0] + len(layers))):
            raise UserError(f"layers {layers} are no block: expected consecutive layers, lowest first")
        if not positions or len(set(positions)) != len(positions):
            raise UserError(f"positions {positions} are invalid: expected at least one, each once")
        if self.mode not in ("replace", "add"):
            raise UserError(f"mode '{self.mode}' is unknown: expected replace or add")
        if (self.vectors is None) == (self.source is None):
            raise UserError("an intervention takes either vectors or a source: found " + self._found())
        if self.vectors is not None:
            _check_vectors(self.vectors, len(layers), len(positions))
        if self.source is not None and len(self.source.positions) != len(positions):
            raise UserError(f"{len(self.source.positions)} source positions given for {len(positions)} positions")

    def _found(self) -> str:
        return "neither" if self.vectors is None else "both"

    def values(self) -> Float[Tensor, "K P D"]:
        """The vectors of every layer of the block and every position."""
        if self.source is not None:
            return self.source.vectors(self.layers)
        assert self.vectors is not None
        return self.vectors if self.vectors.ndim == 3 else self.vectors.expand(len(self.layers), -1, -1)

    def check(self, run: CleanRun) -> None:
        """Raises `UserError` if this does not fit the run: layer, position or vector width."""
        check_layers(self.layers, len(run.residuals))
        check_positions(self.positions, len(run), "position")
        if self.source is not None:
            self.source.check(self.layers)
        given = self.vectors if self.source is None else self.source.run.residuals
        assert given is not None
        if given.shape[-1] != run.residuals.shape[-1]:
            raise UserError(
                f"vector of width {given.shape[-1]} does not fit a model of width {run.residuals.shape[-1]}"
            )


def check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Raises `UserError` unless every layer is one of the model's."""
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(f"layer {layer} is out of range: the model has layers 0 to {num_layers - 1}")


def check_positions(positions: tuple[int, ...], length: int, name: str) -> None:
    """Raises `UserError` unless every position is one of the prompt's."""
    for position in positions:
        if not 0 <= position < length:
            raise UserError(f"{name} {position} is out of range: the prompt has positions 0 to {length - 1}")


def _check_vectors(vectors: Tensor, num_layers: int, num_positions: int) -> None:
    expected = (num_positions,) if vectors.ndim == 2 else (num_layers, num_positions)
    if vectors.ndim not in (2, 3) or vectors.shape[:-1] != expected:
        raise UserError(
            f"vectors of shape {tuple(vectors.shape)} do not fit {num_layers} layers and {num_positions} positions: "
            f"expected [{num_positions}, width] or [{num_layers}, {num_positions}, width]"
        )
    finite = torch.isfinite(vectors)
    if not finite.all():
        where = (~finite).flatten(0, -2).any(-1).nonzero()[0].item()
        raise UserError(f"vector {where} holds NaN or infinity: expected finite numbers")
