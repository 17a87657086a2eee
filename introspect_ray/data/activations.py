"""Activations of a target on texts, streamed by Ray Data.

    driver  texts -> object store (once per node) ;  caller: block numbers as rows
    actors  TargetReader x min..max: load target once; per block: tokens -> early-stopped pass -> rows of activations
    caller  parts in the order of the blocks, as fast as it takes them (Ray holds the actors back otherwise)

Blocks are what Ray tries again when an actor dies; the same block has the same rows, in the same order.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from torch import Tensor

from introspect_ray.config import ActorConfig, ModelConfig, StreamConfig
from introspect_ray.data.attempts import counted_loading
from introspect_ray.data.pool import RETRIES_PER_SHARD, run_context
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed
from introspect_ray.features.places import Place
from introspect_ray.features.reading import read_places
from introspect_ray.features.shuffling import Part, block_texts, pieces
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.tokens import adds_bos

BLOCKS_PER_PIPELINE = 1024
"""Blocks of one pipeline; the next one loads the target again. Ray plans all blocks of a pipeline at its start."""
LEAST_AHEAD_BYTES = 1 << 30
"""Below that, Ray Data would hold its own minimum for some blocks anyway."""
SAMPLED_TEXTS = 64
"""Texts whose lengths say how many blocks are needed."""
SPARE_BLOCKS = 1.1
"""Blocks of a pipeline for each that is expected to be needed: a second pipeline would load the target once more."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StreamPlan:
    """Which activations of which texts; ships to actors."""

    target: ModelConfig
    layer: int
    places: tuple[Place, ...]
    stream: StreamConfig
    num_texts: int
    seed: int | None
    """Of the order of the texts, which then never ends; none: their own, once."""

    @property
    def num_blocks(self) -> int | None:
        """None for a stream that never ends."""
        return None if self.seed is not None else -(-self.num_texts // self.stream.texts_per_block)


@dataclass(frozen=True)
class SharedTexts:
    """Texts in Ray's object store, and how many. Ships as their reference, so that whoever ships it has no copy."""

    reference: ray.ObjectRef
    count: int

    @classmethod
    def of(cls, texts: pa.ChunkedArray) -> SharedTexts:
        return cls(ray.put(texts), len(texts))

    def __len__(self) -> int:
        return self.count

    def read(self) -> pa.ChunkedArray:
        """The texts, as they lie in the store."""
        return ray.get(self.reference)


class TargetReader:
    """Holds a target; turns the number of a block into its rows."""

    def __init__(self, plan: StreamPlan, texts: SharedTexts, notes: Folder, run_id: str):
        self.plan = plan
        self.texts = texts.read()
        with counted_loading(notes, run_id, ray.get_runtime_context().get_actor_id() or ""):
            self.target = Target.load(plan.target)

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        (block,) = batch["block"]
        return block_rows(self.target, self.plan, self.texts, int(block))


def block_rows(target: Target, plan: StreamPlan, texts: pa.ChunkedArray, block: int) -> dict[str, np.ndarray]:
    """One row per token of the texts of a block, their first tokens left out: `block`, `row`, `lost`, and a column per
    place. Rows that are not finite in the stream's dtype are left out too; `lost`, in the first row, counts them."""
    bos = target.tokenizer.bos_token_id if adds_bos(target.tokenizer) else None
    longest = min(plan.stream.max_tokens, target.max_tokens or plan.stream.max_tokens)
    numbers = block_texts(block, plan.num_texts, plan.stream.texts_per_block, plan.seed)
    cut = [piece for number in numbers for piece in pieces(target.encode(texts[number].as_py()), longest, bos)]
    cut = [piece for piece in cut if len(piece) > 1]
    dtype = _DTYPES[plan.stream.dtype]
    if not cut:
        raise RunFailed(f"texts {numbers[0]} to {numbers[-1]} have no two tokens: give longer texts")
    found = [values.to(dtype).cpu() for values in read_places(target.model, cut, plan.layer, plan.places)]
    sound = torch.stack([values.isfinite().all(dim=-1) for values in found]).all(dim=0)
    count = int(sound.sum())
    if not count:
        raise RunFailed(
            f"the activations of {len(sound)} tokens at layer {plan.layer} are not finite in {plan.stream.dtype}"
        )
    lost = np.zeros(count, dtype=np.int64)
    lost[0] = len(sound) - count
    rows = {"block": np.full(count, block), "row": np.arange(count), "lost": lost}
    return rows | {place: _to_numpy(values[sound]) for place, values in zip(plan.places, found, strict=True)}


def _to_numpy(values: Tensor) -> np.ndarray:
    """numpy and Arrow know no bfloat16: its bits travel as integers."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def _to_torch(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    found = torch.from_numpy(np.array(values))  # a copy: Ray's memory may not be written to
    return found.view(dtype) if dtype == torch.bfloat16 else found


class ActivationStream:
    """The rows of a plan, from any place on."""

    def __init__(
        self,
        plan: StreamPlan,
        texts: SharedTexts,
        actors: ActorConfig,
        notes: Folder,
        num_rows: int | None = None,
        ahead_bytes: int = 0,
    ):
        """`notes` is where actors write down that they load, in case they die of it.

        Of an endless stream about `num_rows` rows are wanted, so that no pipeline is much longer. Ray may hold
        `ahead_bytes` of rows that are not yet read, or `LEAST_AHEAD_BYTES`.
        """
        assert len(texts) == plan.num_texts
        self._stride = BLOCKS_PER_PIPELINE if num_rows is None else _num_blocks(plan, texts.read(), num_rows)
        self._ahead_bytes = max(ahead_bytes, LEAST_AHEAD_BYTES)
        self.plan = plan
        self.actors = actors
        self.notes = notes
        self._texts = texts

    def parts(self, block: int = 0, first: int = 0) -> Iterator[Part]:
        """Parts from row `first` of `block` on, in order."""
        end = self.plan.num_blocks
        while end is None or block < end:
            stop = block + self._stride if end is None else min(end, block + self._stride)
            with closing(self._pipeline_parts(block, stop)) as parts:
                for part in parts:
                    skipped = max(0, first - part.first) if part.block == block else 0
                    if not skipped:
                        yield part
                    elif skipped < len(part):
                        yield Part(part.block, part.first + skipped, tuple(values[skipped:] for values in part.columns))
            block, first = stop, 0

    def _pipeline_parts(self, start: int, stop: int) -> Generator[Part]:
        dtype = _DTYPES[self.plan.stream.dtype]
        with run_context():
            with _every_block_in_order(self._ahead_bytes):
                pipeline = self._pipeline(start, stop)
            for batch in pipeline.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
                edges = np.flatnonzero(np.diff(batch["block"])) + 1
                for begin, end in zip([0, *edges], [*edges, len(batch["block"])], strict=True):
                    if end > begin:
                        columns = tuple(_to_torch(batch[place][begin:end], dtype) for place in self.plan.places)
                        lost = int(batch["lost"][begin:end].sum())
                        yield Part(int(batch["block"][begin]), int(batch["row"][begin]), columns, lost)

    def _pipeline(self, start: int, stop: int) -> ray.data.Dataset:
        actors = self.actors
        # Rows of the caller's, because tasks that read them would need a processor beside the actors'.
        rows = ray.data.from_items([{"block": block} for block in range(start, stop)], override_num_blocks=stop - start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in data/generate.py
            return rows.map_batches(
                TargetReader,
                fn_constructor_kwargs={
                    "plan": self.plan,
                    "texts": self._texts,
                    "notes": self.notes,
                    "run_id": uuid.uuid4().hex,
                },
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    min_size=actors.min_size, max_size=actors.max_size, initial_size=actors.initial_size
                ),
                num_cpus=actors.num_cpus,
                num_gpus=actors.num_gpus or None,
                max_restarts=-1,
                max_task_retries=RETRIES_PER_SHARD,
            )


def _num_blocks(plan: StreamPlan, texts: pa.ChunkedArray, num_rows: int) -> int:
    """About as many blocks as hold so many rows, by a sample of the texts, at most `BLOCKS_PER_PIPELINE`."""
    tokenizer = load_tokenizer(plan.target)
    sample = [texts[number].as_py() for number in range(0, len(texts), -(-len(texts) // SAMPLED_TEXTS))]
    per_text = sum(max(0, len(tokenizer(text).input_ids) - 1) for text in sample) / len(sample)
    blocks = SPARE_BLOCKS * num_rows / (max(per_text, 1.0) * plan.stream.texts_per_block)
    return min(BLOCKS_PER_PIPELINE, max(1, math.ceil(blocks)))


@contextmanager
def _every_block_in_order(ahead_bytes: int) -> Iterator[None]:
    """Settings of pipelines made inside: no block is left out for an error, none overtakes another, and actors wait
    once so many bytes wait for the reader."""
    context = ray.data.DataContext.get_current()
    options = context.execution_options
    before = context.max_errored_blocks, options.preserve_order, options.resource_limits
    context.max_errored_blocks, options.preserve_order = 0, True
    options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=ahead_bytes)
    try:
        yield
    finally:
        context.max_errored_blocks, options.preserve_order, options.resource_limits = before
