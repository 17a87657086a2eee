"""Checkpoints: trained weights and AdamW's moments, written by all workers while training goes on.

    checkpoints/step_000200/  a1b2-rank_00000.safetensors  a1b2-rank_00000.json  ...  state.json

    every worker   copy own rows to the CPU -> thread: write them, then their index
    all workers    after each step: are all threads done?  -> rank 0 writes state.json, which vouches for the indices,
                                                              and removes checkpoints that are too old

Writing works on object stores too, where folders cannot be renamed: a folder counts once its state.json is there, and
the digests in it lead to all others. One that does not is passed over for the one before. What random numbers are drawn
and which examples are read follow from the step, so the step is all there is to keep of them. Any number of workers,
sharded or not, goes on from what any other number wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import fsspec
import torch
from torch import Tensor

from introspect_ray.data.storage import Folder
from introspect_ray.training.pieces import DamagedPieces, PieceReader, Rows, index_bytes, write_pieces
from introspect_ray.training.trainable import Trainable

FORMAT_VERSION = 3
STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Called with one line that the user should see."""


@dataclass
class TrainState:
    """Where a run stands, beside weights and optimizer."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens read, prompts included, padding not."""
    window_loss: float = 0.0
    """Loss in nats, summed over the answer tokens since the last line of metrics."""
    window_tokens: int = 0
    """Answer tokens since the last line of metrics."""
    best_step: int = 0
    """Step of the best evaluation so far, whose checkpoint stays; 0 before the first."""
    best_scores: dict[str, float | None] = field(default_factory=dict)
    """What it scored, by metric."""
    bad_evaluations: int = 0
    """Evaluations since then."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last line of metrics, so that a run of which only the export is left need not trust that the log took it."""


