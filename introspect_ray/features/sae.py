"""Sparse coders on disk: folders of sae-lens and of sparsify, sae-lens' releases, and the two of the pocket world.

Read and written by safetensors alone: importing sae_lens takes ten seconds and more, and inference needs none of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from introspect_ray.errors import UserError
from introspect_ray.features.card import CONFIG_FILE, WEIGHTS_FILE, CoderCard, coder_folder, read_card, sae_lens_version
from introspect_ray.features.coder import Gate, SparseCoder
from introspect_ray.features.sparsify import STORED_NAMES

__all__ = ["SparseCoder", "check_sae", "load_sae", "save_transcoder"]


def check_sae(path: str, width: int) -> CoderCard:
    """The card of the coder at `path`, read without its weights.

    Raises `UserError` if it cannot be read, if a tensor is missing or has a shape that its config contradicts, or if
    what it reads or its feature vectors do not have `width` entries.
    """
    card = read_card(path)
    if card.width_in != width and card.width_out == width:
        raise UserError(f"SAE path '{path}' reads vectors of width {card.width_in}: the target has width {width}")
    if card.width_out != width:
        raise UserError(
            f"SAE path '{path}' has feature vectors of width {card.width_out}: the target has width {width}"
        )
    _open_weights(path, card, load=False)
    return card


def load_sae(path: str) -> SparseCoder:
    """The SAE or transcoder at `path`, in float32, on the CPU; scales of training folded into its weights.

    `path` is a folder that sae-lens or sparsify wrote, `sae-lens:RELEASE:ID`, `pocket:sae` or `pocket:transcoder`.
    Raises `UserError` as `check_sae` does, and if a weight is NaN or infinite.
    """
    card = read_card(path)
    tensors = _open_weights(path, card, load=True)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"SAE path '{path}': tensor {name} holds NaN or infinity: expected finite numbers")
    gated = "b_gate" in tensors
    return SparseCoder(
        kind=card.kind,
        layer=card.layer,
        encoder=tensors["W_enc"] * card.input_scale,
        encoder_bias=tensors["b_mag" if gated else "b_enc"],
        decoder=tensors["W_dec"] / card.input_scale,
        decoder_bias=tensors["b_dec"] / card.input_scale,
        threshold=tensors.get("threshold"),
        skip=tensors.get("W_skip"),
        k=card.k,
        subtract_bias=card.subtract_bias,
        rescale=card.rescale,
        signed=card.architecture == "abstopk",
        gate=Gate(tensors["b_gate"], tensors["r_mag"].exp()) if gated else None,
        normalization=card.normalization,
        places=(card.reads, card.writes),
    )


def save_transcoder(coder: SparseCoder, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write a JumpReLU transcoder as sae-lens does; `metadata` must hold `hook_name` and may hold anything else."""
    assert coder.kind == "transcoder" and coder.threshold is not None and not coder.rescale
    tensors = {
        "W_enc": coder.encoder,
        "b_enc": coder.encoder_bias,
        "W_dec": coder.decoder,
        "b_dec": coder.decoder_bias,
        "threshold": coder.threshold,
    }
    if coder.skip is not None:
        tensors["W_skip"] = coder.skip
    config = {
        "architecture": "jumprelu_transcoder" if coder.skip is None else "jumprelu_skip_transcoder",
        "d_in": coder.encoder.shape[0],
        "d_sae": coder.num_latents,
        "d_out": coder.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": sae_lens_version(), **metadata},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _open_weights(path: str, card: CoderCard, load: bool) -> dict[str, Tensor]:
    """The architecture's tensors if `load`; their names and shapes are checked against the card in any case."""
    file = coder_folder(path) / card.weights_file
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as weights:
            names = set(weights.keys())
            if "scaling_factor" in names and (weights.get_tensor("scaling_factor") != 1).any():
                raise UserError(f"{file}: tensor scaling_factor is not supported: fold it into W_dec")
            for name, expected in card.tensor_shapes().items():
                stored = STORED_NAMES.get(name, name) if card.is_sparsify else name
                turned = card.is_sparsify and name == "W_enc"
                if stored not in names:
                    raise UserError(f"{file} has no tensor {stored}, which architecture '{card.architecture}' needs")
                found = tuple(weights.get_slice(stored).get_shape())
                if found != (expected[::-1] if turned else expected):
                    said = expected[::-1] if turned else expected
                    raise UserError(f"{file}: tensor {stored} has shape {found}, but {CONFIG_FILE} says {said}")
                if load:
                    tensor = weights.get_tensor(stored).float()
                    tensors[name] = tensor.T.contiguous() if turned else tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return tensors
