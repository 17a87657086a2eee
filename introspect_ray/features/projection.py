"""Texts that lie most in a vector's direction: the exemplars of a vector that is no latent of any coder.

A token's activation is the projection of its residual vector on the direction, zero where that is negative. Texts are
cut into windows; of each text the window with the largest activation counts, and the k largest of those stay. Choices
depend on contents alone (ties go to the earlier text), so parts of a corpus may be seen in any order and anywhere.
N tokens, W windows, V vectors, D width.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One window of a corpus: tokens `ids` of text number `text`, the first of them the `start`-th of the text.

    `first` is the row of its first token among the activations that it was cut from.
    """

    text: int
    start: int
    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, eq=False)
class Hit:
    """One vector's activations in one window."""

    vector: int
    text: int
    start: int
    ids: tuple[int, ...]
    activations: Float[np.ndarray, " T"]

    @property
    def order(self) -> tuple[float, int, int]:
        """Sorts the largest activation first, then by place in the corpus."""
        return -float(self.activations.max()), self.text, self.start


def cut(pieces: Sequence[tuple[int, int, Sequence[int]]], length: int) -> list[Span]:
    """Windows of at most `length` tokens of pieces (text number, start within the text, ids), without first tokens.

    The first token of a piece is left out, as where activations are read.
    """
    spans: list[Span] = []
    row = 0
    for text, offset, ids in pieces:
        for start in range(1, len(ids), length):
            inside = tuple(ids[start : start + length])
            spans.append(Span(text, offset + start, inside, row))
            row += len(inside)
    return spans


def directions(vectors: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
    """The vectors at length 1."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def activations(
    x: Float[Tensor, "N D"], unit: Float[Tensor, "V D"], mean: Float[Tensor, " D"]
) -> Float[np.ndarray, "N V"]:
    """Projections of `x - mean` on unit vectors, negative ones as zero; a row that is not finite stays so."""
    found = (x - mean) @ unit.T
    return torch.where(found < 0, 0.0, found).cpu().numpy()


def sound_spans(spans: Sequence[Span], found: Float[np.ndarray, "N V"]) -> list[Span]:
    """The windows in which every activation is finite."""
    finite = np.isfinite(found).all(axis=1)
    return [span for span in spans if finite[span.first : span.first + len(span.ids)].all()]


def best(spans: Sequence[Span], found: Float[np.ndarray, "N V"], count: int) -> list[Hit]:
    """The `count` texts of every vector with the largest activation, each by the window that holds it."""
    if not spans:
        return []
    largest = np.stack([found[span.first : span.first + len(span.ids)].max(axis=0) for span in spans])
    hits: list[Hit] = []
    for vector in range(found.shape[1]):
        order = np.argsort(-largest[:, vector], kind="stable")
        seen: set[int] = set()
        for span in (spans[number] for number in order):
            if len(seen) == count:
                break
            if span.text not in seen:
                seen.add(span.text)
                hits.append(_hit(span, found, vector))
    return hits


def drawn(
    spans: Sequence[Span], found: Float[np.ndarray, "N V"], ranks: Sequence[float], count: int
) -> list[tuple[float, list[Hit]]]:
    """The `count` windows of the lowest ranks (random numbers of their own), with every vector's activations."""
    chosen = sorted(zip(ranks, spans, strict=True), key=lambda pair: (pair[0], pair[1].text, pair[1].start))[:count]
    return [(rank, [_hit(span, found, vector) for vector in range(found.shape[1])]) for rank, span in chosen]


def largest_hits(hits: Iterable[Hit], count: int) -> list[Hit]:
    """The `count` first by `order`, of hits of one vector in texts that each occur once."""
    return heapq.nsmallest(count, hits, key=lambda hit: hit.order)


def _hit(span: Span, found: Float[np.ndarray, "N V"], vector: int) -> Hit:
    values = found[span.first : span.first + len(span.ids), vector]
    return Hit(vector, span.text, span.start, span.ids, np.ascontiguousarray(values, dtype=np.float32))
