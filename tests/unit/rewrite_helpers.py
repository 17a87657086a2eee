"""A tiny target with a random skip transcoder and a random SAE, texts for them, and simulators made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from unit.tiny_models import FAMILIES, WIDTH, randomized, tiny_tokenizer

from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.windows import Window
from introspect_ray.interventions.target import Target
from introspect_ray.rewrite.texts import RewriteText

LATENTS = 12


def target(family: str = "llama") -> Target:
    torch.manual_seed(5)
    return Target(randomized(FAMILIES[family]()), tiny_tokenizer())


def transcoder(layer: int = 1, seed: int = 0) -> SparseCoder:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    return SparseCoder(
        kind="transcoder",
        layer=layer,
        encoder=draw(WIDTH, LATENTS),
        encoder_bias=draw(LATENTS),
        decoder=draw(LATENTS, WIDTH),
        decoder_bias=draw(WIDTH),
        threshold=torch.full((LATENTS,), 0.2),
        skip=draw(WIDTH, WIDTH),
    )


def texts(count: int = 4, seed: int = 1) -> list[RewriteText]:
    """Texts of different lengths whose positions 1.. are measured."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(count):
        ids = (1, *torch.randint(3, 97, (6 + 3 * row,), generator=generator).tolist())
        found.append(RewriteText(row, ids, 1, tuple(range(1, len(ids) - 1))))
    return found


class LookUp:
    """Says level 10 on the ids that a description is known for, 0 elsewhere; raises for descriptions in `broken`."""

    def __init__(self, ids: Mapping[str, frozenset[int]], broken: frozenset[str] = frozenset()):
        self.ids = ids
        self.broken = broken
        self.asked = 0

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[np.ndarray]:
        self.asked += len(descriptions)
        if self.broken.intersection(descriptions):
            raise ValueError("this description breaks it")
        return [
            np.array([10.0 if token in self.ids.get(text, ()) else 0.0 for token in window.ids])
            for text, window in zip(descriptions, windows, strict=True)
        ]
