"""A coder's training run before anything starts: checks, identity, and what is there of it. No Ray here.

Output folder:  config.json (first)  metrics.jsonl  checkpoint.safetensors  work/ (while it trains)
                cfg.json  sae_weights.safetensors  training.json (last)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from introspect_ray.config import ActorConfig, CoderTrainerConfig, TrainCoderConfig, TrainSaeConfig, resolved
from introspect_ray.data.claim import Claim
from introspect_ray.data.identity import identify_target
from introspect_ray.data.storage import Folder
from introspect_ray.data.texts import Texts, read_texts
from introspect_ray.errors import UserError
from introspect_ray.features.batch_topk import BatchTopKConfig
from introspect_ray.features.places import Place
from introspect_ray.models.paths import absolute, with_absolute_path
from introspect_ray.tasks.base import stable_id

REPORT_FILE = "training.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
_TEXTS_PER_CHUNK = 1 << 14


@dataclass(frozen=True)
class CoderRun:
    """A run that passed every check. Ships to the trainer."""

    config: TrainCoderConfig
    run_key: str
    """Equal for equal texts, target and every setting that can change the result."""
    width: int
    """Of the target."""

    @property
    def window_bytes(self) -> int:
        """Memory of the rows that are shuffled together."""
        config = self.config
        entries = config.stream.buffer_batches * config.batch_size * self.width * len(self.places)
        return entries * (4 if config.stream.dtype == "float32" else 2)

    @property
    def folder(self) -> Folder:
        return Folder(self.config.output)

    @property
    def work(self) -> Folder:
        """Notes of actors, there only while the run goes on."""
        return Folder(f"{self.config.output.rstrip('/')}/work")

    @property
    def kind(self) -> str:
        return "sae" if isinstance(self.config, TrainSaeConfig) else "transcoder"

    @property
    def places(self) -> tuple[Place, ...]:
        """What is read, and what is written where that is something else."""
        return (self.config.place,) if isinstance(self.config, TrainSaeConfig) else ("mlp_input", "mlp_added")

    @property
    def training(self) -> BatchTopKConfig:
        config = self.config
        return BatchTopKConfig(
            num_latents=config.num_latents,
            num_active=config.num_active,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            dead_after=config.dead_after,
            seed=config.seed,
        )

    def report(self) -> dict[str, Any] | None:
        """What came of the run, None if it is not complete."""
        try:
            return json.loads(self.folder.read(REPORT_FILE))
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class Prepared:
    """A run, its claim to the output folder, and its texts."""

    run: CoderRun
    claim: Claim[TrainCoderConfig]
    texts: Texts

    def read(self, held_out: bool) -> pa.ChunkedArray:
        """The texts to measure on or those to train on, read from the source, once in memory."""
        every, source = self.run.config.hold_out_every, enumerate(self.texts)
        chosen = (text for number, (_, text) in source if (number % every == 0) == held_out)
        chunks: list[pa.Array] = []
        while batch := list(islice(chosen, _TEXTS_PER_CHUNK)):
            chunks.append(pa.array(batch, pa.large_string()))
        return pa.chunked_array(chunks, pa.large_string())


def prepare(config: TrainCoderConfig) -> Prepared:
    """Check a run from end to end. Raises UserError; reads no weights and writes nothing."""
    config = _absolute(config)
    target = identify_target(config.target)
    if config.layer >= target.num_layers:
        raise UserError(
            f"layer is {config.layer}, but {target.path} has {target.num_layers} layers:"
            f" expected 0 to {target.num_layers - 1}"
        )
    texts = read_texts(config.source)
    if texts.num_used < 2:
        raise UserError(f"source {config.source.path} gives {texts.num_used} text, expected 2 or more: one is held out")
    inputs = {
        f"target {target.path}": stable_id(target.model_dump()),
        f"source {config.source.path}": texts.digest,
    }
    key = stable_id(type(config).__name__, _relevant(config), list(inputs.values()))
    run = CoderRun(config, key, target.width)
    claim = Claim(run.folder, "training of this kind of coder", config, run.run_key, inputs, _relevant)
    claim.check()
    return Prepared(run, claim, texts)


def _absolute(config: TrainCoderConfig) -> TrainCoderConfig:
    return config.model_copy(update={"output": absolute(config.output), "target": with_absolute_path(config.target)})


def _relevant(config: TrainCoderConfig) -> dict[str, Any]:
    """The config without what cannot change the result; texts and target are known by their contents."""
    model = config.target.model_copy(update={"path": "", "device": "auto"})
    reset: dict[str, Any] = {"output": "", "actors": ActorConfig(), "trainer": CoderTrainerConfig(), "target": model}
    tree = resolved(config.model_copy(update=reset))
    return {name: value for name, value in tree.items() if name != "source"}
