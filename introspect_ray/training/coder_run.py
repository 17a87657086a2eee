"""A coder's training run before anything starts: checks, identity, and what is there of it. No Ray here.

Output folder:  run.json (first)  metrics.jsonl  checkpoint.safetensors (while it trains)
                cfg.json  sae_weights.safetensors  training.json (last)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from introspect_ray.config import (
    ActorConfig,
    CoderTrainerConfig,
    TrainCoderConfig,
    TrainSaeConfig,
    differences,
    resolved,
)
from introspect_ray.data.identity import identify_target
from introspect_ray.data.sources import load_source
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.features.batch_topk import BatchTopKConfig
from introspect_ray.features.places import Place
from introspect_ray.tasks.base import stable_id

RUN_FILE = "run.json"
REPORT_FILE = "training.json"
CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class CoderRun:
    """A run that passed every check. Ships to the trainer."""

    config: TrainCoderConfig
    run_key: str
    """Equal for equal texts, target and every setting that can change the result."""
    width: int
    """Of the target."""

    @property
    def folder(self) -> Folder:
        return Folder(self.config.output)

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


def prepare(config: TrainCoderConfig) -> tuple[CoderRun, list[str], list[str]]:
    """Check a run from end to end; with it, texts to train on and to measure on. Raises UserError, writes nothing."""
    config = _absolute(config)
    target = identify_target(config.target)
    if config.layer >= target.num_layers:
        raise UserError(
            f"layer is {config.layer}, but {target.path} has {target.num_layers} layers:"
            f" expected 0 to {target.num_layers - 1}"
        )
    texts = [row["text"] for row in load_source(config.source, "text", ("text",)).rows]
    if len(texts) < 2:
        raise UserError(f"source {config.source.path} gives {len(texts)} text, expected 2 or more: one is held out")
    key = stable_id(type(config).__name__, _relevant(config), texts, target.model_dump())
    run = CoderRun(config, key, target.width)
    _check_output(run)
    held_out = texts[:: config.hold_out_every]
    return run, [text for number, text in enumerate(texts) if number % config.hold_out_every], held_out


def begin(run: CoderRun) -> None:
    """Claim the output folder."""
    content = {"run_key": run.run_key, "kind": run.kind, "config": resolved(run.config)}
    run.folder.write(RUN_FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _absolute(config: TrainCoderConfig) -> TrainCoderConfig:
    """Local paths made absolute, because workers have a working directory of their own."""
    model = config.target
    if Path(model.path).expanduser().is_dir():
        model = model.model_copy(update={"path": str(Path(model.path).expanduser().absolute())})
    output = config.output if "://" in config.output else str(Path(config.output).expanduser().absolute())
    return config.model_copy(update={"output": output, "target": model})


def _relevant(config: TrainCoderConfig) -> dict[str, Any]:
    """The config without what cannot change the result; texts and target are known by their contents."""
    model = config.target.model_copy(update={"path": "", "device": "auto"})
    reset: dict[str, Any] = {"output": "", "actors": ActorConfig(), "trainer": CoderTrainerConfig(), "target": model}
    tree = resolved(config.model_copy(update=reset))
    return {name: value for name, value in tree.items() if name != "source"}


def _check_output(run: CoderRun) -> None:
    """Refuse an output folder that holds something else than this very run, begun or finished."""
    folder, url = run.folder, run.folder.url
    names = [name for name in folder.names() if not name.startswith(TEMPORARY)]
    if not names:
        return
    if RUN_FILE not in names:
        raise UserError(
            f"output folder {url} is not empty and holds no such training ({names[0]}, ...): choose another"
        )
    try:
        found = json.loads(folder.read(RUN_FILE))
        key, other = found["run_key"], _relevant(type(run.config).model_validate(found["config"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"output folder {url}: its {RUN_FILE} is of another job or version: choose another") from None
    if key != run.run_key:
        what = "; ".join(differences(other, _relevant(run.config))) or "its texts or its target have changed since"
        raise UserError(f"output folder {url} belongs to another config ({what}): choose another folder or delete it")
