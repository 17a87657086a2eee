"""Neuronpedia's bulk files: `v1/{modelId}/{sourceId}/explanations/batch-N.jsonl.gz`, read and written.

A source is one coder; its id begins with the layer (`5-llamascope-res-32k`). A line is one explanation; `index` is the
latent as text, and lines are ordered by it as text, so batch 0 does not hold the first latents. The importer reads off
the first line of a file which columns there are, and ignores rows whose id it has: every line is written with all
columns, and ids follow from the content.

Of an explanation, the description, its type and the model that wrote it are kept (as `neuronpedia:TYPE:MODEL`); id,
author, embedding and map coordinates are not. What our descriptions have beyond that travels in `notes`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import Description, Imported, by_latent, is_text

SOURCE = "neuronpedia"
ROWS_PER_BATCH = 1024
_LAYER = re.compile(r"(\d+)(?:-.*)?")
_BATCH = re.compile(r"batch-(\d+)\.jsonl(?:\.gz)?")
_NOTES_KEY = "introspect_ray"
_DAMAGE = (OSError, EOFError, zlib.error)


def batch_number(name: str) -> int | None:
    """N of `batch-N.jsonl.gz`, or None of a file that is no batch."""
    found = _BATCH.fullmatch(name)
    return int(found[1]) if found else None


def batch_rows(content: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every line of a batch, compressed or not. Raises UserError for a file that is damaged."""
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (*_DAMAGE, UnicodeDecodeError) as error:
        raise UserError(f"{name} is truncated or damaged: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object of fields, found {type(row).__name__}")
        yield where, row


def read_explanations(batches: Iterable[tuple[str, bytes]]) -> Imported:
    """The explanations of some batches, (name, content), in the files' order.

    Raises UserError for a damaged file, a line that lacks a field, or several sources of one layer, whose latents
    could not be told apart. Lines that say nothing usable are counted with a reason.
    """
    found = Imported()
    sources: dict[int, str] = {}
    for name, content in batches:
        for where, row in batch_rows(content, name):
            one = _description(row, where)
            if isinstance(one, str):
                found.unused.append((where, one))
                continue
            if sources.setdefault(one.layer, row["layer"]) != row["layer"]:
                raise UserError(
                    f"{where}: source {row['layer']} beside {sources[one.layer]}, both of layer {one.layer}:"
                    " convert one coder per layer at a time"
                )
            found.descriptions.append(one)
    return found


def _description(row: Mapping[str, Any], where: str) -> Description | str:
    """The description of one line, or why there is none."""
    for key in ("layer", "index", "description"):
        if key not in row:
            raise UserError(f"{where}: no field {key!r}; fields found: {', '.join(row) or 'none'}")
    layer, index = _LAYER.fullmatch(str(row["layer"])), str(row["index"])
    if layer is None:
        return "source_without_layer"
    if not (index.isascii() and index.isdigit()):
        return "index_is_no_number"
    if not is_text(row["description"]):
        return "no_description"
    source, scores = _ours(row.get("notes")) or (_source(row), {})
    return Description(int(layer[1]), int(index), row["description"], source, scores)


def _source(row: Mapping[str, Any]) -> str:
    model = row.get("explanationModelName") or row.get("explanationModel") or ""
    return ":".join([SOURCE, row.get("typeName") or "", model]).rstrip(":")


def _ours(notes: Any) -> tuple[str, dict[str, float | None]] | None:
    """Source and scores that an export of ours left in the notes."""
    try:
        ours = json.loads(notes)[_NOTES_KEY]
        return str(ours["source"]), dict(ours["scores"])
    except (TypeError, ValueError, KeyError):
        return None


def explanation_batches(
    descriptions: Iterable[Description], model_id: str, source_set: str, author_id: str
) -> dict[str, bytes]:
    """Path below the output folder -> content of every batch, the same bytes for the same descriptions."""
    layers: dict[int, list[Sequence[Description]]] = {}
    for (layer, _), candidates in by_latent(descriptions).items():
        layers.setdefault(layer, []).append(candidates)
    files: dict[str, bytes] = {}
    for layer, latents in sorted(layers.items()):
        source_id = f"{layer}-{source_set}"
        latents.sort(key=lambda candidates: str(candidates[0].latent))
        rows = [
            _row(one, number, model_id, source_id, author_id)
            for candidates in latents
            for number, one in enumerate(candidates)
        ]
        for start in range(0, len(rows), ROWS_PER_BATCH):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows[start : start + ROWS_PER_BATCH])
            path = f"v1/{model_id}/{source_id}/explanations/batch-{start // ROWS_PER_BATCH}.jsonl.gz"
            files[path] = gzip.compress("".join(lines).encode(), mtime=0)
    return files


def _row(one: Description, number: int, model_id: str, source_id: str, author_id: str) -> dict[str, Any]:
    """One line with every column of an exported explanation; `number` counts the candidates of its latent."""
    identity = json.dumps([model_id, source_id, one.latent, number, one.source, one.text])
    parts = one.source.split(":", 2) if one.source.split(":")[0] == SOURCE else []
    ours = {_NOTES_KEY: {"source": one.source, "scores": dict(one.scores)}}
    return {
        "id": hashlib.blake2b(identity.encode(), digest_size=12).hexdigest(),
        "modelId": model_id,
        "layer": source_id,
        "index": str(one.latent),
        "authorId": author_id,
        "description": one.text,
        "embedding": None,
        "typeName": (parts[1] or None) if len(parts) > 1 else None,
        "explanationModelName": parts[2] if len(parts) > 2 else None,
        "umap_x": None,
        "umap_y": None,
        "umap_cluster": None,
        "umap_log_feature_sparsity": None,
        "notes": json.dumps(ours, ensure_ascii=False) if not parts or one.scores else None,
    }
