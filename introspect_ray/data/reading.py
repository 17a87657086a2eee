"""Rows of a json, jsonl, csv, parquet or txt file, local or remote, compressed or not, as plain dicts."""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import PurePosixPath
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from introspect_ray.data.storage import storage_errors
from introspect_ray.errors import UserError

RawRow = dict[str, Any]
TextUnit = Literal["auto", "paragraph", "line", "file"]
_COMPRESSIONS = (".gz", ".bz2", ".xz")
_PARQUET_ROWS = 1024
"""Rows of a Parquet file that are turned into plain dicts at once."""
_PATTERN = re.compile(r"[*?\[]")


def iter_rows(path: str, text_unit: TextUnit = "auto") -> Iterator[RawRow]:
    """All rows of a file in file order, or of the files of one kind in a folder or of a glob, in order of their names.

    Of a Parquet file a part is in memory at a time, of any other all of it. `text_unit` says what a row of a txt file
    is. Every problem of a file as a whole is a UserError that names it.
    """
    for file in _files(path):
        if _kind(file) == ".parquet" and PurePosixPath(file.split("?")[0]).suffix.lower() not in _COMPRESSIONS:
            with open_parquet(file) as parquet:
                if not parquet.metadata.num_rows:
                    raise UserError(f"source {file} holds no rows, expected at least one")
                for batch in parquet.iter_batches(_PARQUET_ROWS):
                    yield from batch.to_pylist()
        else:
            yield from _file_rows(file, text_unit)


def _files(path: str) -> list[str]:
    """The files behind `path`. In a folder those count that lie directly in it and have a suffix of rows."""
    is_local = "://" not in path or path.startswith("file://")
    is_pattern = bool(_PATTERN.search(path))
    if path.startswith(("http://", "https://")) or not (is_local or is_pattern or _kind(path) not in _READERS):
        return [path]  # a web server lists nothing, and a request about what surely is a file would be wasted
    with storage_errors(f"source {path} cannot be read", (FileNotFoundError,)):
        filesystem, root = fsspec.core.url_to_fs(path)
        if is_pattern and not filesystem.exists(root):
            entries, state = filesystem.glob(root, detail=True).values(), "matches no file"
        elif filesystem.isdir(root):
            entries = [
                entry
                for entry in filesystem.ls(root, detail=True)
                if _kind(entry["name"]) in _READERS and not PurePosixPath(entry["name"]).name.startswith((".", "_"))
            ]
            state = f"is a folder without a file of rows, expected one of {', '.join(_READERS)} (or with .gz)"
        else:
            return [path]
        names = sorted(entry["name"] for entry in entries if entry["type"] == "file")
        found = names if is_local else [filesystem.unstrip_protocol(name) for name in names]
    if not found:
        raise UserError(f"source {path} {state}")
    kinds = sorted({_kind(file) for file in found})
    if len(kinds) > 1:
        raise UserError(
            f"source {path} holds files of several kinds ({', '.join(kinds)}): name one, such as *{kinds[0]}"
        )
    return found


def _kind(path: str) -> str:
    """The suffix that says what a file holds, whether or not it is compressed."""
    name = PurePosixPath(path.split("?")[0])
    return (PurePosixPath(name.stem) if name.suffix.lower() in _COMPRESSIONS else name).suffix.lower()


def _file_rows(path: str, text_unit: TextUnit) -> list[RawRow]:
    kind = _kind(path)
    if kind not in _READERS:
        expected = ", ".join(_READERS)
        raise UserError(
            f"source {path}: the name ends in {kind or 'no suffix'!r}, expected one of {expected} (or with .gz)"
        )
    content = _read(path)
    if not content.strip():
        raise UserError(f"source {path} is empty, expected at least one row")
    rows = _READERS[kind](path, content, text_unit)
    if not rows:
        raise UserError(f"source {path} holds no rows, expected at least one")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"source {path}, row {number}: expected an object of fields, found {type(row).__name__}")
    return rows


