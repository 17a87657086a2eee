"""Shards survive the round trip exactly; what is torn, foreign or inconsistent is not taken for done."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from introspect_ray.data.shards import (
    ShardOrder,
    content_digest,
    finished_shard,
    parquet_bytes,
    read_items,
    to_records,
    to_table,
    vector_matrix,
    write_items,
    write_records,
)
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.tasks.base import COMMON_FIELDS, failed

ORDER = ShardOrder(3, "a_run")
ITEM = {"item_id": "i", "split": "train", "group": "g"}


def schema(kind=None):
    vector = pa.field("vector", pa.fixed_shape_tensor(kind or pa.float16(), (3,)))
    return pa.schema([*COMMON_FIELDS, pa.field("layers", pa.list_(pa.int32())), vector])


def record(number, vector):
    common = {"record_id": f"r{number}", "item_id": f"i{number}", "split": "test", "group": "g", "status": "ok"}
    return {**common, "detail": None, "layers": [number, 2], "vector": np.asarray(vector, np.float32)}


RECORDS = [
    record(0, [1, 2, 3]),
    failed(ITEM, "no_reason", "because"),
    record(1, [0.5, -65504, 6e-5]),
    record(2, [0, 0, 0]),
]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()])
def test_records_come_back_bit_for_bit_with_nulls_in_their_place(kind):
    table = to_table(RECORDS, schema(kind))
    content = parquet_bytes(table)
    found = pq.read_table(pa.BufferReader(content))
    assert str(found.schema.field("vector").type).startswith("extension<arrow.fixed_shape_tensor")
    back = to_records(found)
    assert [row["status"] for row in back] == ["ok", "no_reason", "ok", "ok"]
    assert back[1]["vector"] is None and back[1]["layers"] is None
    for before, after in zip(RECORDS, back, strict=True):
        if "vector" in before:
            assert after["vector"].dtype == kind.to_pandas_dtype()
            assert after["vector"].tobytes() == before["vector"].astype(kind.to_pandas_dtype()).tobytes()
    assert content_digest(found) == content_digest(table)


def test_vector_matrix_of_a_slice_and_of_nothing():
    table = to_table(RECORDS, schema(pa.float32()))
    matrix, null = vector_matrix(table.slice(1, 2)["vector"])
    assert null.tolist() == [True, False]
    assert np.array_equal(matrix, np.array([[0, 0, 0], [0.5, -65504, 6e-5]], np.float32))
    assert vector_matrix(table.slice(0, 0)["vector"])[0].shape == (0, 3)
    assert vector_matrix(table.slice(1, 1)["vector"])[1].tolist() == [True]


def test_digest_tells_one_bit_and_the_order():
    def digest(records):
        return content_digest(to_table(records, schema(pa.float32())))

    changed = record(0, [1, 2, np.nextafter(np.float32(3), np.float32(4))])
    assert len({digest(RECORDS), digest([changed, *RECORDS[1:]]), digest(RECORDS[::-1])}) == 3


def test_a_column_beside_the_schema_is_a_defect():
    with pytest.raises(AssertionError, match="surplus"):
        to_table([{**RECORDS[0], "surplus": 1}], schema())


@pytest.mark.parametrize("where", ["plain", "memory"])
def test_written_is_done(tmp_path, where):
    folder = Folder(str(tmp_path / "out") if where == "plain" else f"memory://{tmp_path}/out")
    assert finished_shard(folder, ORDER) is None
    info = write_records(folder, ORDER, RECORDS, schema())
    assert finished_shard(folder, ORDER) == info
    assert (info.num_rows, info.num_bytes) == (4, len(folder.read("shards/shard-00003.parquet")))
    assert folder.names() == ["shards"] and Folder(f"{folder.url}/shards").names() == ["shard-00003.parquet"]


def test_torn_and_foreign_shards_are_not_done(tmp_path):
    folder = Folder(str(tmp_path))
    path = tmp_path / ORDER.name
    info = write_records(folder, ORDER, RECORDS, schema())
    whole = path.read_bytes()
    for torn in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole[len(whole) // 2 :], b"x" * len(whole)):
        path.write_bytes(torn)
        assert finished_shard(folder, ORDER) is None
    group = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):
        flipped = bytearray(whole)
        flipped[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
        path.write_bytes(flipped)
        assert finished_shard(folder, ORDER) is None, column.path_in_schema
    path.write_bytes(whole)
    assert finished_shard(folder, ORDER) == info
    assert finished_shard(folder, ShardOrder(3, "another_run")) is None
    path.rename(tmp_path / ShardOrder(4, "a_run").name)
    assert finished_shard(folder, ShardOrder(4, "a_run")) is None
    rows_lost = pq.read_table(pa.BufferReader(whole)).slice(0, 3)
    path.write_bytes(parquet_bytes(rows_lost))
    assert finished_shard(folder, ORDER) is None
    path.write_bytes(parquet_bytes(pa.table({"a": [1]})))
    assert finished_shard(folder, ORDER) is None


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    folder.write("a.bin", b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"^.*/a.bin cannot be written: disk full$"):
        folder.write("a.bin", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert folder.read("a.bin") == b"old"


def test_a_name_appears_only_when_its_content_is_there(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def spy(source, target):
        names = [path.name for path in tmp_path.iterdir()]
        seen.append((names, Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    Folder(str(tmp_path)).write("a.bin", b"12345")
    ((names, size),) = seen
    assert size == 5 and len(names) == 1 and names[0].startswith(TEMPORARY)


def test_items_come_back_only_for_their_run(tmp_path):
    folder = Folder(str(tmp_path))
    items = [{**ITEM, "text": "é\u2028", "list": [1, None, 2.5]}]
    write_items(folder, ORDER, items)
    assert read_items(folder, ORDER) == items
    with pytest.raises(AssertionError, match="another run"):
        read_items(folder, ShardOrder(3, "another_run"))
