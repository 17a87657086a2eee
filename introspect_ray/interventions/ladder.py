"""Patched runs that compute only what an intervention can change, on stock Hugging Face models.

An intervention whose block starts at layer l and whose first position is t changes nothing at or below layer l's
input, and nothing before t. So a row is the suffix t..T of its prompt, enters the stack after its own layer l, and
attends to the clean run's keys and values of the positions before t. Rows run in packs, see packing.py. Of the last
layer only the last token of each row is read, so its feed-forward part, most of a layer's work, runs over those alone.

N tokens of a pack, n of them in the stack, C clean prefix tokens, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from introspect_ray.interventions.clean import attention_window
from introspect_ray.interventions.forward import in_order, selected_logits
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.packing import Pack, Row, packs
from introspect_ray.interventions.types import CleanRun, Intervention
from introspect_ray.models.structure import (
    block_output,
    decoder_layers,
    layers_owner,
    num_layers,
    with_block_output,
)

TOKENS_PER_PACK_CPU = 384
TOKENS_PER_PACK_GPU = 2048
"""Suffix tokens per pack (and, apart, clean prefix tokens): large enough that Python and kernel launches do not
dominate, small enough that attention between rows, computed and masked away, stays a small share of the work."""


class PrefixLayer(DynamicLayer):
    """Clean keys and values of one layer, which the pack's own are appended to on every read and never kept."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        super().__init__()
        self.prefix_keys, self.prefix_values = keys, values
        self.dtype, self.device, self.is_initialized = keys[0].dtype, keys[0].device, True
        self.keys, self.values = keys[0], values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, C + n, head width] for the n tokens that are in the stack."""
        return torch.cat([*self.prefix_keys, key_states], dim=-2), torch.cat(
            [*self.prefix_values, value_states], dim=-2
        )


class Rung(nn.Module):
    """Stands for a decoder layer: runs it over the rows in the stack, lets new rows join, applies the interventions."""

    def __init__(self, layer: nn.Module, index: int, pack: Pack, output_size: int | None):
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not registered: the layer stays owned by its model
        self.index, self.pack, self.output_size = index, pack, output_size
        self.num_prefix = sum(pack.prefix_lengths)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        entering = self.pack.num_entering[self.index]
        output: Any = None if self.output_size is None else (None,) * self.output_size
        parts = [part[None] for part in self.pack.joining(self.index)]
        if entering:
            assert hidden.shape[1] == entering, "a layer below changed the number of tokens"
            output = self.layer(hidden, *self._cut(args, entering), **self._cut(kwargs, entering))
            parts.insert(0, block_output(output))
        if not parts:
            return with_block_output(output, hidden)
        # Clean residuals lie on the model's first device; of a model on several, this layer may be on another.
        parts = [part.to(parts[0].device) for part in parts]
        result = parts[0] if entering and len(parts) == 1 else torch.cat(parts, dim=1)
        self.pack.edits.apply(self.index, result[0])
        return with_block_output(output, result)

    def _cut(self, value: Any, entering: int) -> Any:
        """Tensors that hold something per token of the whole pack, cut to the tokens in the stack: found by shape."""
        total = self.pack.num_tokens
        if entering == total:
            return value
        if isinstance(value, Tensor):
            if value.ndim == 4 and value.shape[-2] == total:
                return value[:, :, :entering, : self.num_prefix + entering]
            if value.ndim in (2, 3) and value.shape[1] == total:
                return value[:, :entering]
            return value
        if isinstance(value, tuple):
            return tuple(self._cut(item, entering) for item in value)
        if isinstance(value, dict):
            return {key: self._cut(item, entering) for key, item in value.items()}
        return value


class Ladder:
    """Patched runs of one model. Not for use from several threads: the model's layers are swapped during a call."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.window = attention_window(model)
        """Longest prompt, in tokens, for which the ladder is right; `None` for any."""
        self._owner, self._name = layers_owner(model)
        self._num_layers = num_layers(model)
        self._output_size = _output_size(model)
        self._last_mlp = _feed_forward(decoder_layers(model)[-1])
        most = TOKENS_PER_PACK_CPU if model.device.type == "cpu" else TOKENS_PER_PACK_GPU
        self._budget = TokenBudget(most, model.device)

    @torch.no_grad()
    def logits(self, runs: Sequence[CleanRun], interventions: Sequence[Intervention]) -> Float[Tensor, "R V"]:
        """Last-position logits of R rows; row r is the prompt of `runs[r]` under `interventions[r]`.

        The runs must hold keys and values, and be no longer than the window.
        """
        rows = [Row(run, intervention) for run, intervention in zip(runs, interventions, strict=True)]

        def run_pack(indices: Sequence[int]) -> Tensor:
            return self._pack_logits(Pack([rows[index] for index in indices], self._num_layers))

        def num_tokens(indices: Sequence[int]) -> int:
            return sum(rows[index].num_tokens for index in indices)

        return in_order(self._budget.run(packs(rows, self._budget), num_tokens, run_pack))

    def _pack_logits(self, pack: Pack) -> Float[Tensor, "R V"]:
        positions, ends = pack.positions(), pack.ends()
        # The values of the embeddings are never read: the first rows take the place of a layer's output.
        embeddings = pack.like.new_zeros(1, 1, pack.like.shape[-1]).expand(1, pack.num_tokens, -1)
        with self._swapped_layers(pack), _only_at(self._last_mlp, pack.ends_entering_last()):
            return selected_logits(
                self.model,
                torch.zeros_like(ends),
                ends,
                inputs_embeds=embeddings,
                attention_mask=pack.mask(positions),
                position_ids=positions[None],
                past_key_values=Cache(layers=_prefix_layers(pack)),
                use_cache=True,
            )

    @contextmanager
    def _swapped_layers(self, pack: Pack) -> Iterator[None]:
        """A rung in place of every decoder layer; the model's own layers are back afterwards, come what may."""
        stack = getattr(self._owner, self._name)
        rungs = [Rung(layer, index, pack, self._output_size) for index, layer in enumerate(stack)]
        setattr(self._owner, self._name, nn.ModuleList(rungs))
        try:
            yield
        finally:
            setattr(self._owner, self._name, stack)


