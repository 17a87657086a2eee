"""Controls: the same query with its vector taken away, emptied, exchanged or rescaled.

What a trained explainer still scores under the first three it owes to the text and to habit, not to the target's
internals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from introspect_ray.errors import UserError
from introspect_ray.explainer.query import Query, Vector


def without_vector(query: Query) -> Query:
    """The query with its vectors and their marker tokens removed."""
    return query.map_vectors(lambda _: None)


def zero_vector(query: Query) -> Query:
    """The query with its vectors set to zero; markers and projection stay."""
    return query.map_vectors(lambda vector: Vector(np.zeros_like(vector.values), vector.layers))


def scaled_vector(query: Query, norm: float) -> Query:
    """The query with every vector scaled to Euclidean length `norm`; one of length zero has no direction and stays."""

    def scale(vector: Vector) -> Vector:
        # float32: the squares of a float16 vector overflow
        values = np.asarray(vector.values, dtype=np.float32)
        length = float(np.linalg.norm(values))
        return vector if length == 0 else Vector(values * (norm / length), vector.layers)

    return query.map_vectors(scale)


def swapped_vectors(queries: Sequence[Query], groups: Sequence[str], seed: int) -> list[Query]:
    """The queries with their vectors exchanged by a seeded permutation without fixed points.

    Every vector is used once. The donor is of another group wherever that is possible, and of the same layers
    wherever that still leaves another group, so that the swapped vector is as plausible as the own one. The vector
    keeps its own layers, and with them its projection. All queries must hold equally many vectors, at least one.
    """
    if len(queries) < 2:
        raise UserError(f"swapped_vector needs at least 2 records to exchange vectors between, found {len(queries)}")
    counts = {len(query.vectors) for query in queries}
    assert len(counts) == 1 and counts != {0}, f"queries hold {sorted(counts)} vectors"
    layers = [tuple(vector.layers for vector in query.vectors) for query in queries]
    result = list(queries)
    for receiver, donor in _donors(layers, groups, np.random.default_rng(seed)).items():
        result[receiver] = _with_vectors(queries[receiver], queries[donor].vectors)
    return result


def _with_vectors(query: Query, vectors: Iterable[Vector]) -> Query:
    """The query with its vectors replaced in order."""
    replacements = iter(vectors)
    return query.map_vectors(lambda _: next(replacements))


def _donors(
    layers: Sequence[tuple[tuple[int, ...], ...]], groups: Sequence[str], generator: np.random.Generator
) -> dict[int, int]:
    """Receiver -> donor. Rows are exchanged among equal layers; where one group is more than half, pools are merged."""
    pools: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row, key in enumerate(layers):
        pools.setdefault(key, []).append(row)
    free = sorted((pool for pool in pools.values() if _can_leave_groups(pool, groups)), key=len)
    rest = [row for pool in pools.values() if not _can_leave_groups(pool, groups) for row in pool]
    while rest and free and not _can_leave_groups(rest, groups):
        rest += free.pop()
    return {
        receiver: donor
        for pool in [*free, rest]
        if pool
        for receiver, donor in _rotate(pool, groups, generator).items()
    }


def _can_leave_groups(pool: Sequence[int], groups: Sequence[str]) -> bool:
    """Whether a permutation exists that takes every row of the pool to another group."""
    return 2 * _largest(groups[row] for row in pool) <= len(pool)


def _largest(names: Iterable[str]) -> int:
    sizes: dict[str, int] = {}
    for name in names:
        sizes[name] = sizes.get(name, 0) + 1
    return max(sizes.values())


def _rotate(pool: Sequence[int], groups: Sequence[str], generator: np.random.Generator) -> dict[int, int]:
    """Rows sorted by group in random order, each receiving from the row one largest group further on.

    No run of equal groups is longer than that shift, so donor and receiver differ in group if none is more than half.
    """
    rank = {name: place for place, name in enumerate(generator.permutation(sorted({groups[row] for row in pool})))}
    shuffled = [pool[place] for place in generator.permutation(len(pool))]
    ordered = sorted(shuffled, key=lambda row: rank[groups[row]])
    shift = _largest(groups[row] for row in pool)
    if shift == len(pool):
        shift = 1
    return {row: ordered[(place + shift) % len(ordered)] for place, row in enumerate(ordered)}
