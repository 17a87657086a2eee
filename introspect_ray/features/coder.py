"""Sparse coders in memory: SAEs and (skip) transcoders, encode and decode.

N vectors, D_in width read, D_out width written, F latents. Everything is inference: weights carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from introspect_ray.features.selection import above, largest

Kind = Literal["sae", "transcoder"]

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
class SparseCoder:
    """A linear encoder, an activation that leaves few latents, a linear decoder, and maybe a linear skip.

    The activation is ReLU; with `threshold` latents whose pre-activation is not above it are zero too (JumpReLU, which
    a trained BatchTopK becomes); with `k` only the k largest of each vector stay (TopK).
    """

    kind: Kind
    layer: int
    """SAE: decoder layer whose residual output it reads. Transcoder: decoder layer whose MLP it stands for."""
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

    def to(self, device: torch.device) -> SparseCoder:
        """The same coder with its weights on a device."""
        weights: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **weights)

    @property
    def num_latents(self) -> int:
        return self.decoder.shape[0]

    @property
    def width(self) -> int:
        """Width of the feature vectors, D_out."""
        return self.decoder.shape[1]

    @property
    def feature_vectors(self) -> Float[Tensor, "F D_out"]:
        """Decoder rows, as stored: what one unit of each latent adds to the output."""
        return self.decoder

    def preactivations(self, x: Float[Tensor, "... D_in"]) -> Float[Tensor, "... F"]:
        """What the activation is applied to."""
        x = x.to(self.encoder.dtype)
        if self.subtract_bias:
            x = x - self.decoder_bias
        before = torch.addmm(self.encoder_bias, x.flatten(0, -2), self.encoder).unflatten(0, x.shape[:-1])
        return before * self.decoder.norm(dim=-1) if self.rescale else before

    def encode(self, x: Float[Tensor, "... D_in"]) -> Float[Tensor, "... F"]:
        """Latents, zeros included."""
        before = self.preactivations(x)
        if self.k is not None:
            largest = before.topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, largest.indices, largest.values.relu())
        latents = before.relu()
        return latents if self.threshold is None else latents * (before > self.threshold)

    def encode_sparse(self, x: Float[Tensor, "N D_in"]) -> ActiveLatents:
        """The latents that are not zero; all F are held for only some of the N vectors at a time."""
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        values: list[Tensor] = []
        step = max(1, (ENCODE_ENTRIES if x.device.type == "cpu" else ENCODE_ENTRIES_GPU) // self.num_latents)
        for start in range(0, len(x), step):
            before = self.preactivations(x[start : start + step])
            row, column, value = largest(before, self.k) if self.k is not None else above(before, self.threshold)
            rows.append(row + start)
            columns.append(column)
            values.append(value)
        if not rows:
            none = torch.empty(0, dtype=torch.long, device=x.device)
            return ActiveLatents(none, none, none.to(self.encoder.dtype), 0, self.num_latents)
        return ActiveLatents(torch.cat(rows), torch.cat(columns), torch.cat(values), len(x), self.num_latents)

    def decode(self, latents: Float[Tensor, "... F"], x: Float[Tensor, "... D_in"]) -> Float[Tensor, "... D_out"]:
        """What the latents stand for, plus the skip term of `x` where there is one (sae-lens' decode omits it)."""
        if self.rescale:
            latents = latents / self.decoder.norm(dim=-1)
        output = latents @ self.decoder + self.decoder_bias
        return output if self.skip is None else output + x.to(self.skip.dtype) @ self.skip.T

    def forward(self, x: Float[Tensor, "... D_in"]) -> Float[Tensor, "... D_out"]:
        """`decode(encode(x), x)`: the reconstruction of x (SAE), or of the MLP's output at input x (transcoder)."""
        return self.decode(self.encode(x), x)


def fraction_unexplained(predicted: Float[Tensor, "N D"], true: Float[Tensor, "N D"]) -> float:
    """Fraction of variance unexplained: squared error over the squared distance from the mean, both summed over all."""
    error = (predicted - true).double().square().sum()
    return (error / (true - true.mean(0)).double().square().sum()).item()
