"""What a training run needs, before it runs: memory of one worker, arithmetic, time. No weights are read; no Ray here.

    config + model's config.json --skeleton (meta device)--> parameters by kind
                                 --footprint (traced)------> activations
    datasets, or assumed lengths --workload----------------> tokens of a step

With FSDP2, weights, gradients and optimizer state are spread over the workers. Embeddings, head and last norm are whole
on every worker for all of a step; of the decoder layers, the one at work and the one fetched ahead are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from introspect_ray.config import TrainConfig, resolved
from introspect_ray.errors import UserError
from introspect_ray.explainer.projections import resolve_kind
from introspect_ray.models.shapes import model_shape
from introspect_ray.models.structure import decoder_layers
from introspect_ray.training.batches import num_steps
from introspect_ray.training.footprint import Arithmetic, Batch, Footprint, Projecting, footprint, skeleton
from introspect_ray.training.hardware import GPUS
from introspect_ray.training.workload import Workload, find_workload, largest_batch

GIB = 2**30
NF4_BYTES = 0.5
NF4_SCALES_BYTES = 1 / 64 + 4 / (64 * 256)
"""Per weight: one byte per 64 weights, and one float32 per 256 of those bytes (double quantisation). Not sharded."""
ADAM_STATES = 2
SUM_BYTES = 4
"""Gradients are summed over workers in float32."""
LAYERS_GATHERED = 2
PROCESS_BYTES = 3 * GIB
"""Python with torch, CUDA and Ray, and buffers for the examples."""
MOST_WORKERS = 256


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


class Memory(NamedTuple):
    """Bytes on one worker."""

    weights: int
    adapters: int
    """Adapters and projections."""
    gradients: int
    optimizer: int
    gathered: int
    """Whole weights (and their gradients) that stand beside the shards, or weights cast to the compute dtype."""
    activations: int
    logits: int
    """At answer positions, beside the activations."""
    working: int
    """Beside the activations, while one layer works: its unsharded weights and gradients, or its dequantised weights."""
    message: int
    """Gradients packed into one message, when no activations are left."""
    inputs: int
    """Gradients of embeddings and projections, when no activations are left."""

    @property
    def peak(self) -> int:
        standing = self.weights + self.adapters + self.gradients + self.optimizer
        step = self.gathered + max(self.activations + max(self.logits, self.working), self.inputs)
        return standing + max(step, self.message)


class Pace(NamedTuple):
    """Work and time of a run."""

    tokens_per_step: float
    steps: int
    flop_per_step: float
    """Over all workers."""
    seconds_per_step: float | None
    """None where the workers have no GPU."""
    bound: str
    """What a step waits for most: arithmetic, memory or links."""


@dataclass(frozen=True)
class Plan:
    """A run's needs, and whether they can be met."""

    config: TrainConfig
    census: Census
    workload: Workload
    batch: Batch
    memory: Memory
    host_bytes: int
    """Of one worker while it loads."""
    pace: Pace

    @property
    def has_gpus(self) -> bool:
        return self.config.trainer.gpus_per_worker > 0

    @property
    def usable_bytes(self) -> float | None:
        """Of one GPU; None where the workers have none."""
        plan = self.config.plan
        return GPUS[plan.gpu].memory_gib * GIB * plan.usable_share if self.has_gpus else None

    @property
    def fits(self) -> bool:
        return self.usable_bytes is None or self.memory.peak <= self.usable_bytes

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.config.trainer.num_workers / self.config.plan.gpus_per_node)


def plan_run(config: TrainConfig, workload: Workload | None = None) -> Plan:
    """Work out the plan.

    Args:
        workload: the run's examples, where they are known already.

    Raises:
        UserError: the model has no shape that is known, or a dataset is damaged.
    """
    shape = model_shape(config.explainer.model)
    workload = workload or find_workload(config)
    is_linear = resolve_kind(config.explainer, workload.target_width, shape.hidden_size) == "linear"
    projecting = Projecting(
        workload.target_layers if is_linear else 0, workload.target_width, workload.layers_per_vector
    )
    arithmetic = _arithmetic(config, shape)
    census = _counted(type(shape), shape.to_json_string(), arithmetic)
    projection = projecting.num_layers * projecting.target_width * shape.hidden_size
    batch = largest_batch(workload, config)
    is_masked = batch.is_packed and arithmetic.attention == "sdpa"
    traced = footprint(shape, arithmetic, projecting, batch._replace(is_packed=is_masked))
    memory = _memory(config, shape, census, projection, traced)
    return Plan(
        config=config,
        census=census,
        workload=workload,
        batch=batch,
        memory=memory,
        host_bytes=_host_bytes(config, shape, census, memory),
        pace=_pace(config, shape, census, projection, workload, batch),
    )