def _read(path: str) -> bytes:
    damage = (EOFError, zlib.error, lzma.LZMAError)
    try:
        with (
            storage_errors(f"source {path} cannot be read", (FileNotFoundError, IsADirectoryError, *damage)),
            fsspec.open(path, "rb", compression="infer") as file,
        ):
            return file.read()
    except FileNotFoundError as error:
        # fsspec says "not found" of a web server that does not answer, too.
        if path.startswith(("http://", "https://")) and error.__cause__ is not None:
            raise UserError(f"source {path} cannot be read: {error.__cause__}") from None
        raise UserError(f"source {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"source {path} is a folder, expected a file") from None
    except damage as error:
        raise UserError(f"source {path} is truncated or damaged: {error}") from None


def _text(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"source {path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None


def _json(path: str, content: bytes) -> list[Any]:
    try:
        rows = json.loads(_text(path, content))
    except (ValueError, RecursionError) as error:  # also a number with more digits than Python reads
        raise UserError(f"source {path} is not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"source {path}: expected a JSON array of rows, found {type(rows).__name__}")
    return rows


def _jsonl(path: str, content: bytes) -> list[Any]:
    rows = []
    # Only "\n" ends a row: splitlines() would also cut at U+2028 and its kin, which JSON allows inside strings.
    for number, line in enumerate(_text(path, content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"source {path}, line {number} is not valid JSON: {error}") from None
    return rows


def _csv(path: str, content: bytes) -> list[Any]:
    """Rows by header; a row that is shorter than the header lacks its last fields, a longer one is refused."""
    try:
        header, *rows = csv.reader(io.StringIO(_text(path, content), newline=""), strict=True)
    except csv.Error as error:
        raise UserError(f"source {path} is not valid CSV: {error}") from None
    _check_columns(path, header)
    rows = [row for row in rows if row]
    for number, row in enumerate(rows):
        if len(row) > len(header):
            raise UserError(f"source {path}, row {number} has {len(row)} columns, the header has {len(header)}")
    return [dict(zip(header, row, strict=False)) for row in rows]


def _texts(path: str, content: bytes, unit: TextUnit) -> list[Any]:
    """One row per paragraph (parted by blank lines), line that is not blank, or file."""
    lines = [line.strip() for line in _text(path, content).strip().split("\n")]
    text = "\n".join(lines)
    if unit == "auto":
        unit = "paragraph" if "" in lines else "line"
    parts = {"paragraph": re.split(r"\n{2,}", text), "line": list(filter(None, lines)), "file": [text]}[unit]
    return [{"text": part} for part in parts]


def _parquet(path: str, content: bytes) -> list[Any]:
    with _parquet_file(path, io.BytesIO(content)) as file:
        return file.read().to_pylist()


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file to be read in parts. A problem of it, met inside the block too, is a UserError that names it."""
    try:
        with ExitStack() as stack:
            with storage_errors(f"source {path} cannot be read", (FileNotFoundError,)):
                content = stack.enter_context(fsspec.open(path, "rb"))
            stack.enter_context(
                storage_errors(f"source {path} cannot be read", (FileNotFoundError, pa.ArrowException, OSError))
            )
            yield stack.enter_context(_parquet_file(path, content))
    except FileNotFoundError:
        raise UserError(f"source {path} does not exist") from None


@contextmanager
def _parquet_file(path: str, content: Any) -> Iterator[pq.ParquetFile]:
    try:
        # With a buffer a column is read piece by piece, not a whole row group of it at once.
        with pq.ParquetFile(content, buffer_size=1 << 20, page_checksum_verification=True) as file:
            _check_columns(path, file.schema_arrow.names)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"source {path} is not a complete Parquet file: {error}") from None


def _check_columns(path: str, names: Sequence[str]) -> None:
    """Refuse a table of which a row, as a mapping, would lose a column."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"source {path} has the column {name!r} twice, expected every name once")


_READERS: dict[str, Callable[[str, bytes, TextUnit], list[Any]]] = {
    ".json": lambda path, content, _: _json(path, content),
    ".jsonl": lambda path, content, _: _jsonl(path, content),
    ".ndjson": lambda path, content, _: _jsonl(path, content),
    ".csv": lambda path, content, _: _csv(path, content),
    ".parquet": lambda path, content, _: _parquet(path, content),
    ".txt": _texts,
}
"""Suffix -> rows of a file's content."""
