"""Collecting vectors that are no latents, with their exemplars, on Ray.

    driver   prepare (no Ray, no model) -> claim folder
    actors   VectorWorker: per block of prompts: vectors; the mean of the corpus    -> driver: work/vectors.parquet
    actors   PartWorker: per block of texts: work/parts/part-k.parquet (renamed)    -> driver: progress
    driver   all parts -> merge -> vectors.parquet -> vectors.json; work/ is emptied

A part is written whole or not at all, so that the same command goes on after any stop, see pool.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import ray

from introspect_ray.config import CollectVectorsConfig, resolved
from introspect_ray.data.attempts import counted_loading
from introspect_ray.data.cluster import connect
from introspect_ray.data.pool import OrderWorker, Pool, check_resources, run_orders
from introspect_ray.data.shards import ShardOrder, read_items, write_items
from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_files import (
    MANIFEST_FILE,
    PLAN_FILE,
    SCHEMA_VERSION,
    open_vectors,
    read_plan,
    write_plan,
    write_vectors,
)
from introspect_ray.data.vector_parts import finished_row, is_finished, merge_parts, unit_vectors, write_part
from introspect_ray.data.vector_run import (
    PartOrder,
    VectorOrder,
    VectorRun,
    as_matrix,
    corpus_mean,
    item_vectors,
    prepare,
)
from introspect_ray.errors import RunFailed
from introspect_ray.features.windows import window
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import load_tokenizer

REJECTED_FILE = "rejected.jsonl"

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


class VectorWorker(OrderWorker):
    """Holds a target; reads one block of vectors per order, or the mean, and says what it read."""

    order_class: ClassVar[type[ShardOrder]] = VectorOrder

    def __init__(self, config: CollectVectorsConfig, work: Folder, run_id: str):
        self.config, self.work = config, work
        with counted_loading(work, run_id, ray.get_runtime_context().get_actor_id() or ""):
            self.target = Target.load(config.target)

    def make(self, order: VectorOrder) -> str:
        items = read_items(self.work, order)
        if items[0]["kind"] == "mean":
            means = corpus_mean(self.target, self.config, [item["text"] for item in items])
            return json.dumps({layer: mean.tolist() for layer, mean in means.items()})
        return json.dumps(list(item_vectors(self.target, items, self.config)))


class PartWorker(VectorWorker):
    """Holds a target and all vectors; projects one part of the corpus per order."""

    order_class: ClassVar[type[ShardOrder]] = PartOrder

    def __init__(self, config: CollectVectorsConfig, work: Folder, run_id: str):
        super().__init__(config, work, run_id)
        rows, means, _ = read_plan(work)
        self.directions = unit_vectors(rows, as_matrix(rows), means)

    def make(self, order: PartOrder) -> str:  # type: ignore[override]
        write_part(self.work, order, self.target, read_items(self.work, order), self.directions, self.config)
        return ""


def collect_vectors(config: CollectVectorsConfig, progress: Progress) -> VectorSummary:
    """Collect what `config` describes, or what is left of it; the same call after any interruption goes on.

    Raises:
        UserError: bad input, before any model loads.
        RunFailed: too many vectors or tokens are not finite, or processes failed too often.
    """
    run = prepare(config)
    if run.folder.size(MANIFEST_FILE) is not None:
        return VectorSummary(config.output, open_vectors(run.folder.url).manifest, was_complete=True)
    run.claim.write()
    parts = run.parts()
    with connect():
        check_resources(config.actors)
        arguments = {"config": run.config, "work": run.work}
        if run.work.size(PLAN_FILE) is None:
            _make_vectors(run, arguments)
        todo = [order for order in parts if not is_finished(run.work, order)]
        run.write_parts(todo)
        before = len(parts) - len(todo)
        progress(before, len(parts), "")
        pool: Pool[PartOrder] = Pool(run.work, config.actors, PartWorker, arguments)
        for done, _ in enumerate(run_orders(pool, todo) if todo else (), start=before + 1):
            progress(done, len(parts), "")
    return VectorSummary(config.output, _finish(run, parts), was_complete=False)


def _make_vectors(run: VectorRun, arguments: dict[str, Any]) -> None:
    """All vectors, in order of the items, and the means; the failed ones into rejected.jsonl."""
    blocks = run.blocks()
    for order, items in blocks.items():
        write_items(run.work, order, items)
    pool: Pool[VectorOrder] = Pool(run.work, run.config.actors, VectorWorker, arguments)
    found = {order.index: json.loads(account) for order, account in run_orders(pool, list(blocks))}
    means = found.pop(0)
    rows = [row for index in sorted(found) for row in found[index]]
    failed = [row for row in rows if "reason" in row]
    _check_share("vectors", sum(row["reason"] == "vector_not_finite" for row in failed), len(rows), run)
    lines = [*run.rejected, *failed]
    run.folder.write(REJECTED_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    kept = [row for row in rows if "reason" not in row]
    if not kept:
        raise RunFailed(f"of {len(rows)} vectors none can be read ({_reasons(failed)})")
    write_plan(run.work, kept, means, dict(Counter(row["reason"] for row in failed)))


def _reasons(failed: Sequence[dict[str, Any]]) -> str:
    counts = Counter(row["reason"] for row in failed)
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())


def _check_share(what: str, lost: int, total: int, run: VectorRun) -> None:
    if lost > run.config.max_lost_share * total:
        raise RunFailed(
            f"{lost} of {total} {what} are not finite, more than max_lost_share {run.config.max_lost_share:g} allows"
        )


def _finish(run: VectorRun, parts: Sequence[PartOrder]) -> dict[str, Any]:
    """Merge all parts, write vectors.parquet and the manifest; all else is not needed any more and goes."""
    rows, _, failed = read_plan(run.work)
    top, random, counts = merge_parts(run.work, parts, run.config)
    lost, tokens = sum(counts.lost.values()), sum(counts.tokens.values())
    _check_share("tokens", lost, lost + tokens, run)
    if len({number for number, _ in top}) < len(rows):
        raise RunFailed(f"source {run.config.texts.path} has no text of two tokens outside of the test split")
    tokenizer = load_tokenizer(run.config.target)
    window_of = lru_cache(maxsize=None)(lambda ids: window(ids, tokenizer))
    finished = [
        finished_row(row, number, top, random, counts, run.config, window_of) for number, row in enumerate(rows)
    ]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "run_key": run.claim.run_key,
        "config": resolved(run.config),
        "vectors": dict(sorted(Counter(row["kind"] for row in rows).items())),
        "failed": failed,
        "texts": run.num_corpus,
        "tokens": max(counts.tokens.values()),
        "lost_tokens": max(counts.lost.values()),
        "digest": write_vectors(run.folder, finished, len(rows[0]["vector"])),
    }
    run.folder.write(MANIFEST_FILE, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    run.work.clear()
    return manifest
