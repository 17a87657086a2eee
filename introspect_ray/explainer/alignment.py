"""Fitted projections: the closed-form ridge map from the target's residual stream to the explainer's input embeddings.

Where a token of the target and a token of the explainer end at the same character of a text, the target's residual
vector at layer l and the explainer's embedding of its token belong together. `Pi_l` is fitted to such pairs, without
any label, and training goes on from there; the tokenizers may differ. The paper starts its projections at random
(P1, section 3); a fitted start lets an explainer read words off vectors before it has seen one labelled example.

Legend: N pairs, M target width, E explainer width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from introspect_ray.config import FitProjectionConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.files import embedding_weight, input_embeddings
from introspect_ray.explainer.fitted import AlignmentCard
from introspect_ray.explainer.forward import scaled
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import load_model, load_tokenizer
from introspect_ray.models.tokens import encode_with_offsets

TEXTS_PER_PASS = 64


@dataclass
class _Pairs:
    """One text: positions of the target's tokens, and the explainer's token that ends where each of them ends."""

    ids: list[int]
    positions: Int[Tensor, " N"]
    tokens: Int[Tensor, " N"]
    num_unaligned: int


@dataclass
class _Moments:
    """Weighted sums over pairs (x, y) of one layer, in float64."""

    xx: Float[Tensor, "M M"]
    xy: Float[Tensor, "M E"]
    yy: float
    y: Float[Tensor, " E"]
    weight: float

    @classmethod
    def zero(cls, width: int, explainer_width: int) -> _Moments:
        xx, xy = (
            torch.zeros(width, width, dtype=torch.float64),
            torch.zeros(width, explainer_width, dtype=torch.float64),
        )
        return cls(xx, xy, 0.0, torch.zeros(explainer_width, dtype=torch.float64), 0.0)

    def add(self, x: Float[Tensor, "N M"], y: Float[Tensor, "N E"], weights: Float[Tensor, " N"]) -> None:
        weighted = x * weights[:, None]
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y
        self.yy += float((weights[:, None] * y * y).sum())
        self.y += weights @ y
        self.weight += float(weights.sum())

    def solve(self, ridge: float) -> Float[Tensor, "E M"]:
        """The map with the least squared error plus `ridge` times the mean variance of x per squared weight."""
        penalty = ridge * self.xx.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        system = self.xx + penalty * torch.eye(len(self.xx), dtype=torch.float64)
        return torch.linalg.solve(system, self.xy).T.contiguous()

    def explained(self, weight: Float[Tensor, "E M"]) -> float:
        """1 - squared error of the map over the variance of y around its mean."""
        error = self.yy - 2 * float((weight.T * self.xy).sum()) + float(((weight @ self.xx) * weight).sum())
        variance = self.yy - float(self.y @ self.y) / self.weight
        return 1 - error / variance


def fit_alignment(
    config: FitProjectionConfig, texts: Sequence[str], key: str, progress: Callable[[int, int], None]
) -> tuple[dict[int, Float[Tensor, "E M"]], AlignmentCard]:
    """Maps by layer and their card, which gets `key`; `progress` hears (texts done, texts in all).

    Residual vectors enter at length 1, so that attention sinks, many times longer than all others, do not decide the
    fit. Every token type of the explainer weighs the same, however often it occurs, so that rare words are read as well
    as frequent ones. Every text whose number is a multiple of `config.hold_out_every` is not fitted on but scored on.

    Raises:
        UserError: a model cannot be loaded, a layer is not there, or too few token types align to fit or to score on.
    """
    target = Target.load(config.target)
    explainer, tokenizer = load_model(config.explainer), load_tokenizer(config.explainer)
    layers = config.layers if config.layers is not None else tuple(range(target.num_layers))
    pairs = [_align(target, tokenizer, text) for text in texts]
    counts = Counter(token for one in pairs for token in one.tokens.tolist())
    fitted, held = (
        {token for one in sample for token in one.tokens.tolist()}
        for sample in (
            [one for number, one in enumerate(pairs) if number % config.hold_out_every],
            pairs[:: config.hold_out_every],
        )
    )
    if min(len(fitted), len(held)) < 2:
        raise UserError(
            f"the {len(pairs)} texts align {len(fitted)} token types of target and explainer to fit on and {len(held)}"
            " to score on, expected at least 2 of each: give more texts"
        )
    width = embedding_weight(explainer).shape[1]
    sums = {(layer, held): _Moments.zero(target.width, width) for layer in layers for held in (False, True)}
    done = 0
    for numbers in _passes(len(pairs)):
        runs = target.clean_runs([pairs[number].ids for number in numbers])
        for number, run in zip(numbers, runs, strict=True):
            one = pairs[number]
            weights = torch.tensor([1 / counts[token] for token in one.tokens.tolist()], dtype=torch.float64)
            embeddings = input_embeddings(explainer, one.tokens).double().cpu()
            for layer in layers:
                vectors = scaled(run.residuals[layer, one.positions].float(), 1.0).double().cpu()
                sums[layer, number % config.hold_out_every == 0].add(vectors, embeddings, weights)
        done += len(numbers)
        progress(done, len(pairs))
    maps = {layer: sums[layer, False].solve(config.ridge) for layer in layers}
    card = AlignmentCard(
        key=key,
        target_path=config.target.path,
        target_width=target.width,
        explainer_path=config.explainer.path,
        explainer_width=width,
        layers=layers,
        num_pairs=sum(len(one.tokens) for number, one in enumerate(pairs) if number % config.hold_out_every),
        num_unaligned=sum(one.num_unaligned for one in pairs),
        explained={layer: sums[layer, True].explained(maps[layer]) for layer in layers},
    )
    return {layer: weight.float() for layer, weight in maps.items()}, card


def _passes(count: int) -> Iterator[list[int]]:
    yield from (list(range(start, min(start + TEXTS_PER_PASS, count))) for start in range(0, count, TEXTS_PER_PASS))


def _align(target: Target, tokenizer: PreTrainedTokenizerBase, text: str) -> _Pairs:
    ids, offsets = target.encode_with_offsets(text)
    own_ids, own_offsets = encode_with_offsets(tokenizer, text)
    token_at = {end: token for token, (start, end) in zip(own_ids, own_offsets, strict=True) if end > start}
    ends = [(position, end) for position, (start, end) in enumerate(offsets) if end > start]
    aligned = [(position, token_at[end]) for position, end in ends if end in token_at]
    pairs = torch.tensor(aligned, dtype=torch.long).reshape(-1, 2)
    return _Pairs(ids, pairs[:, 0], pairs[:, 1], len(ends) - len(aligned))