def _dtype(config: TrainConfig, shape: PretrainedConfig) -> torch.dtype:
    """Of the weights that a worker holds."""
    if config.explainer.model.dtype == "auto":
        return getattr(shape, "dtype", None) or torch.float32
    return getattr(torch, config.explainer.model.dtype)


def _arithmetic(config: TrainConfig, shape: PretrainedConfig) -> Arithmetic:
    trainer, dtype = config.trainer, _dtype(config, shape)
    # Adapters of half-precision models are kept in float32; what they compute in is another matter.
    adapter_dtype = torch.float32
    if trainer.compute_dtype == "bfloat16":
        dtype = adapter_dtype = torch.bfloat16
    attention = config.explainer.model.attention
    return Arithmetic(
        dtype=dtype,
        # Flash kernels keep what sdpa's fused ones keep.
        attention="sdpa" if attention == "flash_attention_2" else attention,
        lora=None if config.method == "full" else config.lora,
        adapter_dtype=adapter_dtype,
        is_checkpointed=trainer.activation_checkpointing,
        has_fused_dropout=trainer.gpus_per_worker > 0,
    )


@lru_cache(maxsize=64)
def _counted(shape_class: type[PretrainedConfig], shape: str, arithmetic: Arithmetic) -> Census:
    """Parameters by kind, projections left out; the shape comes as JSON, so that equal models are counted once."""
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


def _memory(config: TrainConfig, shape: PretrainedConfig, census: Census, projection: int, traced: Footprint) -> Memory:
    trainer = config.trainer
    is_sharded, is_full = trainer.sharding == "fsdp2", config.method == "full"
    shards = trainer.num_workers if is_sharded else 1
    dtype = _dtype(config, shape)
    held = dtype.itemsize
    computed = _arithmetic(config, shape).dtype.itemsize
    beside = SUM_BYTES  # adapters and projections are float32
    quantised = census.linear if config.method == "qlora" else 0
    weights = ((census.base - quantised) * held + quantised * NF4_BYTES) / shards + quantised * NF4_SCALES_BYTES
    adapters = (census.adapter + projection) * beside / shards
    trained = census.base * held * is_full / shards + adapters
    gathered = working = message = 0.0
    if is_sharded:
        # Of the whole parts outside of the layers, gradients wait until the backward pass is through with them all.
        gathered = (census.rest * (1 + is_full) + 2 * (census.rest_adapter + projection)) * computed
        layer_quantised = census.layer_linear if quantised else 0
        layer = (census.layer - layer_quantised + census.layer_adapter) * computed + layer_quantised * NF4_BYTES
        layer_trained = census.layer * is_full + census.layer_adapter
        # Two layers' sums may be under way: the one just done and the one before.
        working = LAYERS_GATHERED * layer + layer_trained * (computed + 2 * SUM_BYTES)
        rest_trained = census.rest * is_full + census.rest_adapter + projection
        message = gathered + rest_trained * SUM_BYTES
    elif trainer.num_workers > 1:
        copies = census.base * is_full * SUM_BYTES * (held != SUM_BYTES)
        message = (census.base * is_full + census.adapter + projection) * SUM_BYTES + copies
    if not is_sharded and computed < held:
        gathered = (census.base - quantised) * computed
    if quantised:
        working += census.largest_linear * (computed + SUM_BYTES / 64)
    return Memory(
        weights=int(weights),
        adapters=int(adapters),
        gradients=int(trained),
        optimizer=int(ADAM_STATES * trained),
        gathered=int(gathered),
        activations=traced.kept,
        logits=traced.logits + int(working if is_sharded else 0),
        working=traced.working + int(working),
        message=int(message),
        inputs=traced.inputs,
    )


def _host_bytes(config: TrainConfig, shape: PretrainedConfig, census: Census, memory: Memory) -> int:
    held = _dtype(config, shape).itemsize
    if config.trainer.gpus_per_worker == 0:
        return PROCESS_BYTES + memory.peak
    if config.trainer.sharding == "fsdp2" or config.method == "qlora":
        # Tensor by tensor: one as it is on disk, and one in the dtype that it is held in.
        return PROCESS_BYTES + 2 * census.largest * held
    return PROCESS_BYTES + census.base * held


