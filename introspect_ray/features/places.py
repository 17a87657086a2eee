"""Where a coder reads and writes: places of a decoder layer, named in many ways in files, found by structure in models.

    residual_mid --norm--> mlp_normalized x gain = mlp_input --mlp--> mlp_output --maybe a norm--> mlp_added
         +------------------------------------------------------------------------------------------+--> residual

In most models `mlp_added` is `mlp_output`; Gemma and OLMo norm it once more before they add it. Names are those of
TransformerLens (`blocks.N.*`) and of modules (`layers.N`, `model.layers.N.mlp`); TransformerLens itself is not needed.
"""

from __future__ import annotations

import re
from typing import Literal

from introspect_ray.errors import UserError

Place = Literal["residual", "residual_mid", "mlp_normalized", "mlp_input", "mlp_output", "mlp_added"]
"""`residual`: output of the layer. `residual_mid`: what the norm before the MLP reads. `mlp_normalized`: that norm
without its gain and bias. `mlp_input`: what the MLP reads. `mlp_output`: what it returns. `mlp_added`: what of it is
added to the residual stream."""

READ_BY_TRANSCODERS: tuple[Place, ...] = ("mlp_input", "mlp_normalized", "residual_mid")
WRITTEN_BY_TRANSCODERS: tuple[Place, ...] = ("mlp_output", "mlp_added")

_IN_BLOCK: dict[str, Place] = {
    "hook_resid_post": "residual",
    "hook_resid_mid": "residual_mid",
    "hook_mlp_in": "residual_mid",
    "ln2.hook_normalized": "mlp_normalized",
    "mlp.hook_in": "mlp_input",
    "mlp.hook_out": "mlp_output",
    "hook_mlp_out": "mlp_added",
}
_HOOK_NAMES: dict[Place, str] = {place: name for name, place in _IN_BLOCK.items() if name != "hook_mlp_in"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:\w+\.)*?(?:layers|layer|h|blocks)\.(\d+)(\.mlp)?")


def named_place(name: str) -> tuple[int, Place]:
    """Decoder layer and place behind the name of a hook or of a module, whose output is meant.

    "The residual stream before block l" is the output of layer l - 1. Raises `UserError` for names that stand for no
    place above (heads, queries, the embeddings, ...).
    """
    if (match := _MODULE.fullmatch(name)) is not None:
        return int(match[1]), "mlp_output" if match[2] else "residual"
    if (match := _BLOCK.fullmatch(name)) is not None:
        layer, rest = int(match[1]), match[2]
        if rest == "hook_resid_pre":
            if layer == 0:
                raise UserError(f"{name!r} reads the embeddings: expected the output of a decoder layer")
            return layer - 1, "residual"
        if rest in _IN_BLOCK:
            return layer, _IN_BLOCK[rest]
    raise UserError(f"{name!r} names no place that is read: expected blocks.N.hook_resid_post, layers.N or alike")


def hook_name(layer: int, place: Place) -> str:
    """TransformerLens' name of a place, which sae-lens writes into a coder's metadata."""
    return f"blocks.{layer}.{_HOOK_NAMES[place]}"


def transcoder_places(name_in: str, name_out: str) -> tuple[int, Place, Place]:
    """Layer of the MLP that a transcoder stands for, what it reads there, and what it writes.

    Without `name_out` that is what the MLP adds to the residual stream. A module's name alone, `layers.N.mlp`, means
    from its input to its output. Raises `UserError` for everything else, transcoders that span layers among it.
    """
    layer, reads = named_place(name_in)
    if reads == "mlp_output" and name_out in ("", name_in):
        return layer, "mlp_input", "mlp_output"
    layer_out, writes = named_place(name_out) if name_out else (layer, "mlp_added")
    if layer_out != layer or reads not in READ_BY_TRANSCODERS or writes not in WRITTEN_BY_TRANSCODERS:
        to = f" to {name_out!r}" if name_out else ""
        raise UserError(
            f"{name_in!r}{to} names no place of one MLP: expected blocks.N.mlp.hook_in to blocks.N.hook_mlp_out"
            " or alike"
        )
    return layer, reads, writes
