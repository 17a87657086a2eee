"""What a sae-lens folder says about its coder in `cfg.json`, checked without its weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from introspect_ray.errors import UserError
from introspect_ray.features.coder import Kind
from introspect_ray.models.paths import POCKET_ARTIFACTS, POCKET_PREFIX

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

SAE_ARCHITECTURES = ("standard", "topk", "jumprelu")
TRANSCODER_ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")

_RESIDUAL_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)|(?:model\.)?layers\.(\d+)")
_ANY_BLOCK = re.compile(r"(?:blocks|(?:model\.)?layers)\.(\d+)(?:\..*)?")


@dataclass(frozen=True)
class CoderCard:
    """Shape and place of a coder."""

    architecture: str
    num_latents: int
    width_in: int
    width_out: int
    layer: int
    k: int | None
    subtract_bias: bool
    rescale: bool

    @property
    def kind(self) -> Kind:
        return "transcoder" if self.architecture in TRANSCODER_ARCHITECTURES else "sae"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the architecture has, as sae-lens names them."""
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (self.width_in, self.num_latents),
            "b_enc": (self.num_latents,),
            "W_dec": (self.num_latents, self.width_out),
            "b_dec": (self.width_out,),
        }
        if "jumprelu" in self.architecture:
            shapes["threshold"] = (self.num_latents,)
        if "skip" in self.architecture:
            shapes["W_skip"] = (self.width_out, self.width_in)
        return shapes


def coder_folder(path: str) -> Path:
    """The folder behind a path or `pocket:NAME`. Raises `UserError` if there is none, or if a file is missing in it."""
    name = path.removeprefix(POCKET_PREFIX)
    folder = POCKET_ARTIFACTS / name if path.startswith(POCKET_PREFIX) else Path(path).expanduser()
    if not folder.is_dir():
        expected = "pocket:sae or pocket:transcoder" if path.startswith(POCKET_PREFIX) else "a sae-lens folder"
        raise UserError(f"SAE path '{path}' does not exist: expected {expected}")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"SAE path '{path}' has no {file}: expected a sae-lens folder")
    return folder


def read_card(path: str) -> CoderCard:
    """The card of the coder at `path`. Raises `UserError` for what is missing, malformed or not supported."""
    file = coder_folder(path) / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no object: expected the config of a sae-lens SAE")
    architecture = config.get("architecture")
    if architecture not in (*SAE_ARCHITECTURES, *TRANSCODER_ARCHITECTURES):
        known = ", ".join((*SAE_ARCHITECTURES, *TRANSCODER_ARCHITECTURES))
        raise UserError(f"{file}: architecture {architecture!r} is not supported: expected one of {known}")
    _refuse_preprocessing(file, config)
    transcoder = architecture in TRANSCODER_ARCHITECTURES
    width_in = _size(file, config, "d_in")
    num_latents = _size(file, config, "d_sae")
    k = _size(file, config, "k") if architecture == "topk" else None
    if k is not None and k > num_latents:
        raise UserError(f"{file}: k is {k}: expected at most d_sae, {num_latents}")
    return CoderCard(
        architecture=architecture,
        num_latents=num_latents,
        width_in=width_in,
        width_out=_size(file, config, "d_out") if transcoder else width_in,
        layer=_layer(file, config, transcoder),
        k=k,
        subtract_bias=False if transcoder else config.get("apply_b_dec_to_input", True) is True,
        rescale=architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False) is True,
    )


def _size(file: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key} is {value!r}: expected a positive integer")
    return value


def _refuse_preprocessing(file: Path, config: dict[str, Any]) -> None:
    """sae-lens itself skips `expected_average_only_in` on load, so such weights would be read at the wrong scale."""
    for key in ("normalize_activations", "reshape_activations"):
        if (value := config.get(key) or "none") != "none":
            raise UserError(f"{file}: {key} {value!r} is not supported: fold it into the weights and store 'none'")


def _layer(file: Path, config: dict[str, Any], transcoder: bool) -> int:
    """Decoder layer, from the name of the hook; "residual stream before block l" is the output of layer l - 1."""
    metadata = config.get("metadata") or {}
    hook = metadata.get("hook_name") or config.get("hook_name") or ""
    match = (_ANY_BLOCK if transcoder else _RESIDUAL_HOOK).fullmatch(hook)
    if match is None:
        expected = "blocks.N.mlp.hook_in or alike" if transcoder else "blocks.N.hook_resid_post or alike"
        raise UserError(f"{file}: metadata.hook_name {hook!r} names no layer that is read: expected {expected}")
    layer = int(next(group for group in match.groups() if group and group.isdigit()))
    if not transcoder and match[2] == "pre":
        layer -= 1
    if layer < 0:
        raise UserError(
            f"{file}: metadata.hook_name {hook!r} reads the embeddings: expected the output of a decoder layer"
        )
    return layer


def sae_lens_version() -> str:
    """Version to write into metadata: sae-lens drops all metadata of a folder that names none, or one before 6."""
    try:
        return version("sae-lens")
    except PackageNotFoundError:
        return "6.0.0"
