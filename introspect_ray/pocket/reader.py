"""The lexicon as a simulator: it reads descriptions exactly, so what it gets wrong is the description's fault.

Level 10 at every token that the description holds for, 0 elsewhere, by the rules that the labels were chosen with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from introspect_ray.features.windows import Window
from introspect_ray.models.tokens import encode_with_offsets
from introspect_ray.pocket.annotation import Word, annotate, knowledge
from introspect_ray.pocket.lexicon import RULES
from introspect_ray.pocket.sources import TEXT_SEED, TEXTS, WORLD_SEED
from introspect_ray.pocket.text import Corpus, Document
from introspect_ray.pocket.world import World
from introspect_ray.simulator.base import MAX_LEVEL

BEGINNING = 6
"""Characters by which texts are looked up."""


class ExactReader:
    """Knows the truth about the pocket world's plain texts, and nothing about any other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        world = World(WORLD_SEED)
        corpus = Corpus(world, TEXT_SEED)
        self._tokenizer = tokenizer
        self._facts = knowledge(world)
        self._by_beginning: dict[str, list[Document]] = {}
        for _ in range(TEXTS):
            document = corpus.document()
            self._by_beginning.setdefault(document.text[:BEGINNING], []).append(document)
        self._known: dict[tuple[int, ...], list[frozenset[str]]] = {}

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`. Raises KeyError for a window that begins none of the pocket's plain texts."""
        return [
            MAX_LEVEL * np.array([description in said for said in self._said(window)], dtype=np.float64)
            for description, window in zip(descriptions, windows, strict=True)
        ]

    def _said(self, window: Window) -> list[frozenset[str]]:
        """Of every token all descriptions that hold for it."""
        if window.ids not in self._known:
            words = self._words(window)
            self._known[window.ids] = [
                frozenset(text for rule in RULES.values() for text in rule(word)) if word is not None else frozenset()
                for word in words
            ]
        return self._known[window.ids]

    def _words(self, window: Window) -> list[Word | None]:
        text = window.text
        found = self._by_beginning.get(text[:BEGINNING], [])
        for document in found if len(text) >= BEGINNING else chain.from_iterable(self._by_beginning.values()):
            if document.text.startswith(text):
                ids, offsets = encode_with_offsets(self._tokenizer, document.text)
                if tuple(ids[1 : len(window) + 1]) == window.ids:
                    return annotate(document, offsets, self._facts)[1 : len(window) + 1]
        raise KeyError(f"no plain text of the pocket world begins with this window: {text!r}")
