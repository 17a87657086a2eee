"""Controls change the vector and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from introspect_ray.errors import UserError
from introspect_ray.evaluation.controls import scaled_vector, swapped_vectors, without_vector, zero_vector
from introspect_ray.explainer.query import Query, Vector


def query(value: float, layers: tuple[int, ...] = (0,)) -> Query:
    return Query((f"before {value} ", Vector(np.full(3, value, dtype=np.float32), layers), " after"))


def donors(queries: list[Query], groups: list[str], seed: int) -> list[int]:
    """Whose vector each query got, read off the values."""
    swapped = swapped_vectors(queries, groups, seed)
    assert [new.text for new in swapped] == [old.text for old in queries]
    owner = {float(old.vectors[0].values[0]): index for index, old in enumerate(queries)}
    got = [owner[float(new.vectors[0].values[0])] for new in swapped]
    assert [new.vectors[0].layers for new in swapped] == [queries[index].vectors[0].layers for index in got]
    return got


def test_without_and_zero_vector() -> None:
    original = query(2.0)
    assert without_vector(original) == Query(("before 2.0 ", " after"))
    zeroed = zero_vector(original).vectors[0]
    assert zeroed.values.tolist() == [0, 0, 0] and zeroed.layers == (0,) and zeroed.values.dtype == np.float32
    assert original.vectors[0].values.tolist() == [2, 2, 2]


def test_scaled_vector_has_the_norm_and_the_direction() -> None:
    half = Query((Vector(np.array([300, -400], dtype=np.float16), (1,)),))
    scaled = scaled_vector(half, 10.0).vectors[0]
    assert scaled.values.tolist() == pytest.approx([6, -8]) and scaled.layers == (1,)
    assert scaled_vector(zero_vector(half), 10.0).vectors[0].values.tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_swap_is_a_permutation_to_other_groups_of_the_same_layers(seed: int) -> None:
    generator = np.random.default_rng(seed)
    layers = [(int(generator.integers(3)),) for _ in range(80)]
    groups = [f"g{int(generator.integers(12))}" for _ in range(80)]
    queries = [query(index + 1.0, layers[index]) for index in range(80)]
    got = donors(queries, groups, seed)
    assert sorted(got) == list(range(80))
    assert all(groups[index] != groups[donor] for index, donor in enumerate(got))
    assert all(layers[index] == layers[donor] for index, donor in enumerate(got))


def test_swap_leaves_layers_only_for_rows_that_have_no_partner_there() -> None:
    """Layer 9 has one row, layer 1 has one group, so they exchange; layer 0 stays among itself."""
    layers = [(0,)] * 4 + [(1,)] * 2 + [(9,)] * 2
    groups = ["a", "b", "c", "d", "e", "e", "f", "f"]
    got = donors([query(index + 1.0, layer) for index, layer in enumerate(layers)], groups, seed=0)
    assert set(got[:4]) == {0, 1, 2, 3} and set(got[4:6]) == {6, 7} and set(got[6:]) == {4, 5}


@pytest.mark.parametrize(
    ("groups", "same_group"),
    [(["a"] * 5, 5), (["a", "a", "a", "a", "b"], 3), (["a", "b"], 0), (["a", "a", "b", "b", "c"], 0)],
)
def test_swap_never_gives_a_query_its_own_vector(groups: list[str], same_group: int) -> None:
    """With one group of 4 among 5 rows, 3 of its rows can not be served from outside."""
    for seed in range(5):
        got = donors([query(index + 1.0) for index in range(len(groups))], groups, seed)
        assert all(index != donor for index, donor in enumerate(got))
        assert sum(groups[index] == groups[donor] for index, donor in enumerate(got)) == same_group


def test_lone_row_of_a_layer_joins_a_larger_pool() -> None:
    got = donors([query(1.0, (5,)), query(2.0), query(3.0), query(4.0)], ["a", "b", "c", "d"], seed=0)
    assert got[0] != 0 and all(index != donor for index, donor in enumerate(got))


def test_swap_follows_its_seed_alone() -> None:
    queries, groups = [query(index + 1.0) for index in range(30)], [f"g{index}" for index in range(30)]
    np.random.seed(0)
    first = donors(queries, groups, seed=3)
    np.random.seed(1)
    assert donors(queries, groups, seed=3) == first != donors(queries, groups, seed=4)


def test_one_query_can_not_swap() -> None:
    with pytest.raises(UserError, match="swapped_vector needs at least 2 records to exchange vectors between, found 1"):
        swapped_vectors([query(1.0)], ["a"], 0)
