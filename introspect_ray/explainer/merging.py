"""An adapter added to the weights that it adapts."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """The language model inside a PEFT model with its adapter merged; both are used up.

    4-bit weights become what they stand for before the adapter is added: PEFT would round the sum to 4 bits again.
    """
    causal: Any = cast(Any, model).get_base_model()
    if getattr(causal, "hf_quantizer", None) is None:
        return cast(nn.Module, cast(Any, model).merge_and_unload(safe_merge=True))
    from bitsandbytes.nn import Linear4bit

    for name, module in list(causal.named_modules()):
        base = getattr(module, "base_layer", module)
        if not isinstance(base, Linear4bit) or ".base_layer" in name:
            continue
        plain = _plain(base)
        if base is not module:
            for adapter in cast(Any, module).active_adapters:
                plain.weight += cast(Any, module).get_delta_weight(adapter).to(plain.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(causal.get_submodule(parent), child, plain)
    # What transformers takes a model for quantized by.
    del causal.config.quantization_config
    causal.hf_quantizer, causal.is_quantized, causal._hf_peft_config_loaded = None, False, False
    return cast(nn.Module, causal)


def _plain(layer: Any) -> nn.Linear:
    """A linear layer with the weights that a 4-bit one computes with."""
    from bitsandbytes.functional import dequantize_4bit

    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype or torch.float32)
    plain.weight = nn.Parameter(weight.reshape(layer.out_features, layer.in_features), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return plain
