"""What a coder's files say about it, checked without its weights.

Two layouts are read: sae-lens' (`cfg.json`, `sae_weights.safetensors`) and sparsify's (`cfg.json`, `sae.safetensors`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from introspect_ray.errors import UserError
from introspect_ray.features.coder import Kind, Normalization
from introspect_ray.features.places import Place, named_place, transcoder_places
from introspect_ray.features.releases import RELEASE_PREFIX, fetch_release
from introspect_ray.models.paths import POCKET_ARTIFACTS, POCKET_PREFIX

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSIFY_WEIGHTS_FILE = "sae.safetensors"
SCALER_FILE = "activation_scaler.json"
"""sae-lens' training checkpoints: the factor of `expected_average_only_in`, which its own loader leaves out."""

SAE_ARCHITECTURES = ("standard", "topk", "abstopk", "jumprelu", "gated")
TRANSCODER_ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TOPK_ARCHITECTURES = ("topk", "abstopk")

_NORMALIZATIONS: dict[str, Normalization] = {"none": "none", "constant_norm_rescale": "constant_norm"}
_NORMALIZATIONS["layer_norm"] = "layer_norm"
_OLD_NAMES = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
"""sae-lens before 6 -> since then."""


@dataclass(frozen=True)
class CoderCard:
    """Shape and place of a coder."""

    architecture: str
    """As sae-lens calls it, whatever the layout."""
    num_latents: int
    width_in: int
    width_out: int
    layer: int
    k: int | None
    subtract_bias: bool
    rescale: bool
    reads: Place
    writes: Place
    model_name: str = ""
    """The model that it was trained on, where its files say so."""
    normalization: Normalization = "none"
    input_scale: float = 1.0
    """What was read was multiplied by this in training, and what was written divided: to be folded into the weights."""
    weights_file: str = WEIGHTS_FILE

    @property
    def kind(self) -> Kind:
        return "transcoder" if self.architecture in TRANSCODER_ARCHITECTURES else "sae"

    @property
    def is_sparsify(self) -> bool:
        return self.weights_file == SPARSIFY_WEIGHTS_FILE

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the architecture has, as sae-lens names them."""
        bias = (self.num_latents,)
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (self.width_in, self.num_latents),
            "W_dec": (self.num_latents, self.width_out),
            "b_dec": (self.width_out,),
        }
        shapes |= {"b_gate": bias, "b_mag": bias, "r_mag": bias} if self.architecture == "gated" else {"b_enc": bias}
        if "jumprelu" in self.architecture:
            shapes["threshold"] = bias
        if "skip" in self.architecture:
            shapes["W_skip"] = (self.width_out, self.width_in)
        return shapes

    def other_model(self, path: str) -> str:
        """A line about the coder's model if it does not have the name of the target at `path`, else empty.

        Names say little (a folder may be called anything), so this is a note and no refusal; widths are checked.
        """
        own, target = (name.rstrip("/").rpartition("/")[2].lower() for name in (self.model_name, path))
        if not own or own == target:
            return ""
        return f"it was trained on activations of {self.model_name}, the target is {path}"


def coder_folder(path: str) -> Path:
    """The folder behind a path, `pocket:NAME` or `sae-lens:RELEASE:ID`.

    Raises `UserError` if there is none, or if a file is missing in it.
    """
    if path.startswith(RELEASE_PREFIX):
        return fetch_release(path)
    name = path.removeprefix(POCKET_PREFIX)
    folder = POCKET_ARTIFACTS / name if path.startswith(POCKET_PREFIX) else Path(path).expanduser()
    if not folder.is_dir():
        expected = "pocket:sae or pocket:transcoder" if path.startswith(POCKET_PREFIX) else "a sae-lens folder"
        raise UserError(f"SAE path '{path}' does not exist: expected {expected}")
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(part.parent.name for part in folder.glob(f"*/{CONFIG_FILE}"))
        if inside:
            several = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
            raise UserError(f"SAE path '{path}' holds {len(inside)} coders: expected one of its folders {several}")
        raise UserError(f"SAE path '{path}' has no {CONFIG_FILE}: expected a sae-lens folder")
    if not any((folder / file).is_file() for file in (WEIGHTS_FILE, SPARSIFY_WEIGHTS_FILE)):
        raise UserError(f"SAE path '{path}' has no {WEIGHTS_FILE}: expected a sae-lens folder")
    return folder


def read_card(path: str) -> CoderCard:
    """The card of the coder at `path`. Raises `UserError` for what is missing, malformed or not supported."""
    folder = coder_folder(path)
    config = read_object(folder / CONFIG_FILE)
    if (folder / WEIGHTS_FILE).is_file():
        return _sae_lens_card(folder, config)
    from introspect_ray.features.sparsify import sparsify_card  # which needs this module

    return sparsify_card(folder, config)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` if there is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no object: expected the config of a coder")
    return config


def _sae_lens_card(folder: Path, config: dict[str, Any]) -> CoderCard:
    file = folder / CONFIG_FILE
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: metadata is {metadata!r}: expected an object")
    if not metadata:
        config = _since_6(config)
    architecture = config.get("architecture")
    if architecture not in (*SAE_ARCHITECTURES, *TRANSCODER_ARCHITECTURES):
        known = ", ".join((*SAE_ARCHITECTURES, *TRANSCODER_ARCHITECTURES))
        raise UserError(f"{file}: architecture {architecture!r} is not supported: expected one of {known}")
    transcoder = architecture in TRANSCODER_ARCHITECTURES
    width_in = size(file, config, "d_in")
    num_latents = size(file, config, "d_sae")
    normalization, scale = _preprocessing(folder, config)
    layer, reads, writes = _place(file, config, metadata, transcoder)
    return CoderCard(
        architecture=architecture,
        num_latents=num_latents,
        width_in=width_in,
        width_out=size(file, config, "d_out") if transcoder else width_in,
        layer=layer,
        k=active_size(file, config, num_latents) if architecture in TOPK_ARCHITECTURES else None,
        subtract_bias=False if transcoder else config.get("apply_b_dec_to_input", True) is True,
        rescale=architecture in TOPK_ARCHITECTURES and config.get("rescale_acts_by_decoder_norm", False) is True,
        reads=reads,
        writes=writes,
        model_name=str(metadata.get("model_name") or config.get("model_name") or ""),
        normalization=normalization,
        input_scale=scale,
    )


def _since_6(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a folder that sae-lens wrote before version 6, in today's names."""
    config = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    config.setdefault("architecture", "standard")
    arguments = config.get("activation_fn_kwargs")
    if config.get("activation_fn") == "topk" and isinstance(arguments, dict) and "k" in arguments:
        config |= {"architecture": "topk", "k": arguments["k"]}
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return config


