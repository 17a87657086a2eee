"""One shard of texts, from texts to what is kept of each coder's activations: what an actor does, without Ray.

scans/CODER/rows-00000       kept rows (features/collection.py), by latent: a Parquet table per block (data/packs.py)
scans/CODER/windows-00000    the windows they lie in: Parquet, as all below
scans/CODER/pool-00000       the windows of the pool
scans/CODER/latents-00000    per latent that fires: number of tokens, largest activation
shards/shard-00000.json      last: sizes of the files above, and what became of the texts
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import CollectConfig
from introspect_ray.data.attempts import TOGETHER, Attempt
from introspect_ray.data.collecting import ScanOrder, limits_of
from introspect_ray.data.packs import packed
from introspect_ray.data.shards import read_items
from introspect_ray.data.storage import Folder
from introspect_ray.data.writer import GENERATION_ERROR, PROCESS_DIED, DeviceFailed, announced, check_device
from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.collection import Collector, Firings, Rows
from introspect_ray.features.contexts import Cuts, Text, cut
from introspect_ray.features.exemplar_store import WINDOW_FIELDS, encoded, list_array, window_table
from introspect_ray.features.inputs import CoderInputs
from introspect_ray.features.sae import load_sae
from introspect_ray.models.loading import load_model, load_tokenizer

logger = logging.getLogger(__name__)


class ScanInfo(BaseModel):
    """A finished shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_key: str
    index: int
    num_texts: int
    failed: list[tuple[int, str, str]]
    """Row, reason and detail of every text that gave nothing because something went wrong."""
    num_tokens: list[int]
    """Tokens seen whose activations are numbers, per coder."""
    num_not_finite: list[int]
    files: dict[str, int]
    """Name and size in bytes."""


def finished_info(folder: Folder, order: ScanOrder) -> ScanInfo | None:
    """The shard as it lies there if it is done and all its files are whole, else None."""
    try:
        info = ScanInfo.model_validate_json(folder.read(order.name))
    except (OSError, ValidationError):
        return None
    if (info.run_key, info.index) != (order.run_key, order.index):
        return None
    return info if all(folder.size(name) == size for name, size in info.files.items()) else None


def scan_file(coder: int, kind: str, shard: int) -> str:
    """Name of a file of a shard; `kind` is rows, windows, pool or latents, and gathered once blocks have chosen."""
    return f"scans/{coder:02d}/{kind}-{shard:05d}"


@dataclass(frozen=True)
class Scanner:
    """A target and its coders, in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    coders: tuple[SparseCoder, ...]

    @classmethod
    def load(cls, config: CollectConfig) -> Scanner:
        """Raises UserError if a part cannot be loaded."""
        model = load_model(config.target)
        coders = tuple(load_sae(path).to(model.device) for path in config.coders)
        return cls(model, load_tokenizer(config.target), coders)


# --- one shard --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scan:
    """What is kept of one coder's activations on some texts."""

    collector: Collector
    rows: Rows
    windows: pa.Table
    """Those that `rows` lie in."""
    pool: pa.Table
    """Windows of the pool."""


def scan_shard(scanner: Scanner, config: CollectConfig, folder: Folder, order: ScanOrder, run_id: str) -> ScanInfo:
    """Collect from the texts of one shard and write its files; `run_id` is one of each run of the driver.

    A text at which the target raises, or ends its process, is left out with a reason. Nothing is written if it raises
    for every text alike, which is raised then, or if it raises DeviceFailed.
    """
    texts = [Text(**item) for item in read_items(folder, order)]
    attempt = Attempt(folder, order, run_id)
    try:
        scans, failed = scan_what_works(scanner, config, texts, attempt)
    except DeviceFailed as error:
        attempt.device_failed(error.reason)
        raise
    files: dict[str, int] = {}
    for number, scan in enumerate(scans):
        for kind, content in _files(scan, config.latents_per_block).items():
            name = scan_file(number, kind, order.index)
            folder.write(name, content)
            files[name] = len(content)
    info = ScanInfo(
        run_key=order.run_key,
        index=order.index,
        num_texts=len(texts),
        failed=failed,
        num_tokens=[scan.collector.num_tokens for scan in scans],
        num_not_finite=[scan.collector.num_not_finite for scan in scans],
        files=files,
    )
    folder.write(order.name, (info.model_dump_json() + "\n").encode())
    attempt.succeeded()
    return info


def scan_what_works(
    scanner: Scanner, config: CollectConfig, texts: Sequence[Text], attempt: Attempt | None = None
) -> tuple[list[Scan], list[tuple[int, str, str]]]:
    """What is kept of all texts that go through; row, reason and detail of the others. As writer.generate_records."""
    careful = attempt if attempt and attempt.is_careful else None
    if careful is None:
        try:
            return scan_texts(scanner, config, texts), []
        except Exception as error:
            check_device(error)
            logger.warning("a shard of %d texts raised %r", len(texts), error)
    failed: list[tuple[int, str, str]] = []
    errors: list[Exception] = []
    sound: list[Text] = []
    for text in texts:
        if careful and careful.is_deadly(str(text.row)):
            deaths = careful.deaths_of(str(text.row))
            failed.append((text.row, PROCESS_DIED, f"{deaths} processes ended while this text ran alone"))
            continue
        with announced(careful, str(text.row)):
            try:
                scan_texts(scanner, config, [text])
                sound.append(text)
            except Exception as error:
                check_device(error)
                errors.append(error)
                failed.append((text.row, GENERATION_ERROR, f"{type(error).__name__}: {' '.join(str(error).split())}"))
    if not sound and len(errors) > 1 and len(set(map(type, errors))) == 1:
        raise errors[0]
    with announced(careful, TOGETHER):
        return scan_texts(scanner, config, sound), failed


