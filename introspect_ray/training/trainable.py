"""What the optimizer, clipping and checkpoints see of the trained parameters: plain tensors, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from introspect_ray.training.pieces import Rows
from introspect_ray.training.workers import Workers


class Trained(Protocol):
    """What is trained: an explainer, or a simulator."""

    @property
    def device(self) -> torch.device: ...

    def trainable_parameters(self) -> dict[str, nn.Parameter]: ...


@dataclass(frozen=True)
class _Parameter:
    whole: nn.Parameter
    """As the model has it."""
    own: nn.Parameter
    """This worker's rows of it, in the same memory."""
    rows: Rows

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.whole, DTensor)


class Trainable:
    """This worker's rows of all trained parameters.

    Parameters that are not sharded are whole on every worker, and their gradients are summed here; those of sharded
    ones were summed while they were computed.
    """

    def __init__(self, trained: Trained, workers: Workers):
        self.workers = workers
        self._parameters = {name: _own(parameter) for name, parameter in trained.trainable_parameters().items()}
        self.is_sharded = any(one.is_sharded for one in self._parameters.values())
        self.device = trained.device

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """Name -> what this worker updates; parameters of which it has no row are left out."""
        return {name: one.own for name, one in self._parameters.items() if one.own.numel()}

    @property
    def rows(self) -> dict[str, Rows]:
        """Name -> where the rows of `own` lie."""
        return {name: one.rows for name, one in self._parameters.items() if one.own.numel()}

    def written(self) -> dict[str, nn.Parameter]:
        """The part of `own` that this worker writes into checkpoints: of what all have, rank 0's copy."""
        return {
            name: own for name, own in self.own.items() if self.workers.rank == 0 or self._parameters[name].is_sharded
        }

    def clear_gradients(self) -> None:
        """Zeros where the parameter is whole, so that one that a batch does not touch is treated alike everywhere."""
        for one in self._parameters.values():
            if one.is_sharded:
                one.whole.grad = None
            elif one.whole.grad is None:
                one.whole.grad = torch.zeros_like(one.whole)
            else:
                one.whole.grad.zero_()

    def sum_gradients(self, extra: Tensor) -> Tensor:
        """Leave the sum over all workers in the gradients of `own`; returns `extra` summed as well."""
        replicated = [one.own for one in self._parameters.values() if not one.is_sharded]
        total = self.workers.sum_gradients(replicated, extra)
        for one in self._parameters.values():
            if one.is_sharded:
                gradient = cast(DTensor | None, one.whole.grad)
                one.own.grad = torch.zeros_like(one.own) if gradient is None else gradient.to_local()
        return total

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradient to Euclidean norm `max_norm` if it is longer; returns the norm that it had."""
        parameters = list(self.own.values())
        if not self.is_sharded:
            return float(nn.utils.clip_grad_norm_(parameters, max_norm))
        sharded = [one.own.grad for one in self._parameters.values() if one.is_sharded and one.own.numel()]
        replicated = [one.own.grad for one in self._parameters.values() if not one.is_sharded]
        squared = _squared_norm(sharded, self.device)
        dist.all_reduce(squared)
        norm = (squared + _squared_norm(replicated, self.device)).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return float(norm)


def _own(parameter: nn.Parameter) -> _Parameter:
    if not isinstance(parameter, DTensor):
        shape = tuple(parameter.shape)
        return _Parameter(parameter, parameter, Rows(0, shape[0] if shape else 1, shape))
    own = nn.Parameter(cast(DTensor, parameter.detach()).to_local())
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return _Parameter(parameter, own, Rows(offset[0], offset[0] + own.shape[0], tuple(parameter.shape)))


def _squared_norm(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    there = [gradient for gradient in gradients if gradient is not None]
    if not there:
        return torch.zeros((), device=device)
    return torch.stack([gradient.float().square().sum() for gradient in there]).sum()
