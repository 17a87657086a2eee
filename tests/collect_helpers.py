"""Collections of exemplars without Ray, and scanners that misbehave."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from introspect_ray.config import CollectConfig
from introspect_ray.data.collect import finish_coder
from introspect_ray.data.collecting import plan_collection
from introspect_ray.data.merging import BlockOrder, ChooseOrder, GatherOrder, Merging, StepInfo
from introspect_ray.data.scanning import Scanner, finished_info, scan_shard
from introspect_ray.features import exemplar_store
from introspect_ray.features.exemplar_store import ExemplarStore, open_exemplars

DEADLY = "deadly text"


def write_texts(folder: Path, texts: list[str]) -> str:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def collect_config(folder: Path, texts: list[str], **changes: Any) -> CollectConfig:
    """A config whose source lies in `folder` and whose output is `folder/out`; small numbers of everything."""
    folder.mkdir(exist_ok=True)
    tree: dict[str, Any] = {
        "output": str(folder / "out"),
        "source": {"path": write_texts(folder, texts)},
        "limits": {"top": 3, "quantiles": 2, "per_quantile": 2, "random": 4, "silent": 2, "pool": 12},
        "context_tokens": 24,
        "window_tokens": 8,
        "texts_per_batch": 8,
        "texts_per_shard": 32,
        "latents_per_block": 600,
    }
    return CollectConfig.model_validate(tree | changes)


def collect_here(config: CollectConfig, scanner: Scanner) -> dict[str, ExemplarStore]:
    """What the driver and its actors do, in one process; shards that are done are kept. Coder -> store."""
    plan = plan_collection(config)
    plan.claim.write()
    scans = {order.index: info for order in plan.scans if (info := finished_info(plan.work, order))}
    todo = [order for order in plan.scans if order.index not in scans]
    plan.write_plan(todo)
    for order in todo:
        scans[order.index] = scan_shard(scanner, config, plan.work, order, "run")
    merging = Merging.of(plan)
    for step in (ChooseOrder, GatherOrder):
        for order in merging.orders(step):
            merging.make(order)
    blocks: list[list[StepInfo]] = [[] for _ in plan.coders]
    for order in merging.orders(BlockOrder):
        blocks[merging.place(order)[0]].append(merging.make(order))
    for number, infos in enumerate(blocks):
        finish_coder(plan, number, scans, {}, infos)
    return {coder.name: open_exemplars(plan.coder_folder(coder).url) for coder in plan.coders}


def content(store: ExemplarStore) -> list[Any]:
    """All that a store holds, whatever its blocks: rows in their order, windows, and what is known of each latent."""
    count = -(-store.meta.num_latents // store.meta.latents_per_block)
    rows, windows = (
        pa.concat_tables(
            [pq.read_table(f"{store.url}/{exemplar_store.block_name(kind, number)}") for number in range(count)]
        )
        for kind in ("blocks", "windows")
    )
    unique = {row["window"]: row for row in windows.to_pylist()}
    return [rows.to_pydict(), unique, store.counts.tolist(), store.maxima.tolist(), store.meta.num_tokens]


def load_once_deadly(config: CollectConfig) -> Scanner:
    """A scanner that waits at each batch; the first one in `config.output`'s parent ends its process half way."""
    return _watched(Scanner.load(config), Path(config.output).parent / "killed")


def load_slow(config: CollectConfig) -> Scanner:
    return _watched(Scanner.load(config), None)


def _watched(scanner: Scanner, marker: Path | None) -> Scanner:
    calls = 0

    def watch(*_: Any) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.05)
        if marker is not None and calls > 6 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), 9)

    scanner.model.get_input_embeddings().register_forward_hook(watch)
    return scanner


def damaged(scanner: Scanner, word: str, value: float = float("nan")) -> Scanner:
    """The same scanner with a model whose residual stream holds `value` wherever the first token of `word` stands."""
    (token,) = scanner.tokenizer(word, add_special_tokens=False).input_ids[:1]
    model = Scanner.load(CollectConfig()).model
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    return dataclasses.replace(scanner, model=model)
