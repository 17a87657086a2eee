"""What a fine-tuned simulator is trained on: pairs of a description and a window, at the natural base rate.

    latent with descriptions  x  exemplars  ->  pairs of two strata, firing and silent  ->  a step draws from both
                                                                                            importance weights undo it

Drawn at the natural base rate, hardly any pair would fire. So firing ones are drawn more often, and every pair counts
in the loss by its natural share over its share of the draws: the expected loss is that of plain text, the mean over
latents of the cross-entropy per token. K levels, N positions read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from introspect_ray.features.descriptions import Description
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.interventions.forward import padded
from introspect_ray.simulator.base import MAX_LEVEL, NUM_LEVELS
from introspect_ray.simulator.base_rate import natural_weights
from introspect_ray.simulator.finetuned import FinetunedSimulator
from introspect_ray.simulator.levels import levels_only
from introspect_ray.simulator.reading import levels_at_positions

LatentKey = tuple[int, int]
"""Layer and number of a latent."""

MOST_COPIED = 4
"""Words of a made-up description, at most: those of latents seldom name more."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One description with one window of its latent."""

    description: str
    exemplar: Exemplar
    maximum: float
    """The latent's largest activation, which is level 10."""
    weight: float
    """How much it counts in the loss when it is drawn; one on average over the draws."""
    latent: LatentKey


def training_pairs(
    latents: Sequence[LatentExemplars], descriptions: Mapping[LatentKey, Sequence[Description]], firing_share: float
) -> tuple[list[Pair], list[Pair]]:
    """All pairs that fire, and all that do not; of latents without a description, and of windows without weight, none.

    Args:
        firing_share: share of the draws that come from the first list. A stratum without pairs leaves it to the other.
    """
    strata: tuple[list[Pair], list[Pair]] = ([], [])
    for one in latents:
        key = (one.layer, one.latent)
        texts = [description.text for description in descriptions.get(key, ())]
        if not texts or one.maximum <= 0:
            continue
        weights = natural_weights(one.density, one.exemplars)
        for weight, exemplar in zip(weights, one.exemplars, strict=True):
            if weight > 0:
                stratum = strata[0] if exemplar.activations.max() > 0 else strata[1]
                natural = float(weight) * len(exemplar.window) / len(texts)
                stratum += [Pair(text, exemplar, one.maximum, natural, key) for text in texts]
    total = sum(pair.weight for stratum in strata for pair in stratum)
    shares = (firing_share, 1 - firing_share) if all(strata) else (1.0, 1.0)
    return tuple(  # type: ignore[return-value]
        [_reweighted(pair, len(stratum) / (share * total)) for pair in stratum]
        for stratum, share in zip(strata, shares, strict=True)
    )


def _reweighted(pair: Pair, factor: float) -> Pair:
    return Pair(pair.description, pair.exemplar, pair.maximum, pair.weight * factor, pair.latent)


def copied(pair: Pair, draw: random.Random) -> Pair:
    """A made-up latent that fires on some words of the pair's window, and is described by those words.

    A few words, in any order: text that says where it is itself found, in every window and for every word. It teaches
    to compare a description with the tokens of a window, with far more tokens that fire than latents have; what
    descriptions mean beyond their words is left to the latents.
    """
    window = pair.exemplar.window
    pieces = [piece.strip() for piece in window.pieces]
    words = sorted({piece for piece in pieces if piece})
    chosen = draw.sample(words, draw.randint(1, max(1, min(MOST_COPIED, len(words) // 2)))) if words else []
    levels = np.array([float(piece in chosen) if piece else 0.0 for piece in pieces])
    text = f"the word{'s' * (len(chosen) > 1)} {' '.join(chosen)}"
    return Pair(text, Exemplar(window, levels, "random"), 1.0, 1.0, pair.latent)


@dataclass(frozen=True, eq=False)
class LevelExample:
    """A pair as the simulator is trained on it."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: Float[Tensor, "N K"]
    """Probabilities of the levels."""
    weight: float

    def __len__(self) -> int:
        return len(self.ids)


def encode_pair(simulator: FinetunedSimulator, pair: Pair) -> LevelExample:
    """Ids of description and window, and the true levels where they are read."""
    prefix = simulator.encode(pair.description)
    reading = simulator.read(pair.exemplar.window)
    levels = MAX_LEVEL * np.clip(pair.exemplar.activations / pair.maximum, 0, 1)
    positions, read = levels_at_positions(reading, levels)
    return LevelExample(
        ids=prefix + reading.ids,
        positions=tuple(len(prefix) + position for position in positions),
        targets=soft_levels(read),
        weight=pair.weight,
    )


def soft_levels(levels: Float[np.ndarray, " N"]) -> Float[Tensor, "N K"]:
    """Probabilities on the two levels around each value, so that their expectation is the value itself.

    Rounding to one level would teach that what is below 0.5 is silent.
    """
    values = torch.from_numpy(np.asarray(levels, dtype=np.float32))
    lower = values.floor().clamp(max=MAX_LEVEL - 1)
    upper_share = values - lower
    targets = torch.zeros(len(values), NUM_LEVELS)
    index = lower.long()[:, None]
    return targets.scatter_(1, index, (1 - upper_share)[:, None]).scatter_(1, index + 1, upper_share[:, None])


def level_loss(simulator: FinetunedSimulator, batch: Sequence[LevelExample]) -> Float[Tensor, ""]:
    """Sum over the examples of weight times mean cross-entropy in nats per position read."""
    ids, _ = padded([example.ids for example in batch], simulator.device)
    with levels_only(simulator.model, simulator.levels):
        logits = simulator.model(input_ids=ids, use_cache=False).logits
    rows = [row for row, example in enumerate(batch) for _ in example.positions]
    columns = [position for example in batch for position in example.positions]
    weights = [example.weight / len(example.positions) for example in batch for _ in example.positions]
    targets = torch.cat([example.targets for example in batch]).to(logits.device)
    losses = nn.functional.cross_entropy(logits[rows, columns].float(), targets, reduction="none")
    return losses @ torch.tensor(weights, device=logits.device)
