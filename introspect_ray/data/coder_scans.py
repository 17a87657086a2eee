"""What all shards of texts kept of one coder, and what steps of merging did with it, as they lie on disk (merging.py).

Whatever is read of a shard for a block of latents is one part of a file (packs.py), so that as many bytes are read as
there are, however many blocks there are. Shards pass one at a time and what is kept is cut back in between, so that
memory follows from the number of latents in a block and not from the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, UInt64

from introspect_ray.config import CollectConfig
from introspect_ray.data.collecting import MERGED_NAME, ScanOrder, limits_of
from introspect_ray.data.packs import read_part
from introspect_ray.data.scanning import scan_file
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed
from introspect_ray.features.collection import Pool, Rows, in_order, joined, kept_rows, no_rows, pool_of
from introspect_ray.features.exemplar_store import WINDOW_FIELDS
from introspect_ray.features.picking import Picked, SilentFinder, pick_firing

Read = TypeVar("Read")
IDS = np.dtype("<u8")
"""Ids of windows on disk."""


class CoderScans:
    """What all shards kept of one coder."""

    def __init__(self, work: Folder, config: CollectConfig, coder: int, num_shards: int, num_latents: int):
        self.work, self.config, self.coder = work, config, coder
        self.num_shards, self.num_latents = num_shards, num_latents
        self.limits = limits_of(config)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_latents // self.config.latents_per_block)

    @property
    def pool(self) -> Pool:
        """The pool of all texts."""
        return self._pooled[0]

    @property
    def pool_windows(self) -> pa.Table:
        """The windows of the pool, in its order."""
        return self._pooled[1]

    @cached_property
    def finder(self) -> SilentFinder:
        return SilentFinder(self.pool, tokens_of(self.pool_windows))

    def chosen_name(self, kind: str, block: int) -> str:
        """Name of a file of a block; `kind` is rows or windows (ids, a part per shard)."""
        return f"chosen/{self.coder:02d}/{kind}-{block:05d}"

    def rows(self, block: int) -> tuple[Rows, Origins]:
        """The rows kept of a block of latents, by latent, split and window; and which shards their windows are of."""
        kept: list[Rows] = []
        origins = Origins()
        waiting = 0
        for shard in range(self.num_shards):
            part = self._rows(shard, block)
            origins.add(part.windows, shard)
            kept.append(part)
            waiting += len(part)
            if waiting > self.config.buffer_rows:
                kept, waiting = [kept_rows(joined(kept), self.pool, self.limits)], 0
                origins.keep(kept[0].windows)
        return in_order(kept_rows(joined(kept), self.pool, self.limits)), origins

    def chosen_rows(self, block: int) -> Rows:
        """The rows that the block chose."""
        name = self.chosen_name("rows", block)
        return _to_rows(self._checked(None, lambda: _table(self.work.read(name))))

    def chosen_ids(self, block: int, shard: int) -> UInt64[np.ndarray, " W"]:
        """Windows of a shard that a block chose."""
        name = self.chosen_name("windows", block)
        found = self._checked(None, lambda: np.frombuffer(read_part(self.work, name, shard), IDS))
        return found.astype(np.uint64)

    def firing(self, rows: Rows) -> Picked:
        """Exemplars among the rows of a block."""
        limits = self.config.limits
        return pick_firing(rows, self.pool, self.limits, limits.quantiles, limits.random)

    def windows(self, shard: int) -> pa.Table:
        """The windows of the rows that a shard kept, by id."""
        return self._table("windows", shard)

    def chosen_windows(self, block: int) -> pa.Table:
        """The windows that a block chose, by id."""
        tables = [WINDOW_FIELDS.empty_table()]
        for shard in range(self.num_shards):
            content = self._checked(None, partial(self._part, "gathered", shard, block))
            if content:
                tables.append(self._checked(None, partial(_table, content)))
        return pa.concat_tables(tables).sort_by("window")

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens on which each latent fires, and its largest activation."""
        counts, maxima = np.zeros(self.num_latents, dtype=np.int64), np.zeros(self.num_latents, dtype=np.float32)
        for shard in range(self.num_shards):
            table = self._table("latents", shard)
            latents = table["latent"].to_numpy()
            counts[latents] += table["count"].to_numpy()
            maxima[latents] = np.maximum(maxima[latents], table["maximum"].to_numpy())
        return counts, maxima

    @cached_property
    def _pooled(self) -> tuple[Pool, pa.Table]:
        pool, table = Pool(np.empty(0, np.uint64), np.empty(0, np.int64)), WINDOW_FIELDS.empty_table()
        for shard in range(self.num_shards):
            both = pa.concat_tables([table, self._table("pool", shard)])
            pool = pool_of(both["window"].to_numpy(), both["split"].to_numpy(), self.limits)
            table = in_order_of(both, pool.windows)
        return pool, table

    def _rows(self, shard: int, block: int) -> Rows:
        content = self._checked(shard, partial(self._part, "rows", shard, block))
        return _to_rows(self._checked(shard, partial(_table, content))) if content else no_rows()

    def _part(self, kind: str, shard: int, block: int) -> bytes:
        return read_part(self.work, scan_file(self.coder, kind, shard), block)

    def _table(self, kind: str, shard: int) -> pa.Table:
        return self._checked(shard, lambda: _table(self.work.read(scan_file(self.coder, kind, shard))))

    def _checked(self, shard: int | None, read: Callable[[], Read]) -> Read:
        """What `read` returns: what a shard gave, or with None, what a step did. Of what is damaged after it was done,
        the notes that it is are removed, so that the next run makes it again."""
        try:
            return read()
        except (OSError, pa.ArrowException) as error:
            if shard is None:
                self.work.remove_folder(MERGED_NAME)
            else:
                self.work.remove(ScanOrder(shard, "").name)
            what = f"what is merged in {self.work.url}" if shard is None else f"shard {shard} of {self.work.url}"
            raise RunFailed(
                f"{what} was damaged after it was written ({str(error).splitlines()[0]}); the same command makes it"
                " again"
            ) from error


