"""Causal language models and tokenizers from disk or hub, ready for inference."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.models.paths import check_model, load_error, resolve_device, resolve_model_path

# On CPUs it says at every import that a package is not there which it can do without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The causal language model of `config`, in eval mode and frozen, on its device or devices.

    Raises `UserError` if it cannot be loaded, if the checkpoint lacks weights (they would be random), or if the GPUs of
    this process do not hold it.
    """
    check_model(config)
    device = resolve_device(config.device)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        with no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                resolve_model_path(config.path),
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=dtype,
                attn_implementation=config.attention,
                use_safetensors=True,  # no pickles
                output_loading_info=True,
                **_placement(config, device),
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise load_error(config.path, error) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model path '{config.path}' lacks {len(missing)} weights that its config.json asks for, e.g. {missing[0]}"
        )
    if config.quantization != "none":
        _keep_packing(model)
    if config.device_map != "none":
        # transformers leaves no map where one device holds all.
        check_placement(config, getattr(model, "hf_device_map", {"": model.device}), device)
    elif config.quantization == "none":
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _placement(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize, and place while loading; empty if the model is moved afterwards."""
    arguments: dict[str, Any] = {}
    if config.quantization != "none":
        # What is computed in follows the dtype of the other weights; `auto` is known only to the checkpoint.
        compute = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.quantization == "nf4_double",
            bnb_4bit_compute_dtype=compute,
        )
    if config.device_map != "none":
        arguments["device_map"] = config.device_map
    elif config.quantization != "none":
        arguments["device_map"] = {"": device}  # 4-bit weights are packed on the device that they stay on
    return arguments


def _keep_packing(model: PreTrainedModel) -> None:
    """On CPUs, bitsandbytes repacks 4-bit weights at first use, and fails at shapes that are not whole blocks."""
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None and (state.shape[1] % state.blocksize or state.shape[0] % 32):
            cast(Any, module).support_avx512bf16_for_cpu = False


def check_placement(config: ModelConfig, placed: Mapping[str, Any], device: torch.device) -> None:
    """Refuse a model of which a part lies beside the GPUs or on disk, from where it would be moved at every pass.

    `placed` says where each module is (accelerate); `device` is what `auto` means here.
    """
    slow = ("disk",) if device.type == "cpu" else ("disk", "cpu")
    beside = [name for name, where in placed.items() if str(where) in slow]
    if beside:
        raise UserError(
            f"model path '{config.path}' does not fit: device_map {config.device_map} left {len(beside)} of"
            f" {len(placed)} parts outside of the memory of {device.type} devices, e.g. {beside[0] or 'all'}; give the"
            " process more GPUs (actors.num_gpus), or set quantization to nf4"
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model of `config`. Raises `UserError` if there is none, or none with offsets."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model_path(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise load_error(config.path, error) from error
    if not tokenizer.is_fast:
        raise UserError(f"model path '{config.path}' has no fast tokenizer (tokenizer.json), which offsets need")
    return tokenizer


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Silences the bar that transformers draws while it reads or writes weights."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
