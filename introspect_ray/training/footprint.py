"""Bytes that one micro-batch needs beside weights, gradients and optimizer state: the real forward and backward pass
run on tensors that have shapes and no storage.

A model of 2 and one of 3 decoder layers are traced; every further layer adds what the third one added. That is exact
where all layers are alike, because gradients are in place before a step and only what is kept for the backward pass
grows with depth.

Legend: B rows, T tokens per row, P answer positions, N vectors.
"""

from __future__ import annotations

import copy
import json
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from introspect_ray.config import LoraConfig
from introspect_ray.explainer.files import with_adapter
from introspect_ray.explainer.forward import logits_at
from introspect_ray.explainer.projections import Projections
from introspect_ray.models.structure import decoder_layers

TRACED_LAYERS = (2, 3)
UNMASKED = "introspect_ray_unmasked"
"""Attention of transformers without a mask. It has none for rows of one example, but on tensors without values, where
it cannot see that no row holds several, it makes one."""


def _unmasked(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **settings: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, mask, **settings)


AttentionInterface.register(UNMASKED, _unmasked)


class Batch(NamedTuple):
    """One micro-batch's shape."""

    rows: int
    tokens_per_row: int
    num_answer_tokens: int
    num_vectors: int
    is_masked: bool
    """Whether attention takes a mask beyond the causal one: where rows hold several examples, or windows are short."""

    @property
    def tokens(self) -> int:
        """Tokens of the forward pass, padding included."""
        return self.rows * self.tokens_per_row


class Arithmetic(NamedTuple):
    """How the model computes."""

    dtype: torch.dtype
    """Of weights and residual stream in the forward pass."""
    attention: str
    lora: LoraConfig | None
    """None trains every weight."""
    adapter_dtype: torch.dtype
    is_checkpointed: bool
    """Whether each decoder layer is computed again in the backward pass."""
    is_autocast: bool
    """Whether operations cast to bfloat16 what they compute with, weights included."""
    has_fused_dropout: bool
    """GPUs keep one byte per element that dropout decided on, CPUs a number."""
    is_quantized: bool
    """Whether linear layers inside decoder layers hold 4-bit weights."""


class Projecting(NamedTuple):
    """The projections of a run, by their shape; `num_layers` 0 where vectors enter as they are."""

    num_layers: int
    target_width: int
    layers_per_vector: int
    """Layers whose maps are averaged for one vector."""

    def num_weights(self, width: int) -> int:
        """Parameters of all maps into an explainer of this width."""
        return self.num_layers * self.target_width * width


class Footprint(NamedTuple):
    """Bytes of one micro-batch."""

    kept: int
    """For the backward pass, when the last layer is done."""
    logits: int
    """On top of `kept`, at the language-model head and the loss."""
    working: int
    """On top of `kept`, where one layer's backward pass needs most; what it computes again is included."""
    inputs: int
    """Alone, at the end, where embeddings and projections get their gradients."""

    @property
    def peak(self) -> int:
        return max(self.kept + max(self.logits, self.working), self.inputs)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside the context made and that are still alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = 0

    def restart(self) -> int:
        """The peak so far; a new one begins at what is alive."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size


def footprint(shape: PretrainedConfig, arithmetic: Arithmetic, projecting: Projecting, batch: Batch) -> Footprint:
    """Bytes of one micro-batch's forward and backward pass through a model of this shape."""
    less, more = (
        _traced(cast(Any, type(shape)), shape.to_json_string(), arithmetic, projecting, batch, count)
        for count in TRACED_LAYERS
    )
    each = more.kept - less.kept
    return more._replace(kept=more.kept + (shape.num_hidden_layers - TRACED_LAYERS[1]) * each)


@lru_cache(maxsize=256)
def _traced(
    shape_class: type[PretrainedConfig],
    shape: str,
    arithmetic: Arithmetic,
    projecting: Projecting,
    batch: Batch,
    num_layers: int,
) -> Footprint:
    """One trace at `num_layers`; the shape comes as JSON, so that equal traces are done once."""
    config = cut_to(shape_class.from_dict(json.loads(shape)), num_layers)
    is_plain = arithmetic.attention == "sdpa" and not batch.is_masked
    model, causal = skeleton(config, arithmetic._replace(attention=UNMASKED) if is_plain else arithmetic)
    if arithmetic.has_fused_dropout:
        _fuse_dropout(model)
    if arithmetic.is_quantized and arithmetic.is_autocast:
        _answer_in_kind(causal)
    if arithmetic.is_checkpointed:
        for layer in decoder_layers(causal):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    with FakeTensorMode():
        _imagine(model, arithmetic.adapter_dtype)
        return _trace(model.train(), causal, arithmetic.is_autocast, projecting, batch)