def size(file: Path, config: dict[str, Any], key: str) -> int:
    """A positive integer of a config. Raises `UserError` for anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key} is {value!r}: expected a positive integer")
    return value


def active_size(file: Path, config: dict[str, Any], num_latents: int) -> int:
    """`k` of a TopK coder. Raises `UserError` if it is none, or more than there are latents."""
    k = size(file, config, "k")
    if k > num_latents:
        raise UserError(f"{file}: k is {k}: expected at most d_sae, {num_latents}")
    return k


def _preprocessing(folder: Path, config: dict[str, Any]) -> tuple[Normalization, float]:
    """What is done to vectors before they are read: per vector, and by one factor for all.

    sae-lens itself skips `expected_average_only_in` on load, so such weights would be read at the wrong scale; its
    factor is known only in training checkpoints. `covariance_whitening` and `hook_z` are refused as well.
    """
    file = folder / CONFIG_FILE
    if (value := config.get("reshape_activations") or "none") != "none":
        raise UserError(f"{file}: reshape_activations {value!r} is not supported: its coder reads attention heads")
    value = config.get("normalize_activations") or "none"
    if value in _NORMALIZATIONS:
        return _NORMALIZATIONS[value], 1.0
    if value == "expected_average_only_in" and (folder / SCALER_FILE).is_file():
        factor = read_object(folder / SCALER_FILE).get("scaling_factor")
        if isinstance(factor, int | float) and factor > 0:
            return "none", float(factor)
    raise UserError(
        f"{file}: normalize_activations {value!r} is not supported: fold it into the weights and store 'none'"
    )


def _place(file: Path, config: dict[str, Any], metadata: dict[str, Any], transcoder: bool) -> tuple[int, Place, Place]:
    """Decoder layer, what is read and what is written, from the names of the hooks."""
    hook, hook_out = (str(metadata.get(key) or config.get(key) or "") for key in ("hook_name", "hook_name_out"))
    try:
        if transcoder:
            return transcoder_places(hook, hook_out)
        layer, place = named_place(hook)
        return layer, place, place
    except UserError as error:
        raise UserError(f"{file}: metadata.hook_name {error}") from None


def sae_lens_version() -> str:
    """Version to write into metadata: sae-lens drops all metadata of a folder that names none, or one before 6."""
    try:
        return version("sae-lens")
    except PackageNotFoundError:
        return "6.0.0"
