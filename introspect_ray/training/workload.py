"""What a run has to go through: token counts of its examples, from its datasets where they exist, else assumed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from introspect_ray.config import TaskName, TrainConfig
from introspect_ray.data.dataset import Dataset, open_dataset
from introspect_ray.data.manifest import MANIFEST_NAME
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.explainer.encoding import Encoder, Frame, choose_placeholders
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.paths import POCKET_PREFIX
from introspect_ray.models.shapes import model_shape
from introspect_ray.tasks.base import Example
from introspect_ray.tasks.registry import get_task
from introspect_ray.training.footprint import Batch

SAMPLE = 512
"""Examples that stand for all of a run's."""
CHARACTERS_PER_TOKEN = 4
FRAME_TOKENS = 24
"""What a chat template puts around a query, where no tokenizer is at hand to say."""


class Length(NamedTuple):
    """Tokens of one example, its answer included, and of its answer alone."""

    tokens: int
    answer: int


@dataclass(frozen=True)
class Workload:
    """Examples of a run, drawn as often as the run draws them."""

    lengths: tuple[Length, ...]
    num_examples: int
    has_vectors: bool
    layers_per_vector: int
    target_width: int
    target_layers: int
    source: str
    """Where this was found, for people."""

    @property
    def mean_tokens(self) -> float:
        return sum(length.tokens for length in self.lengths) / len(self.lengths)

    @property
    def mean_answer(self) -> float:
        return sum(length.answer for length in self.lengths) / len(self.lengths)

    @property
    def longest(self) -> int:
        return max(length.tokens for length in self.lengths)


class Assumed(NamedTuple):
    """A task in P1: lengths at equal distances of rank, and the number of its training records."""

    lengths: tuple[Length, ...]
    num_examples: int


def _lengths(tokens: Sequence[int], answers: Sequence[int]) -> tuple[Length, ...]:
    return tuple(itertools.starmap(Length, zip(tokens, answers, strict=True)))


ASSUMED: dict[TaskName, Assumed] = {
    # 1,024 latents of each of 32 layers: how many P1 trained on is not published.
    "feature_description": Assumed(
        _lengths((26, 30, 34, 38, 42, 48, 56, 64), (8, 9, 10, 11, 12, 14, 17, 21)), 32 * 1024
    ),
    "activation_patching": Assumed(_lengths((80, 90, 96, 102, 110, 120, 135, 160), (6, 6, 6, 7, 7, 7, 8, 9)), 13454),
    # P1 leaves out questions of more than 500 tokens.
    "input_ablation": Assumed(_lengths((100, 120, 140, 160, 190, 240, 330, 500), (6, 6, 6, 6, 6, 7, 7, 8)), 12642),
}


def find_workload(config: TrainConfig) -> Workload:
    """The run's examples: a sample of its datasets, or what the plan's task makes likely if none of them is there yet.

    Raises:
        UserError: only some datasets are there, one is damaged, or the target has no shape that is known.
    """
    try:
        is_there = [Folder(url).size(MANIFEST_NAME) is not None for url in config.datasets]
    except UserError as error:  # a plan is made where the storage need not be within reach
        return _assumed(config, str(error))
    if not any(is_there):
        return _assumed(config, f"no dataset at {', '.join(config.datasets)}")
    return _measured(config, [open_dataset(url) for url in config.datasets])


