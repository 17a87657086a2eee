"""Explainers as P1 published them: plain checkpoints of transformers or PEFT, without an `explainer.json`.

    full weights   config.json, model*.safetensors with or without embed_projs.L.weight, tokenizer
    adapter        adapter_config.json, adapter_model.safetensors with copies of the embeddings, maybe tokenizer
    projections    embed_projs.L.weight, E x M (in the weights, or as L.weight in embed_projs.pt), used only where
                   E and M differ; or alignment files with alignments.L.weight, M x E

What such a folder does not say (which model is explained) comes from its published name or from the caller.
Legend: M target width, E explainer width, L layer of the target.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import fsspec
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer import files
from introspect_ray.explainer.card import CARD_FILE, PROJECTIONS_FILE, ExplainerCard, TargetInfo, local_copy
from introspect_ray.explainer.encoding import OWN_TOKENS, Frame, choose_placeholders
from introspect_ray.explainer.projections import Projections
from introspect_ray.models.loading import load_model, load_tokenizer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
UNKNOWN = "unknown"
"""Path of a model that neither the folder nor the caller names."""
MAX_NEW_TOKENS = 50
"""P1's limit in the causal tasks; descriptions end earlier by themselves."""
_MODELS = {
    "llama3.1_8b_instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1_8b": "meta-llama/Llama-3.1-8B",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "qwen3_8b": "Qwen/Qwen3-8B",
}
_NAME = re.compile(
    rf"(?:features_explain|act_patch|input_ablation)_(?P<target>{'|'.join(map(re.escape, _MODELS))})"
    rf"_(?P<explainer>{'|'.join(map(re.escape, _MODELS))})(?:_hint)?(?:/|$)"
)
_PROJECTION = re.compile(r"(?:^|\.)embed_projs\.(\d+)\.(?:base_layer\.)?weight$")
_PROJECTION_ADAPTER = re.compile(r"(?:^|\.)embed_projs\.(\d+)\.lora_([AB])\.(?:default\.)?weight$")
_ALIGNMENT = re.compile(r"(?:^|\.)alignments\.(\d+)\.weight$")
_RELEVANT = re.compile(r"(?:^|\.)(?:embed_projs|alignments)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|lm_head)\.weight$")
logger = logging.getLogger(__name__)

Maps = dict[int, Float[Tensor, "E M"]]


def is_published(folder: str) -> bool:
    """Whether a folder (path or fsspec URL) holds a checkpoint that is no explainer of ours, finished or not."""
    filesystem, path = fsspec.core.url_to_fs(folder)

    def has(name: str) -> bool:
        return bool(filesystem.exists(f"{path.rstrip('/')}/{name}"))

    ours = any(has(name) for name in (CARD_FILE, PROJECTIONS_FILE, "training.json"))
    return not ours and (has("config.json") or has(files.ADAPTER_FILE))


