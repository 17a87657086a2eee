"""Exemplars on disk: one folder per coder, read one latent at a time.

    exemplars.json                 written last: about what, from how much text, which files
    latents.parquet                every latent: tokens on which it fires, largest activation; dead ones too; of
                                   imported exemplars also how often it fires, of which the tokens say nothing then
    blocks/block-00000.parquet     rows of consecutive latents, by latent, kind, split and order
    windows/block-00000.parquet    the windows that they lie in, each once; `random` ones belong to every latent

Folders may be paths or any fsspec URL.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt64
from pydantic import BaseModel, ConfigDict, ValidationError

from introspect_ray.errors import UserError
from introspect_ray.features.collection import NUM_SPLITS
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.picking import KINDS, QUANTILE, RANDOM, TOP, Picked
from introspect_ray.features.windows import Window

META_NAME = "exemplars.json"
LATENTS_NAME = "latents.parquet"
SCHEMA_VERSION = 1
ROWS_PER_GROUP = 1 << 14
"""Rows that are read at once to find those of one latent."""
BLOCKS_IN_MEMORY = 2

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
assert len(SPLITS) == NUM_SPLITS

WINDOW_FIELDS = pa.schema(
    [("window", pa.uint64()), ("split", pa.int8()), ("tokens", pa.list_(pa.int32())), ("pieces", pa.list_(pa.string()))]
)
ROW_FIELDS = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.int8()),
        ("quantile", pa.int8()),
        ("split", pa.int8()),
        ("window", pa.uint64()),
        ("positions", pa.list_(pa.uint16())),
        ("values", pa.list_(pa.float32())),
    ]
)


class ExemplarMeta(BaseModel):
    """The contents of exemplars.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    run_key: str
    config: dict[str, Any]
    """The resolved CollectConfig."""
    target: dict[str, Any]
    """Which model read the texts."""
    coder: str
    coder_digest: str
    kind: str
    layer: int
    num_latents: int
    num_live: int
    """Latents that fire at all."""
    num_tokens: int
    """Tokens seen: all but the first of each context, and but those whose activations are no numbers."""
    num_not_finite: int
    """Tokens whose activations are no numbers; no exemplar has one."""
    texts: dict[str, int]
    """What became of the rows of the source -> how many; `used` ones gave tokens."""
    top: int
    """`top` exemplars of a latent and split, at most."""
    latents_per_block: int
    files: dict[str, int]
    """Every other file, and its size in bytes."""


@dataclass(frozen=True)
class LatentStats:
    """One latent, without its exemplars."""

    layer: int
    latent: int
    density: float
    """Share of all tokens seen on which it fires."""
    maximum: float
    """Largest activation seen; 0 if it never fires."""


def block_name(kind: Literal["blocks", "windows"], block: int) -> str:
    return f"{kind}/block-{block:05d}.parquet"


# --- tables -----------------------------------------------------------------------------------------------------


def window_table(ids: UInt64[np.ndarray, " W"], splits: Int[np.ndarray, " W"], windows: Sequence[Window]) -> pa.Table:
    """Windows as a table of `WINDOW_FIELDS`, in order of their ids."""
    order = np.argsort(ids)
    columns = [
        pa.array(ids[order], pa.uint64()),
        pa.array(splits[order].astype(np.int8), pa.int8()),
        pa.array([windows[index].ids for index in order], pa.list_(pa.int32())),
        pa.array([windows[index].pieces for index in order], pa.list_(pa.string())),
    ]
    return pa.Table.from_arrays(columns, schema=WINDOW_FIELDS)


def row_table(parts: Sequence[Picked]) -> pa.Table:
    """Exemplars as a table of `ROW_FIELDS`, by latent, kind and split; those alike stay in their order."""
    tables = [
        pa.Table.from_arrays(
            [
                pa.array(part.rows.latents, pa.int32()),
                pa.array(part.kinds.astype(np.int8), pa.int8()),
                pa.array(part.quantiles.astype(np.int8), pa.int8()),
                pa.array(part.rows.splits, pa.int8()),
                pa.array(part.rows.windows, pa.uint64()),
                list_array(part.rows.offsets, part.rows.positions),
                list_array(part.rows.offsets, part.rows.values),
            ],
            schema=ROW_FIELDS,
        )
        for part in parts
    ]
    table = pa.concat_tables(tables)
    order = np.lexsort([table[name].to_numpy() for name in ("split", "kind", "latent")])
    return table.take(pa.array(order))