def _assumed(config: TrainConfig, reason: str) -> Workload:
    plan = config.plan
    assumed = ASSUMED[plan.task]
    model = config.explainer.model
    shape = model_shape(model if plan.target is None else model.model_copy(update={"path": plan.target}))
    return Workload(
        lengths=assumed.lengths,
        num_examples=plan.num_examples or assumed.num_examples,
        has_vectors=get_task(plan.task).has_vectors,
        layers_per_vector=max(1, shape.num_hidden_layers // 4) if plan.task == "activation_patching" else 1,
        target_width=shape.hidden_size,
        target_layers=shape.num_hidden_layers,
        source=f"lengths of {plan.task} assumed ({reason})",
    )


def _measured(config: TrainConfig, datasets: Sequence[Dataset]) -> Workload:
    sizes = [dataset.manifest.selected.get("train", 0) for dataset in datasets]
    shares = list(config.weights) if config.weights is not None else [float(size) for size in sizes]
    drawn: list[Length] = []
    layers = 1
    for dataset, share in zip(datasets, shares, strict=True):
        examples = _sample(dataset)
        if not examples:
            raise UserError(f"dataset {dataset.folder.url} has no records in its train split, expected at least one")
        found = _token_counts(config, examples)
        count = len(found) if len(datasets) == 1 else max(1, round(SAMPLE * share / sum(shares)))
        drawn += [found[index * len(found) // count] for index in range(count)]
        layers = max([layers, *(len(v.layers) for example in examples for v in example.query.vectors)])
    target = datasets[0].manifest.target
    by = "tokenizer" if _has_tokenizer(config) else f"{CHARACTERS_PER_TOKEN} characters per token"
    return Workload(
        lengths=tuple(drawn),
        num_examples=sum(sizes),
        has_vectors=any(get_task(dataset.manifest.task).has_vectors for dataset in datasets),
        layers_per_vector=layers,
        target_width=target.width,
        target_layers=target.num_layers,
        source=f"lengths of {', '.join(config.datasets)} (by {by})",
    )


def _sample(dataset: Dataset) -> list[Example]:
    """Training examples from the first shards that hold enough of them."""
    task = get_task(dataset.manifest.task)
    shards = dataset.manifest.shards
    count = 1
    while True:
        part = dataclasses.replace(dataset, manifest=dataset.manifest.model_copy(update={"shards": shards[:count]}))
        records = part.records("train")
        if len(records) >= SAMPLE or count >= len(shards):
            return [task.render(record) for record in records[:SAMPLE]]
        count *= 2


def _has_tokenizer(config: TrainConfig) -> bool:
    path = config.explainer.model.path
    return path.startswith(POCKET_PREFIX) or Path(path).expanduser().is_dir()


def _token_counts(config: TrainConfig, examples: Sequence[Example]) -> list[Length]:
    if _has_tokenizer(config):
        tokenizer = load_tokenizer(config.explainer.model)
        encoder = Encoder(tokenizer, choose_placeholders(tokenizer), Frame.of(tokenizer))
        encoded = [encoder.encode(example.query, example.answer) for example in examples]
        return [Length(len(one.ids), one.num_loss_tokens) for one in encoded]
    counts = []
    for example in examples:
        answer = math.ceil(len(example.answer) / CHARACTERS_PER_TOKEN) + 1
        query = math.ceil(len(example.query.text) / CHARACTERS_PER_TOKEN) + 3 * len(example.query.vectors)
        counts.append(Length(FRAME_TOKENS + query + answer, answer))
    return counts


def largest_batch(workload: Workload, config: TrainConfig, window: int | None) -> Batch:
    """The largest micro-batch that a worker can meet: its share of a step, made of the longest examples.

    Args:
        window: tokens that attention reaches back, where some layers do not reach back to the start.
    """
    trainer = config.trainer
    count = math.ceil(config.optimization.batch_size / trainer.num_workers)
    by_length = sorted(workload.lengths, reverse=True)
    mine = [by_length[index % len(by_length)] for index in range(count)]
    tokens = [length.tokens for length in mine]
    if trainer.packing:
        size = max(tokens[0], min(trainer.micro_batch_tokens, sum(tokens)))
        ends = itertools.accumulate(sorted(tokens))
        rows, tokens_per_row, examples = 1, size, max(1, sum(end <= size for end in ends))
    else:
        # Examples of similar length share a micro-batch: of each length, as many as there are and as find room.
        fitting = [
            (max(1, min(trainer.micro_batch_tokens // longest, count - index)), longest)
            for index, longest in enumerate(tokens)
        ]
        rows, tokens_per_row = max(fitting, key=lambda both: both[0] * both[1])
        examples = max(together for together, _ in fitting)
    answers = sorted((length.answer for length in mine), reverse=True)
    return Batch(
        rows=rows,
        tokens_per_row=tokens_per_row,
        num_answer_tokens=sum(answers[:examples]),
        num_vectors=examples if workload.has_vectors else 0,
        # Flash kernels take the bounds of examples and the window as numbers.
        is_masked=config.explainer.model.attention != "flash_attention_2"
        and (trainer.packing or (window is not None and tokens_per_row >= window)),
    )