def skeleton(shape: PretrainedConfig, arithmetic: Arithmetic) -> tuple[nn.Module, Any]:
    """The model on the meta device as a run would build it, adapters included, and the causal model inside it."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about how PEFT calls transformers
        causal: Any = AutoModelForCausalLM.from_config(
            shape, dtype=arithmetic.dtype, attn_implementation=arithmetic.attention
        )
        if arithmetic.lora is None:
            return causal, causal
        return with_adapter(causal, arithmetic.lora, seed=0), causal


def _imagine(model: nn.Module, adapter_dtype: torch.dtype) -> None:
    """Replace what is on the meta device by tensors that, in a fake tensor mode, look as if they were on the CPU."""
    made: dict[Tensor, Any] = {}
    has_adapter = not all(parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in made:
                # Whatever trains beside a frozen model is an adapter's.
                dtype = adapter_dtype if old.requires_grad and has_adapter else old.dtype
                made[old] = nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=old.requires_grad)
            setattr(module, name, made[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def cut_to(shape: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same shape with so many decoder layers."""
    shape = copy.deepcopy(shape)
    kinds = getattr(shape, "layer_types", None)
    if kinds:
        shape.layer_types = [kinds[index % len(kinds)] for index in range(num_layers)]
    shape.num_hidden_layers = num_layers
    return shape


def _trace(model: nn.Module, causal: Any, is_autocast: bool, projecting: Projecting, batch: Batch) -> Footprint:
    """`Explainer.loss` and its backward pass, with the bytes that were alive at each stage."""
    embeddings = causal.get_input_embeddings()
    width = embeddings.weight.shape[1]
    projections = Projections(
        "linear" if projecting.num_layers else "none", projecting.num_layers, projecting.target_width, width
    )
    parameters = [*model.parameters(), *projections.parameters()]
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    stages: dict[str, int] = {}
    with LiveBytes([*parameters, *model.buffers()]) as alive:

        def at_head(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stages.update(kept=alive.live, forward=alive.restart())
            args[0].register_hook(lambda _: stages.update(logits=alive.restart()))

        def at_inputs(_gradient: Tensor) -> None:
            stages.update(working=alive.restart())

        handle = causal.get_output_embeddings().register_forward_pre_hook(at_head)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            loss = _loss(model, causal, projections, projecting, batch, at_inputs)
        handle.remove()
        loss.backward()
        stages["inputs" if "working" in stages else "working"] = alive.peak
    kept = stages["kept"]
    return Footprint(
        kept=kept,
        logits=stages["logits"] - kept,
        working=max(stages["working"], stages["forward"]) - kept,
        inputs=stages.get("inputs", 0),
    )


def _loss(
    model: nn.Module,
    causal: Any,
    projections: Projections,
    projecting: Projecting,
    batch: Batch,
    at_inputs: Callable[[Tensor], None],
) -> Tensor:
    """`Explainer.loss` of any batch of this shape; `at_inputs` is called with the gradient of the embeddings."""
    ids = torch.zeros(batch.rows, batch.tokens_per_row, dtype=torch.long)
    embeds = causal.get_input_embeddings()(ids)
    if batch.num_vectors:
        place = torch.zeros(batch.num_vectors, dtype=torch.long)
        vectors = torch.zeros(batch.num_vectors, projecting.target_width)
        layers = [tuple(range(projecting.layers_per_vector))] * batch.num_vectors
        embeds = embeds.index_put((place, place), projections(vectors, layers).to(embeds.dtype))
    if embeds.requires_grad:
        embeds.register_hook(at_inputs)
    mask = None
    if batch.is_masked:
        mask = torch.ones(batch.rows, 1, batch.tokens_per_row, batch.tokens_per_row, dtype=torch.bool)
    positions = torch.zeros(batch.num_answer_tokens, dtype=torch.long)
    places = torch.arange(batch.tokens_per_row).expand_as(ids)
    logits = logits_at(model, causal, positions, inputs_embeds=embeds, attention_mask=mask, position_ids=places)
    loss = nn.functional.cross_entropy(logits.float(), positions, reduction="sum")
    return loss / max(batch.num_answer_tokens, 1)


class _Dropped(torch.autograd.Function):
    """Dropout that keeps a mask of one byte per element, as the kernels of GPUs do."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(values, dtype=torch.bool))
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient).copy_(ctx.saved_tensors[0])


class _FusedDropout(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return _Dropped.apply(values)


def _answer_in_kind(causal: nn.Module) -> None:
    """Linear layers in 4 bits give back the dtype that they were given, whatever autocast computes in."""
    for layer in decoder_layers(causal):
        for module in layer.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.register_forward_hook(lambda _module, inputs, output: output.to(inputs[0].dtype))


def _fuse_dropout(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(module, name, _FusedDropout())
