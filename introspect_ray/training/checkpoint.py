"""Checkpoints: trainable weights and AdamW's moments as safetensors; `state.json`, written last, vouches for both.

    checkpoints/step_000200/  weights.safetensors  optimizer.safetensors  state.json

Writing works on object stores too, where folders cannot be renamed: a folder counts once its state.json is there and
the digests in it match. One that does not is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed

FORMAT_VERSION = 1
STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE = "state.json", "weights.safetensors", "optimizer.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
logger = logging.getLogger(__name__)

Parameters = Mapping[str, nn.Parameter]


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


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Folder, run_key: str, keep: int):
        self.folder = folder
        self.run_key = run_key
        self.keep = keep

    def save(self, parameters: Parameters, optimizer: torch.optim.AdamW, state: TrainState) -> None:
        """Write one checkpoint, then remove all but the newest and those that they name as their best."""
        place = self._place(f"step_{state.step:06d}")
        files = {
            WEIGHTS_FILE: safetensors.torch.save({name: p.detach().contiguous() for name, p in parameters.items()}),
            OPTIMIZER_FILE: safetensors.torch.save(_moments(parameters, optimizer)),
        }
        for name, content in files.items():
            place.write(name, content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        vouched = {"format_version": FORMAT_VERSION, "run_key": self.run_key, "sha256": digests, **asdict(state)}
        place.write(STATE_FILE, (json.dumps(vouched, indent=2) + "\n").encode())
        names = self.names()
        named = {self._best_of(name) for name in names[-self.keep :]}
        for name in names[: -self.keep]:
            if name not in named:
                self._remove(name)

    def restore(self, parameters: Parameters, optimizer: torch.optim.AdamW, at_step: int | None) -> TrainState:
        """Load the newest whole checkpoint in place, or the one at a step; a fresh state if there is none.

        Raises:
            RunFailed: the checkpoint at that step is not whole.
        """
        names = self.names() if at_step is None else [f"step_{at_step:06d}"]
        for name in reversed(names):
            try:
                state, weights, moments = self._read(name)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("checkpoint %s/%s is passed over: %s", self.folder.url, name, error)
                continue
            _load(parameters, optimizer, weights, moments)
            return state
        if at_step is not None:
            raise RunFailed(f"checkpoint {self.folder.url}/{names[0]}, which the run needs, is missing or damaged")
        return TrainState()

    def names(self) -> list[str]:
        """Folder names in order of their steps, whole or not."""
        found = [name for name in self.folder.names() if re.fullmatch(r"step_\d{6,}", name)]
        return sorted(found, key=lambda name: int(name.removeprefix("step_")))

    def clear(self) -> None:
        """Remove all checkpoints, and their folder."""
        for name in self.names():
            self._remove(name)
        _remove_tree(self.folder)

    def _read(self, name: str) -> tuple[TrainState, dict[str, Tensor], dict[str, Tensor]]:
        """Raises one of many errors if the checkpoint is not whole or not this run's."""
        place = self._place(name)
        vouched = json.loads(place.read(STATE_FILE))
        if (vouched.pop("format_version"), vouched.pop("run_key")) != (FORMAT_VERSION, self.run_key):
            raise ValueError("it belongs to another run or version")
        contents = {file: place.read(file) for file in (WEIGHTS_FILE, OPTIMIZER_FILE)}
        digests = vouched.pop("sha256")
        for file, content in contents.items():
            if hashlib.sha256(content).hexdigest() != digests[file]:
                raise ValueError(f"{file} is not what was written")
        weights, moments = (safetensors.torch.load(contents[file]) for file in (WEIGHTS_FILE, OPTIMIZER_FILE))
        return TrainState(**vouched), weights, moments

    def _best_of(self, name: str) -> str | None:
        """Name of the checkpoint that one calls its best; none if it has none yet, or is not whole."""
        try:
            step = int(json.loads(self._place(name).read(STATE_FILE))["best_step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return f"step_{step:06d}" if step else None

    def _place(self, name: str) -> Folder:
        return Folder(f"{self.folder.url}/{name}")

    def _remove(self, name: str) -> None:
        place = self._place(name)
        place.remove(STATE_FILE)  # First, so that a half removed checkpoint does not count.
        _remove_tree(place)


def _remove_tree(folder: Folder) -> None:
    filesystem, path = fsspec.core.url_to_fs(folder.url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def _moments(parameters: Parameters, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    state = optimizer.state
    return {f"{name}:{key}": state[p][key].contiguous() for name, p in parameters.items() for key in MOMENTS}


@torch.no_grad()
def _load(
    parameters: Parameters, optimizer: torch.optim.AdamW, weights: dict[str, Tensor], moments: dict[str, Tensor]
) -> None:
    assert weights.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
        state = {key: moments[f"{name}:{key}"] for key in MOMENTS}
        # AdamW keeps its step counters on the device only in its fused form, which is the one in use.
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
