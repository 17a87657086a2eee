"""The lexicon as a simulator: it reads descriptions exactly, so what it gets wrong is the description's fault.

Level 10 at every token that the description holds for, 0 elsewhere, by the rules that the labels were chosen with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from introspect_ray.features.windows import Window
from introspect_ray.models.tokens import encode_with_offsets
from introspect_ray.pocket.annotation import Word, annotate, knowledge
from introspect_ray.pocket.lexicon import RULES
from introspect_ray.pocket.sources import TEXT_SEED, TEXTS, WORLD_SEED
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.world import World
from introspect_ray.simulator.base import MAX_LEVEL


class ExactReader:
    """Knows the truth about the pocket world's plain texts, and nothing about any other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        world = World(WORLD_SEED)
        known = knowledge(world)
        corpus = Corpus(world, TEXT_SEED)
        self._known: dict[tuple[int, ...], list[frozenset[str]]] = {}
        self._texts: list[tuple[list[int], list[Word | None]]] = []
        for _ in range(TEXTS):
            document = corpus.document()
            ids, offsets = encode_with_offsets(tokenizer, document.text)
            self._texts.append((ids[1:], annotate(document, offsets, known)[1:]))
        self._by_first: dict[int, list[int]] = {}
        for number, (ids, _) in enumerate(self._texts):
            self._by_first.setdefault(ids[0], []).append(number)

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`. Raises KeyError for a window that begins none of the pocket's plain texts."""
        return [
            MAX_LEVEL * np.array([description in said for said in self._said(window)], dtype=np.float64)
            for description, window in zip(descriptions, windows, strict=True)
        ]

    def _said(self, window: Window) -> list[frozenset[str]]:
        """Of every token all descriptions that hold for it."""
        if window.ids not in self._known:
            words = self._words(window.ids)
            self._known[window.ids] = [
                frozenset(text for rule in RULES.values() for text in rule(word)) if word is not None else frozenset()
                for word in words
            ]
        return self._known[window.ids]

    def _words(self, window: tuple[int, ...]) -> list[Word | None]:
        for number in self._by_first.get(window[0], []):
            ids, words = self._texts[number]
            if tuple(ids[: len(window)]) == window:
                return words[: len(window)]
        raise KeyError(f"no plain text of the pocket world begins with the {len(window)} tokens of this window")
