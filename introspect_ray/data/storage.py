"""A folder on any file system that fsspec knows, with writes that are never seen half done."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from introspect_ray.errors import StorageError, UserError

TEMPORARY = ".tmp-"
"""Names that begin so are writes that were interrupted; nobody reads them."""


_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "az")
"""Schemes without folders. There, s3fs would answer a request for one by creating the bucket, misspelt or not."""
_ABSENT = (FileNotFoundError, NotADirectoryError)


@contextmanager
def storage_errors(what: str, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever a file system raises inside the block becomes a StorageError `WHAT: REASON`, except what is `passed`."""
    as_they_are: tuple[type[Exception], ...] = (UserError, *passed)
    try:
        yield
    except as_they_are:
        raise
    except Exception as error:  # every backend has its own; botocore's are not even OSErrors
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        raise StorageError(f"{what}: {lines[0] if lines else type(error).__name__}") from error


class _Guarded(io.RawIOBase):
    """A file of any file system, to read; what goes wrong meanwhile is a StorageError."""

    def __init__(self, file: io.IOBase, what: str):
        self._file: Any = file
        self._what = what

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        with storage_errors(self._what):
            return self._file.read(-1 if size is None else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with storage_errors(self._what):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Folder:
    """A folder by its URL (`s3://`, `file://`, `memory://`, or a plain path). Ships to other processes as that URL.

    Keys, endpoint and retries of an object store come from its usual environment variables and config files. Every
    method raises StorageError where the storage refuses or cannot be reached.
    """

    url: str

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # Listings that s3fs caches go stale while other processes write.
        options: dict[str, Any] = {"use_listings_cache": False} if self.url.startswith(("s3://", "s3a://")) else {}
        with storage_errors(f"{self.url} is not a path or URL that can be opened"):
            filesystem, path = fsspec.core.url_to_fs(self.url, **options)
        return filesystem, path.rstrip("/")

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is no such file."""
        filesystem, root = self._open()
        with storage_errors(f"{self.url}/{name} cannot be read", _ABSENT), suppress(*_ABSENT):
            return int(filesystem.info(f"{root}/{name}")["size"])
        return None

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The whole file, or bytes `[start, end)`. Raises FileNotFoundError or NotADirectoryError if it is absent."""
        filesystem, root = self._open()
        with storage_errors(f"{self.url}/{name} cannot be read", _ABSENT):
            return filesystem.cat_file(f"{root}/{name}", start=start, end=end)

    def open(self, name: str) -> io.IOBase:
        """The file for random access, e.g. to read only the footer of a shard. Raises FileNotFoundError.

        Reading from it raises StorageError as well, so that storage that is away is not taken for a damaged file.
        """
        filesystem, root = self._open()
        what = f"{self.url}/{name} cannot be read"
        with storage_errors(what, _ABSENT):
            return _Guarded(filesystem.open(f"{root}/{name}", "rb"), what)

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file so that readers see the old content or the new, and nothing between.

        Local files are written under a temporary name and renamed; on object stores one put is atomic. A bucket that
        does not exist is not created.
        """
        filesystem, root = self._open()
        path = f"{root}/{name}"
        with storage_errors(f"{self.url}/{name} cannot be written"):
            if isinstance(filesystem, LocalFileSystem):
                _write_local(filesystem, path, content)
                return
            self._make_parent(filesystem, path)
            filesystem.pipe_file(path, content)

    @contextmanager
    def create(self, name: str) -> Iterator[io.IOBase]:
        """A file to write piece by piece. Readers may see it half done, so something else has to vouch for it."""
        filesystem, root = self._open()
        path = f"{root}/{name}"
        with storage_errors(f"{self.url}/{name} cannot be written"):
            self._make_parent(filesystem, path)
            with filesystem.open(path, "wb") as stream:
                yield stream

    def _make_parent(self, filesystem: fsspec.AbstractFileSystem, path: str) -> None:
        if self.url.partition("://")[0] not in _OBJECT_STORES:
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)

    def names(self) -> list[str]:
        """Names of the files and folders directly inside, sorted; empty if the folder does not exist."""
        filesystem, root = self._open()
        with storage_errors(f"{self.url} cannot be listed", _ABSENT):
            try:
                entries = filesystem.ls(root, detail=True)
            except FileNotFoundError:
                return []
            except NotADirectoryError:
                raise UserError(f"{self.url} lies in a file, expected a folder") from None
        # A file lists itself.
        if [(entry["name"].rstrip("/"), entry["type"]) for entry in entries] == [(root, "file")]:
            raise UserError(f"{self.url} is a file, expected a folder")
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries)

    def files(self) -> list[str]:
        """Paths of all files below, sorted, without interrupted writes; empty if the folder does not exist."""
        filesystem, root = self._open()
        with storage_errors(f"{self.url} cannot be listed", _ABSENT):
            found = filesystem.find(root)
        if found == [root]:
            raise UserError(f"{self.url} is a file, expected a folder")
        paths = sorted(path.removeprefix(root).lstrip("/") for path in found)
        return [path for path in paths if not path.rpartition("/")[2].startswith(TEMPORARY)]

    def remove(self, name: str) -> None:
        """Delete one file; not an error if it is gone."""
        filesystem, root = self._open()
        with storage_errors(f"{self.url}/{name} cannot be deleted", _ABSENT), suppress(FileNotFoundError):
            filesystem.rm_file(f"{root}/{name}")

    def remove_folder(self, name: str) -> None:
        """Delete a folder inside with all that it holds; not an error if it is gone."""
        filesystem, root = self._open()
        with storage_errors(f"{self.url}/{name} cannot be deleted", _ABSENT), suppress(*_ABSENT):
            filesystem.rm(f"{root}/{name}", recursive=True)

    def clear(self) -> None:
        """Delete all that is inside, folders too."""
        filesystem, root = self._open()
        for name in self.names():
            with storage_errors(f"{self.url}/{name} cannot be deleted", _ABSENT), suppress(FileNotFoundError):
                filesystem.rm(f"{root}/{name}", recursive=True)


def _write_local(filesystem: LocalFileSystem, path: str, content: bytes) -> None:
    parent, _, last = path.rpartition("/")
    filesystem.makedirs(parent, exist_ok=True)
    temporary = f"{parent}/{TEMPORARY}{uuid.uuid4().hex}-{last}"
    try:
        filesystem.pipe_file(temporary, content)
        os.replace(temporary, path)  # noqa: PTH105 - fsspec's own move copies across file systems, which is not atomic
    finally:
        if filesystem.exists(temporary):
            filesystem.rm_file(temporary)


@contextmanager
def new_folder(url: str) -> Iterator[Folder]:
    """The output folder, which must be empty: nothing of another conversion may stay in it, nor of one that fails."""
    folder = Folder(url)
    if names := folder.names():
        raise UserError(f"output folder {url} is not empty ({names[0]}, ...): choose another folder")
    try:
        yield folder
    except BaseException:
        folder.clear()
        raise
