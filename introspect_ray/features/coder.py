"""Sparse coders in memory: SAEs and (skip) transcoders, encode and decode.

N vectors, D_in width read, D_out width written, F latents. Everything is inference: weights carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from introspect_ray.features.places import Place
from introspect_ray.features.selection import Entries, above, largest

Kind = Literal["sae", "transcoder"]
Normalization = Literal["none", "constant_norm", "layer_norm"]
"""What becomes of a vector before it is read, as sae-lens does it. `constant_norm`: scaled to length sqrt(D_in).
`layer_norm`: less its mean, over its standard deviation."""

LAYER_NORM_EPSILON = 1e-5
"""Added to the standard deviation, not to the variance: sae-lens' own way."""

ENCODE_ENTRIES = 1 << 25
"""Entries of the dense latents that `encode_sparse` holds at a time, 128 MB in float32; fewer slow the product down."""
ENCODE_ENTRIES_GPU = 1 << 28
"""The same on a GPU, which wants more work at once."""


@dataclass(frozen=True, eq=False)
class ActiveLatents:
    """The non-zero latents of N vectors: entry i says that `latents[i]` has `values[i]` at vector `vectors[i]`.

    Entries are ordered by vector, then by latent.
    """

    vectors: Int[Tensor, " entries"]
    latents: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    num_vectors: int
    num_latents: int

    def dense(self) -> Float[Tensor, "N F"]:
        latents = torch.zeros(self.num_vectors, self.num_latents, dtype=self.values.dtype, device=self.values.device)
        latents[self.vectors, self.latents] = self.values
        return latents

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Gate:
    """The half of a gated encoder that decides whether a latent fires; the other half says how much.

    A latent is active where `x @ encoder + bias` is above zero. Its value is `x @ (encoder * scale)` plus the coder's
    encoder bias, and ReLU of that.
    """

    bias: Float[Tensor, " F"]
    scale: Float[Tensor, " F"]


