"""Collecting vectors that are no latents, with their exemplars, on Ray Data.

    driver   prepare (no Ray, no model) -> claim folder
    actors   VectorWorker: blocks of prompts -> vectors; the mean of the corpus     -> driver: plan/vectors.parquet
    actors   VectorWorker: blocks of texts -> parts/part-k.parquet (renamed)        -> driver: progress
    driver   all parts -> merge -> vectors.parquet -> vectors.json

A part is written whole or not at all, so that the same command goes on after any stop.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from introspect_ray.config import CollectVectorsConfig
from introspect_ray.data.cluster import connect, is_verbose, quiet_stderr
from introspect_ray.data.generate import RETRIES_PER_SHARD, check_resources, run_context, translated
from introspect_ray.data.shards import parquet_bytes
from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_files import MANIFEST_FILE, open_vectors, vector_schema, write_vectors
from introspect_ray.data.vector_parts import (
    Directions,
    finished_parts,
    finished_row,
    merge_parts,
    part_name,
    unit_vectors,
    write_part,
)
from introspect_ray.data.vector_run import VectorRun, as_matrix, begin, corpus_mean, item_vectors, mean_texts, prepare
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.windows import window
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import load_tokenizer

PLAN_FILE = "plan/vectors.parquet"
REJECTED_FILE = "rejected.jsonl"
ITEMS_PER_BLOCK = 64

Progress = Callable[[int, int, str], None]
"""Called with parts done, parts in all, and how it goes."""


@dataclass(frozen=True)
class VectorSummary:
    """What a run left in its output folder."""

    output: str
    manifest: dict[str, Any]
    was_complete: bool

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"{self.output} was already complete" if self.was_complete else f"wrote {self.output}"
        kinds = ", ".join(f"{count} {kind}s" for kind, count in self.manifest["vectors"].items())
        failed = ", ".join(f"{count} {reason}" for reason, count in self.manifest["failed"].items())
        return (
            f"{start}: {kinds}{f' ({failed})' if failed else ''}; exemplars from {self.manifest['texts']} texts,"
            f" {self.manifest['tokens']} tokens{self._lost}"
        )

    @property
    def _lost(self) -> str:
        return f", {self.manifest['lost_tokens']} of them not finite" if self.manifest["lost_tokens"] else ""


class VectorWorker:
    """Holds a target; does one order per call, and answers with a row of JSON."""

    def __init__(self, config: CollectVectorsConfig, run_key: str):
        self.config, self.run_key = config, run_key
        self.folder = Folder(config.output)
        self.target = Target.load(config.target)
        self._directions: Directions | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"answer": [self._answer(json.loads(str(order))) for order in batch["order"]]}

    def _answer(self, order: dict[str, Any]) -> str:
        if order["kind"] == "mean":
            means = corpus_mean(self.target, self.config, order["texts"])
            return json.dumps({"means": {layer: mean.tolist() for layer, mean in means.items()}})
        if order["kind"] == "items":
            return json.dumps(
                {"block": order["block"], "rows": list(item_vectors(self.target, order["items"], self.config))}
            )
        if self._directions is None:
            planned, means = read_plan(self.folder)
            self._directions = unit_vectors(planned, as_matrix(planned), means)
        texts = [(number, text) for number, text in order["texts"]]
        write_part(self.folder, order["part"], self.run_key, self.target, texts, self._directions, self.config)
        return json.dumps({"part": order["part"]})


def collect_vectors(config: CollectVectorsConfig, progress: Progress) -> VectorSummary:
    """Collect what `config` describes, or what is left of it; the same call after any interruption goes on.

    Raises:
        UserError: bad input, before any model loads.
        RunFailed: too many vectors or tokens are not finite, or processes failed too often.
    """
    run = prepare(config)
    if run.folder.size(MANIFEST_FILE) is not None:
        return VectorSummary(config.output, open_vectors(run.folder.url).manifest, was_complete=True)
    begin(run)
    with connect():
        check_resources(config.actors)
        if run.folder.size(PLAN_FILE) is None:
            _make_vectors(run)
        done = finished_parts(run.folder, run.run_key, run.num_parts)
        progress(len(done), run.num_parts, "")
        size = config.texts_per_block
        orders = [
            {"kind": "texts", "part": part, "texts": run.corpus[part * size : (part + 1) * size]}
            for part in range(run.num_parts)
            if part not in done
        ]
        for answer in _answers(run, orders):
            done.add(answer["part"])
            progress(len(done), run.num_parts, "")
    if len(done) < run.num_parts:
        raise RunFailed(f"{run.num_parts - len(done)} parts were not written; the same command tries again")
    return VectorSummary(config.output, _finish(run), was_complete=False)


def _make_vectors(run: VectorRun) -> None:
    """All vectors, in order of the items, and the means; the failed ones into rejected.jsonl."""
    blocks = [run.items[start : start + ITEMS_PER_BLOCK] for start in range(0, len(run.items), ITEMS_PER_BLOCK)]
    orders: list[dict[str, Any]] = [
        {"kind": "items", "block": number, "items": items} for number, items in enumerate(blocks)
    ]
    found: dict[int, list[dict[str, Any]]] = {}
    means: dict[int, list[float]] = {}
    for answer in _answers(run, [{"kind": "mean", "texts": mean_texts(run)}, *orders]):
        if "means" in answer:
            means = answer["means"]
        else:
            found[answer["block"]] = answer["rows"]
    if len(found) < len(blocks) or not means:
        raise RunFailed("not all vectors were read; the same command tries again")
    rows = [row for number in range(len(blocks)) for row in found[number]]
    failed = [row for row in rows if "reason" in row]
    _check_share("vectors", sum(row["reason"] == "vector_not_finite" for row in failed), len(rows), run)
    lines = [*run.rejected, *failed]
    run.folder.write(REJECTED_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    kept = [row for row in rows if "reason" not in row]
    if not kept:
        raise RunFailed(f"of {len(rows)} vectors none can be read ({_reasons(failed)})")
    table = pa.Table.from_pylist(kept, schema=vector_schema(len(kept[0]["vector"])))
    metadata = {"means": json.dumps(means), "failed": json.dumps(dict(Counter(row["reason"] for row in failed)))}
    run.folder.write(PLAN_FILE, parquet_bytes(table.replace_schema_metadata(metadata)))


def _reasons(failed: Sequence[dict[str, Any]]) -> str:
    counts = Counter(row["reason"] for row in failed)
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())


def read_plan(folder: Folder) -> tuple[list[dict[str, Any]], dict[int, torch.Tensor]]:
    """The vectors of a run as rows without exemplars, and the mean vector per layer."""
    table = pq.read_table(io.BytesIO(folder.read(PLAN_FILE)))
    means = json.loads(table.schema.metadata[b"means"])
    return table.to_pylist(), {int(layer): torch.tensor(mean) for layer, mean in means.items()}


def _check_share(what: str, lost: int, total: int, run: VectorRun) -> None:
    if lost > run.config.max_lost_share * total:
        raise RunFailed(
            f"{lost} of {total} {what} are not finite, more than max_lost_share {run.config.max_lost_share:g} allows"
        )


def _answers(run: VectorRun, orders: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the actors answer to every order, in any order."""
    if not orders:
        return
    actors = run.config.actors
    rows = ray.data.from_items([{"order": json.dumps(order)} for order in orders], override_num_blocks=len(orders))
    with run_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in data/generate.py
        pipeline = rows.map_batches(
            VectorWorker,
            fn_constructor_kwargs={"config": run.config, "run_key": run.run_key},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=actors.min_size, max_size=actors.max_size, initial_size=actors.initial_size
            ),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus or None,
            max_restarts=-1,
            max_task_retries=RETRIES_PER_SHARD,
        )
        answers = pipeline.iter_rows()
        iterator = iter(answers)
        while True:
            try:
                with quiet_stderr():
                    row = next(iterator, None)
            except Exception as error:
                raise translated(error, "") from (error if is_verbose() else None)
            if row is None:
                return
            yield json.loads(row["answer"])


