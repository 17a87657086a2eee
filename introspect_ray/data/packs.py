"""Files of numbered parts, any of which is one contiguous read: n + 1 offsets (int64, little-endian), then n parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from introspect_ray.data.storage import Folder

_OFFSET = np.dtype("<i8")


def packed(parts: Sequence[bytes]) -> bytes:
    """A file of these parts."""
    offsets = np.cumsum([_OFFSET.itemsize * (len(parts) + 1), *map(len, parts)], dtype=_OFFSET)
    return b"".join([offsets.tobytes(), *parts])


def read_part(folder: Folder, name: str, number: int) -> bytes:
    """One part of a file. Raises FileNotFoundError, and OSError for a file that ends before the part does."""
    place = _OFFSET.itemsize * number
    found = np.frombuffer(_exactly(folder, name, place, place + 2 * _OFFSET.itemsize), _OFFSET)
    return _exactly(folder, name, *map(int, found))


def _exactly(folder: Folder, name: str, start: int, end: int) -> bytes:
    content = folder.read(name, start, end) if 0 <= start < end else b""
    if len(content) != end - start:
        raise OSError(f"{name} has no bytes {start} to {end}")
    return content
