"""Coders that EleutherAI's sparsify wrote: a folder per module, `cfg.json` beside `sae.safetensors`.

The folder's name says the module: `layers.N` (residual output) or `layers.N.mlp`; a transcoder goes from the input of
its module to its output. sae-lens' own reader of this layout transposes the decoder and drops the skip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from introspect_ray.errors import UserError
from introspect_ray.features.card import (
    CONFIG_FILE,
    SPARSIFY_WEIGHTS_FILE,
    CoderCard,
    active_size,
    read_object,
    size,
)
from introspect_ray.features.places import Place, named_place, transcoder_places

STORED_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
"""sae-lens' name -> sparsify's, where they differ; the encoder is stored as [F, D_in]."""
_RUN_CONFIG = "config.json"


def sparsify_card(folder: Path, config: dict[str, Any]) -> CoderCard:
    """The card of a sparsify folder. Raises `UserError` for what is missing, malformed or not supported."""
    file = folder / CONFIG_FILE
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"{file}: activation {activation!r} is not supported: expected topk")
    width = size(file, config, "d_in")
    num_latents = config.get("num_latents") or width * size(file, config, "expansion_factor")
    num_latents = size(file, {"num_latents": num_latents}, "num_latents")
    transcode, skip = config.get("transcode") is True, config.get("skip_connection") is True
    if skip and not transcode:
        raise UserError(f"{file}: skip_connection without transcode is not supported")
    layer, reads, writes = _place(folder, transcode)
    return CoderCard(
        # The activation is TopK for all; of sae-lens' transcoders, which have none, only the shapes are the same.
        architecture="skip_transcoder" if skip else "transcoder" if transcode else "topk",
        num_latents=num_latents,
        width_in=width,
        width_out=width,
        layer=layer,
        k=active_size(file, config, num_latents),
        subtract_bias=not transcode,
        rescale=False,
        reads=reads,
        writes=writes,
        model_name=_model_name(folder),
        weights_file=SPARSIFY_WEIGHTS_FILE,
    )


def _place(folder: Path, transcode: bool) -> tuple[int, Place, Place]:
    name = folder.resolve().name
    try:
        if transcode:
            return transcoder_places(name, "")
        layer, place = named_place(name)
        return layer, place, place
    except UserError as error:
        raise UserError(f"SAE path '{folder}': its name says the module, but {error}") from None


def _model_name(folder: Path) -> str:
    """The model, from the config of the run, which lies beside its coders; empty if it does not."""
    file = folder.resolve().parent / _RUN_CONFIG
    return str(read_object(file).get("model") or "") if file.is_file() else ""