def _finish(run: VectorRun) -> dict[str, Any]:
    """Merge all parts, write vectors.parquet and the manifest; the parts are not needed any more and go."""
    table = pq.read_table(io.BytesIO(run.folder.read(PLAN_FILE)))
    rows = table.to_pylist()
    top, random, counts = merge_parts(run.folder, range(run.num_parts), run.config)
    lost, tokens = sum(counts.lost.values()), sum(counts.tokens.values())
    _check_share("tokens", lost, lost + tokens, run)
    tokenizer = load_tokenizer(run.config.target)
    window_of = lru_cache(maxsize=None)(lambda ids: window(ids, tokenizer))
    finished = [
        finished_row(row, number, top.get(number, []), random.get(number, []), counts, window_of)
        for number, row in enumerate(rows)
    ]
    if any(row["maximum"] is None for row in finished):
        raise UserError(f"source {run.config.texts.path} has no text of two tokens outside of the test split")
    manifest = {
        "run_key": run.run_key,
        "config": json.loads(run.folder.read("config.json"))["config"],
        "vectors": dict(sorted(Counter(row["kind"] for row in rows).items())),
        "failed": json.loads(table.schema.metadata[b"failed"]),
        "texts": len(run.corpus),
        "tokens": max(counts.tokens.values()),
        "lost_tokens": max(counts.lost.values()),
        "digest": write_vectors(run.folder, finished, len(rows[0]["vector"])),
    }
    run.folder.write(MANIFEST_FILE, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    for part in range(run.num_parts):
        run.folder.remove(part_name(part))
    return manifest
