"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch

from introspect_ray.config import TrainConfig
from introspect_ray.errors import RunFailed
from introspect_ray.explainer.encoding import Encoded
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.packing import can_pack, joined
from introspect_ray.models.structure import model_width
from introspect_ray.training.batches import Packing, arrange, share, step_indices, step_seed
from introspect_ray.training.examples import Ahead, Examples
from introspect_ray.training.schedule import learning_rate
from introspect_ray.training.trainable import Trainable
from introspect_ray.training.workers import Workers


class StepResult(NamedTuple):
    """Loss in nats summed over the step's answer tokens, their number, all tokens, unclipped gradient norm."""

    loss_sum: float
    loss_tokens: int
    tokens: int
    grad_norm: float


class Stepper:
    """Takes optimizer steps; what a step does depends on its number, the seed and the weights alone."""

    def __init__(self, explainer: Explainer, examples: Examples, config: TrainConfig, workers: Workers):
        self.explainer = explainer
        self.examples = examples
        self.config = config
        self.workers = workers
        self.trainable = Trainable(explainer, workers)
        self._packing = _packing(explainer) if config.trainer.packing else None
        self._ahead = Ahead(examples, lambda number: self._mine(self._chosen(number)))

    def step(self, number: int, optimizer: torch.optim.AdamW) -> StepResult:
        """Do optimizer step `number`, counted from 0.

        Raises:
            RunFailed: the loss or its gradient is not finite, on all workers alike; the batch's records are named.
        """
        settings = self.config.optimization
        chosen = self._chosen(number)
        loss_tokens = sum(self.examples.loss_tokens[index] for index in chosen)
        mine = self._ahead.get(number)
        # Dropout draws from the global generator: a resumed run must draw what an undisturbed one would have drawn.
        torch.manual_seed(step_seed(number, self.config.seed, self.workers.rank))
        own_loss = self._accumulate(chosen, mine, loss_tokens)
        loss_sum = float(self.trainable.sum_gradients(own_loss.reshape(1)))
        grad_norm = self.trainable.clip_gradients(settings.max_grad_norm)
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            ids = ", ".join(sorted({self.examples.record_id(index) for index in chosen}))
            rate = f"optimization.learning_rate {settings.learning_rate:g}"
            raise RunFailed(
                f"step {number + 1}: loss is {loss_sum / loss_tokens:g} and gradient norm {grad_norm:g}, "
                f"expected finite numbers ({rate} too high?); records of the batch: {ids}"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, settings)
        optimizer.step()
        return StepResult(loss_sum, loss_tokens, sum(self.examples.lengths[index] for index in chosen), grad_norm)

    def _chosen(self, number: int) -> list[int]:
        """All workers' examples of a step."""
        config = self.config
        return step_indices(
            number, config.optimization.batch_size, self.examples.sizes, config.seed, weights=config.weights
        )

    def _mine(self, chosen: Sequence[int]) -> list[int]:
        return share(chosen, self.examples.lengths, self.workers.rank, self.workers.size)

    def _accumulate(
        self, chosen: Sequence[int], examples: Mapping[int, Encoded] | Examples, loss_tokens: int
    ) -> torch.Tensor:
        """Leave this worker's share of the gradient of the token mean in `.grad`; returns its summed loss."""
        self.trainable.clear_gradients()
        total = torch.zeros((), device=self.explainer.device)
        mine = self._mine(chosen)
        batches = arrange(mine, self.examples.lengths, self.config.trainer.micro_batch_tokens, self._packing)
        # Every pass needs the shards of all workers, so those with fewer micro-batches add some that count zero.
        # How many is asked before the first pass: a worker that waits for an answer gives no shards.
        is_sharded = self.trainable.is_sharded
        num_passes = self.workers.largest(len(batches), self.explainer.device) if is_sharded else len(batches)
        for rows in batches:
            total += self._backward([joined([examples[index] for index in row]) for row in rows], loss_tokens)
        for _ in range(num_passes - len(batches)):
            self._backward([self._idle], loss_tokens, weight=0.0)
        return total

    def _backward(self, batch: Sequence[Encoded], loss_tokens: int, weight: float = 1.0) -> torch.Tensor:
        """Add one micro-batch to the gradient; returns its summed loss."""
        with self._precision():
            loss, _ = self.explainer.loss(batch)
        (loss * (weight / loss_tokens)).backward()
        return loss.detach()

    @cached_property
    def _idle(self) -> Encoded:
        """Any example, for passes that count zero."""
        return self.examples[0]

    def _precision(self) -> AbstractContextManager[object]:
        """Sharded weights come in the dtype to compute in; whole ones are cast as they are used."""
        if self.config.trainer.compute_dtype == "model" or self.trainable.is_sharded:
            return nullcontext()
        return torch.autocast(self.explainer.device.type, torch.bfloat16)


def _packing(explainer: Explainer) -> Packing | None:
    """How rows of several examples are laid out for this explainer; none if it does not take them."""
    if not can_pack(explainer):
        return None
    implementation = str(explainer.causal.config._attn_implementation)
    return Packing(model_width(explainer.causal), one_row=implementation.startswith("flash"))
