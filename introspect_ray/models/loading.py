"""Causal language models and tokenizers from disk or hub, ready for inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.models.paths import check_model, load_error, resolve_device, resolve_model_path


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The causal language model of `config`, in eval mode and frozen, on its device.

    Raises `UserError` if it cannot be loaded, or if the checkpoint lacks weights (they would be random).
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
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise load_error(config.path, error) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model path '{config.path}' lacks {len(missing)} weights that its config.json asks for, e.g. {missing[0]}"
        )
    return model.to(device).eval().requires_grad_(False)


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