def _pace(
    config: TrainConfig, shape: PretrainedConfig, census: Census, projection: int, workload: Workload, batch: Batch
) -> Pace:
    trainer, optimization, plan = config.trainer, config.optimization, config.plan
    examples = optimization.batch_size
    tokens = examples * workload.mean_tokens
    steps = optimization.steps
    if optimization.epochs is not None:
        steps = num_steps(optimization.epochs, workload.num_examples, examples)
    flop = _flop_per_step(config, shape, census, projection, workload, batch)
    if trainer.gpus_per_worker == 0:
        return Pace(tokens, steps, flop, None, "arithmetic")
    gpu, workers = GPUS[plan.gpu], trainer.num_workers
    passes = max(1, math.ceil(tokens / workers / batch.tokens))
    times = {"arithmetic": flop / workers / (gpu.bf16_flops * plan.share_of_peak)}
    quantised = census.linear if config.method == "qlora" else 0
    computed = _arithmetic(config, shape).dtype.itemsize
    packed_bytes = (census.base - quantised) * computed + quantised * NF4_BYTES
    # Weights are read in the forward and the backward pass, dequantised ones written and read again.
    sweeps = 2 + trainer.activation_checkpointing
    times["memory"] = passes * sweeps * (packed_bytes + 2 * quantised * computed) / gpu.memory_bandwidth
    trained = census.base * (config.method == "full") + census.adapter + projection
    others = (workers - 1) / workers
    if trainer.sharding == "fsdp2":
        moved = passes * others * (2 * packed_bytes + trained * SUM_BYTES)
    else:
        moved = 2 * others * trained * SUM_BYTES
    link = gpu.link_bandwidth
    if workers > plan.gpus_per_node:
        link = min(link, plan.node_gbit_per_s * 1e9 / 8 / plan.gpus_per_node)
    times["links"] = moved / link
    bound = max(times, key=lambda name: times[name])
    return Pace(tokens, steps, flop, times[bound], bound)


def _flop_per_step(
    config: TrainConfig, shape: PretrainedConfig, census: Census, projection: int, workload: Workload, batch: Batch
) -> float:
    """Two per weight and token forward, two more for the input's gradient, two more for the weight's own.

    The head sees answer tokens alone; attention is counted over whole rows, as its kernels compute masked blocks.
    """
    is_full = config.method == "full"
    examples = config.optimization.batch_size
    tokens = examples * workload.mean_tokens
    again = 2 * config.trainer.activation_checkpointing
    weights = (4 + 2 * is_full + again) * (census.base - census.rest) + (6 + again) * census.adapter
    heads = shape.num_attention_heads
    width = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // heads)
    context = batch.tokens_per_row if batch.is_packed else workload.mean_tokens / 2
    attention = (12 + 2 * again) * context * width * shape.num_hidden_layers
    head = (4 + 2 * is_full) * census.head * examples * workload.mean_answer
    vectors = 6 * projection / max(workload.target_layers, 1) * examples * workload.has_vectors
    return tokens * (weights + attention) + head + vectors


def check_plan(plan: Plan) -> None:
    """Raise UserError for a plan that does not fit, in one line that says which settings would."""
    if plan.fits:
        return
    assert plan.usable_bytes is not None, "without a GPU every plan fits"
    needed, there = plan.memory.peak / GIB, plan.usable_bytes / GIB
    line = f"the plan does not fit: a worker needs {needed:.1f} GiB, of a {plan.config.plan.gpu} {there:.1f} are usable"
    for settings in remedies(plan):
        other = plan_run(changed(plan.config, settings), plan.workload)
        if other.fits:
            words = " and ".join(f"{name} {str(value).lower()}" for name, value in settings.items())
            raise UserError(f"{line}; it would fit with {words} ({other.memory.peak / GIB:.1f} GiB)")
    raise UserError(f"{line}, and no sharding, adapter or batch of up to {MOST_WORKERS} workers makes it fit")