def load_published(
    folder: str,
    device: str,
    dtype: str,
    target: TargetInfo | None = None,
    base: str | None = None,
    alignment: str | None = None,
) -> files.Parts:
    """Model, tokenizer, projections and card of a published checkpoint.

    An adapter whose copies of the embeddings are not its base's is merged into it, because adapters of ours hold none.

    Args:
        target: the model that it explains; without it, what name and projections of the folder say.
        base: the model that an adapter belongs to, where the name that it says leads nowhere.
        alignment: alignment file of a checkpoint that has no projections of its own.

    Raises:
        UserError: a file is damaged or lacks something, or widths or layers do not fit; the folder is named.
    """
    with local_copy(folder) as path, _readable(folder):
        settings = _adapter_settings(path)
        start = str(path) if settings is None else base or settings.get("base_model_name_or_path")
        if not start:
            raise UserError(f"adapter {folder} does not say what its base model is: name it as base")
        own = ModelConfig(path=start, device=device, dtype=cast(Any, dtype))
        has_tokenizer = (path / "tokenizer.json").is_file()
        tokenizer = load_tokenizer(own.model_copy(update={"path": str(path)}) if has_tokenizer else own)
        placeholders = choose_placeholders(tokenizer)
        if placeholders == OWN_TOKENS:
            raise UserError(f"checkpoint {folder}: its tokenizer has none of the placeholder tokens of P1")
        maps = _maps(folder, path, settings, alignment)
        model: nn.Module = load_model(own)
        if settings is not None:
            model = _adapted(folder, cast(PreTrainedModel, model), path)
    names = _NAME.search(folder)
    if settings is None:
        own = own.model_copy(update={"path": _MODELS[names["explainer"]] if names else UNKNOWN})
    unwrap: Any = getattr(model, "get_base_model", None)
    causal = cast(PreTrainedModel, unwrap() if unwrap is not None else model)
    target = target or _guess(causal, maps, _MODELS[names["target"]] if names else UNKNOWN)
    projections = _projections(folder, maps, target, files.embedding_weight(causal))
    card = ExplainerCard(
        target=target,
        base=own,
        weights="full" if causal is model else "lora",
        placeholders=placeholders,
        frame=Frame.of(tokenizer),
        projection=projections.kind,
        vector_norm=None,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return model.eval(), tokenizer, projections, card


@contextmanager
def _readable(folder: str) -> Iterator[None]:
    """Whatever is wrong with a file is a UserError that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {folder} cannot be loaded: {first}") from None


def _adapter_settings(path: Path) -> dict[str, Any] | None:
    """The contents of adapter_config.json; none for full weights."""
    file = path / files.ADAPTER_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _adapted(folder: str, model: PreTrainedModel, path: Path) -> nn.Module:
    """The base with its adapter on it, or merged into it where the adapter brings other embeddings along."""
    import peft  # Slow, and it brings bitsandbytes along: only adapters need it.

    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"adapter {folder} has no {ADAPTER_WEIGHTS}")
    tensors = load_file(file)
    embeddings = {key: tensor for key, tensor in tensors.items() if _EMBEDDINGS.search(key)}
    rows = max((len(tensor) for tensor in embeddings.values()), default=0)
    if rows > len(files.embedding_weight(model)):
        model.resize_token_embeddings(rows, mean_resizing=False)
    of_base = model.state_dict()
    are_copies = all(
        _is_copy(tensor, of_base.get(key.removeprefix("base_model.model."))) for key, tensor in embeddings.items()
    )
    adapted = peft.PeftModel.from_pretrained(model, str(path))
    if are_copies:
        return adapted
    logger.warning("adapter %s brings embeddings that are not its base model's: it is merged", folder)
    return cast(nn.Module, adapted.merge_and_unload(safe_merge=True))


def _is_copy(tensor: Tensor, of_base: Tensor | None) -> bool:
    """Whether an adapter's embeddings are the base's, as exactly as their dtype can say."""
    if of_base is None or tensor.shape != of_base.shape:
        return False
    return torch.equal(of_base.to(tensor.dtype).cpu(), tensor)


def _maps(folder: str, path: Path, settings: Mapping[str, Any] | None, alignment: str | None) -> Maps:
    """The projections that the folder holds, else those of its alignment or of the file that is named; maybe none."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= _selected(file)
    beside = path / "embed_projs.pt"
    if beside.is_file():
        # The state of the list of projections alone, which says L.weight.
        tensors |= {f"embed_projs.{key.removeprefix('embed_projs.')}": value for key, value in _load_pt(beside).items()}
    maps = {int(found[1]): tensor for key, tensor in tensors.items() if (found := _PROJECTION.search(key))}
    for file in sorted(path.glob("*.pt")):
        if file != beside:
            tensors |= _selected(file)
    aligned = _aligned(tensors)
    if alignment is not None:
        if maps or aligned:
            raise UserError(f"checkpoint {folder} has projections of its own, so that no alignment can be given")
        with local_copy(alignment.rpartition("/")[0] or ".") as place:
            aligned = _aligned(_selected(place / alignment.rpartition("/")[2]))
        if not aligned:
            raise UserError(f"alignment {alignment} has no keys alignments.LAYER.weight")
    return _with_adapters(folder, maps, tensors, settings) if maps or not aligned else aligned


def _selected(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or `.pt` file whose keys are of projections; no others are read."""
    if file.suffix == ".pt":
        return {key: value for key, value in _load_pt(file).items() if _RELEVANT.search(key)}
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys() if _RELEVANT.search(key)}  # noqa: SIM118


def _load_pt(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file by key, read by torch's reader that builds nothing but tensors and plain values."""
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch says in many kinds of errors that it refused
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"file {file} cannot be read as tensors: {first}") from None
    items = content.items() if isinstance(content, dict) else ()
    return {str(key): value for key, value in items if isinstance(value, Tensor)}


def _aligned(tensors: Mapping[str, Tensor]) -> Maps:
    """Alignments are kept the other way round: M x E."""
    return {int(found[1]): tensor.T for key, tensor in tensors.items() if (found := _ALIGNMENT.search(key))}


def _with_adapters(folder: str, maps: Maps, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None) -> Maps:
    """The projections with what adapters, which P1's code puts on them too, add to each."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := _PROJECTION_ADAPTER.search(key):
            parts.setdefault(int(found[1]), {})[found[2]] = tensor
    assert settings is not None or not parts, "adapters of projections come with an adapter"
    for layer, pair in parts.items():
        if layer not in maps:
            raise UserError(
                f"adapter {folder} changes embed_projs.{layer} but does not hold its weights: it cannot be rebuilt"
            )
        assert settings is not None
        scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"])
        maps[layer] = maps[layer].float() + scale * (pair["B"].float() @ pair["A"].float())
    return maps


def _guess(model: PreTrainedModel, maps: Maps, path: str) -> TargetInfo:
    """The target as far as the folder tells: as wide and deep as its projections, else as the explainer itself."""
    if maps:
        return TargetInfo(path=path, width=next(iter(maps.values())).shape[1], num_layers=max(maps) + 1)
    text = model.config.get_text_config(decoder=True)
    return TargetInfo(path=path, width=text.hidden_size, num_layers=text.num_hidden_layers)


def _projections(folder: str, maps: Maps, target: TargetInfo, embeddings: Tensor) -> Projections:
    """Maps for every layer of the target; none where the widths are equal, as in P1's code, which then skips them."""
    width = embeddings.shape[1]
    if target.width == width:
        return Projections("none", target.num_layers, target.width, width)
    for layer in range(target.num_layers):
        if layer not in maps:
            raise UserError(
                f"checkpoint {folder} has no projection of layer {layer}, expected one for each of the"
                f" {target.num_layers} layers of {target.path}"
            )
        found = tuple(maps[layer].shape)
        if found != (width, target.width) or not bool(maps[layer].isfinite().all()):
            raise UserError(
                f"checkpoint {folder}: the projection of layer {layer} is {found[0]} x {found[1]}, expected a finite"
                f" one of {width} x {target.width}"
            )
    projections = Projections("linear", target.num_layers, target.width, width)
    projections.start_from({layer: maps[layer].float() for layer in range(target.num_layers)})
    return projections.to(embeddings.device).requires_grad_(False)
