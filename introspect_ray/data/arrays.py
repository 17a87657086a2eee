"""Named arrays in one file, written whole or not at all, and read back only as they were written.

A Parquet file with one row per array and checksums on its pages; its metadata name the key of what it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from introspect_ray.data.shards import parquet_bytes
from introspect_ray.data.storage import Folder

_KEY, _NOTE = b"introspect_ray.key", b"introspect_ray.note"


def write_arrays(folder: Folder, name: str, key: str, arrays: Mapping[str, np.ndarray], note: Any = None) -> None:
    """Write the arrays, and anything that goes into JSON beside them, in one atomic step."""
    held = {label: np.asarray(array, order="C") for label, array in arrays.items()}
    table = pa.table(
        {
            "name": pa.array(list(held), pa.string()),
            "dtype": pa.array([array.dtype.newbyteorder("<").str for array in held.values()], pa.string()),
            "shape": pa.array([list(array.shape) for array in held.values()], pa.list_(pa.int64())),
            "data": pa.array(
                [array.astype(array.dtype.newbyteorder("<")).tobytes() for array in held.values()], pa.large_binary()
            ),
        }
    )
    folder.write(name, parquet_bytes(table.replace_schema_metadata({_KEY: key, _NOTE: json.dumps(note)})))


def read_arrays(folder: Folder, name: str, key: str) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays and the note, or `None` if the file is absent, damaged, or of another key."""
    try:
        content = folder.read(name)
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as parquet:
            table = parquet.read()
    except (OSError, pa.ArrowException):
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(_KEY) != key.encode():
        return None
    arrays = {
        row["name"]: np.frombuffer(row["data"], dtype=row["dtype"]).reshape(row["shape"]) for row in table.to_pylist()
    }
    return arrays, json.loads(metadata[_NOTE])
