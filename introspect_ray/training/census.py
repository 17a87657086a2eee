"""Parameters of an explainer by kind, counted on the meta device; and how it computes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from introspect_ray.config import TrainConfig
from introspect_ray.models.structure import decoder_layers
from introspect_ray.training.footprint import Arithmetic, skeleton


class Census(NamedTuple):
    """Numbers of parameters. "Layer" is the largest decoder layer, "rest" is outside of all of them."""

    base: int
    linear: int
    """Of base: weights of linear layers inside decoder layers, which 4 bits are for."""
    largest_linear: int
    largest: int
    """Largest single tensor."""
    layer: int
    layer_linear: int
    layer_adapter: int
    rest: int
    rest_adapter: int
    head: int
    """Weights that one token's logits are computed with."""
    adapter: int


def held_dtype(config: TrainConfig, shape: PretrainedConfig) -> torch.dtype:
    """Of the weights that a worker holds."""
    if config.explainer.model.dtype == "auto":
        return getattr(shape, "dtype", None) or torch.float32
    return getattr(torch, config.explainer.model.dtype)


def arithmetic_of(config: TrainConfig, shape: PretrainedConfig) -> Arithmetic:
    """How a worker of this run computes."""
    trainer, dtype = config.trainer, held_dtype(config, shape)
    is_sharded, is_bfloat16 = trainer.sharding == "fsdp2", trainer.compute_dtype == "bfloat16"
    # Sharded weights are gathered in the dtype to compute in; whole ones are cast where they are used.
    is_gathered = is_sharded and is_bfloat16
    attention = config.explainer.model.attention
    return Arithmetic(
        dtype=torch.bfloat16 if is_gathered else dtype,
        # Flash kernels keep what sdpa's fused ones keep.
        attention="sdpa" if attention == "flash_attention_2" else attention,
        lora=None if config.method == "full" else config.lora,
        # Adapters of half-precision models are held in float32.
        adapter_dtype=torch.bfloat16 if is_gathered else torch.float32,
        is_checkpointed=trainer.activation_checkpointing,
        is_autocast=is_bfloat16 and not is_sharded,
        has_fused_dropout=trainer.gpus_per_worker > 0,
        is_quantized=config.method == "qlora",
    )


def count(shape: PretrainedConfig, arithmetic: Arithmetic) -> Census:
    """Parameters by kind, projections left out."""
    return _counted(cast(Any, type(shape)), shape.to_json_string(), arithmetic)


@lru_cache(maxsize=64)
def _counted(shape_class: type[PretrainedConfig], shape: str, arithmetic: Arithmetic) -> Census:
    """`count`; the shape comes as JSON, so that equal models are counted once."""
    model, causal = skeleton(shape_class.from_dict(json.loads(shape)), arithmetic)
    is_lora = arithmetic.lora is not None
    layers = list(decoder_layers(causal))
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    everything = list(model.parameters())

    def adapter(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters if p.requires_grad) if is_lora else 0

    def base(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters if not (is_lora and p.requires_grad))

    def linear(layer: nn.Module) -> list[int]:
        """Sizes of linear layers' own weights; an adapter's are trained and so not among them."""
        found = [part.weight for part in layer.modules() if isinstance(part, nn.Linear)]
        return [weight.numel() for weight in found if not (is_lora and weight.requires_grad)]

    rest = [parameter for parameter in everything if parameter not in inside]
    return Census(
        base=base(everything),
        linear=sum(sum(linear(layer)) for layer in layers),
        largest_linear=max(max(linear(layer), default=0) for layer in layers),
        largest=max(parameter.numel() for parameter in everything),
        layer=max(base(layer.parameters()) for layer in layers),
        layer_linear=max(sum(linear(layer)) for layer in layers),
        layer_adapter=max(adapter(layer.parameters()) for layer in layers),
        rest=base(rest),
        rest_adapter=adapter(rest),
        head=causal.get_output_embeddings().weight.numel(),
        adapter=adapter(everything),
    )