@dataclass(frozen=True, eq=False)
class SparseCoder:
    """A linear encoder, an activation that leaves few latents, a linear decoder, and maybe a linear skip.

    The activation is ReLU; with `threshold` latents whose pre-activation is not above it are zero too (JumpReLU, which
    a trained BatchTopK becomes); with `k` only the k largest of each vector stay (TopK), with `signed` those of the
    largest size, below zero too (AbsTopK); with `gate` only latents that it lets through.
    """

    kind: Kind
    layer: int
    """SAE: decoder layer in which it reads. Transcoder: decoder layer whose MLP it stands for."""
    encoder: Float[Tensor, "D_in F"]
    encoder_bias: Float[Tensor, " F"]
    decoder: Float[Tensor, "F D_out"]
    decoder_bias: Float[Tensor, " D_out"]
    threshold: Float[Tensor, " F"] | None = None
    skip: Float[Tensor, "D_out D_in"] | None = None
    k: int | None = None
    subtract_bias: bool = False
    """Whether the decoder bias is subtracted from what is read (sae-lens: `apply_b_dec_to_input`)."""
    rescale: bool = False
    """Whether latents count in units of their decoder row's norm (sae-lens: `rescale_acts_by_decoder_norm`)."""
    signed: bool = False
    gate: Gate | None = None
    normalization: Normalization = "none"
    """Done to what is read; an SAE's output is put back into the units of what it read, a transcoder's is not."""
    places: tuple[Place, Place] | None = None
    """What it reads in its layer, and what it writes; none: the residual output, or from the MLP's input to what the
    MLP adds to the residual stream."""

    @property
    def reads(self) -> Place:
        """What it reads in its layer."""
        return self.places[0] if self.places else "residual" if self.kind == "sae" else "mlp_input"

    @property
    def writes(self) -> Place:
        """What its output stands for."""
        return self.places[1] if self.places else "residual" if self.kind == "sae" else "mlp_added"

    @property
    def num_latents(self) -> int:
        return self.decoder.shape[0]

    @property
    def width(self) -> int:
        """Width of the feature vectors, D_out."""
        return self.decoder.shape[1]

    @property
    def feature_vectors(self) -> Float[Tensor, "F D_out"]:
        """Decoder rows, as stored: what one unit of each latent adds to the output (before units are put back)."""
        return self.decoder

    def encode(self, x: Float[Tensor, "... D_in"]) -> Float[Tensor, "... F"]:
        """Latents, zeros included."""
        x = self._read(x)
        if self.gate is not None:
            linear = x @ self.encoder
            return (linear * self.gate.scale + self.encoder_bias).relu() * (linear + self.gate.bias > 0)
        before = self._before(x)
        if self.k is not None:
            indices = (before.abs() if self.signed else before).topk(self.k, dim=-1).indices
            values = before.gather(-1, indices)
            return torch.zeros_like(before).scatter(-1, indices, values if self.signed else values.relu())
        latents = before.relu()
        return latents if self.threshold is None else latents * (before > self.threshold)

    def _read(self, x: Tensor) -> Tensor:
        """What the encoder's matrix is applied to."""
        x, _, _ = self._normalized(x.to(self.encoder.dtype))
        return x - self.decoder_bias if self.subtract_bias else x

    def _before(self, x: Tensor) -> Tensor:
        """What the activation is applied to, where no gate is asked."""
        # One pass over all latents less than a product and a sum.
        rows = torch.addmm(self.encoder_bias, x.reshape(-1, x.shape[-1]), self.encoder)
        before = rows.view(*x.shape[:-1], self.num_latents)
        return before * self.decoder.norm(dim=-1) if self.rescale else before

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """x as the encoder takes it, and the scale and offset that lead back: x = normalized * scale + offset."""
        if self.normalization == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / scale, scale, 0.0
        if self.normalization == "layer_norm":
            offset = x.mean(dim=-1, keepdim=True)
            scale = (x - offset).std(dim=-1, keepdim=True)
            return (x - offset) / (scale + LAYER_NORM_EPSILON), scale, offset
        return x, 1.0, 0.0

    def encode_sparse(self, x: Float[Tensor, "N D_in"]) -> ActiveLatents:
        """The latents that are not zero; all F are held for only some of the N vectors at a time."""
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        values: list[Tensor] = []
        step = max(1, (ENCODE_ENTRIES if x.device.type == "cpu" else ENCODE_ENTRIES_GPU) // self.num_latents)
        for start in range(0, len(x), step):
            row, column, value = self._active(x[start : start + step])
            rows.append(row + start)
            columns.append(column)
            values.append(value)
        if not rows:
            none = torch.empty(0, dtype=torch.long, device=x.device)
            return ActiveLatents(none, none, none.to(self.encoder.dtype), 0, self.num_latents)
        return ActiveLatents(torch.cat(rows), torch.cat(columns), torch.cat(values), len(x), self.num_latents)

    def _active(self, x: Float[Tensor, "n D_in"]) -> Entries:
        """Row, column and value of the latents of a few vectors that are not zero."""
        if self.gate is not None or self.signed:
            latents = self.encode(x)
            row, column = latents.nonzero(as_tuple=True)
            return row, column, latents[row, column]
        before = self._before(self._read(x))
        return above(before, self.threshold) if self.k is None else largest(before, self.k)

    def decode(self, latents: Float[Tensor, "... F"], x: Float[Tensor, "... D_in"]) -> Float[Tensor, "... D_out"]:
        """What the latents stand for, plus the skip term of `x` where there is one (sae-lens' decode omits it)."""
        if self.rescale:
            latents = latents / self.decoder.norm(dim=-1)
        output = latents @ self.decoder + self.decoder_bias
        if self.kind == "sae" and self.normalization != "none":
            _, scale, offset = self._normalized(x.to(output.dtype))
            output = output * scale + offset
        return output if self.skip is None else output + x.to(self.skip.dtype) @ self.skip.T

    def forward(self, x: Float[Tensor, "... D_in"]) -> Float[Tensor, "... D_out"]:
        """`decode(encode(x), x)`: the reconstruction of x (SAE), or of the MLP's output at input x (transcoder)."""
        return self.decode(self.encode(x), x)

    def to(self, device: torch.device | str) -> SparseCoder:
        """The same coder with its weights on a device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Gate):
                return Gate(value.bias.to(device), value.scale.to(device))
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: moved(getattr(self, field.name)) for field in fields(self)})


def fraction_unexplained(predicted: Float[Tensor, "N D"], true: Float[Tensor, "N D"]) -> float:
    """Fraction of variance unexplained: squared error over the squared distance from the mean, both summed over all."""
    error = (predicted - true).double().square().sum()
    return (error / (true - true.mean(0)).double().square().sum()).item()
