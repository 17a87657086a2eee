"""Published pickles, read without running what they ask for: the only module that may import pickle.

A pickle is a program. Here it may build tensors, lists, dicts, tuples, texts and numbers; a pickle that names anything
else is refused before that is imported or called. Nothing is ever written as a pickle.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import torch
from torch import Tensor

from introspect_ray.data.storage import storage_errors
from introspect_ray.errors import UserError

TENSOR_SUFFIXES = (".pkl", ".pt")


def _storage(content: bytes) -> Any:
    """A tensor's storage from its bytes. Torch's own function of this place would unpickle them without any limit."""
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _bytes(text: str, encoding: str) -> bytes:
    """Bytes as pickles of protocol 2 spell them."""
    if encoding != "latin1":
        raise ValueError(f"bytes are spelled in {encoding}, expected latin1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, name: str, content: bytes):
        super().__init__(io.BytesIO(content))
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(f"pickle {self.name} asks for {module}.{name}, which no data needs: it is not read")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002 - the base class's signature
        raise UserError(f"pickle {self.name} refers to something outside itself: it is not read")


def read_pickle(name: str, content: bytes) -> Any:
    """The data in a pickle of tensors and plain values. Raises UserError for any other, before it has any effect."""
    try:
        return _Unpickler(name, content).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).strip().splitlines()
        raise UserError(f"pickle {name} cannot be read: {reason[0] if reason else type(error).__name__}") from None


def read_tensor_file(name: str, content: bytes) -> Tensor:
    """The one tensor of a `.pkl` (pickle) or `.pt` (torch.save) file. Raises UserError if it holds something else."""
    if content[:2] == b"PK":
        try:
            found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception as error:  # torch says in many kinds of errors that it refused
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"file {name} cannot be read as a tensor: {first}") from None
    else:
        found = read_pickle(name, content)
    if not isinstance(found, Tensor):
        raise UserError(f"file {name} holds {type(found).__name__}, expected a tensor")
    return found


def archive_files(url: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every plain file of a tar (compressed or not), or of the one file at `url`.

    Links and special files are passed over; nothing is extracted to a disk.
    """
    name = url.rpartition("/")[2]
    try:
        with (
            storage_errors(f"source {url} cannot be read", (FileNotFoundError, tarfile.TarError, EOFError)),
            fsspec.open(url, "rb") as file,
        ):
            if ".tar" not in name:
                yield name, file.read()
                return
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    opened = archive.extractfile(member) if member.isfile() else None
                    if opened is not None:
                        yield member.name, opened.read()
    except FileNotFoundError:
        raise UserError(f"source {url} does not exist") from None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"source {url} is truncated or no tar: {error}") from None
