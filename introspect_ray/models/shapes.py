"""Shapes of models that plans and ready configs know without having the models: their `config.json`, and no weights."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from introspect_ray.config import HUB_IDS, KnownModel, ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.models.paths import POCKET_PREFIX, check_model


def known_shape(name: KnownModel) -> PretrainedConfig:
    """The model's config as far as it decides sizes and arithmetic."""
    if name == "qwen3-8b":
        return Qwen3Config(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
    is_large = name == "llama-3.1-70b"
    return LlamaConfig(
        hidden_size=8192 if is_large else 4096,
        intermediate_size=28672 if is_large else 14336,
        num_hidden_layers=80 if is_large else 32,
        num_attention_heads=64 if is_large else 32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192 if name == "llama-3-8b" else 131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def known_name(path: str) -> KnownModel | None:
    """The known model that a hub id or the last part of a path spells."""
    for name, hub_id in HUB_IDS.items():
        if path == hub_id or path.rstrip("/").rpartition("/")[2].lower() in (name, hub_id.rpartition("/")[2].lower()):
            return name
    return None


def model_shape(config: ModelConfig) -> PretrainedConfig:
    """The language model's config: the folder's own where there is one, else a known model's.

    Raises:
        UserError: there is no folder, the model is not known, and no hub has it.
    """
    name = known_name(config.path)
    is_here = config.path.startswith(POCKET_PREFIX) or Path(config.path).expanduser().exists()
    if is_here or name is None:
        try:
            return check_model(config).get_text_config(decoder=True)
        except UserError as error:
            if is_here:
                raise
            raise UserError(f"{error}; shapes are known of {', '.join(HUB_IDS.values())}") from None
    return known_shape(name)