def scan_texts(
    scanner: Scanner,
    config: CollectConfig,
    texts: Sequence[Text],
) -> list[Scan]:
    """What is kept of each coder's activations on these texts, batch by batch."""
    limits = limits_of(config)
    inputs = CoderInputs(scanner.model, [(coder.layer, coder.reads) for coder in scanner.coders])
    collectors = [Collector(coder.num_latents, limits) for coder in scanner.coders]
    tables: list[pa.Table] = [WINDOW_FIELDS.empty_table()]
    for start in range(0, len(texts), config.texts_per_batch):
        batch = texts[start : start + config.texts_per_batch]
        cuts = cut(batch, scanner.tokenizer, config.context_tokens, config.window_tokens)
        if not cuts.contexts:
            continue
        for collector, firings in zip(collectors, _firings(scanner.coders, inputs, cuts), strict=True):
            collector.add(firings, cuts.ids, cuts.splits, cuts.first)
        tables.append(window_table(cuts.ids, cuts.splits, cuts.windows))
    windows = pa.concat_tables(tables)
    return [_scan(collector, windows) for collector in collectors]


@torch.no_grad()
def _firings(coders: Sequence[SparseCoder], inputs: CoderInputs, cuts: Cuts) -> list[Firings]:
    """What fires at the seen tokens of some texts, per coder."""
    lengths = np.array([len(context) - 1 for context in cuts.contexts])
    first = np.concatenate([[0], np.cumsum(lengths)])
    parts: list[list[Firings]] = [[] for _ in coders]
    for contexts, read in inputs.batches(cuts.contexts):
        tokens = np.concatenate([np.arange(first[index], first[index + 1]) for index in contexts])
        for coder, found in zip(coders, parts, strict=True):
            found.append(firings_of(coder, read[coder.layer, coder.reads], tokens))
    return [
        Firings(
            np.concatenate([part.tokens for part in found]),
            np.concatenate([part.latents for part in found]),
            np.concatenate([part.values for part in found]),
            np.concatenate([part.not_finite for part in found]),
        )
        for found in parts
    ]


def firings_of(coder: SparseCoder, x: torch.Tensor, tokens: np.ndarray) -> Firings:
    """What fires at vectors `x`, which are of these tokens; vectors with a NaN or infinity, before or after, apart.

    A latent that goes below zero (AbsTopK) fires where it is above.
    """
    active = coder.encode_sparse(x.to(coder.encoder.device))
    vectors, values = active.vectors.cpu().numpy(), active.values.float().cpu().numpy()
    bad = ~torch.isfinite(x).all(dim=1).cpu().numpy()
    bad[vectors[~np.isfinite(values)]] = True
    good = ~bad[vectors] & (values > 0)
    return Firings(tokens[vectors[good]], active.latents.cpu().numpy()[good], values[good], tokens[np.flatnonzero(bad)])


def _scan(collector: Collector, windows: pa.Table) -> Scan:
    rows, pool = collector.kept()
    ids = windows["window"].to_numpy()
    of_rows, of_pool = (
        windows.filter(pa.array(np.isin(ids, wanted))).sort_by("window") for wanted in (rows.windows, pool.windows)
    )
    return Scan(collector, rows, of_rows, of_pool)


def _files(scan: Scan, latents_per_block: int) -> dict[str, bytes]:
    """Kind -> content."""
    rows, collector = scan.rows, scan.collector
    live = np.flatnonzero(collector.counts)
    latents = pa.table(
        {"latent": live.astype(np.int32), "count": collector.counts[live], "maximum": collector.maxima[live]}
    )
    starts = np.arange(0, len(collector.counts) + latents_per_block, latents_per_block)
    table, edges = rows_table(rows), np.searchsorted(rows.latents, starts)
    blocks = [table.slice(low, high - low) for low, high in pairwise(edges.tolist())]
    return {
        "rows": packed([encoded(block) if block.num_rows else b"" for block in blocks]),
        "windows": encoded(scan.windows),
        "pool": encoded(scan.pool),
        "latents": encoded(latents),
    }


def rows_table(rows: Rows) -> pa.Table:
    """Kept rows as they lie on disk."""
    return pa.table(
        {
            "latent": rows.latents,
            "split": rows.splits,
            "window": rows.windows,
            "peak": rows.peaks,
            "positions": list_array(rows.offsets, rows.positions),
            "values": list_array(rows.offsets, rows.values),
        }
    )