@torch.no_grad()
def _output_size(model: PreTrainedModel) -> int | None:
    """Length of the tuple that a decoder layer returns, which a skipped one must imitate; `None` for a bare tensor."""
    sizes: list[int | None] = []
    hook = decoder_layers(model)[0].register_forward_hook(
        lambda _module, _inputs, output: sizes.append(len(output) if isinstance(output, tuple) else None)
    )
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    finally:
        hook.remove()
    return sizes[0]


def _feed_forward(layer: nn.Module) -> nn.Module | None:
    """The part of a decoder layer that treats every token alone, by its usual name; `None` if none is so named."""
    found = getattr(layer, "mlp", None)
    return found if isinstance(found, nn.Module) else None


@contextmanager
def _only_at(module: nn.Module | None, tokens: Int[Tensor, " M"]) -> Iterator[None]:
    """The module sees only M tokens of its input [1, n, D]; what it would have said about the others is zero."""
    if module is None:
        yield
        return
    given: list[Tensor] = []

    def narrow(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(arguments[0])
        return (arguments[0][:, tokens.to(arguments[0].device)], *arguments[1:])

    def widen(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        said = block_output(output)
        whole = said.new_zeros(*given.pop().shape[:-1], said.shape[-1])
        whole[:, tokens.to(said.device)] = said
        return with_block_output(output, whole)

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(narrow).remove)
        hooks.callback(module.register_forward_hook(widen).remove)
        yield


def _prefix_layers(pack: Pack) -> list[CacheLayerMixin | Any]:
    """Per decoder layer, the clean keys and values of every prompt up to the last position at which a row starts."""
    caches = [run.cache for run in pack.runs if run.cache is not None]
    assert len(caches) == len(pack.runs), "the ladder needs runs with keys and values"
    ends = list(zip(caches, pack.prefix_lengths, strict=True))
    return [
        PrefixLayer(
            [cache[layer][0][:, :, :end] for cache, end in ends],
            [cache[layer][1][:, :, :end] for cache, end in ends],
        )
        for layer in range(len(pack.num_entering))
    ]
