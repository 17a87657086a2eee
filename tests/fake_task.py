"""A task and a target that need no model: every question gives two records whose vectors follow from its text."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from introspect_ray.config import GenerateConfig
from introspect_ray.data.finish import finish
from introspect_ray.data.manifest import Manifest
from introspect_ray.data.prepare import begin, prepare
from introspect_ray.data.writer import write_shard
from introspect_ray.errors import UserError
from introspect_ray.explainer.query import Query
from introspect_ray.tasks.base import COMMON_FIELDS, OK, Example, Plan, failed, stable_id

WIDTH = 8


def fake_target(config: GenerateConfig) -> Any:  # noqa: ARG001
    return SimpleNamespace(width=WIDTH, take_slow_reasons=str)


def signing_target(config: GenerateConfig) -> Any:
    """A fake target that leaves its process id in `actors/` beside the output folder."""
    signed = Path(config.output).parent / "actors"
    signed.mkdir(exist_ok=True)
    (signed / str(os.getpid())).touch()
    return fake_target(config)


def deadly_target(config: GenerateConfig) -> Any:  # noqa: ARG001
    """A target whose loading ends the process."""
    os.kill(os.getpid(), 9)


def load_no_such_model(config):
    raise UserError(f"model {config.target.path} has no weights")


def crash(config):  # noqa: ARG001
    raise ZeroDivisionError("a defect")


@dataclass
class FakeTask:
    """Questions with `raise`, `nan`, `huge`, `device` or `kill` misbehave; the last two once if given a `marker`.

    `kill` ends the process, `device` says that the GPU has failed.
    """

    delay: float = 0.0
    marker: str = ""
    name = "fake"
    breakdowns: ClassVar = {"Answer": "changed"}
    unshared = ("text",)
    has_vectors = True
    selected_by = ("changed",)
    source_formats = ("mmlu",)

    def schema(self, width, config):
        kind = pa.float16() if config.vector_dtype == "float16" else pa.float32()
        vector = pa.field("vector", pa.fixed_shape_tensor(kind, (width,)))
        return pa.schema([*COMMON_FIELDS, pa.field("text", pa.string()), pa.field("changed", pa.bool_()), vector])

    def plan(self, rows, config, split_of):  # noqa: ARG002
        plan = Plan(num_source_rows=len(rows))
        for row in rows:
            if "skip" in row["question"]:
                plan.rejected.append((row["row"], "skipped"))
                continue
            item = {"split": split_of(row["question"]), "group": row["question"], "text": row["question"]}
            plan.items.append({"item_id": stable_id(item, row["row"]), **item})
        return plan

    def generate(self, target, items, config):  # noqa: ARG002
        return [record for item in items for record in self._records(target, item)]

    def _records(self, target, item):
        time.sleep(self.delay)
        text = item["text"]
        if "raise" in text:
            raise RuntimeError(f"cannot do {text}")
        if "wordless" in text:
            return [failed(item, "no_word")]
        if ("kill" in text or "device" in text) and not (self.marker and Path(self.marker).exists()):
            if self.marker:
                Path(self.marker).touch()
            if "device" in text:
                raise RuntimeError("CUDA error: unspecified launch failure")
            os.kill(os.getpid(), 9)
        records = []
        for number in range(2):
            seed = hashlib.sha256(f"{text}/{number}".encode()).digest()[: target.width]
            vector = np.frombuffer(seed, np.uint8).astype(np.float32) / 7
            vector[0] = {"nan": np.nan, "huge": 1e6}.get(text.split()[0], vector[0])
            records.append(
                {
                    "record_id": stable_id(item["item_id"], number),
                    "status": OK,
                    "detail": None,
                    **{key: item[key] for key in ("item_id", "split", "group", "text")},
                    "changed": bool(seed[0] % 2),
                    "vector": vector,
                }
            )
        return records

    def render(self, record):
        return Example(Query((record["text"],)), str(record["changed"]))

    def display(self, record):
        return [(record["text"], True)], {"place": "here"}

    def select(self, records, config):  # noqa: ARG002
        """The changed ones, so that a selection differs from "all that are ok"."""
        return [row["record_id"] for row in records.to_pylist() if row["status"] == OK and row["changed"]]


def make_dataset(config: GenerateConfig, task: Any = None, target: Any = None) -> Manifest:
    """What the driver and its actors do, in one process; shards that are done are kept."""
    prepared = prepare(config, task or FakeTask())
    shards, target = prepared.finished(), target or fake_target(config)
    todo = [order for order in prepared.orders if order.index not in shards]
    begin(prepared, todo)
    shards |= {order.index: write_shard(prepared.task, target, config, order, "run") for order in todo}
    return finish(prepared, shards)


def write_model_config(folder: Path, num_layers: int = 4) -> Path:
    """A model folder as far as it is read before weights are."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH}
    config |= {"num_hidden_layers": num_layers, "num_attention_heads": 2, "vocab_size": 16, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def question(text: str, **changes: Any) -> dict[str, Any]:
    """An MMLU row."""
    return {"question": text, "subject": "trivia", "choices": ["one", "two"], "answer": 1, **changes}


def fake_config(folder: Path, questions: list[str], **changes: Any) -> GenerateConfig:
    """A config whose source and target lie in `folder` and whose output is `folder/out`."""
    source = folder / "questions.jsonl"
    source.write_text("".join(json.dumps(question(text)) + "\n" for text in questions))
    return GenerateConfig.model_validate(
        {
            "output": str(folder / "out"),
            "target": {"path": str(write_model_config(folder / "model"))},
            "source": {"path": str(source)},
            "items_per_shard": 4,
            **changes,
        }
    )
