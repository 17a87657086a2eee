"""From what all shards kept to exemplars on disk, in three steps of which actors make one order per call; no Ray.

    choose   per block of latents: its rows of all shards     -> work/chosen/CODER/: rows, and the ids of their windows
    gather   per shard: its windows, and what blocks chose    -> work/scans/CODER/gathered-SHARD, a part per block
    merge    per block: its rows, its part of every shard     -> blocks/, windows/ in the coder's folder

A step begins when the one before is done with all of its orders.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from introspect_ray.config import CollectConfig
from introspect_ray.data.coder_scans import IDS, CoderScans, in_order_of, tokens_of
from introspect_ray.data.collecting import Collecting, StepOrder
from introspect_ray.data.packs import packed
from introspect_ray.data.scanning import rows_table, scan_file
from introspect_ray.data.storage import Folder
from introspect_ray.features.exemplar_store import block_name, encoded, row_table
from introspect_ray.features.picking import pick_silent, random_windows


class ChooseOrder(StepOrder):
    """Which block of latents is to choose its rows."""

    step = "choose"


class GatherOrder(StepOrder):
    """Which shard of which coder is to lay out the windows that blocks chose."""

    step = "gather"


class BlockOrder(StepOrder):
    """Which block of latents is to be written."""

    step = "merge"


class StepInfo(BaseModel):
    """A finished order of a step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_key: str
    index: int
    files: dict[str, int]
    """Name in the step's folder and size in bytes."""


@dataclass(frozen=True)
class Merging:
    """The merge of a collection. Ships to actors."""

    config: CollectConfig
    work: Folder
    run_key: str
    folders: tuple[Folder, ...]
    """Of the coders."""
    num_latents: tuple[int, ...]
    num_shards: int

    @classmethod
    def of(cls, plan: Collecting) -> Merging:
        folders = tuple(map(plan.coder_folder, plan.coders))
        num_latents = tuple(coder.card.num_latents for coder in plan.coders)
        return cls(plan.config, plan.work, plan.run_key, folders, num_latents, len(plan.scans))

    @cached_property
    def scans(self) -> list[CoderScans]:
        """Per coder."""
        return [
            CoderScans(self.work, self.config, coder, self.num_shards, num_latents)
            for coder, num_latents in enumerate(self.num_latents)
        ]

    def orders(self, step: type[StepOrder]) -> list[StepOrder]:
        """All orders of a step."""
        return [step(index, self.run_key) for index in range(sum(self._sizes(step)))]

    def place(self, order: StepOrder) -> tuple[int, int]:
        """(coder, its block or shard) of an order."""
        index = order.index
        for coder, size in enumerate(self._sizes(type(order))):
            if index < size:
                return coder, index
            index -= size
        raise AssertionError("there is no such order")

    def finished(self, order: StepOrder) -> StepInfo | None:
        """The order as it lies there if it is done and its files are whole, else None."""
        try:
            info = StepInfo.model_validate_json(self.work.read(order.name))
        except (OSError, ValidationError):
            return None
        if (info.run_key, info.index) != (order.run_key, order.index):
            return None
        folder = self._folder(order)
        return info if all(folder.size(name) == size for name, size in info.files.items()) else None

    def make(self, order: StepOrder) -> StepInfo:
        """Write the files of an order, then that it is done."""
        coder, place = self.place(order)
        files = _STEPS[type(order)](self.scans[coder], place)
        for name, content in files.items():
            self._folder(order).write(name, content)
        sizes = {name: len(content) for name, content in files.items()}
        info = StepInfo(run_key=order.run_key, index=order.index, files=sizes)
        self.work.write(order.name, (info.model_dump_json() + "\n").encode())
        return info

    def _sizes(self, step: type[StepOrder]) -> Sequence[int]:
        """Orders per coder."""
        if step is GatherOrder:
            return [self.num_shards] * len(self.num_latents)
        return [scans.num_blocks for scans in self.scans]

    def _folder(self, order: StepOrder) -> Folder:
        return self.folders[self.place(order)[0]] if isinstance(order, BlockOrder) else self.work


# --- the three steps: files by name -----------------------------------------------------------------------------


def choose_rows(scans: CoderScans, block: int) -> dict[str, bytes]:
    """The rows that a block of latents keeps, and the ids of the windows of its exemplars by shard."""
    rows, origins = scans.rows(block)
    origins.keep(scans.firing(rows).rows.windows)
    ids = [windows.astype(IDS).tobytes() for windows in origins.by_shard(scans.num_shards)]
    return {
        scans.chosen_name("rows", block): encoded(rows_table(rows)),
        scans.chosen_name("windows", block): packed(ids),
    }


def gather_windows(scans: CoderScans, shard: int) -> dict[str, bytes]:
    """The windows of a shard that blocks chose, for each block a part."""
    windows = scans.windows(shard)
    parts: list[bytes] = []
    for block in range(scans.num_blocks):
        wanted = scans.chosen_ids(block, shard)
        parts.append(encoded(in_order_of(windows, wanted)) if len(wanted) else b"")
    return {scan_file(scans.coder, "gathered", shard): packed(parts)}


def merge_block(scans: CoderScans, block: int) -> dict[str, bytes]:
    """The exemplars of one block of a coder's latents."""
    limits = scans.config.limits
    rows = scans.chosen_rows(block)
    firing = scans.firing(rows)
    firing_windows = scans.chosen_windows(block)
    tokens = dict(zip(firing_windows["window"].to_pylist(), tokens_of(firing_windows), strict=True))
    silent = pick_silent(firing, rows, scans.pool, scans.finder, tokens, limits.silent)
    random = scans.pool.windows[random_windows(scans.pool, limits.random)]
    wanted = np.unique(np.concatenate([random, silent.rows.windows]))
    others = in_order_of(scans.pool_windows, np.setdiff1d(wanted, firing.rows.windows))
    windows = pa.concat_tables([firing_windows, others]).sort_by("window")
    is_random = pa.array(np.isin(windows["window"].to_numpy(), random))
    return {
        block_name("blocks", block): encoded(row_table([firing, silent])),
        block_name("windows", block): encoded(windows.append_column("random", is_random)),
    }


_STEPS: dict[type[StepOrder], Callable[[CoderScans, int], dict[str, bytes]]] = {
    ChooseOrder: choose_rows,
    GatherOrder: gather_windows,
    BlockOrder: merge_block,
}


def stats_bytes(counts: np.ndarray, maxima: np.ndarray, densities: np.ndarray | None = None) -> bytes:
    """The table of all latents of a coder; `densities` where they do not follow from the counts."""
    buffer = io.BytesIO()
    table = pa.table({"latent": np.arange(len(counts), dtype=np.int32), "count": counts, "maximum": maxima})
    if densities is not None:
        table = table.append_column("density", pa.array(densities, pa.float64()))
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()
