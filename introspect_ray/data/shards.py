"""Shards: one Parquet file of records per `items_per_shard` work items, self-describing, done or not done.

    plan/shard-00000.parquet         work items, one JSON text per row
    plan/shard-00000.attempts.json   only while the shard is being made, see attempts.py
    shards/shard-00000.parquet       their records; schema metadata names the run, the shard and a digest of the content

A shard counts as done if its footer opens, names this run and this shard, and agrees with itself about its rows, and
if every page has the checksum it was written with. All else (torn, foreign, damaged on the disk, half written by
something that does not rename) is written again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from introspect_ray.data.storage import Folder
from introspect_ray.tasks.base import Item, Record

_RUN, _SHARD, _ROWS, _DIGEST, _SLOW = (
    b"introspect_ray.run",
    b"introspect_ray.shard",
    b"introspect_ray.rows",
    b"introspect_ray.digest",
    b"introspect_ray.slow",
)
ATTEMPTS_SUFFIX = ".attempts.json"


@dataclass(frozen=True)
class ShardOrder:
    """Which shard of which run: all that a worker needs beside the config."""

    index: int
    run_key: str

    @property
    def plan_name(self) -> str:
        return f"plan/shard-{self.index:05d}.parquet"

    @property
    def attempts_name(self) -> str:
        return f"plan/shard-{self.index:05d}{ATTEMPTS_SUFFIX}"

    @property
    def name(self) -> str:
        return f"shards/shard-{self.index:05d}.parquet"


class ShardInfo(BaseModel):
    """A finished shard, as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    num_rows: int
    num_bytes: int
    digest: str
    """32 hex digits over the records in their order, independent of the Parquet encoding."""
    slow_because: str = ""
    """Why its target took a slower way than targets can, such as plain hooks; empty if it did not."""


# --- tables -----------------------------------------------------------------------------------------------------


def vector_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns that hold one vector per row."""
    return [field.name for field in schema if isinstance(field.type, pa.FixedShapeTensorType)]


def to_table(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """Records as a table of `schema`; a key that a record lacks is null, one that the schema lacks is a defect."""
    known = set(schema.names)
    for record in records:
        assert known.issuperset(record), (
            f"record {record['record_id']} has columns beside the schema: {set(record) - known}"
        )
    vectors = set(vector_columns(schema))
    columns = [
        _vector_array([record.get(field.name) for record in records], field.type)
        if field.name in vectors
        else pa.array([record.get(field.name) for record in records], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _vector_array(vectors: Sequence[Any], tensor: pa.FixedShapeTensorType) -> pa.Array:
    """Vectors (or None) as an Arrow fixed-shape tensor column."""
    (width,) = tensor.shape
    matrix = np.zeros((len(vectors), width), dtype=tensor.value_type.to_pandas_dtype())
    for row, vector in enumerate(vectors):
        if vector is not None:
            assert np.shape(vector) == (width,), f"a vector has shape {np.shape(vector)}, expected ({width},)"
            matrix[row] = vector
    missing = pa.array([vector is None for vector in vectors], pa.bool_())
    storage = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), width, mask=missing)
    return pa.ExtensionArray.from_storage(tensor, storage)


def vector_matrix(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A tensor column as a matrix [rows, width] in its stored dtype (zeros where null), and which rows are null."""
    storage = column.combine_chunks()
    storage = (storage.chunk(0) if isinstance(storage, pa.ChunkedArray) else storage).storage
    width = storage.type.list_size
    null = np.asarray(storage.is_null())
    matrix = np.zeros((len(storage), width), dtype=storage.type.value_type.to_pandas_dtype())
    if not null.all():
        # flatten() leaves null rows out, so that only the others have values to place.
        matrix[~null] = storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix, null


def to_records(table: pa.Table) -> list[Record]:
    """Rows as dicts; vectors as numpy arrays in their stored dtype, None where null."""
    vectors = vector_columns(table.schema)
    records = table.drop_columns(vectors).to_pylist() if vectors else table.to_pylist()
    for name in vectors:
        matrix, null = vector_matrix(table[name])
        for record, vector, is_null in zip(records, matrix, null, strict=True):
            record[name] = None if is_null else vector
    return records


def canonical_line(record: Record) -> str:
    """One record as JSON with sorted keys; a vector as the hex digits of its little-endian bytes."""
    shown = {
        name: value.astype(value.dtype.newbyteorder("<")).tobytes().hex() if isinstance(value, np.ndarray) else value
        for name, value in record.items()
    }
    return json.dumps(shown, sort_keys=True, ensure_ascii=False)


def content_digest(table: pa.Table) -> str:
    """32 hex digits of the records' canonical lines, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for record in to_records(table):
        digest.update(canonical_line(record).encode() + b"\n")
    return digest.hexdigest()


# --- files ------------------------------------------------------------------------------------------------------


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one zstd Parquet file with page checksums."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def write_records(
    folder: Folder, order: ShardOrder, records: Sequence[Record], schema: pa.Schema, slow_because: str = ""
) -> ShardInfo:
    """Write a finished shard in one atomic step."""
    table = to_table(records, schema)
    digest = content_digest(table)
    metadata = {_RUN: order.run_key, _SHARD: str(order.index), _ROWS: str(table.num_rows), _DIGEST: digest}
    metadata[_SLOW] = slow_because
    content = parquet_bytes(table.replace_schema_metadata(metadata))
    folder.write(order.name, content)
    return ShardInfo(
        name=order.name, num_rows=table.num_rows, num_bytes=len(content), digest=digest, slow_because=slow_because
    )


def finished_shard(folder: Folder, order: ShardOrder) -> ShardInfo | None:
    """The shard as it lies there if it is done, else None; reads all of it."""
    try:
        content = folder.read(order.name)
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as parquet:
            metadata: Mapping[bytes, bytes] = parquet.schema_arrow.metadata or {}
            rows = parquet.metadata.num_rows
            parquet.read()
    except (OSError, pa.ArrowException):
        return None
    expected = {_RUN: order.run_key.encode(), _SHARD: str(order.index).encode(), _ROWS: str(rows).encode()}
    if rows == 0 or any(metadata.get(key) != value for key, value in expected.items()):
        return None
    return ShardInfo(
        name=order.name,
        num_rows=rows,
        num_bytes=len(content),
        digest=metadata[_DIGEST].decode(),
        slow_because=metadata.get(_SLOW, b"").decode(),
    )


def write_items(folder: Folder, order: ShardOrder, items: Sequence[Item]) -> None:
    """Write the work items of a shard."""
    table = pa.table({"item": [json.dumps(item, sort_keys=True, ensure_ascii=False) for item in items]})
    folder.write(order.plan_name, parquet_bytes(table.replace_schema_metadata({_RUN: order.run_key})))


def read_items(folder: Folder, order: ShardOrder) -> list[Item]:
    """The work items of a shard, as planned by the run that `order` names."""
    table = pq.read_table(io.BytesIO(folder.read(order.plan_name)))
    assert table.schema.metadata[_RUN] == order.run_key.encode(), f"{order.plan_name} is of another run"
    return [json.loads(item) for item in table["item"].to_pylist()]
