"""Weights from safetensors into a model that was built without them: a module at a time, quantized as they arrive.

    empty_model (parameters on the meta device) -> Streamer.load(layer) -> the caller shards it -> the next layer

So a process holds one layer more than its share of the model, and never a whole copy; the files are memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.models.paths import check_model, load_error, resolve_model_path
from introspect_ray.models.structure import decoder_layers

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
STORAGE_DTYPE = torch.bfloat16
"""What 4-bit weights are packed into. Sharding moves floating-point numbers only, and casts every other dtype to the
one it computes in, which would change packed bits; bfloat16 is the only one that it may be told to compute in."""

Fill = Callable[[str, torch.Size], Tensor]
"""(name, shape) -> start of a parameter that no checkpoint holds, e.g. of an adapter."""


class WeightFiles:
    """The tensors of one checkpoint, read one at a time.

    Raises:
        UserError: the model has no safetensors files, or they are damaged.
    """

    def __init__(self, config: ModelConfig):
        self.path = config.path
        self.folder = _local_folder(config)
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        self._open: dict[str, Any] = {}
        try:
            if index.is_file():
                self.file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            elif single.is_file():
                self.file_of = dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)
            else:
                raise UserError(f"model path '{config.path}' has no safetensors weights: expected {SINGLE_FILE}")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise load_error(config.path, error) from error

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the dtype of the checkpoint."""
        try:
            return self._file(self.file_of[name]).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise load_error(self.path, error) from error

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt", device="cpu")
        return self._open[name]


def _local_folder(config: ModelConfig) -> Path:
    """The checkpoint on this machine's disk, downloaded if it is a hub model."""
    location = resolve_model_path(config.path)
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, revision=config.revision, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise load_error(config.path, error) from error


def weights_dtype(config: ModelConfig, files: WeightFiles) -> torch.dtype:
    """What the weights of `config` are kept in."""
    if config.dtype != "auto":
        return cast(torch.dtype, getattr(torch, config.dtype))
    return getattr(check_model(config), "dtype", None) or files.read(next(iter(files.file_of))).dtype


def empty_model(config: ModelConfig, dtype: torch.dtype, num_tokens: int) -> PreTrainedModel:
    """The model of `config` in eval mode and frozen, buffers real and parameters on the meta device.

    Args:
        num_tokens: rows that the embeddings have at least.
    """
    from accelerate import init_empty_weights

    found = check_model(config)
    text = found.get_text_config(decoder=True)
    text.vocab_size = max(text.vocab_size, num_tokens)
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                found, dtype=dtype, attn_implementation=config.attention, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise load_error(config.path, error) from error
    model.tie_weights()  # moving parameters to the meta device one by one untied them
    return model.eval().requires_grad_(False)


def quantize_layers(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Swap the linear layers inside the decoder layers of an empty model for ones in NF4 with double quantization."""
    import bitsandbytes as bnb  # slow

    for layer in decoder_layers(model):
        for name, linear in [(name, part) for name, part in layer.named_modules() if type(part) is nn.Linear]:
            packed = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=True,
                quant_type="nf4",
                quant_storage=STORAGE_DTYPE,
                device="meta",
            )
            # On a CPU, a forward pass without gradient would repack the weights for itself and spoil their shards.
            packed.support_avx512bf16_for_cpu = False
            packed.requires_grad_(False)
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, packed.to(next(linear.parameters()).dtype))
    cast(Any, model).is_loaded_in_4bit = True  # what PEFT goes by


class Streamer:
    """Fills an empty model from its files, module by module.

    Args:
        model: the language model; adapters may have been put into it.
        fill: starts the parameters that adapters brought.

    Raises:
        UserError: the checkpoint lacks weights of the model, or has them in another shape.
    """

    def __init__(self, model: PreTrainedModel, files: WeightFiles, device: torch.device, fill: Fill):
        self.model, self.files, self.device, self.fill = model, files, device, fill
        self._names = {module: name for name, module in model.named_modules()}
        # Embeddings may have more rows than the checkpoint: those of tokens that were added.
        heads = (model.get_input_embeddings(), model.get_output_embeddings())
        self._may_grow = {id(module.weight) for module in heads if module is not None}
        self._key_of = self._keys()

    def load(self, part: nn.Module) -> None:
        """Give every parameter inside `part` that is still empty its values, on the device."""
        # The key is the empty parameter: tied weights are one parameter in several places and stay one. Nothing is kept
        # beyond this call, so that the caller can let go of what it has cut up.
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in part.modules():
            prefix = self._names[module]
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if parameter not in made:
                        made[parameter] = self._real(module, f"{prefix}.{name}", parameter)
                    module._parameters[name] = made[parameter]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    key = self._key_of.get(f"{prefix}.{name}")
                    module._buffers[name] = (buffer if key is None else self.files.read(key)).to(self.device)

    def _real(self, module: nn.Module, name: str, empty: nn.Parameter) -> nn.Parameter:
        dtype = empty.dtype
        if name not in self._key_of:
            values = self.fill(name, empty.shape).to(self.device, dtype)
            return nn.Parameter(values, requires_grad=empty.requires_grad)
        stored = self.files.read(self._key_of[name])
        if id(empty) in self._may_grow and stored.shape[0] < empty.shape[0]:
            stored = _grown(stored.to(dtype), empty.shape[0])
        if hasattr(module, "quant_state") and name.endswith(".weight"):
            return self._packed(module, stored)
        if stored.shape != empty.shape:
            raise UserError(
                f"model path '{self.files.path}': {self._key_of[name]} is {list(stored.shape)}, its config.json asks "
                f"for {list(empty.shape)}"
            )
        # A copy: what is memory-mapped could change under us, and is read-only.
        values = stored.to(device=self.device, dtype=dtype, copy=True)
        return nn.Parameter(values, requires_grad=empty.requires_grad)

    def _packed(self, module: nn.Module, weight: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Params4bit

        unpacked: Any = Params4bit(
            weight.to(self.device),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=STORAGE_DTYPE,
            module=cast(Any, module),
        )
        return unpacked.to(self.device)  # packs it

    def _keys(self) -> dict[str, str]:
        """Parameter or buffer of the model -> tensor of the checkpoint; adapters' parameters are left out."""
        prefix = f"{self.model.base_model_prefix}."
        there = self.files.file_of
        found: dict[str, str] = {}
        missing = []
        buffers = self.model.state_dict().keys() - dict(self.model.named_parameters()).keys()
        for name in [*dict(self.model.named_parameters()), *buffers]:
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            choices = [key for key in (plain, plain.removeprefix(prefix), prefix + plain) if key in there]
            if choices:
                found[name] = choices[0]
            elif name not in buffers:
                missing.append(plain)
        if missing:
            raise UserError(
                f"model path '{self.files.path}' lacks {len(missing)} weights that its config.json asks for under "
                f"these names, e.g. {missing[0]}"
            )
        return found


def _grown(rows: Tensor, count: int) -> Tensor:
    """Embeddings with rows for new tokens: the mean of all others, so nothing is drawn at random."""
    mean = rows.float().mean(dim=0).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - rows.shape[0], -1)])
