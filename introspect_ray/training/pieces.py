"""Rows of tensors in safetensors files, written by many workers and read back by any number of others.

    rank 0: rows 0-9 of weight  --+                      +--> worker of another run: rows 0-6
    rank 1: rows 10-19 of weight -+--> files, index -----+--> ...                    rows 7-13

Every worker writes one file of its own rows and one index that says which they are and what their bytes hash to. No
pickle is involved, which torch's own distributed checkpoints would have in their metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introspect_ray.data.storage import Folder

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Rows(NamedTuple):
    """Rows `[start, stop)` of a tensor of `shape`."""

    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor, and where their bytes lie."""

    file: str
    dtype: str
    start: int
    stop: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    begin: int
    end: int
    sha256: str


class DamagedPieces(Exception):
    """Pieces that are missing, torn or of something else; the message says which."""


def write_pieces(folder: Folder, file: str, tensors: Mapping[str, tuple[Tensor, Rows]]) -> dict[str, Piece]:
    """Write rows of tensors (on the CPU, contiguous) as one safetensors file; returns what an index says of them."""
    header: dict[str, Any] = {}
    position = 0
    for name, (tensor, _) in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    offset = 8 + len(head)
    pieces: dict[str, Piece] = {}
    with folder.create(file) as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for name, (tensor, rows) in tensors.items():
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            stream.write(content)
            begin, end = (offset + place for place in header[name]["data_offsets"])
            digest = hashlib.sha256(content).hexdigest()
            pieces[name] = Piece(file, _NAMES[tensor.dtype], rows.start, rows.stop, rows.shape, begin, end, digest)
    return pieces


def index_bytes(pieces: Mapping[str, Piece]) -> bytes:
    """The index of one file, as JSON."""
    return (json.dumps({name: asdict(piece) for name, piece in pieces.items()}, indent=1) + "\n").encode()


class PieceReader:
    """Reads rows of tensors, whoever wrote them."""

    def __init__(self, folder: Folder, indices: Sequence[bytes]):
        self.folder = folder
        self._pieces: dict[str, list[Piece]] = {}
        for content in indices:
            for name, fields in json.loads(content).items():
                piece = Piece(**{**fields, "shape": tuple(fields["shape"])})
                self._pieces.setdefault(name, []).append(piece)

    def read(self, name: str, rows: Rows) -> Tensor:
        """The rows on the CPU. Raises DamagedPieces."""
        parts, position = [], rows.start
        for piece in sorted(self._pieces.get(name, []), key=lambda piece: piece.start):
            if piece.shape != rows.shape:
                raise DamagedPieces(f"{name} is of shape {list(piece.shape)}, expected {list(rows.shape)}")
            if piece.start <= position < piece.stop and position < rows.stop:
                stop = min(piece.stop, rows.stop)
                parts.append(self._content(name, piece)[position - piece.start : stop - piece.start])
                position = stop
        if position < rows.stop:
            raise DamagedPieces(f"rows {position} to {rows.stop - 1} of {name} are missing")
        return torch.cat(parts).reshape((rows.stop - rows.start, *rows.shape[1:]) if rows.shape else ())

    def _content(self, name: str, piece: Piece) -> Tensor:
        """All rows of a piece: their digest is that of all."""
        content = self.folder.read(piece.file, piece.begin, piece.end)
        if hashlib.sha256(content).hexdigest() != piece.sha256:
            raise DamagedPieces(f"{name} in {piece.file} is not what was written")
        flat = torch.frombuffer(bytearray(content), dtype=_DTYPES[piece.dtype])
        return flat.reshape(piece.stop - piece.start, -1)
