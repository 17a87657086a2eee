"""Vectors that are no latents, on disk with their exemplars: what collect_vectors.py writes and scorers read.

config.json (first)  plan/vectors.parquet  parts/part-00000.parquet ...  rejected.jsonl
vectors.parquet      one row per vector: id, kind, layer, origin, the vector, statistics, exemplars
vectors.json (last)  what it is, counts, and a digest of vectors.parquet
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from introspect_ray.data.shards import parquet_bytes
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.features.exemplar_store import SplitName
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.windows import Window

VECTORS_FILE = "vectors.parquet"
MANIFEST_FILE = "vectors.json"
SCHEMA_VERSION = 2
PLAN_FILE = "vectors.parquet"
"""In the folder `work/`: the vectors before they have exemplars."""

VectorKind = Literal["activation", "difference"]

EXEMPLAR_TYPE = pa.struct(
    {
        "kind": pa.string(),
        "quantile": pa.int8(),
        "split": pa.string(),
        "text": pa.int64(),
        "start": pa.int32(),
        "ids": pa.list_(pa.int32()),
        "pieces": pa.list_(pa.string()),
        "activations": pa.list_(pa.float32()),
    }
)
"""`text` is the number of the corpus' source row, `start` the number of the window's first token in it."""


def vector_schema(width: int) -> pa.Schema:
    """Columns of vectors.parquet. `group` is what is independent; `origin` the text or prompts that it was read in."""
    return pa.schema(
        [
            pa.field("vector_id", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("group", pa.string(), nullable=False),
            pa.field("origin", pa.string(), nullable=False),
            pa.field("token", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), width), nullable=False),
            pa.field("density", pa.float64()),
            pa.field("maximum", pa.float64()),
            pa.field("exemplars", pa.list_(EXEMPLAR_TYPE)),
        ]
    )


@dataclass(frozen=True, eq=False)
class CollectedVector:
    """One evaluation vector. It has no reference description; what it responds to are its exemplars."""

    vector_id: str
    kind: VectorKind
    layer: int
    group: str
    origin: str
    token: str
    vector: Float[np.ndarray, " D"]
    exemplars: LatentExemplars
    """`latent` is the number of the row; `density` the share of tokens with a projection above zero. Of all texts."""
    splits: Sequence[SplitName]
    """Split of the text that each exemplar is of."""

    def of_split(self, split: SplitName) -> LatentExemplars:
        """Exemplars of texts of one split."""
        kept = [one for one, of in zip(self.exemplars.exemplars, self.splits, strict=True) if of == split]
        return replace(self.exemplars, exemplars=tuple(kept))


@dataclass(frozen=True)
class VectorSet:
    """All vectors of a finished folder, and its manifest."""

    manifest: dict[str, Any]
    vectors: Sequence[CollectedVector]


def open_vectors(url: str) -> VectorSet:
    """What collect_vectors.py wrote to the folder. Raises `UserError` if it is not finished, or damaged."""
    folder = Folder(url)
    try:
        manifest = json.loads(folder.read(MANIFEST_FILE))
        content = folder.read(VECTORS_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{url} holds no finished vectors: collect_vectors.py writes {MANIFEST_FILE} last") from error
    except ValueError as error:
        raise UserError(f"{url}/{MANIFEST_FILE} is not valid JSON: {error}") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{url} has schema version {version}, this version reads {SCHEMA_VERSION}: collect again")
    if manifest.get("digest") != digest(content):
        raise UserError(f"{url}/{VECTORS_FILE} is not what {MANIFEST_FILE} says: delete both and collect them again")
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    return VectorSet(manifest, [_vector(number, row) for number, row in enumerate(rows)])


def write_vectors(folder: Folder, rows: Sequence[dict[str, Any]], width: int) -> str:
    """Write vectors.parquet; its digest."""
    content = parquet_bytes(pa.Table.from_pylist(list(rows), schema=vector_schema(width)))
    folder.write(VECTORS_FILE, content)
    return digest(content)


def write_plan(
    folder: Folder, rows: Sequence[dict[str, Any]], means: dict[str, list[float]], failed: dict[str, int]
) -> None:
    """Vectors without exemplars, the mean vector per layer, and how many vectors failed for which reason."""
    table = pa.Table.from_pylist(list(rows), schema=vector_schema(len(rows[0]["vector"])))
    metadata = {"means": json.dumps(means), "failed": json.dumps(failed)}
    folder.write(PLAN_FILE, parquet_bytes(table.replace_schema_metadata(metadata)))


def read_plan(folder: Folder) -> tuple[list[dict[str, Any]], dict[int, Tensor], dict[str, int]]:
    """What `write_plan` wrote."""
    table = pq.read_table(io.BytesIO(folder.read(PLAN_FILE)))
    means = json.loads(table.schema.metadata[b"means"])
    failed = json.loads(table.schema.metadata[b"failed"])
    return table.to_pylist(), {int(layer): torch.tensor(mean) for layer, mean in means.items()}, failed


def digest(content: bytes) -> str:
    """32 hex digits of a file's bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _vector(number: int, row: dict[str, Any]) -> CollectedVector:
    exemplars = tuple(
        Exemplar(
            window=Window(tuple(one["ids"]), tuple(one["pieces"])),
            activations=np.asarray(one["activations"], dtype=np.float32),
            kind=one["kind"],
            quantile=one["quantile"],
        )
        for one in row["exemplars"]
    )
    kept = ("vector_id", "kind", "layer", "group", "origin", "token")
    return CollectedVector(
        **{name: row[name] for name in kept},
        vector=np.asarray(row["vector"], dtype=np.float32),
        exemplars=LatentExemplars(row["layer"], number, row["density"], row["maximum"], exemplars),
        splits=tuple(one["split"] for one in row["exemplars"]),
    )
