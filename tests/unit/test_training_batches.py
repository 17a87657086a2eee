"""Which examples a step reads, and the learning rate it uses."""

import math
from collections import Counter

import pytest

from introspect_ray.config import OptimizationConfig
from introspect_ray.training.batches import micro_batches, share, step_indices, step_seed
from introspect_ray.training.schedule import learning_rate

LENGTHS = [7, 3, 9, 3, 12, 5, 40, 8, 2, 6]


def test_every_epoch_reads_every_example_once():
    read = [index for step in range(15) for index in step_indices(step, 4, 10, seed=0)]
    for epoch in range(6):
        assert sorted(read[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert read[:10] != read[10:20]


def test_a_batch_larger_than_the_dataset_repeats_it_evenly():
    assert Counter(step_indices(0, 25, 10, seed=0)).most_common()[-1][1] == 2
    assert len(step_indices(3, 25, 10, seed=0)) == 25


def test_order_depends_on_the_seed_alone():
    assert step_indices(7, 4, 10, seed=1) == step_indices(7, 4, 10, seed=1)
    assert step_indices(0, 10, 10, seed=1) != step_indices(0, 10, 10, seed=2)
    assert len(step_indices(0, 4, 10, seed=-1)) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_shares_are_a_partition(world_size):
    indices = [0, 1, 2, 4, 6, 6, 9]
    parts = [share(indices, LENGTHS, rank, world_size) for rank in range(world_size)]
    assert Counter(index for part in parts for index in part) == Counter(indices)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_micro_batches_hold_the_budget_and_every_example():
    groups = micro_batches(range(10), LENGTHS, max_tokens=24)
    assert sorted(index for group in groups for index in group) == list(range(10))
    for group in groups:
        assert len(group) == 1 or len(group) * max(LENGTHS[index] for index in group) <= 24
    assert [6] in groups
    assert micro_batches([], LENGTHS, 10) == []


def test_step_seeds_differ_by_step_and_rank():
    seeds = {step_seed(step, seed, rank) for step in range(5) for seed in range(3) for rank in range(2)}
    assert len(seeds) == 30


def test_schedule():
    config = OptimizationConfig(steps=100, learning_rate=2.0, warmup_share=0.1, schedule="cosine")
    assert [learning_rate(step, config) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate(55, config) == pytest.approx(1.0)
    assert learning_rate(99, config) == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    constant = config.model_copy(update={"schedule": "constant", "warmup_share": 0})
    assert {learning_rate(step, constant) for step in (0, 50, 99)} == {2.0}
