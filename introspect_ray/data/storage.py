"""A folder on any file system that fsspec knows, with writes that are never seen half done."""

from __future__ import annotations

import io
import os
import uuid
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from introspect_ray.errors import UserError

TEMPORARY = ".tmp-"
"""Names that begin so are writes that were interrupted; nobody reads them."""


@dataclass(frozen=True)
class Folder:
    """A folder by its URL (`s3://`, `file://`, `memory://`, or a plain path). Ships to other processes as that URL."""

    url: str

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # Listings that s3fs caches go stale while other processes write.
        options: dict[str, Any] = {"use_listings_cache": False} if self.url.startswith(("s3://", "s3a://")) else {}
        try:
            filesystem, path = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.url} is not a path or URL that can be opened: {error}") from None
        return filesystem, path.rstrip("/")

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is no such file."""
        filesystem, root = self._open()
        try:
            return int(filesystem.info(f"{root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        filesystem, root = self._open()
        return filesystem.cat_file(f"{root}/{name}")

    def open(self, name: str) -> io.IOBase:
        """The file for random access, e.g. to read only the footer of a shard. Raises FileNotFoundError."""
        filesystem, root = self._open()
        return filesystem.open(f"{root}/{name}", "rb")

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file so that readers see the old content or the new, and nothing between.

        Local files are written under a temporary name and renamed; on object stores one put is atomic.
        """
        filesystem, root = self._open()
        path = f"{root}/{name}"
        parent, _, last = path.rpartition("/")
        filesystem.makedirs(parent, exist_ok=True)
        if not isinstance(filesystem, LocalFileSystem):
            filesystem.pipe_file(path, content)
            return
        temporary = f"{parent}/{TEMPORARY}{uuid.uuid4().hex}-{last}"
        try:
            filesystem.pipe_file(temporary, content)
            os.replace(temporary, path)  # noqa: PTH105 - fsspec's own move copies across file systems, which is not atomic
        finally:
            if filesystem.exists(temporary):
                filesystem.rm_file(temporary)

    def names(self) -> list[str]:
        """Names of the files and folders directly inside, sorted; empty if the folder does not exist."""
        filesystem, root = self._open()
        try:
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(root, detail=False))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise UserError(f"{self.url} is a file, expected a folder") from None

    def remove(self, name: str) -> None:
        """Delete one file; not an error if it is gone."""
        filesystem, root = self._open()
        try:
            filesystem.rm_file(f"{root}/{name}")
        except FileNotFoundError:
            return
