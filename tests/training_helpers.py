"""Tiny datasets of activation_patching records, written as the generator writes them, and configs to train on them."""

from pathlib import Path
from typing import Any

import numpy as np
from explainer_helpers import model_folder

from introspect_ray.config import GenerateConfig, TrainConfig, resolved
from introspect_ray.data.manifest import SCHEMA_VERSION, Manifest, SourceAccount, TargetIdentity, write_manifest
from introspect_ray.data.shards import ShardOrder, write_records
from introspect_ray.data.storage import Folder
from introspect_ray.tasks.base import stable_id
from introspect_ray.tasks.registry import get_task


def write_dataset(
    folder: Path, count: int = 24, width: int = 32, target: str = "target", splits: tuple = ("train",)
) -> Path:
    """Records whose answer is in the sign of the vector's first coordinate; texts of different lengths."""
    config = GenerateConfig(task="activation_patching", output=str(folder))
    generator = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(count):
        vector = generator.normal(size=width).astype(np.float32)
        text = "word " * (1 + number % 5) + "end"
        records.append(
            {
                "record_id": stable_id("record", number),
                "item_id": stable_id("item", number),
                "split": splits[number % len(splits)],
                "group": f"group {number}",
                "status": "ok",
                "text": text,
                "layers": [number % 2, number % 2 + 1],
                "token_start": len(text) - 3,
                "token_end": len(text),
                "content": "up" if vector[0] > 0 else "down and out",
                "changed": bool(vector[0] > 0),
                "vector": vector,
            }
        )
    order = ShardOrder(0, "key")
    info = write_records(Folder(str(folder)), order, records, get_task(config.task).schema(width, config))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        task=config.task,
        config=resolved(config),
        run_key="key",
        target=TargetIdentity(path=target, revision=None, width=width, num_layers=4, digest=""),
        source=SourceAccount(name="made up", format="counterfact", rows=count, used=count, rejected={}),
        num_records=count,
        counts={split: {"ok": sum(record["split"] == split for record in records)} for split in splits},
        selected={split: sum(record["split"] == split for record in records) for split in splits},
        has_selection=False,
        shards=(info,),
    )
    write_manifest(Folder(str(folder)), manifest)
    return folder


def train_config(folder: Path, **changes: Any) -> TrainConfig:
    """A run on `folder/dataset` from `folder/base` into `folder/out`, both of which are made if they are not there.

    `changes` are dotted names with `__` for the dot.
    """
    if not (folder / "base").exists():
        model_folder(folder / "base", "llama")
    if not (folder / "dataset").exists():
        write_dataset(folder / "dataset")
    tree: dict[str, Any] = {
        "datasets": [str(folder / "dataset")],
        "output": str(folder / "out"),
        "explainer": {"model": {"path": str(folder / "base"), "device": "cpu"}, "max_new_tokens": 6},
        "optimization": {"steps": 8, "batch_size": 6, "learning_rate": 0.01},
        "trainer": {"checkpoint_every": 2, "log_every": 3, "micro_batch_tokens": 256},
    }
    for name, value in changes.items():
        *sections, key = name.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return TrainConfig.model_validate(tree)
