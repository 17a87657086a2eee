"""Descriptions of latents by exact counting: which category of tokens does a latent fire on?

A category is a set of tokens with a description in words. A latent fires on a token if its activation there exceeds a
share of its largest one. F1 of "fires" against "is in the category" decides. N tokens, F latents, C categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from introspect_ray.features.coder import ActiveLatents

PAIRS_AT_ONCE = 1 << 24
"""(latent, category) pairs of one token that are counted at a time: bounds memory to a few hundred MB."""


@dataclass(frozen=True)
class Category:
    """`kind` groups categories for a reader; `rank` prefers the lower where two categories fit almost equally well."""

    kind: str
    rank: int
    description: str


@dataclass(frozen=True, eq=False)
class Membership:
    """Token `tokens[i]` belongs to category `categories[i]`; ordered by token."""

    tokens: Int[np.ndarray, " entries"]
    categories: Int[np.ndarray, " entries"]
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Sample:
    """Activations and categories of the same N tokens."""

    active: ActiveLatents
    membership: Membership

    def __post_init__(self) -> None:
        assert self.active.num_vectors == self.membership.num_tokens


@dataclass(frozen=True)
class LatentLabel:
    """One live latent, and the category that fits it best."""

    layer: int
    index: int
    description: str
    kind: str
    accepted: list[str]
    """All descriptions that fit well enough, in order of their fit; may be empty, and need not hold `description`."""
    score: float
    """F1 of `description` on tokens that were not used to choose it."""
    fit_score: float
    """F1 on the tokens that were."""
    density: float
    """Share of tokens on which the latent fires."""


@dataclass(frozen=True)
class LabellingConfig:
    active_share: float
    """A latent fires where its activation exceeds this share of its largest one in the fit sample."""
    minimum_firings: int
    """A latent that fires less often in the fit sample is not live and gets no label."""
    margin: float
    """Categories within this distance of the best F1 count as equally good, and the one of lowest rank is taken."""
    accepted_score: float
    """F1, in both samples, from which a description is accepted as right."""


def firing_thresholds(active: ActiveLatents, share: float) -> Float[np.ndarray, " F"]:
    """`share` of each latent's largest activation; 0 for one that is never active."""
    largest = np.zeros(active.num_latents, dtype=np.float64)
    np.maximum.at(largest, active.latents.numpy(), active.values.double().numpy())
    return share * largest


def f1_scores(
    sample: Sample, thresholds: Float[np.ndarray, " F"], num_categories: int
) -> tuple[Float[np.ndarray, "F C"], Int[np.ndarray, " F"]]:
    """F1 = 2 TP / (fired + in category) of every latent and category, 0 where both are empty; firings per latent."""
    active, membership = sample.active, sample.membership
    latents, tokens = active.latents.numpy(), active.vectors.numpy()
    fires = active.values.double().numpy() > thresholds[latents]
    latents, tokens = latents[fires], tokens[fires]
    firings = np.bincount(latents, minlength=active.num_latents)
    sizes = np.bincount(membership.categories, minlength=num_categories)
    both = _joint_counts(latents, tokens, membership, active.num_latents, num_categories)
    total = firings[:, None] + sizes[None, :]
    return 2 * both / np.maximum(total, 1), firings


def _joint_counts(
    latents: Int[np.ndarray, " fired"],
    tokens: Int[np.ndarray, " fired"],
    membership: Membership,
    num_latents: int,
    num_categories: int,
) -> Int[np.ndarray, "F C"]:
    """Tokens on which a latent fires and which are in a category."""
    first = np.searchsorted(membership.tokens, np.arange(membership.num_tokens + 1))
    per_firing = np.diff(first)[tokens]
    pairs_before = np.concatenate([[0], np.cumsum(per_firing)])
    counts = np.zeros(num_latents * num_categories, dtype=np.int64)
    start = 0
    while start < len(tokens):
        stop = max(start + 1, int(np.searchsorted(pairs_before, pairs_before[start] + PAIRS_AT_ONCE, side="right")) - 1)
        lengths = per_firing[start:stop]
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        members = membership.categories[np.repeat(first[tokens[start:stop]], lengths) + offsets]
        joint = np.repeat(latents[start:stop], lengths) * num_categories + members
        counts += np.bincount(joint, minlength=len(counts))
        start = stop
    return counts.reshape(num_latents, num_categories)


def label_latents(
    layer: int, catalog: Sequence[Category], fit: Sample, held_out: Sample, config: LabellingConfig
) -> list[LatentLabel]:
    """One label per live latent, in order of index. Both samples' category numbers count into `catalog`.

    Of the categories within `config.margin` of the best F1 on the fit sample, the one of lowest rank is taken: the
    simplest that is as good as any. Ties in rank go to the better F1, then to the shorter and alphabetically first
    description. The label's score is its F1 on the held-out sample.
    """
    thresholds = firing_thresholds(fit.active, config.active_share)
    fit_scores, firings = f1_scores(fit, thresholds, len(catalog))
    held_out_scores, _ = f1_scores(held_out, thresholds, len(catalog))
    labels = []
    for index in np.flatnonzero(firings >= config.minimum_firings):
        row = fit_scores[index]
        near = np.flatnonzero(row >= row.max() - config.margin).tolist()
        best = min(near, key=lambda number: _preference(catalog[number], row[number]))
        both = np.minimum(row, held_out_scores[index])
        fitting = np.flatnonzero(both >= config.accepted_score).tolist()
        fitting.sort(key=lambda number: (-both[number], catalog[number].description))
        labels.append(
            LatentLabel(
                layer=layer,
                index=int(index),
                description=catalog[best].description,
                kind=catalog[best].kind,
                accepted=[catalog[number].description for number in fitting],
                score=float(held_out_scores[index, best]),
                fit_score=float(row[best]),
                density=float(firings[index] / fit.active.num_vectors),
            )
        )
    return labels


def _preference(category: Category, score: float) -> tuple[int, float, int, str]:
    return category.rank, -score, len(category.description), category.description
