"""Evaluation while training: the workers answer validation records and agree on the task's own metrics. No Ray here.

    validation split --spread over groups--> records --dealt to workers--> answers --> counts, summed over workers
                                                                  metric(summed counts), mean over datasets

A metric is a function of sums (evaluation/metrics.py), so summed counts give the value of all answers together and no
text has to travel. All workers see the same values, and so decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from introspect_ray.config import EvaluationDuringConfig, TrainConfig
from introspect_ray.data.dataset import Dataset, open_dataset
from introspect_ray.errors import UserError
from introspect_ray.evaluation.evaluate import score_texts
from introspect_ray.evaluation.metrics import METRICS, count_rows
from introspect_ray.evaluation.sampling import spread
from introspect_ray.explainer.encoding import Encoded
from introspect_ray.explainer.model import Explainer
from introspect_ray.tasks.base import Example, Record, Task
from introspect_ray.tasks.registry import get_task
from introspect_ray.training.batches import share
from introspect_ray.training.checkpoint import TrainState
from introspect_ray.training.workers import Workers

Scores = dict[str, float]
"""Metric -> value; `nan` where it is undefined."""


def check_evaluation(config: EvaluationDuringConfig, datasets: Sequence[Dataset]) -> None:
    """Refuse datasets without validation records and a metric that none of them has. Reads manifests only."""
    if not config.every:
        return
    for dataset in datasets:
        if not dataset.manifest.selected.get("validation", 0):
            raise UserError(
                f"evaluation.every is {config.every}, but dataset {dataset.folder.url} has no records in its validation"
                " split: expected at least one, or evaluation.every 0"
            )
    known = dict.fromkeys(metric for dataset in datasets for metric in get_task(dataset.manifest.task).metrics)
    if config.metric not in known:
        raise UserError(f"evaluation.metric is {config.metric!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class HeldOut:
    """Validation records of one dataset, rendered and encoded without their answers."""

    name: str
    task: Task
    records: list[Record]
    examples: list[Example]
    encoded: list[Encoded]


def load_held_out(explainer: Explainer, config: TrainConfig) -> list[HeldOut]:
    """What evaluations answer; nothing if there are to be none.

    Raises:
        UserError: a dataset is damaged, or a record does not fit the explainer; the record is named.
    """
    found = []
    for url in config.datasets if config.evaluation.every else ():
        dataset = open_dataset(url)
        task = get_task(dataset.manifest.task)
        records = spread(dataset.records(split="validation"), config.evaluation.max_examples)
        examples = [task.render(record) for record in records]
        names = [f"dataset {url}, record {record['record_id']}" for record in records]
        encoded = explainer.encode([example.query for example in examples], None, names)
        found.append(HeldOut(url, task, records, examples, encoded))
    return found


class Evaluator:
    """Answers and scores the held-out records with the explainer as it is; a function of its weights alone."""

    def __init__(self, explainer: Explainer, held_out: Sequence[HeldOut], config: TrainConfig, workers: Workers):
        self.explainer = explainer
        self.held_out = held_out
        self.config = config
        self.workers = workers

    def is_due(self, step: int) -> bool:
        """After every so many steps, and after the last one."""
        every = self.config.evaluation.every
        return bool(every) and (step % every == 0 or step == self.config.optimization.steps)

    def evaluate(self, state: TrainState) -> dict[str, Any]:
        """Score the explainer, note in `state` whether it is the best so far, and return what metrics.jsonl says."""
        by_dataset = self.scores()
        mean = _json(_mean(list(by_dataset.values())))
        value, best = (scores.get(self.config.evaluation.metric) for scores in (mean, state.best_scores))
        if value is not None and (best is None or value > best):
            state.best_step, state.best_scores, state.bad_evaluations = state.step, mean, 0
        else:
            state.bad_evaluations += 1
        metrics: dict[str, Any] = {"validation": mean}
        if len(by_dataset) > 1:
            metrics["validation_by_dataset"] = {name: _json(scores) for name, scores in by_dataset.items()}
        return metrics

    def is_over(self, state: TrainState) -> bool:
        """Whether so many evaluations in a row were no better that training stops here."""
        patience = self.config.evaluation.patience
        return patience is not None and state.bad_evaluations >= patience

    def scores(self) -> dict[str, Scores]:
        """Dataset -> metrics of its task over its held-out records. All workers call this together."""
        own = {
            (held_out.name, metric): sums
            for held_out in self.held_out
            for metric, sums in self._own_sums(held_out).items()
        }
        summed = iter(self.workers.sum([float(value) for sums in own.values() for value in sums], self._device))
        result: dict[str, Scores] = {held_out.name: {} for held_out in self.held_out}
        for (name, metric), sums in own.items():
            total = np.array([next(summed) for _ in sums])
            result[name][metric] = METRICS[metric].of_sums(total)
        return result

    @property
    def _device(self) -> torch.device:
        return self.explainer.device

    def _own_sums(self, held_out: HeldOut) -> dict[str, Float[np.ndarray, " counts"]]:
        """Metric -> counts summed over this worker's share of the answers."""
        mine, num_padding = self._share(held_out)
        texts = self.explainer.answer(
            [held_out.encoded[index] for index in mine], self._batch_size(held_out), self._is_sharded
        )
        rows = score_texts(
            held_out.task,
            [held_out.records[index] for index in mine],
            [held_out.examples[index] for index in mine],
            texts,
        )
        counted = len(rows) - num_padding
        return {name: count_rows(METRICS[name], rows)[:counted].sum(axis=0) for name in held_out.task.metrics}

    def _share(self, held_out: HeldOut) -> tuple[list[int], int]:
        """This worker's records and how many of them, at the end, only make all workers' shares equally long."""
        lengths = [len(encoded.ids) for encoded in held_out.encoded]
        mine = share(range(len(lengths)), lengths, self.workers.rank, self.workers.size)
        padding = -(-len(lengths) // self.workers.size) - len(mine)
        return mine + [0] * padding, padding

    @property
    def _is_sharded(self) -> bool:
        return self.workers.size > 1 and self.config.trainer.sharding != "none"

    def _batch_size(self, held_out: HeldOut) -> int:
        """Answers at once, equal on all workers: as many as one forward pass of training may hold."""
        longest = max(len(encoded.ids) for encoded in held_out.encoded) + self.explainer.card.max_new_tokens
        return max(1, self.config.trainer.micro_batch_tokens // longest)


def _mean(by_dataset: Sequence[Scores]) -> Scores:
    """Every metric averaged over the datasets that have it, those where it is undefined left out."""
    names = dict.fromkeys(name for scores in by_dataset for name in scores)
    values = {
        name: [scores[name] for scores in by_dataset if math.isfinite(scores.get(name, math.nan))] for name in names
    }
    return {name: sum(found) / len(found) if found else math.nan for name, found in values.items()}


def _json(scores: Scores) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
