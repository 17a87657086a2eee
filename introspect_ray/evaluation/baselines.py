"""Baselines that know the training answers but no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from introspect_ray.errors import UserError
from introspect_ray.explainer.query import Query

Variant = Literal["per_layer", "global"]

_CHUNK = 2048
"""Rows per block of the similarity matrix: 16 MB of float32."""
_WORD = re.compile(r"\w+|[^\w\s]")


def majority(train_answers: Sequence[str]) -> str:
    """The most frequent training answer; of equally frequent ones the first in text order."""
    if not train_answers:
        raise UserError("the majority baseline needs at least 1 training record, found 0")
    counts = Counter(train_answers)
    return min(counts, key=lambda text: (-counts[text], text))


class NearestNeighbor:
    """Answers a query with the answer of the most similar training query; of equal ones, the first.

    Similarity is the cosine between vectors (several vectors of one query are concatenated). `per_layer` compares
    only with training vectors of the same layers, and with all of them where there are none; `global` always with
    all of them (of the same width). A query without a vector of non-zero, finite length, or with no training vector
    to compare with, is answered by the cosine between bags of words of the query texts; training vectors without
    such a length are never neighbours by vector.

    Source: P1, nearest-neighbour baseline. Deviation: its code takes the raw dot product, which prefers long vectors.
    """

    def __init__(self, queries: Sequence[Query], answers: Sequence[str], variant: Variant):
        if not queries:
            raise UserError("the nearest neighbour baseline needs at least 1 training record, found 0")
        assert len(queries) == len(answers), f"{len(queries)} queries, {len(answers)} answers"
        self._queries = queries
        self._answers = answers
        self._variant = variant
        self._by_layers: dict[tuple[object, ...], list[int]] = {}
        self._by_width: dict[int, list[int]] = {}
        for row, query in enumerate(queries):
            if _has_direction(query):
                self._by_layers.setdefault(_layers_key(query), []).append(row)
                self._by_width.setdefault(_width(query), []).append(row)
        self._words: _WordIndex | None = None

    def answer(self, queries: Sequence[Query]) -> list[str]:
        """Texts of the neighbours' answers, one per query."""
        return [self._answers[row] for row in self.neighbors(queries)]

    def neighbors(self, queries: Sequence[Query]) -> list[int]:
        """Training rows, one per query."""
        # the key says which training rows are candidates; queries that share candidates are compared in blocks
        jobs: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
        by_text: list[int] = []
        for place, query in enumerate(queries):
            key, candidates = self._candidates(query)
            if candidates:
                jobs.setdefault(key, (candidates, []))[1].append(place)
            else:
                by_text.append(place)
        result = [-1] * len(queries)
        for candidates, places in jobs.values():
            best = _best_cosine([queries[place] for place in places], [self._queries[row] for row in candidates])
            for place, index in zip(places, best, strict=True):
                result[place] = candidates[index]
        if by_text:
            self._words = self._words or _WordIndex([query.text for query in self._queries])
            for place in by_text:
                result[place] = self._words.nearest(queries[place].text)
        return result

    def _candidates(self, query: Query) -> tuple[tuple[object, ...], list[int]]:
        if not _has_direction(query):
            return (), []
        width = _width(query)
        if self._variant == "per_layer":
            key = _layers_key(query)
            if key in self._by_layers:
                return key, self._by_layers[key]
        return ("all", width), self._by_width.get(width, [])


def _layers_key(query: Query) -> tuple[object, ...]:
    return (_width(query), *(vector.layers for vector in query.vectors))


def _width(query: Query) -> int:
    return sum(len(vector.values) for vector in query.vectors)


def _has_direction(query: Query) -> bool:
    """Whether a cosine is defined: some vector, all finite, not all zero."""
    if not query.vectors:
        return False
    squares = sum(float(np.square(vector.values, dtype=np.float64).sum()) for vector in query.vectors)
    return bool(np.isfinite(squares)) and squares > 0


def _unit_rows(queries: Sequence[Query]) -> Float[np.ndarray, "queries width"]:
    # float64 for the lengths: squares of float16 overflow, and those of tiny float32 values vanish
    rows = np.stack([np.concatenate([vector.values for vector in query.vectors]) for query in queries])
    rows = rows.astype(np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _best_cosine(queries: Sequence[Query], candidates: Sequence[Query]) -> list[int]:
    """Index of each query's most similar candidate, by blocks: no N x M matrix, no second copy of all vectors."""
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    index = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(candidates), _CHUNK):
        block = _unit_rows(candidates[start : start + _CHUNK])
        for first in range(0, len(queries), _CHUNK):
            rows = slice(first, min(first + _CHUNK, len(queries)))
            similarity = _unit_rows(queries[rows]) @ block.T
            place = similarity.argmax(axis=1)
            value = similarity[np.arange(len(place)), place]
            better = value > best[rows]  # strict: the first of equal ones stays
            best[rows] = np.where(better, value, best[rows])
            index[rows] = np.where(better, place + start, index[rows])
    return index.tolist()


class _WordIndex:
    """Cosine between word counts, by an inverted index: word -> rows that hold it, and how often."""

    def __init__(self, texts: Sequence[str]):
        postings: dict[str, tuple[list[int], list[float]]] = {}
        self._norms = np.ones(len(texts))
        for row, text in enumerate(texts):
            counts = _word_counts(text)
            for word, count in counts.items():
                rows, values = postings.setdefault(word, ([], []))
                rows.append(row)
                values.append(count)
            if counts:
                self._norms[row] = np.sqrt(sum(count * count for count in counts.values()))
        self._postings = {word: (np.array(rows), np.array(values)) for word, (rows, values) in postings.items()}

    def nearest(self, text: str) -> int:
        """Row of the most similar text; the first one if no word is shared."""
        scores = np.zeros(len(self._norms))
        for word, count in _word_counts(text).items():
            if word in self._postings:
                rows, values = self._postings[word]
                scores[rows] += count * values
        return int((scores / self._norms).argmax())


def _word_counts(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.casefold()))