class Origins:
    """Which shard each window of a growing set is of."""

    def __init__(self) -> None:
        self._windows = [np.empty(0, np.uint64)]
        self._shards = [np.empty(0, np.int32)]

    def add(self, windows: UInt64[np.ndarray, " R"], shard: int) -> None:
        """Windows of a shard, of which no other has any."""
        self._windows.append(np.unique(windows))
        self._shards.append(np.full(len(self._windows[-1]), shard, np.int32))

    def keep(self, windows: UInt64[np.ndarray, " R"]) -> None:
        """Forget all others."""
        found, shards = np.concatenate(self._windows), np.concatenate(self._shards)
        there = np.isin(found, windows)
        self._windows, self._shards = [found[there]], [shards[there]]

    def by_shard(self, num_shards: int) -> list[UInt64[np.ndarray, " W"]]:
        """The windows of every shard, by id."""
        found, shards = np.concatenate(self._windows), np.concatenate(self._shards)
        order = np.lexsort((found, shards))
        edges: Int[np.ndarray, " shards_and_1"] = np.searchsorted(shards[order], np.arange(num_shards + 1))
        return np.split(found[order], edges[1:-1])


def _table(content: bytes) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
        return file.read()


def tokens_of(windows: pa.Table) -> list[np.ndarray]:
    """Tokens of every window."""
    return [np.array(tokens, dtype=np.int64) for tokens in windows["tokens"].to_pylist()]


def in_order_of(table: pa.Table, wanted: np.ndarray) -> pa.Table:
    """Rows of a table by the ids of their windows, in the order that is wanted."""
    ids = table["window"].to_numpy()
    assert np.isin(wanted, ids).all(), "every window that is chosen has its tokens kept"
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
