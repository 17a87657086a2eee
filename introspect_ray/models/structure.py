"""Where the decoder layers of a model are, found by shape and not by the model's name.

L decoder layers, D model width, T tokens, B batch rows.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig

from introspect_ray.errors import UserError


def text_config(model: nn.Module) -> PretrainedConfig:
    """The config of the language model, which for models of several parts is a section of the whole."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def num_layers(model: nn.Module) -> int:
    """L: decoder layers of the language model."""
    return text_config(model).num_hidden_layers


def model_width(model: nn.Module) -> int:
    """D: width of the residual stream."""
    return text_config(model).hidden_size


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The L decoder layers, in order."""
    owner, name = layers_owner(model)
    return getattr(owner, name)


def layers_owner(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers, and the attribute's name, so that they can be swapped.

    They are the one outermost ModuleList of L modules that have parts of their own (a list of plain Linear layers or
    norms is none). Raises `UserError` if there is no such list or more than one.
    """
    count = num_layers(model)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(_has_parts(part) for part in module)
    ]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise UserError(
            f"the decoder layers of {type(model).__name__} cannot be told: expected one list of {count} blocks, "
            f"found {', '.join(outermost) or 'none'}"
        )
    owner, _, name = outermost[0].rpartition(".")
    return model.get_submodule(owner), name


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def block_output(output: Any) -> Float[Tensor, "B T D"]:
    """The residual stream in what a decoder layer returned: a tensor since transformers 5, a tuple before."""
    return output[0] if isinstance(output, tuple) else output


def with_block_output(output: Any, hidden: Float[Tensor, "B T D"]) -> Any:
    """What the decoder layer returned, its residual stream replaced by `hidden`."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def max_positions(model: nn.Module) -> int | None:
    """Positions that the model was made for; None if its config sets no bound."""
    return getattr(text_config(model), "max_position_embeddings", None)


def layer_blocks(num_layers: int, num_blocks: int) -> list[tuple[int, ...]]:
    """`num_blocks` blocks of consecutive layers that cover all layers; sizes differ by at most one, larger ones first.

    P1 section 2.3 uses four equal blocks. Raises `UserError` if there are more blocks than layers.
    """
    if not 1 <= num_blocks <= num_layers:
        raise UserError(f"{num_blocks} blocks of layers asked for, but the model has {num_layers} layers")
    size, larger = divmod(num_layers, num_blocks)
    blocks, start = [], 0
    for index in range(num_blocks):
        stop = start + size + (index < larger)
        blocks.append(tuple(range(start, stop)))
        start = stop
    return blocks