def list_array(offsets: Int[np.ndarray, " R_and_1"], values: np.ndarray) -> pa.ListArray:
    """Lists cut from one array."""
    assert offsets[-1] < 2**31, "more activations at once than an Arrow list has room for"
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def encoded(table: pa.Table, rows_per_group: int = ROWS_PER_GROUP) -> bytes:
    """A table as one zstd Parquet file with page checksums."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, row_group_size=rows_per_group)
    return buffer.getvalue()


# --- reading ----------------------------------------------------------------------------------------------------


def open_exemplars(folder: str) -> ExemplarStore:
    """The exemplars of one coder, from its folder or from one above it that holds no other.

    Raises `UserError` if they are not there, not finished, or of another version.
    """
    url = folder.rstrip("/")
    with _readable(folder):
        if not _exists(f"{url}/{META_NAME}"):
            inside = coder_folders(url)
            if len(inside) != 1:
                there = f"choose one of {', '.join(inside)}" if inside else "collect_exemplars.py writes it last"
                raise UserError(f"{folder} has no {META_NAME}: {there}")
            url = f"{url}/{inside[0]}"
        return ExemplarStore(url, _read_meta(f"{url}/{META_NAME}"))


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whatever a file system or Arrow raises inside becomes a UserError that says what cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system has its own
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        raise UserError(f"{what} cannot be read: {lines[0] if lines else type(error).__name__}") from error


def coder_folders(folder: str) -> list[str]:
    """Names of the finished coders' folders inside, sorted."""
    filesystem, root = fsspec.core.url_to_fs(folder)
    found = filesystem.glob(f"{root.rstrip('/')}/*/{META_NAME}")
    return sorted(str(path).split("/")[-2] for path in found)


