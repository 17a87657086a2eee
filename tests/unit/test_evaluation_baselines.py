"""Majority and nearest neighbour against literal definitions, and vectors without a direction."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from introspect_ray.errors import UserError
from introspect_ray.evaluation import baselines
from introspect_ray.evaluation.baselines import NearestNeighbor, majority
from introspect_ray.explainer.query import Query, Vector


def at(values: list[float], layers: tuple[int, ...] = (0,), text: str = "q", dtype: type = np.float32) -> Query:
    return Query((text, Vector(np.array(values, dtype=dtype), layers)))


def test_majority_breaks_ties_by_text() -> None:
    assert majority(["b", "c", "c", "b", "a"]) == "b"
    with pytest.raises(UserError, match=r"^the majority baseline needs at least 1 training record, found 0$"):
        majority([])


def test_cosine_not_dot_product() -> None:
    index = NearestNeighbor([at([100, 100]), at([0.01, 0])], ["long", "aligned"], "global")
    assert index.answer([at([1, 0.1])]) == ["aligned"]


def test_per_layer_keeps_to_its_layers_and_falls_back() -> None:
    train = [at([1, 0], (0,)), at([0, 1], (0,)), at([0.9, 0.1], (1, 2))]
    answers = ["a", "b", "c"]
    queries = [at([0.9, 0.1], (0,)), at([0, 1], (1, 2)), at([0, 1], (7,))]
    assert NearestNeighbor(train, answers, "per_layer").answer(queries) == ["a", "c", "b"]
    assert NearestNeighbor(train, answers, "global").answer(queries) == ["c", "b", "b"]


@pytest.mark.parametrize("variant", ["per_layer", "global"])
def test_blocks_equal_a_literal_loop(variant: baselines.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_CHUNK", 7)
    generator = np.random.default_rng(0)
    train = [at(generator.normal(size=5).tolist(), (int(generator.integers(3)),)) for _ in range(50)]
    queries = [at(generator.normal(size=5).tolist(), (int(generator.integers(3)),)) for _ in range(23)]

    def cosine(one: Query, other: Query) -> float:
        if variant == "per_layer" and one.vectors[0].layers != other.vectors[0].layers:
            return -math.inf
        left, right = one.vectors[0].values.astype(float), other.vectors[0].values.astype(float)
        return float(left @ right / math.sqrt(left @ left) / math.sqrt(right @ right))

    expected = [max(range(50), key=lambda row, query=query: cosine(query, train[row])) for query in queries]
    assert NearestNeighbor(train, [""] * 50, variant).neighbors(queries) == expected


def test_equal_neighbours_give_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_CHUNK", 2)
    train = [at([0, 1]), at([1, 0]), at([1, 0]), at([1, 0])]
    assert NearestNeighbor(train, ["a", "b", "c", "d"], "global").answer([at([2, 0])]) == ["b"]


@pytest.mark.parametrize("bad", [[0, 0], [math.nan, 1], [math.inf, 1]])
def test_vectors_without_a_direction_are_answered_by_text_and_are_never_neighbours(bad: list[float]) -> None:
    train = [at(bad, text="red apple"), at([0, 1], text="green pear"), at([-1, 0], text="blue plum")]
    index = NearestNeighbor(train, ["red", "green", "blue"], "per_layer")
    assert index.answer([at([1, 0.5], text="red apple"), at(bad, text="a blue plum")]) == ["green", "blue"]


def test_half_precision_vectors_neither_overflow_nor_vanish() -> None:
    train = [at([300, 400], dtype=np.float16), at([1e-6, -1e-6], dtype=np.float16)]
    index = NearestNeighbor(train, ["large", "small"], "global")
    assert index.answer([at([400, 300], dtype=np.float16), at([2, -1], dtype=np.float16)]) == ["large", "small"]


def test_other_widths_are_never_compared() -> None:
    index = NearestNeighbor([at([1, 0, 0], text="red"), at([0, 1, 0], text="green")], ["r", "g"], "global")
    assert index.answer([at([1, 0], text="green")]) == ["g"]


def test_texts_by_cosine_of_word_counts() -> None:
    texts = ["the cat sat on the mat", "a cat", "Who made the harbour map ?", "", "the the the the"]
    wanted = ["cat", "map of the harbour", "the", "zebra"]
    index = NearestNeighbor([Query((text,)) for text in texts], texts, "per_layer")

    def cosine(one: str, other: str) -> float:
        left, right = Counter(one.casefold().split()), Counter(other.casefold().split())
        size = math.sqrt(sum(n * n for n in left.values())) * math.sqrt(sum(n * n for n in right.values()))
        return sum(left[word] * right[word] for word in left) / size if size else 0.0

    expected = [max(texts, key=lambda text, query=query: cosine(query, text)) for query in wanted]
    assert index.answer([Query((text,)) for text in wanted]) == expected
    assert expected[:2] == ["a cat", "Who made the harbour map ?"]


def test_no_training_record_is_refused() -> None:
    with pytest.raises(UserError, match="nearest neighbour baseline needs at least 1 training record, found 0"):
        NearestNeighbor([], [], "global")