class CheckpointStore:
    """The checkpoints of one run on storage, as one process sees them."""

    def __init__(self, folder: Folder, run_key: str, keep: int):
        self.folder = folder
        self.run_key = run_key
        self.keep = keep

    def place(self, step: int) -> Folder:
        """Where the checkpoint of a step lies."""
        return Folder(f"{self.folder.url}/step_{step:06d}")

    def steps(self) -> list[int]:
        """Steps that have a folder, whole or not, in order."""
        found = [re.fullmatch(r"step_(\d{6,})", name) for name in self.folder.names()]
        return sorted(int(match[1]) for match in found if match)

    def newest(self, below: int | None) -> int:
        """The last step (before `below`, if given) whose checkpoint was completed; 0 if there is none."""
        for step in reversed(self.steps()):
            if below is None or step < below:
                try:
                    self._vouched(step)
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    self.pass_over(step, error)
                    continue
                return step
        return 0

    def best(self, until: int, metric: str = "", least: float = -math.inf) -> int:
        """The last step up to `until` that was the best evaluation so far, whose checkpoint was completed and whose
        score in `metric`, if one is named, is at least `least`; 0 if there is none.

        Each best is better than those before it, so this is the best one whose weights are there.
        """
        for step in reversed(self.steps()):
            if step <= until and self._best_of(step) == step:
                scores = self._vouched(step)["best_scores"]
                return step if not metric or scores[metric] >= least else 0
        return 0

    def complete(self, state: TrainState, indices: Sequence[str]) -> None:
        """Let the checkpoint of `state` count, then remove all but the newest, those that they name as their best,
        and later ones that a run has gone back behind because they were damaged.

        Where a best was never written, the best before it stays in its place."""
        place = self.place(state.step)
        digests = {name: hashlib.sha256(place.read(name)).hexdigest() for name in indices}
        vouched = {"format_version": FORMAT_VERSION, "run_key": self.run_key, "indices": digests, **asdict(state)}
        place.write(STATE_FILE, (json.dumps(vouched, indent=2) + "\n").encode())
        steps = self.steps()
        # Not the newest by name but the newest that count: what was interrupted does not push out what is whole.
        whole = [step for step in steps if step <= state.step and self.place(step).size(STATE_FILE) is not None]
        newest = whole[-self.keep :]
        best = {self.best(until=self._best_of(step)) for step in newest}
        for step in steps:
            if (step < newest[0] and step not in best) or step > state.step:
                self._remove(step)

    def open(self, step: int) -> tuple[TrainState, PieceReader]:
        """What one checkpoint says. Raises one of many errors if it is not whole or not this run's."""
        vouched, place = self._vouched(step), self.place(step)
        contents = {name: place.read(name) for name in vouched["indices"]}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != vouched["indices"][name]:
                raise DamagedPieces(f"{name} is not what was written")
        fields = {name: vouched[name] for name in asdict(TrainState())}
        return TrainState(**fields), PieceReader(place, list(contents.values()))

    def pass_over(self, step: int, error: Exception) -> None:
        """Say in the log why a checkpoint does not count."""
        logger.warning("checkpoint %s is passed over: %s", self.place(step).url, error)

    def clear(self) -> None:
        """Remove all checkpoints, and their folder."""
        for step in self.steps():
            self._remove(step)
        _remove_tree(self.folder)

    def _vouched(self, step: int) -> dict[str, Any]:
        vouched = json.loads(self.place(step).read(STATE_FILE))
        if (vouched["format_version"], vouched["run_key"]) != (FORMAT_VERSION, self.run_key):
            raise ValueError("it belongs to another run or version")
        return vouched

    def _best_of(self, step: int) -> int:
        """The step that one checkpoint calls its best; 0 if it has none yet, or does not count."""
        try:
            return int(self._vouched(step)["best_step"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0

    def _remove(self, step: int) -> None:
        self.place(step).remove(STATE_FILE)  # First, so that a half removed checkpoint does not count.
        _remove_tree(self.place(step))


class _Writing:
    """One checkpoint on its way to storage."""

    def __init__(self, state: TrainState, write: Callable[[], None]):
        self.state = state
        self.error: Exception | None = None
        self._write = write
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # every backend has its own; training must not end because of it
            self.error = error


class Checkpoints:
    """What the workers of a run do about checkpoints together: all call the same methods in the same order.

    A checkpoint that cannot be written costs a line to the user and nothing else; the next one is tried when it is due.
    """

    def __init__(self, store: CheckpointStore, trainable: Trainable, optimizer: torch.optim.AdamW, tell: Tell):
        self.store = store
        self.trainable = trainable
        self.optimizer = optimizer
        self.tell = tell
        self.workers = trainable.workers
        # Files that an attempt before this one left half written are never mistaken for this one's.
        self._attempt = f"{self.workers.agree(uuid.uuid4().int >> 96, trainable.device):08x}"
        # A run that is not sharded is whole on rank 0, which writes alone.
        self._writers = self.workers.size if trainable.is_sharded else 1
        self._writing: _Writing | None = None

    def restore(self) -> TrainState:
        """Load the newest checkpoint that is whole for all workers; a fresh state without one.

        Raises:
            StorageError: this worker cannot reach the storage, which says nothing against the checkpoints there.
        """
        return self._restore(self.store.newest)

    def restore_best(self, step: int, metric: str, least: float) -> TrainState:
        """Load the checkpoint of the best evaluation, at `step`, or of the best before it whose checkpoint is whole for
        all workers, as long as its score in `metric` is at least `least`; a fresh state without one."""

        def best(below: int | None) -> int:
            return self.store.best(step if below is None else below - 1, metric, least)

        return self._restore(best)

    def _restore(self, choose: Callable[[int | None], int]) -> TrainState:
        """`choose` gives rank 0 the step to try, before another if one is given; 0 ends it."""
        below: int | None = None
        while True:
            own = choose(below) if self.workers.rank == 0 else 0
            step = self.workers.agree(own, self.trainable.device)
            if step == 0:
                return TrainState()
            try:
                state, reader = self.store.open(step)
                values = {name: self._read(reader, name) for name in self.trainable.own}
                is_whole = True
            except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedPieces) as error:
                self.store.pass_over(step, error)
                is_whole = False
            if self.workers.all_true(is_whole, self.trainable.device):
                self._load(values, state.step)
                return state
            below = step

    def start(self, state: TrainState) -> None:
        """Begin to write the checkpoint of `state`; the one before is waited for."""
        self.settle(wait=True)
        if self.workers.rank >= self._writers:
            return
        place, name = self.store.place(state.step), self._name(self.workers.rank)
        tensors = self._copied()

        def write() -> None:
            pieces = write_pieces(place, f"{name}.safetensors", tensors)
            place.write(f"{name}.json", index_bytes(pieces))

        self._writing = _Writing(replace(state), write)

    def settle(self, wait: bool) -> None:
        """Complete the checkpoint that is being written if all workers have written theirs, or wait until they have."""
        writing = self._writing
        if writing is None:
            return
        if wait:
            writing.thread.join()
        counts = (float(writing.thread.is_alive()), float(writing.error is not None))
        alive, failed = self.workers.sum(counts, self.trainable.device) if self._writers > 1 else counts
        if alive:
            return
        self._writing = None
        error: Exception | None = writing.error
        if not failed and self.workers.rank == 0:
            try:
                self.store.complete(writing.state, [f"{self._name(rank)}.json" for rank in range(self._writers)])
            except Exception as found:  # as in _Writing
                error = found
        if error is not None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.tell(
                f"checkpoint of step {writing.state.step} could not be written ({reason}); training goes on and tries"
                " again when the next one is due"
            )

    def _name(self, rank: int) -> str:
        return f"{self._attempt}-rank_{rank:05d}"

    def _copied(self) -> dict[str, tuple[Tensor, Rows]]:
        """What this worker writes, on the CPU and apart from what training goes on changing."""
        rows, copies = self.trainable.rows, {}
        for name, own in self.trainable.written().items():
            state = self.optimizer.state[own]
            for key, tensor in (("", own), *((f":{moment}", state[moment]) for moment in MOMENTS)):
                copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                copies[name + key] = (copy.copy_(tensor.detach()), rows[name])
        return copies

    def _read(self, reader: PieceReader, name: str) -> tuple[Tensor, ...]:
        rows = self.trainable.rows[name]
        return tuple(reader.read(name + key, rows) for key in ("", *(f":{moment}" for moment in MOMENTS)))

    @torch.no_grad()
    def _load(self, values: dict[str, tuple[Tensor, ...]], step: int) -> None:
        for name, own in self.trainable.own.items():
            weight, *moments = values[name]
            own.copy_(weight)
            state = dict(zip(MOMENTS, (moment.to(own.device) for moment in moments), strict=True))
            # AdamW keeps its step counter on the device only in its fused form, which is the one in use.
            self.optimizer.state[own] = {"step": torch.tensor(float(step), device=own.device), **state}


def _remove_tree(folder: Folder) -> None:
    filesystem, path = fsspec.core.url_to_fs(folder.url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)
