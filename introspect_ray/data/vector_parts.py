"""Parts of a corpus projected on all vectors: one Parquet file per block of texts, and their merging. No Ray here.

A part holds, of its texts alone, the best windows of every vector and the windows of the lowest random ranks; what
stays of all parts is the same whatever the parts are.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from introspect_ray.config import CollectVectorsConfig
from introspect_ray.data.shards import parquet_bytes
from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_run import Item, PartOrder, window_rank
from introspect_ray.features.projection import (
    Hit,
    activations,
    best,
    cut,
    directions,
    drawn,
    largest_hits,
    sound_spans,
)
from introspect_ray.features.reading import read_places
from introspect_ray.features.shuffling import pieces
from introspect_ray.features.windows import Window
from introspect_ray.interventions.target import Target
from introspect_ray.models.tokens import adds_bos

_RUN, _COUNTS = b"introspect_ray.run", b"introspect_ray.counts"
_SCHEMA = pa.schema(
    [
        ("vector", pa.int32()),
        ("rank", pa.float64()),
        ("text", pa.int64()),
        ("start", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("activations", pa.list_(pa.float32())),
    ]
)
"""`rank` is null for the best windows."""


Directions = dict[int, tuple[list[int], Tensor, Tensor]]
"""Layer -> numbers of its vectors, their directions at length 1, and the mean that is taken off what is projected."""


@dataclass
class Counts:
    """Of the tokens of some parts, per layer; of `firing`, per vector."""

    tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    lost: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens whose windows have an activation that is not finite, and count nowhere."""
    firing: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens with an activation above zero."""

    def to_json(self) -> str:
        return json.dumps({"tokens": self.tokens, "lost": self.lost, "firing": self.firing})

    def add(self, content: str) -> None:
        """Add what `to_json` wrote."""
        for name, counts in json.loads(content).items():
            mine = getattr(self, name)
            for key, count in counts.items():
                mine[int(key)] += count


def write_part(
    folder: Folder,
    order: PartOrder,
    target: Target,
    texts: Sequence[Item],
    vectors: Directions,
    config: CollectVectorsConfig,
) -> None:
    """Project the texts, each with its source row, on the vectors."""
    bos = target.tokenizer.bos_token_id if adds_bos(target.tokenizer) else None
    longest = min(config.max_tokens, target.max_tokens or config.max_tokens)
    parts: list[tuple[int, int, list[int]]] = []
    for text in texts:
        offset = 0
        for ids in pieces(target.encode(text["text"]), longest, bos):
            if len(ids) > 1:
                parts.append((text["row"], offset, ids))
            offset += len(ids) - (bos is not None)
    counts = Counts()
    hits: list[tuple[int, float | None, Hit]] = []
    spans = cut(parts, config.window)
    for layer, (numbers, unit, mean) in vectors.items():
        if not spans:
            break
        x = read_places(target.model, [ids for _, _, ids in parts], layer, ["residual"])[0]
        found = activations(x, unit.to(x.device), mean.to(x.device))
        sound = sound_spans(spans, found)
        kept = [row for span in sound for row in range(span.first, span.first + len(span.ids))]
        counts.tokens[layer], counts.lost[layer] = len(kept), len(found) - len(kept)
        for number, firing in zip(numbers, (found[kept] > 0).sum(axis=0), strict=True):
            counts.firing[number] = int(firing)
        hits += [(numbers[hit.vector], None, hit) for hit in best(sound, found, config.top)]
        ranks = [window_rank(config.seed, span.text, span.start) for span in sound]
        for rank, of_all in drawn(sound, found, ranks, config.random):
            hits += [(numbers[hit.vector], rank, hit) for hit in of_all]
    rows = [
        {"vector": vector, "rank": rank, "text": hit.text, "start": hit.start}
        | {"ids": list(hit.ids), "activations": hit.activations}
        for vector, rank, hit in hits
    ]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    table = table.replace_schema_metadata({_RUN: order.run_key, _COUNTS: counts.to_json()})
    folder.write(order.name, parquet_bytes(table))


def is_finished(folder: Folder, order: PartOrder) -> bool:
    """Whether the part is there, whole, and of this run."""
    try:
        table = _read(folder, order)
    except (OSError, pa.ArrowException):
        return False
    return (table.schema.metadata or {}).get(_RUN) == order.run_key.encode()


def _read(folder: Folder, order: PartOrder) -> pa.Table:
    return pq.read_table(io.BytesIO(folder.read(order.name)), page_checksum_verification=True)


def merge_parts(
    folder: Folder, parts: Iterable[PartOrder], config: CollectVectorsConfig
) -> tuple[dict[int, list[Hit]], dict[int, list[Hit]], Counts]:
    """Vector -> its best windows in order, vector -> the windows drawn, and the counts, of all parts."""
    top: dict[int, list[Hit]] = defaultdict(list)
    random: dict[int, list[tuple[float, Hit]]] = defaultdict(list)
    counts = Counts()
    for order in parts:
        table = _read(folder, order)
        counts.add(table.schema.metadata[_COUNTS].decode())
        for row in table.to_pylist():
            values = np.asarray(row["activations"], dtype=np.float32)
            hit = Hit(row["vector"], row["text"], row["start"], tuple(row["ids"]), values)
            if row["rank"] is None:
                top[hit.vector].append(hit)
            else:
                random[hit.vector].append((row["rank"], hit))
        # After every part, so that no more is held than what stays and what one part brings.
        for vector in top:
            top[vector] = largest_hits(top[vector], config.top)
        for vector, found in random.items():
            random[vector] = sorted(found, key=lambda pair: (pair[0], pair[1].text, pair[1].start))[: config.random]
    return dict(top), {vector: [hit for _, hit in found] for vector, found in random.items()}, counts


def finished_row(
    row: dict[str, Any],
    number: int,
    top: Sequence[Hit],
    random: Sequence[Hit],
    counts: Counts,
    window_of: Callable[[tuple[int, ...]], Window],
) -> dict[str, Any]:
    """A row of vectors.parquet with its statistics and exemplars."""
    tokens = counts.tokens[row["layer"]]
    exemplars = [
        {
            "kind": kind,
            "text": hit.text,
            "start": hit.start,
            "ids": list(hit.ids),
            "pieces": list(window_of(hit.ids).pieces),
            "activations": hit.activations.tolist(),
        }
        for kind, hits in (("top", top), ("random", random))
        for hit in hits
    ]
    return {
        **row,
        "density": counts.firing[number] / tokens if tokens else None,
        "maximum": float(top[0].activations.max()) if top else None,
        "exemplars": exemplars,
    }


def unit_vectors(rows: Sequence[dict[str, Any]], matrix: Tensor, means: dict[int, Tensor]) -> Directions:
    """The directions of all rows: of single activations the mean is taken off first."""
    found: Directions = {}
    for layer, mean in means.items():
        numbers = [number for number, row in enumerate(rows) if row["layer"] == layer]
        if numbers:
            alone = [[float(rows[number]["kind"] == "activation")] for number in numbers]
            found[layer] = numbers, directions(matrix[numbers] - matrix.new_tensor(alone) * mean), mean
    return found
