"""The state of a training run as tensors and plain numbers, so that no pickle is needed to keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

_HEADER_LENGTH = 8
_NUMBERS = "numbers"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Tensors by name, and everything else as JSON types."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def to_bytes(self) -> bytes:
        """One safetensors file; the numbers are its metadata."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return save(tensors, {_NUMBERS: json.dumps(self.numbers)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Snapshot:
        length = int.from_bytes(content[:_HEADER_LENGTH], "little")
        header = json.loads(content[_HEADER_LENGTH : _HEADER_LENGTH + length])
        return cls(load(content), json.loads(header["__metadata__"][_NUMBERS]))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def optimizer_snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    """Moments and settings of an optimizer whose state is made of tensors."""
    state = optimizer.state_dict()
    tensors = {f"{number}.{name}": value for number, entry in state["state"].items() for name, value in entry.items()}
    return Snapshot(tensors, {"param_groups": state["param_groups"]})


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Any) -> None:
    """Put back what `optimizer_snapshot` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": numbers["param_groups"]})