def remedies(plan: Plan) -> Iterator[dict[str, Any]]:
    """Settings that need less memory, by their full names: first what keeps the result, then what trains less, then
    what needs more workers."""
    trainer = plan.config.trainer
    saving: list[dict[str, Any]] = [{}]
    if not trainer.activation_checkpointing:
        saving.append({"trainer.activation_checkpointing": True})
    tokens = trainer.micro_batch_tokens // 2
    while tokens >= max(plan.workload.longest, trainer.micro_batch_tokens // 16):
        saving.append(saving[-1] | {"trainer.micro_batch_tokens": tokens})
        tokens //= 2
    sharding: list[dict[str, Any]] = [{}]
    if trainer.sharding == "none":
        if trainer.num_workers > 1:
            sharding.append({"trainer.sharding": "fsdp2"})
        spread = {"trainer.sharding": "fsdp2"}
    else:
        spread = {}
    lighter = {"full": ("full", "lora", "qlora"), "lora": ("lora", "qlora"), "qlora": ("qlora",)}[plan.config.method]
    for method in lighter:
        other = {} if method == plan.config.method else {"method": method}
        for shards in sharding:
            for saved in saving:
                if other or shards or saved:
                    yield other | shards | saved
    workers = 2 * trainer.num_workers
    while workers <= MOST_WORKERS:
        for saved in saving:
            yield spread | {"trainer.num_workers": workers} | saved
        workers *= 2


def changed(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The config with other values under the full names given."""
    tree = resolved(config)
    for name, value in settings.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    return type(config).model_validate(tree)


def table(plan: Plan) -> str:
    """The plan for people."""
    config, memory, pace, census = plan.config, plan.memory, plan.pace, plan.census
    trainer = config.trainer
    gib = {name: getattr(memory, name) / GIB for name in Memory._fields}
    standing = {
        "weights": f"weights ({census.base / 1e9:.2f} B parameters)",
        "adapters": "adapters and projections",
        "gradients": "gradients",
        "optimizer": "optimizer state (AdamW)",
    }
    step = {
        "gathered": "whole weights outside the layers" if trainer.sharding == "fsdp2" else "weights in compute dtype",
        "activations": "activations kept" + (" (layer inputs)" if trainer.activation_checkpointing else ""),
        "logits": f"with them: logits at {plan.batch.num_answer_tokens} answer positions",
        "working": "  or: one layer at work",
        "inputs": "later: gradients of embeddings",
        "message": "later, alone: summing gradients",
    }

    def rows(names: Mapping[str, str]) -> list[str]:
        return [f"  {text:<44}{gib[name]:>9.2f}" for name, text in names.items() if gib[name] >= 0.005]

    lines = [
        f"plan: {config.explainer.model.path}, {config.method}, sharding {trainer.sharding}, {device}"
        + (f" on {plan.num_nodes} nodes" if plan.num_nodes > 1 else ""),
        "memory of one worker between steps, GiB:",
        *rows(standing),
        "in a step beside it:",
        *rows(step),
        f"{'peak':<46}{memory.peak / GIB:>9.2f}{_limit(plan)}",
        f"host memory per worker: {plan.host_bytes / GIB:.1f} GiB while loading",
        f"examples: {plan.workload.num_examples:,}, {plan.workload.source}",
        f"  mean {plan.workload.mean_tokens:.0f} tokens ({plan.workload.mean_answer:.0f} of the answer), "
        f"longest {plan.workload.longest}; largest micro-batch {plan.batch.rows} x {plan.batch.tokens_per_row}",
        f"steps: {pace.steps:,} of {config.optimization.batch_size} examples, {pace.tokens_per_step:,.0f} tokens and "
        f"{pace.flop_per_step / 1e12:,.1f} TFLOP",
    ]
    if pace.seconds_per_step is not None:
        total = pace.seconds_per_step * pace.steps
        lines.append(
            f"time: {_duration(total)} at {pace.seconds_per_step:.2f} s per step "
            f"({pace.tokens_per_step / pace.seconds_per_step:,.0f} tokens/s, bound by {pace.bound}; "
            f"{config.plan.share_of_peak:.0%} of peak assumed, loading and checkpoints not counted)"
        )
    return "\n".join(lines)


def _limit(plan: Plan) -> str:
    if plan.usable_bytes is None:
        return ""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    gpu = GPUS[plan.config.plan.gpu]
    return f"  of {plan.usable_bytes / GIB:.1f} usable ({plan.config.plan.usable_share:.0%} of {gpu.memory_gib}): {verdict}"


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
