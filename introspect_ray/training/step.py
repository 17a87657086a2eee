"""One optimizer step, and the examples it draws from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from introspect_ray.config import TrainConfig
from introspect_ray.data.dataset import open_dataset
from introspect_ray.errors import RunFailed
from introspect_ray.explainer.encoding import Encoded
from introspect_ray.explainer.model import Explainer
from introspect_ray.tasks.registry import get_task
from introspect_ray.training.batches import micro_batches, share, step_indices, step_seed
from introspect_ray.training.schedule import learning_rate
from introspect_ray.training.trainable import Trainable
from introspect_ray.training.workers import Workers


@dataclass(frozen=True)
class Examples:
    """All training examples, encoded, and the ids of their records."""

    encoded: list[Encoded]
    record_ids: list[str]

    @property
    def lengths(self) -> list[int]:
        return [len(one.ids) for one in self.encoded]


class StepResult(NamedTuple):
    """Loss in nats summed over the step's answer tokens, their number, all tokens, unclipped gradient norm."""

    loss_sum: float
    loss_tokens: int
    tokens: int
    grad_norm: float


def load_examples(explainer: Explainer, datasets: Sequence[str]) -> Examples:
    """The selected training records of all datasets, rendered and encoded.

    Raises:
        UserError: a dataset is damaged, or a record does not fit the explainer; the record is named.
    """
    encoded: list[Encoded] = []
    record_ids: list[str] = []
    for url in datasets:
        dataset = open_dataset(url)
        task = get_task(dataset.manifest.task)
        records = dataset.records(split="train")
        examples = [task.render(record) for record in records]
        own_ids = [record["record_id"] for record in records]
        names = [f"dataset {url}, record {record_id}" for record_id in own_ids]
        encoded += explainer.encode([one.query for one in examples], [one.answer for one in examples], names)
        record_ids += own_ids
    return Examples(encoded, record_ids)


class Stepper:
    """Takes optimizer steps; what a step does depends on its number, the seed and the weights alone."""

    def __init__(self, explainer: Explainer, examples: Examples, config: TrainConfig, workers: Workers):
        self.explainer = explainer
        self.examples = examples
        self.config = config
        self.workers = workers
        self.lengths = examples.lengths
        self.trainable = Trainable(explainer, workers)

    def step(self, number: int, optimizer: torch.optim.AdamW) -> StepResult:
        """Do optimizer step `number`, counted from 0.

        Raises:
            RunFailed: the loss or its gradient is not finite, on all workers alike; the batch's records are named.
        """
        settings = self.config.optimization
        chosen = step_indices(number, settings.batch_size, len(self.lengths), self.config.seed)
        loss_tokens = sum(self.examples.encoded[index].num_loss_tokens for index in chosen)
        # Dropout draws from the global generator: a resumed run must draw what an undisturbed one would have drawn.
        torch.manual_seed(step_seed(number, self.config.seed, self.workers.rank))
        own_loss = self._accumulate(chosen, loss_tokens)
        loss_sum = float(self.trainable.sum_gradients(own_loss.reshape(1)))
        grad_norm = self.trainable.clip_gradients(settings.max_grad_norm)
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            ids = ", ".join(sorted({self.examples.record_ids[index] for index in chosen}))
            rate = f"optimization.learning_rate {settings.learning_rate:g}"
            raise RunFailed(
                f"step {number + 1}: loss is {loss_sum / loss_tokens:g} and gradient norm {grad_norm:g}, "
                f"expected finite numbers ({rate} too high?); records of the batch: {ids}"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, settings)
        optimizer.step()
        return StepResult(loss_sum, loss_tokens, sum(self.lengths[index] for index in chosen), grad_norm)

    def _accumulate(self, chosen: Sequence[int], loss_tokens: int) -> torch.Tensor:
        """Leave this worker's share of the gradient of the token mean in `.grad`; returns its summed loss."""
        self.trainable.clear_gradients()
        total = torch.zeros((), device=self.explainer.device)
        mine = share(chosen, self.lengths, self.workers.rank, self.workers.size)
        groups = micro_batches(mine, self.lengths, self.config.trainer.micro_batch_tokens)
        # Every pass needs the shards of all workers, so those with fewer micro-batches add some that count zero.
        num_passes = (
            self.workers.largest(len(groups), self.explainer.device) if self.trainable.is_sharded else len(groups)
        )
        for group in groups:
            total += self._backward([self.examples.encoded[index] for index in group], loss_tokens)
        idle = self.examples.encoded[min(chosen, key=lambda index: self.lengths[index])]
        for _ in range(num_passes - len(groups)):
            self._backward([idle], loss_tokens, weight=0.0)
        return total

    def _backward(self, batch: Sequence[Encoded], loss_tokens: int, weight: float = 1.0) -> torch.Tensor:
        """Add one micro-batch to the gradient; returns its summed loss."""
        with self._precision():
            loss, _ = self.explainer.loss(batch)
        (loss * (weight / loss_tokens)).backward()
        return loss.detach()

    def _precision(self) -> AbstractContextManager[object]:
        """Sharded weights come in the dtype to compute in; whole ones are cast as they are used."""
        if self.config.trainer.compute_dtype == "model" or self.trainable.is_sharded:
            return nullcontext()
        return torch.autocast(self.explainer.device.type, torch.bfloat16)
