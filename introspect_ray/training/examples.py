"""Training examples on a worker's own disk, read when a step needs them: memory does not grow with their number.

    shard by shard:  records --render--> query, answer --encode--> examples.bin   (one blob per example)
                                                                   index.npy      (where each is; written last)
    step by step:    a thread reads the next step's blobs while this step is computed

Optimizer steps read in random order, so shards as they are will not do. Workers of one machine share the two files: the
first one there writes them and the others wait. They stay until the run ends, also for a worker that takes another's
place. They lie in the folder for temporary files (TMPDIR).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from introspect_ray.data.dataset import open_dataset
from introspect_ray.errors import UserError
from introspect_ray.explainer.encoding import Encoded
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Vector
from introspect_ray.tasks.registry import get_task

BLOBS_FILE, INDEX_FILE = "examples.bin", "index.npy"
INDEX_COLUMNS = 5
"""Number of the dataset, start and size of the blob in bytes, tokens, answer tokens."""
RECORDS_AT_ONCE = 512
FORMAT_VERSION = 1
"""Of the files; raised whenever what is in them changes, as a run that is resumed may find those of another version."""

EncodedRecords = tuple[list[Encoded], list[str]]
"""Examples, and the ids of the records that they were made of."""


def scratch_folder(run_key: str) -> Path:
    """Where the examples of a run lie on this machine."""
    return Path(tempfile.gettempdir()) / f"introspect_ray-{os.getuid()}" / f"{run_key}-v{FORMAT_VERSION}"


class Examples:
    """All training examples of a run, encoded, dataset after dataset; an index counts through all of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._index = np.load(folder / INDEX_FILE, mmap_mode="r")
        self._blobs = os.open(folder / BLOBS_FILE, os.O_RDONLY)
        self.sizes = tuple(int(size) for size in np.bincount(self._index[:, 0]))
        """Examples of each dataset."""
        self.lengths = _SmallInts(self._index[:, 3])
        """Tokens of every example."""
        self.loss_tokens = _SmallInts(self._index[:, 4])
        """Answer tokens of every example."""

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Encoded:
        return _unpacked(self._blob(index))

    def record_id(self, index: int) -> str:
        """Id of the record that the example was made of."""
        return str(self._blob(index)["record_id"].tobytes().decode())

    def remove(self) -> None:
        """Delete the files; who has them open can go on reading."""
        with _locked(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _blob(self, index: int) -> dict[str, np.ndarray]:
        start, size = (int(number) for number in self._index[index, 1:3])
        # Not memory-mapped: pages of a map count as this process's memory, and random reads would gather them all.
        content = os.pread(self._blobs, size, start)
        assert len(content) == size, f"{self.folder}/{BLOBS_FILE} is shorter than its index says"
        return load(content)

    def __del__(self) -> None:
        os.close(self._blobs)


class _SmallInts(Sequence[int]):
    """A column of the index as plain ints."""

    def __init__(self, column: np.ndarray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # slices are not needed
        return int(self._column[index])


def load_examples(explainer: Explainer, datasets: Sequence[str], folder: Path) -> Examples:
    """The selected training records of all datasets, rendered and encoded; they are made in `folder` if not there.

    Raises:
        UserError: a dataset is damaged, a record does not fit the explainer and is named, or the disk has no room.
    """
    with _locked(folder):
        if not (folder / INDEX_FILE).exists():
            try:
                write_examples(folder, [_encoded(explainer, url) for url in datasets])
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                reason = error.strerror or str(error)
                raise UserError(
                    f"examples cannot be stored in {folder}: {reason}; set TMPDIR to a folder with more room"
                ) from None
        return Examples(folder)


def write_examples(folder: Path, datasets: Sequence[Iterable[EncodedRecords]]) -> None:
    """Make the files of all datasets' examples; what is there of an interrupted write is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    index: list[np.ndarray] = []
    position = 0
    with (folder / BLOBS_FILE).open("wb") as file:
        for number, batches in enumerate(datasets):
            for encoded, record_ids in batches:
                blobs = [_packed(one, record_id) for one, record_id in zip(encoded, record_ids, strict=True)]
                counts = np.array([(len(one.ids), one.num_loss_tokens) for one in encoded], dtype=np.int64)
                sizes = np.array([len(blob) for blob in blobs], dtype=np.int64)
                starts = position + np.cumsum(sizes) - sizes
                index.append(np.column_stack([np.full(len(blobs), number), starts, sizes, counts]))
                position += int(sizes.sum())
                file.writelines(blobs)
    partial = folder / f"partial-{INDEX_FILE}"
    np.save(partial, np.concatenate(index) if index else np.zeros((0, INDEX_COLUMNS), dtype=np.int64))
    partial.replace(folder / INDEX_FILE)


def _encoded(explainer: Explainer, url: str) -> Iterator[EncodedRecords]:
    """A dataset's examples, a few hundred at a time."""
    dataset = open_dataset(url)
    task = get_task(dataset.manifest.task)
    for records in dataset.record_batches("train", RECORDS_AT_ONCE):
        examples = [task.render(record) for record in records]
        names = [f"dataset {url}, record {record['record_id']}" for record in records]
        encoded = explainer.encode([one.query for one in examples], [one.answer for one in examples], names)
        yield encoded, [record["record_id"] for record in records]


def _packed(one: Encoded, record_id: str) -> bytes:
    content: dict[str, np.ndarray] = {
        "record_id": np.frombuffer(record_id.encode(), dtype=np.uint8),
        "ids": np.asarray(one.ids, dtype=np.int32),
        "loss_mask": np.asarray(one.loss_mask, dtype=np.bool_),
        "positions": np.asarray(one.vector_positions, dtype=np.int32),
    }
    for number, vector in enumerate(one.vectors):
        content[f"layers_{number}"] = np.asarray(vector.layers, dtype=np.int32)
        content[f"values_{number}"] = _smallest(vector.values)
    return save(content)


def _smallest(values: np.ndarray) -> np.ndarray:
    """As float16 if nothing is lost, as most datasets store vectors."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(values.dtype), values) else values


def _unpacked(content: dict[str, np.ndarray]) -> Encoded:
    vectors = tuple(
        Vector(content[f"values_{number}"].astype(np.float32), tuple(content[f"layers_{number}"].tolist()))
        for number in range(len(content["positions"]))
    )
    return Encoded(content["ids"].tolist(), content["loss_mask"].tolist(), content["positions"].tolist(), vectors)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this machine at a time; a process that dies lets go.

    Raises:
        UserError: the folder above is another user's, or others may write into it. Its name is known beforehand, so
            whoever made it could put examples into it, or links.
    """
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{parent}, where examples are to be stored, is not this user's own folder, closed to others: "
            "remove it, or set TMPDIR to another folder"
        )
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Ahead:
    """Examples of a step, read by a thread while the step before was computed.

    Args:
        indices_of: step -> the examples that this worker needs for it.
    """

    def __init__(self, examples: Examples, indices_of: Callable[[int], list[int]]):
        self._examples = examples
        self._indices_of = indices_of
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examples")
        self._coming: dict[int, Future[dict[int, Encoded]]] = {}

    def get(self, step: int) -> dict[int, Encoded]:
        """Index -> example. Any step may be asked for; only the one that follows is ready beforehand."""
        coming = self._coming.pop(step, None)
        self._coming = {step + 1: self._thread.submit(self._read, step + 1)}
        return coming.result() if coming is not None else self._read(step)

    def _read(self, step: int) -> dict[int, Encoded]:
        return {index: self._examples[index] for index in self._indices_of(step)}
