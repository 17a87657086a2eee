"""Reading a finished dataset: the manifest is trusted, the directory listing is not."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from introspect_ray.config import GenerateConfig
from introspect_ray.data.manifest import SELECTION_NAME, Manifest, read_manifest
from introspect_ray.data.shards import (
    ShardInfo,
    canonical_line,
    content_digest,
    to_records,
    vector_columns,
    vector_matrix,
)
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.tasks.base import OK, Record


@dataclass(frozen=True)
class Dataset:
    """A finished dataset folder."""

    folder: Folder
    manifest: Manifest

    @property
    def config(self) -> GenerateConfig:
        """The config it was generated with."""
        return GenerateConfig.model_validate(self.manifest.config)

    def records(self, split: str | None, columns: Sequence[str] | None = None, selected: bool = True) -> list[Record]:
        """Records in shard order; `split` None is all of them. Vectors are float32 numpy arrays, whatever is stored.

        `selected` gives those to train and score on; otherwise failed records come too, their task columns None.
        """
        return float32_records(self.table(split, columns, selected))

    def record_batches(self, split: str, size: int) -> Iterator[list[Record]]:
        """The selected `records` of a split, at most `size` at a time, holding one shard in memory."""
        for table in self.tables(split):
            for start in range(0, table.num_rows, size):
                yield float32_records(table.slice(start, size))

    def table(self, split: str | None, columns: Sequence[str] | None = None, selected: bool = True) -> pa.Table:
        """`records` as an Arrow table, vectors as stored. Raises UserError for a torn shard or a vector with NaN."""
        return pa.concat_tables(self.tables(split, columns, selected))

    def tables(
        self, split: str | None, columns: Sequence[str] | None = None, selected: bool = True
    ) -> Iterator[pa.Table]:
        """The parts of `table`, one per shard, so that only one shard need be in memory."""
        chosen = self.selection() if selected and self.manifest.has_selection else None
        needed = None if columns is None else list(dict.fromkeys([*columns, "record_id", "split", "status"]))
        for shard in self.manifest.shards:
            table = read_shard(self.folder, shard, needed)
            keep = pa.array([True] * table.num_rows, pa.bool_())
            if split is not None:
                keep = pc.and_(keep, pc.equal(table["split"], split))
            if chosen is not None:
                keep = pc.and_(keep, pc.is_in(table["record_id"], value_set=chosen))
            elif selected:
                keep = pc.and_(keep, pc.equal(table["status"], OK))
            yield table.filter(keep) if columns is None else table.filter(keep).select(list(columns))

    def check_shards(self) -> None:
        """Read every shard once. Raises UserError for the first that is torn or holds a vector with NaN."""
        for shard in self.manifest.shards:
            read_shard(self.folder, shard, None)

    def selection(self) -> pa.Array:
        """Ids of the selected records. Raises UserError if their list is missing or torn."""
        with _opened(self.folder, SELECTION_NAME) as file:
            table = _parse(f"{self.folder.url}/{SELECTION_NAME}", file, ["record_id"])
        return table["record_id"].combine_chunks()


def float32_records(table: pa.Table) -> list[Record]:
    """Rows as dicts, vectors as float32: sums of float16 overflow at 65,504, so that even a norm is wrong in it."""
    records = to_records(table)
    for record in records:
        for name, value in record.items():
            if isinstance(value, np.ndarray):
                record[name] = value.astype(np.float32)
    return records


def open_dataset(url: str, task: str | None = None) -> Dataset:
    """The finished dataset at `url`. Raises UserError if it is none, of another task, or a shard is missing or torn.

    Every shard's size is compared with the manifest here, so that damage shows before a model loads.
    """
    folder = Folder(url)
    manifest = read_manifest(folder)
    if task is not None and manifest.task != task:
        raise UserError(f"dataset {url} is of task {manifest.task}, expected {task}")
    for shard in manifest.shards:
        _check_size(folder, shard, folder.size(shard.name))
    return Dataset(folder, manifest)


def read_shard(folder: Folder, shard: ShardInfo, columns: Sequence[str] | None) -> pa.Table:
    """The records of one shard, checked against the manifest's size and rows; every vector that is there is finite."""
    table = load_shard(folder, shard, columns)
    for name, bad in nonfinite_rows(table).items():
        raise UserError(
            f"{folder.url}/{shard.name}, row {bad[0]}: column {name!r} holds a NaN or infinite value,"
            " expected finite numbers"
        )
    return table


def load_shard(folder: Folder, shard: ShardInfo, columns: Sequence[str] | None) -> pa.Table:
    """The records of one shard, vectors unchecked. Raises UserError if size or rows are not the manifest's.

    Of a file, only the pages of `columns` are read.
    """
    where = f"{folder.url}/{shard.name}"
    with _opened(folder, shard.name) as file:
        _check_size(folder, shard, file.seek(0, io.SEEK_END))
        file.seek(0)
        table = _parse(where, file, columns)
    if table.num_rows != shard.num_rows:
        raise UserError(
            f"{where} has {table.num_rows} rows, dataset.json says {shard.num_rows}: generate the dataset again"
        )
    return table.replace_schema_metadata(None)


def holds_its_records(folder: Folder, shard: ShardInfo) -> bool:
    """Whether the shard holds exactly the records that it was written with, by their digest."""
    try:
        return content_digest(load_shard(folder, shard, None)) == shard.digest
    except UserError:
        return False


def nonfinite_rows(table: pa.Table) -> dict[str, list[int]]:
    """Vector column -> numbers of the rows whose vector holds a NaN or an infinity; clean columns are left out."""
    found = {
        name: np.flatnonzero(~np.isfinite(vector_matrix(table[name])[0]).all(axis=1)).tolist()
        for name in vector_columns(table.schema)
    }
    return {name: rows for name, rows in found.items() if rows}


def _opened(folder: Folder, name: str) -> io.IOBase:
    try:
        return folder.open(name)
    except FileNotFoundError:
        raise UserError(
            f"{folder.url}/{name} is missing, but dataset.json lists it: generate the dataset again"
        ) from None


def _parse(where: str, file: io.IOBase, columns: Sequence[str] | None) -> pa.Table:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            unknown = set(columns or ()) - set(parquet.schema_arrow.names)
            if unknown:
                raise UserError(f"{where} has no column {sorted(unknown)[0]!r}")
            return parquet.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where} is damaged: {error}; generate the dataset again") from None


def _check_size(folder: Folder, shard: ShardInfo, size: int | None) -> None:
    if size != shard.num_bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(
            f"{folder.url}/{shard.name} {found}, dataset.json says {shard.num_bytes} bytes ({shard.num_rows} rows):"
            " generate the dataset again"
        )


def canonical_dump(dataset: Dataset) -> str:
    """All records as sorted JSON lines, each saying if it is selected; equal for equal datasets in any layout."""
    selected = set(dataset.table(None, ["record_id"])["record_id"].to_pylist())
    lines = (
        canonical_line({**record, "selected": record["record_id"] in selected})
        for record in to_records(dataset.table(None, selected=False))
    )
    return "".join(line + "\n" for line in sorted(lines))
