"""Bytes and time that a run needs, from its parameters, its largest micro-batch and data sheets.

With FSDP2, weights, gradients and optimizer state are spread over the workers, those of projections excepted. In a
step, embeddings, head and last norm are whole on every worker, and of the decoder layers the one at work and the next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from transformers import PretrainedConfig

from introspect_ray.config import TrainConfig
from introspect_ray.training.batches import num_steps
from introspect_ray.training.census import Census, arithmetic_of, held_dtype
from introspect_ray.training.footprint import Batch, Footprint
from introspect_ray.training.hardware import GPUS
from introspect_ray.training.workload import Workload

GIB = 2**30
NF4_BYTES = 0.5
NF4_SCALES_BYTES = 1 / 64 + 4 / (64 * 256)
"""Per weight: one byte per 64 weights, and one float32 per 256 of those bytes (double quantisation). Not sharded."""
ADAM_STATES = 2
SUM_BYTES = 4
"""Gradients are summed over workers in float32."""
ADAPTER_BYTES = 4
"""Adapters and projections are float32; projections are whole on every worker."""
LAYERS_GATHERED = 2
PROCESS_BYTES = 3 * GIB
"""Python with torch, CUDA and Ray, and buffers for the examples."""


class Memory(NamedTuple):
    """Bytes on one worker."""

    weights: int
    adapters: int
    """Adapters and projections."""
    gradients: int
    optimizer: int
    gathered: int
    """Whole weights outside of the layers, and their gradients, that stand beside the shards."""
    activations: int
    logits: int
    """At answer positions, beside the activations."""
    working: int
    """Beside the activations, while one layer works: what it computes again, its whole weights and gradients."""
    message: int
    """Gradients packed into one message, when no activations are left."""
    inputs: int
    """Gradients of embeddings and projections, when no activations are left."""
    evaluation: int
    """Between steps: keys, values and one layer at work for the answers that are written at once."""

    @property
    def peak(self) -> int:
        standing = self.weights + self.adapters + self.gradients + self.optimizer
        step = self.gathered + max(self.activations + max(self.logits, self.working), self.inputs)
        return standing + max(step, self.message, self.evaluation)


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


def memory_of(
    config: TrainConfig,
    shape: PretrainedConfig,
    census: Census,
    projection: int,
    traced: Footprint,
    workload: Workload,
) -> Memory:
    """Bytes on one worker. `projection` is the number of the projections' parameters."""
    trainer = config.trainer
    is_sharded, is_full = trainer.sharding == "fsdp2", config.method == "full"
    shards = trainer.num_workers if is_sharded else 1
    dtype = held_dtype(config, shape)
    held = dtype.itemsize
    arithmetic = arithmetic_of(config, shape)
    computed, computed_adapter = arithmetic.dtype.itemsize, arithmetic.adapter_dtype.itemsize
    quantised = census.linear if config.method == "qlora" else 0
    weights = ((census.base - quantised) * held + quantised * NF4_BYTES) / shards + quantised * NF4_SCALES_BYTES
    beside = (census.adapter / shards + projection) * ADAPTER_BYTES
    trained = census.base * held * is_full / shards + beside
    gathered = working = message = 0.0
    if is_sharded:
        # Of the parts outside of the layers, gradients wait until the backward pass is through with them all.
        gathered = census.rest * computed * (1 + is_full) + census.rest_adapter * computed_adapter * 2
        layer_quantised = census.layer_linear if quantised else 0
        layer = (
            (census.layer - layer_quantised) * computed
            + layer_quantised * NF4_BYTES
            + census.layer_adapter * computed_adapter
        )
        gradients = census.layer * is_full * computed + census.layer_adapter * computed_adapter
        # Two layers' sums may be under way: the one just done and the one before.
        sums = 2 * SUM_BYTES * (census.layer * is_full + census.layer_adapter)
        working = LAYERS_GATHERED * layer + gradients + sums
        rest_sum = gathered + SUM_BYTES * (census.rest * is_full + census.rest_adapter)
        message = max(rest_sum, projection * SUM_BYTES)
    elif trainer.num_workers > 1:
        copies = census.base * is_full * SUM_BYTES * (held != SUM_BYTES)
        message = (census.base * is_full + census.adapter + projection) * SUM_BYTES + copies
    if quantised:
        working += census.largest_linear * (computed + SUM_BYTES / 64)
    answers = _answers(config, shape, workload, computed)
    return Memory(
        weights=int(weights),
        adapters=int(beside),
        gradients=int(trained),
        optimizer=int(ADAM_STATES * trained),
        gathered=int(gathered),
        activations=traced.kept,
        logits=traced.logits + int(working if is_sharded else 0),
        working=traced.working + int(working),
        message=int(message),
        inputs=traced.inputs,
        evaluation=answers and answers + int(gathered + working) + traced.working,
    )


def _answers(config: TrainConfig, shape: PretrainedConfig, workload: Workload, itemsize: int) -> int:
    """Bytes of the keys and values, masks and last logits of the answers that an evaluation writes at once; 0 without
    evaluations. Lengths are those of the training examples."""
    if not config.evaluation.every:
        return 0
    tokens = max(length.tokens - length.answer for length in workload.lengths) + config.explainer.max_new_tokens
    share = math.ceil(config.evaluation.max_examples / config.trainer.num_workers)
    rows = min(share, max(1, config.trainer.micro_batch_tokens // tokens))
    heads = shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    # Keys and values of one layer are there twice while a token is added to them.
    cache = 2 * (getattr(shape, "num_key_value_heads", None) or heads) * width * (shape.num_hidden_layers + 1)
    return rows * (tokens * (cache * itemsize + tokens) + shape.vocab_size * (itemsize + SUM_BYTES))


def host_bytes(config: TrainConfig, shape: PretrainedConfig, census: Census, memory: Memory) -> int:
    """Host memory of one worker while it loads, or while it writes a checkpoint, whichever is more."""
    held = held_dtype(config, shape).itemsize
    checkpoint = memory.gradients + memory.optimizer  # copies of all that is trained, and of AdamW's moments
    if config.trainer.gpus_per_worker == 0:
        return PROCESS_BYTES + memory.peak + checkpoint
    if config.trainer.sharding == "fsdp2" or config.method == "qlora":
        # Tensor by tensor: one as it is on disk, and one in the dtype that it is held in.
        return PROCESS_BYTES + max(2 * census.largest * held, checkpoint)
    return PROCESS_BYTES + max(census.base * held, checkpoint)


def pace_of(
    config: TrainConfig, shape: PretrainedConfig, census: Census, projection: int, workload: Workload, batch: Batch
) -> Pace:
    """Steps, arithmetic and time; without a GPU there is no time."""
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
    computed = arithmetic_of(config, shape).dtype.itemsize
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
    context = batch.tokens_per_row if batch.is_masked else workload.mean_tokens / 2
    attention = (12 + 2 * again) * context * width * shape.num_hidden_layers
    head = (4 + 2 * is_full) * census.head * examples * workload.mean_answer
    vectors = 6 * projection / max(workload.target_layers, 1) * examples * workload.has_vectors
    return tokens * (weights + attention) + head + vectors