def _exists(url: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(url)
    return bool(filesystem.exists(path))


def _read_meta(url: str) -> ExemplarMeta:
    try:
        content = json.loads(_read(url))
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(f"{url} has schema version {version}, this version reads {SCHEMA_VERSION}: collect again")
        return ExemplarMeta.model_validate(content)
    except (ValueError, AttributeError, ValidationError) as error:
        raise UserError(f"{url} cannot be read: {str(error).splitlines()[0]}") from None


def _read(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        return file.read()


class ExemplarStore:
    """Exemplars of one coder's latents. Reading latents in order is cheap: the block of the last one is kept."""

    def __init__(self, url: str, meta: ExemplarMeta):
        self.url = url
        self.meta = meta
        self._block = lru_cache(BLOCKS_IN_MEMORY)(self._open_block)

    def latents(self) -> list[LatentStats]:
        """All latents that fire, in order."""
        counts, maxima = self.counts, self.maxima
        return [self._stats(int(latent)) for latent in np.flatnonzero(counts)] if len(maxima) else []

    @cached_property
    def counts(self) -> Int[np.ndarray, " F"]:
        """Tokens on which each latent fires."""
        return self._stats_table["count"].to_numpy()

    @cached_property
    def densities(self) -> Float[np.ndarray, " F"]:
        """Share of all tokens seen on which each latent fires; as whoever collected them says, if exemplars are
        imported."""
        table = self._stats_table
        known = table["density"].to_numpy() if "density" in table.column_names else None
        return self.counts / max(1, self.meta.num_tokens) if known is None else known

    @cached_property
    def maxima(self) -> np.ndarray:
        """Largest activation of each latent."""
        return self._stats_table["maximum"].to_numpy()

    def read(self, latent: int, split: SplitName | None = None) -> LatentExemplars:
        """Everything collected about one latent, or what lies in texts of one split.

        Without a split, `top` has the largest of all texts, as many as a split alone has at most. One that never fires
        has random exemplars only. Raises `UserError` for a latent that the coder does not have.
        """
        if not 0 <= latent < self.meta.num_latents:
            raise UserError(f"{self.url} has latents 0 to {self.meta.num_latents - 1}, none is {latent}")
        wanted = range(NUM_SPLITS) if split is None else (SPLITS.index(split),)
        stats = self._stats(latent)
        with _readable(f"{self.url}/{block_name('blocks', latent // self.meta.latents_per_block)}"):
            block = self._block(latent // self.meta.latents_per_block)
            exemplars = block.exemplars(latent, wanted, self.meta.top)
        return LatentExemplars(
            layer=stats.layer, latent=latent, density=stats.density, maximum=stats.maximum, exemplars=exemplars
        )

    def _stats(self, latent: int) -> LatentStats:
        return LatentStats(self.meta.layer, latent, float(self.densities[latent]), float(self.maxima[latent]))

    @cached_property
    def _stats_table(self) -> pa.Table:
        with _readable(f"{self.url}/{LATENTS_NAME}"):
            return pq.ParquetFile(self._file(LATENTS_NAME), page_checksum_verification=True).read()

    def _open_block(self, number: int) -> _Block:
        # Rows are read as latents are asked for; windows at once, because those of a latent lie all over the file.
        return _Block(
            pq.ParquetFile(self._file(block_name("blocks", number)), page_checksum_verification=True),
            pq.ParquetFile(self._file(block_name("windows", number)), page_checksum_verification=True).read(),
        )

    def _file(self, name: str) -> Any:
        """A file to read parts of. Raises UserError if it is not there as the manifest says."""
        filesystem, path = fsspec.core.url_to_fs(f"{self.url}/{name}")
        with _readable(f"{self.url}/{name}"):
            size = filesystem.size(path)
            if size != self.meta.files.get(name):
                raise UserError(f"{self.url}/{name} has {size} bytes, {META_NAME} says {self.meta.files.get(name)}")
            return filesystem.open(path, "rb")


class _Block:
    """Rows and windows of consecutive latents."""

    def __init__(self, rows: pq.ParquetFile, windows: pa.Table):
        self._rows = rows
        self._windows = windows
        self._places = {window: place for place, window in enumerate(windows["window"].to_pylist())}
        self._splits = windows["split"].to_numpy()
        random = np.flatnonzero(windows["random"].to_numpy(zero_copy_only=False))
        self._random = [(int(self._splits[place]), windows["window"][int(place)].as_py()) for place in random]
        self._made: dict[int, Window] = {}
        groups = [rows.metadata.row_group(index).column(0).statistics for index in range(rows.num_row_groups)]
        self._first = np.array([group.min for group in groups], dtype=np.int64)
        self._last = np.array([group.max for group in groups], dtype=np.int64)

    def exemplars(self, latent: int, splits: Sequence[int], num_top: int) -> list[Exemplar]:
        rows = [row for row in self._of(latent) if row["split"] in splits]
        top = sorted((row for row in rows if row["kind"] == TOP), key=lambda row: (-max(row["values"]), row["window"]))
        fires = {row["window"]: row for row in rows if row["kind"] == RANDOM}
        random = [
            fires.get(window, {"window": window, "kind": RANDOM, "positions": (), "values": ()})
            for split, window in self._random
            if split in splits
        ]
        others = [
            [row for row in rows if row["kind"] == kind] for kind in range(len(KINDS)) if kind not in (TOP, RANDOM)
        ]
        quantile, silent = others
        return [self._exemplar(row) for row in (*top[:num_top], *quantile, *random, *silent)]

    def _of(self, latent: int) -> list[dict[str, Any]]:
        groups = np.flatnonzero((self._first <= latent) & (latent <= self._last)).tolist()
        if not groups:
            return []
        table = self._rows.read_row_groups(groups)
        low, high = np.searchsorted(table["latent"].to_numpy(), [latent, latent + 1])
        return table.slice(low, high - low).to_pylist()

    def _exemplar(self, row: dict[str, Any]) -> Exemplar:
        window = self._window(row["window"])
        activations = np.zeros(len(window), dtype=np.float32)
        activations[np.asarray(row["positions"], dtype=np.int64)] = row["values"]
        kind = row["kind"]
        return Exemplar(window, activations, KINDS[kind], row["quantile"] if kind == QUANTILE else None)

    def _window(self, window: int) -> Window:
        if window not in self._made:
            row = self._windows.slice(self._places[window], 1).to_pylist()[0]
            self._made[window] = Window(tuple(row["tokens"]), tuple(row["pieces"]))
        return self._made[window]
