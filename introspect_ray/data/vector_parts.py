"""Parts of a corpus projected on all vectors: one Parquet file per block of texts, and their merging. No Ray here.

A part holds, of its texts alone, the best windows of every vector and the windows of the lowest random ranks; what
stays of all parts is the same whatever the parts are.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from introspect_ray.config import CollectVectorsConfig
from introspect_ray.data.shards import parquet_bytes
from introspect_ray.data.splits import split_of
from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_run import Item, PartOrder, window_rank
from introspect_ray.features.exemplar_store import SPLITS, SplitName
from introspect_ray.features.exemplars import ExemplarKind
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
        ("split", pa.string()),
        ("rank", pa.float64()),
        ("text", pa.int64()),
        ("start", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("activations", pa.list_(pa.float32())),
    ]
)
"""`rank` is null for the best windows."""


Place = tuple[int, SplitName]
"""Number of a vector, and the split of the texts that windows of it are of."""
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
    splits = {text["row"]: split_of(text["text"], config.split) for text in texts}
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
        for split in sorted(set(splits.values())):
            inside = [span for span in sound if splits[span.text] == split]
            hits += [(numbers[hit.vector], None, hit) for hit in best(inside, found, config.top)]
            ranks = [window_rank(config.seed, span.text, span.start) for span in inside]
            for rank, of_all in drawn(inside, found, ranks, _num_drawn(config)):
                hits += [(numbers[hit.vector], rank, hit) for hit in of_all]
    rows = [
        {"vector": vector, "split": splits[hit.text], "rank": rank, "text": hit.text, "start": hit.start}
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


def _num_drawn(config: CollectVectorsConfig) -> int:
    """Windows that are drawn of one split: first the random ones, then those that are parted by their projection."""
    return config.random + config.quantiles * config.per_quantile


def merge_parts(
    folder: Folder, parts: Iterable[PartOrder], config: CollectVectorsConfig
) -> tuple[dict[Place, list[Hit]], dict[Place, list[Hit]], Counts]:
    """Of every vector and split the best windows and the windows drawn, in order, and the counts, of all parts."""
    top: dict[Place, list[Hit]] = defaultdict(list)
    random: dict[Place, list[tuple[float, Hit]]] = defaultdict(list)
    counts = Counts()
    for order in parts:
        table = _read(folder, order)
        counts.add(table.schema.metadata[_COUNTS].decode())
        for row in table.to_pylist():
            values = np.asarray(row["activations"], dtype=np.float32)
            hit = Hit(row["vector"], row["text"], row["start"], tuple(row["ids"]), values)
            if row["rank"] is None:
                top[hit.vector, row["split"]].append(hit)
            else:
                random[hit.vector, row["split"]].append((row["rank"], hit))
        # After every part, so that no more is held than what stays and what one part brings.
        for place in top:
            top[place] = largest_hits(top[place], config.top)
        for found in random.values():
            found.sort(key=lambda pair: (pair[0], pair[1].text, pair[1].start))
            del found[_num_drawn(config) :]
    return dict(top), {place: [hit for _, hit in found] for place, found in random.items()}, counts


def finished_row(
    row: dict[str, Any],
    number: int,
    top: Mapping[Place, Sequence[Hit]],
    drawn_windows: Mapping[Place, Sequence[Hit]],
    counts: Counts,
    config: CollectVectorsConfig,
    window_of: Callable[[tuple[int, ...]], Window],
) -> dict[str, Any]:
    """A row of vectors.parquet with its statistics and exemplars: the best of all splits in order, then the others."""
    tokens = counts.tokens[row["layer"]]
    best_windows = [(hit, split) for split in SPLITS for hit in top.get((number, split), ())]
    best_windows.sort(key=lambda pair: pair[0].order)
    chosen: list[tuple[ExemplarKind, int | None, SplitName, Hit]] = [
        ("top", None, split, hit) for hit, split in best_windows
    ]
    for split in SPLITS:
        windows = drawn_windows.get((number, split), ())
        ranges = by_quantile(windows[config.random :], config.quantiles)
        chosen += [("quantile", quantile, split, hit) for quantile, hit in ranges]
        chosen += [("random", None, split, hit) for hit in windows[: config.random]]
    exemplars = [
        {
            "kind": kind,
            "quantile": quantile,
            "split": split,
            "text": hit.text,
            "start": hit.start,
            "ids": list(hit.ids),
            "pieces": list(window_of(hit.ids).pieces),
            "activations": hit.activations.tolist(),
        }
        for kind, quantile, split, hit in chosen
    ]
    return {
        **row,
        "density": counts.firing[number] / tokens if tokens else None,
        "maximum": float(best_windows[0][0].activations.max()) if best_windows else None,
        "exemplars": exemplars,
    }


def by_quantile(windows: Sequence[Hit], quantiles: int) -> list[tuple[int, Hit]]:
    """The windows above zero with the range that the rank of their largest activation lies in, 0 the lowest.

    Windows drawn from all are, where they are above zero, drawn from all that are.
    """
    firing = sorted((hit for hit in windows if hit.activations.max() > 0), key=lambda hit: hit.order, reverse=True)
    return [(place * quantiles // len(firing), hit) for place, hit in enumerate(firing)]


def unit_vectors(rows: Sequence[dict[str, Any]], matrix: Tensor, means: dict[int, Tensor]) -> Directions:
    """The directions of all rows: of single activations the mean is taken off first."""
    found: Directions = {}
    for layer, mean in means.items():
        numbers = [number for number, row in enumerate(rows) if row["layer"] == layer]
        if numbers:
            alone = [[float(rows[number]["kind"] == "activation")] for number in numbers]
            found[layer] = numbers, directions(matrix[numbers] - matrix.new_tensor(alone) * mean), mean
    return found
