"""One block of latents, from what all shards kept of them to exemplars on disk: what an actor does per call, no Ray.

Shards pass one at a time and what is kept is cut back in between, so that memory follows from the number of latents in
a block and not from the number of shards.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from introspect_ray.config import CollectConfig
from introspect_ray.data.collecting import BlockOrder, ScanOrder, limits_of
from introspect_ray.data.scanning import scan_file
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed
from introspect_ray.features.collection import Pool, Rows, in_order, joined, kept_rows, pool_of
from introspect_ray.features.exemplar_store import WINDOW_FIELDS, block_name, encoded, row_table
from introspect_ray.features.picking import SilentFinder, pick_firing, pick_silent, random_windows

Read = TypeVar("Read")


class BlockInfo(BaseModel):
    """A finished block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_key: str
    index: int
    files: dict[str, int]
    """Name in the coder's folder and size in bytes."""


def finished_block(work: Folder, order: BlockOrder, coder_folder: Folder) -> BlockInfo | None:
    """The block as it lies there if it is done and its files are whole, else None."""
    try:
        info = BlockInfo.model_validate_json(work.read(order.name))
    except (OSError, ValidationError):
        return None
    if (info.run_key, info.index) != (order.run_key, order.index):
        return None
    return info if all(coder_folder.size(name) == size for name, size in info.files.items()) else None


