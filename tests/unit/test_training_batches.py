"""Which examples a step reads, and the learning rate it uses."""

import math
from collections import Counter

import pytest

from introspect_ray.config import OptimizationConfig
from introspect_ray.training.batches import (
    Packing,
    arrange,
    epoch_places,
    micro_batches,
    pack_rows,
    share,
    step_indices,
    step_seed,
)
from introspect_ray.training.schedule import learning_rate

LENGTHS = [7, 3, 9, 3, 12, 5, 40, 8, 2, 6]


def test_every_epoch_reads_every_example_once():
    read = [index for step in range(15) for index in step_indices(step, 4, [10], seed=0)]
    for epoch in range(6):
        assert sorted(read[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert read[:10] != read[10:20]


def test_a_batch_larger_than_the_dataset_repeats_it_evenly():
    assert Counter(step_indices(0, 25, [10], seed=0)).most_common()[-1][1] == 2
    assert len(step_indices(3, 25, [10], seed=0)) == 25


def test_order_depends_on_the_seed_alone():
    assert step_indices(7, 4, [10], seed=1) == step_indices(7, 4, [10], seed=1)
    assert step_indices(0, 10, [4, 6], seed=1) != step_indices(0, 10, [4, 6], seed=2)
    assert len(step_indices(0, 4, [10], seed=-1)) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_shares_are_a_partition(world_size):
    indices = [0, 1, 2, 4, 6, 6, 9]
    parts = [share(indices, LENGTHS, rank, world_size) for rank in range(world_size)]
    assert Counter(index for part in parts for index in part) == Counter(indices)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_weights_set_how_often_datasets_are_drawn():
    """2 to 1 for the smaller dataset; within a dataset, every example equally often."""
    sizes, weights = [4, 20], [2, 1]
    drawn = [index for step in range(9) for index in step_indices(step, 16, sizes, seed=3, weights=weights)]
    counts = Counter(drawn)
    assert sum(counts[index] for index in range(4)) == 96
    assert {counts[index] for index in range(4)} == {24}
    assert {counts[index] for index in range(4, 24)} == {2, 3}
    # Also within an epoch of 24 places the small dataset is not all at one end.
    assert 0 < sum(index < 4 for index in drawn[:12]) < 12


def test_weighted_order_is_a_function_of_seed_and_step():
    def order(step, seed):
        return step_indices(step, 8, [5, 7], seed, weights=[1, 3])

    assert order(4, 1) == order(4, 1)
    assert order(4, 1) != order(4, 2)
    whole = [index for step in range(6) for index in order(step, 1)]
    assert whole == step_indices(0, 48, [5, 7], 1, weights=[1, 3])


def test_weights_of_one_dataset_change_nothing():
    assert step_indices(3, 4, [10], 0, weights=[7.0]) == step_indices(3, 4, [10], 0)


@pytest.mark.parametrize(
    ("count", "weights", "places"),
    [
        (10, [1, 1], [5, 5]),
        (10, [1, 2], [3, 7]),
        (10, [2, 3, 5], [2, 3, 5]),
        (10, [1e-9, 1, 1e-9], [1, 8, 1]),
        (7, [1, 1, 1], [3, 2, 2]),
    ],
)
def test_places_of_an_epoch(count, weights, places):
    assert epoch_places(count, weights) == places


def test_micro_batches_hold_the_budget_and_every_example():
    groups = arrange(range(10), LENGTHS, 24, packing=None)
    assert sorted(index for group in groups for row in group for index in row) == list(range(10))
    for group in groups:
        assert all(len(row) == 1 for row in group)
        assert len(group) == 1 or len(group) * max(LENGTHS[row[0]] for row in group) <= 24
    assert [[6]] in groups
    assert arrange([], LENGTHS, 10, Packing(64)) == []


def test_rows_are_filled_and_never_overfilled():
    assert pack_rows(range(10), LENGTHS, 20) == [[6], [4, 7], [2, 0, 1], [9, 5, 3, 8]]
    assert micro_batches([[4, 7], [6], [2, 5, 1]], LENGTHS, 40) == [[[2, 5, 1], [4, 7]], [[6]]]


@pytest.mark.parametrize("width", [8, 4096])
@pytest.mark.parametrize("max_tokens", [30, 40, 64, 500])
def test_packed_layouts_hold_the_budget_and_every_example(width, max_tokens):
    indices = [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    groups = arrange(indices, LENGTHS, max_tokens, Packing(width))
    assert sorted(index for group in groups for row in group for index in row) == indices
    for group in groups:
        longest = max(sum(LENGTHS[index] for index in row) for row in group)
        assert len(group) * longest <= max_tokens or group == [[6]]
    assert groups == arrange(indices[::-1], LENGTHS, max_tokens, Packing(width))


def test_wide_models_take_longer_rows_with_less_padding():
    lengths = [30, 41, 55, 62, 70, 88, 97, 130, 145, 160]

    def padded(width):
        layout = arrange(range(10), lengths, 1024, Packing(width) if width else None)
        return sum(len(group) * max(sum(lengths[i] for i in row) for row in group) for group in layout)

    assert padded(10_000) <= padded(100) <= padded(None)
    assert padded(10_000) < 1.05 * sum(lengths)
    assert padded(None) > 1.3 * sum(lengths)


def test_one_long_example_does_not_keep_the_others_from_short_rows():
    lengths = [900, *[40 + 7 * (number % 5) for number in range(40)]]
    groups = arrange(range(41), lengths, 1024, Packing(512))
    assert [[0]] in groups
    others = [row for group in groups for row in group if row != [0]]
    assert max(sum(lengths[index] for index in row) for row in others) <= 512


def test_flash_attention_gets_one_row_at_a_time():
    groups = arrange(range(10), LENGTHS, 50, Packing(64, one_row=True))
    assert all(len(group) == 1 for group in groups)
    assert len(groups) == 2


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
