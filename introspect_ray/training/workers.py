"""The workers of one run as a step sees them: who am I, and sums over all of us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """Rank and number of the workers; with one of them nothing is communicated and no process group is needed."""

    rank: int
    size: int

    @property
    def device(self) -> torch.device:
        """Where small messages lie when no model says so: on the GPU if the backend knows nothing else."""
        if self.size > 1 and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def sum_gradients(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        """Replace every gradient by its sum over the workers, in one message; returns `extra` summed as well.

        Sums, not means: each worker has divided by the answer tokens of the whole batch already. A mean of the workers'
        means would weigh a token by how many others its worker happens to hold.
        """
        if self.size == 1:
            return extra
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters), "every worker must send equally many numbers"
        flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), extra.float()])
        dist.all_reduce(flat)
        *summed, total = flat.split([*(gradient.numel() for gradient in gradients), extra.numel()])
        for gradient, sum_of_all in zip(gradients, summed, strict=True):
            gradient.copy_(sum_of_all.view_as(gradient))
        return total

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Every value summed over the workers, in double precision: counts come out exact."""
        if self.size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(message)
        return message.tolist()

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of all workers' values."""
        if self.size == 1:
            return value
        message = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        return int(message)

    def agree(self, value: int, device: torch.device) -> int:
        """Rank 0's value, on every worker."""
        if self.size == 1:
            return value
        message = torch.tensor([value], dtype=torch.int64, device=device)
        dist.broadcast(message, src=0)
        return int(message)

    def all_true(self, mine: bool, device: torch.device) -> bool:
        """Whether it is true on every worker."""
        if self.size == 1:
            return mine
        message = torch.tensor([int(mine)], dtype=torch.int64, device=device)
        dist.all_reduce(message, op=dist.ReduceOp.MIN)
        return bool(message)