class CoderScans:
    """What all shards kept of one coder."""

    def __init__(self, work: Folder, config: CollectConfig, coder: int, num_shards: int):
        self.work, self.config, self.coder, self.num_shards = work, config, coder, num_shards
        self.limits = limits_of(config)

    @cached_property
    def pool(self) -> Pool:
        """The pool of all texts."""
        table = pa.concat_tables([WINDOW_FIELDS.empty_table(), *self._windows(pooled=True)])
        return pool_of(table["window"].to_numpy(), table["split"].to_numpy().astype(np.int64), self.limits)

    @cached_property
    def pool_windows(self) -> pa.Table:
        """The windows of the pool, in its order."""
        return _in_order(self.windows(self.pool.windows), self.pool.windows)

    @cached_property
    def finder(self) -> SilentFinder:
        return SilentFinder(self.pool, _tokens(self.pool_windows))

    def rows(self, low: int, high: int) -> Rows:
        """The rows kept of latents `low` up to `high`, by latent, split and window."""
        kept: list[Rows] = []
        waiting = 0
        for shard in range(self.num_shards):
            part = self._rows(shard, low, high)
            kept.append(part)
            waiting += len(part)
            if waiting > self.config.buffer_rows:
                kept, waiting = [kept_rows(joined(kept), self.pool, self.limits)], 0
        return in_order(kept_rows(joined(kept), self.pool, self.limits))

    def windows(self, wanted: np.ndarray) -> pa.Table:
        """Windows by id, in order of the ids; each is in one shard or more, with the same content."""
        found = [table.filter(pa.array(np.isin(table["window"].to_numpy(), wanted))) for table in self._windows()]
        table = pa.concat_tables([WINDOW_FIELDS.empty_table(), *found])
        assert table.num_rows == len(wanted), "every window that is kept has its tokens kept, once"
        return table.sort_by("window")

    def counts(self, num_latents: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens on which each latent fires, and its largest activation."""
        counts, maxima = np.zeros(num_latents, dtype=np.int64), np.zeros(num_latents, dtype=np.float32)
        for shard in range(self.num_shards):
            with self._open("latents", shard) as file:
                table = self._checked(shard, file.read)
            latents = table["latent"].to_numpy()
            counts[latents] += table["count"].to_numpy()
            maxima[latents] = np.maximum(maxima[latents], table["maximum"].to_numpy())
        return counts, maxima

    def _windows(self, pooled: bool = False) -> Iterator[pa.Table]:
        for shard in range(self.num_shards):
            with self._open("windows", shard) as file:
                table = self._checked(shard, file.read)
            yield (table.filter(table["pool"]) if pooled else table).select(WINDOW_FIELDS.names)

    def _rows(self, shard: int, low: int, high: int) -> Rows:
        with self._open("rows", shard) as file:
            groups = []
            for number in range(file.num_row_groups):
                statistics = file.metadata.row_group(number).column(0).statistics
                if statistics.min < high and statistics.max >= low:
                    groups.append(number)
            table = self._checked(shard, partial(file.read_row_groups, groups)).combine_chunks()
        latents = table["latent"].to_numpy()
        start, stop = np.searchsorted(latents, [low, high])
        return _to_rows(table.slice(start, stop - start))

    def _open(self, kind: str, shard: int) -> pq.ParquetFile:
        name = scan_file(self.coder, kind, shard)
        return self._checked(shard, lambda: pq.ParquetFile(self.work.open(name), page_checksum_verification=True))

    def _checked(self, shard: int, read: Callable[[], Read]) -> Read:
        """What `read` returns; a shard that is damaged after it was done is made again by the next run."""
        try:
            return read()
        except (OSError, pa.ArrowException) as error:
            self.work.remove(ScanOrder(shard, "").name)
            raise RunFailed(
                f"shard {shard} of {self.work.url} was damaged after it was written ({str(error).splitlines()[0]});"
                " the same command makes it again"
            ) from error


def merge_block(scans: CoderScans, output: Folder, order: BlockOrder, block: int, num_latents: int) -> BlockInfo:
    """Write the exemplars of one block of a coder's latents."""
    config = scans.config
    low = block * config.latents_per_block
    rows = scans.rows(low, min(low + config.latents_per_block, num_latents))
    limits = config.limits
    firing = pick_firing(rows, scans.pool, scans.limits, limits.quantiles, limits.random)
    firing_windows = scans.windows(np.unique(firing.rows.windows))
    tokens = dict(zip(firing_windows["window"].to_pylist(), _tokens(firing_windows), strict=True))
    silent = pick_silent(firing, rows, scans.pool, scans.finder, tokens, limits.silent)
    random = scans.pool.windows[random_windows(scans.pool, limits.random)]
    wanted = np.unique(np.concatenate([random, silent.rows.windows]))
    others = _in_order(scans.pool_windows, np.setdiff1d(wanted, firing.rows.windows), scans.pool.windows)
    windows = pa.concat_tables([firing_windows, others]).sort_by("window")
    is_random = pa.array(np.isin(windows["window"].to_numpy(), random))
    files = {
        block_name("blocks", block): encoded(row_table([firing, silent])),
        block_name("windows", block): encoded(windows.append_column("random", is_random)),
    }
    for name, content in files.items():
        output.write(name, content)
    info = BlockInfo(
        run_key=order.run_key, index=order.index, files={name: len(content) for name, content in files.items()}
    )
    scans.work.write(order.name, (info.model_dump_json() + "\n").encode())
    return info


def stats_bytes(counts: np.ndarray, maxima: np.ndarray) -> bytes:
    """The table of all latents of a coder."""
    buffer = io.BytesIO()
    table = pa.table({"latent": np.arange(len(counts), dtype=np.int32), "count": counts, "maximum": maxima})
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def _tokens(windows: pa.Table) -> list[np.ndarray]:
    return [np.array(tokens, dtype=np.int64) for tokens in windows["tokens"].to_pylist()]


def _in_order(table: pa.Table, wanted: np.ndarray, there: np.ndarray | None = None) -> pa.Table:
    """Rows of a table by the ids of their windows; `there` are those of the table, in its order."""
    ids = table["window"].to_numpy() if there is None else there
    order = np.argsort(ids)
    return table.take(pa.array(order[np.searchsorted(ids, wanted, sorter=order)]))


def _to_rows(table: pa.Table) -> Rows:
    positions, values = table["positions"].combine_chunks(), table["values"].combine_chunks()
    offsets = positions.offsets.to_numpy().astype(np.int64)
    return Rows(
        table["latent"].to_numpy(),
        table["split"].to_numpy(),
        table["window"].to_numpy(),
        table["peak"].to_numpy(),
        offsets - offsets[0],
        positions.flatten().to_numpy(),
        values.flatten().to_numpy(),
    )
