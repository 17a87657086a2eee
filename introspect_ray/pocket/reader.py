"""The lexicon as a simulator: it reads descriptions exactly, so what it gets wrong is the description's fault.

Level 10 at every token that the description holds for, 0 elsewhere, by the rules that the labels were chosen with. It
reads causally: what only the following text tells, such as the next word, the correct option or a document's kind
before it shows, is not said, because the next token is what rewriting is measured on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from introspect_ray.features.windows import Window
from introspect_ray.models.tokens import encode_with_offsets
from introspect_ray.pocket.annotation import Knowledge, Word, annotate, knowledge, words_of
from introspect_ray.pocket.lexicon import RULES
from introspect_ray.pocket.sources import TEXT_SEED, TEXTS, WORLD_SEED
from introspect_ray.pocket.text import Corpus, Document
from introspect_ray.pocket.world import World
from introspect_ray.simulator.base import MAX_LEVEL

BEGINNING = 6
"""Characters by which texts are looked up."""
UNKNOWN = "\0"
"""Stands for what a word's beginning of text does not tell; a description with it is not said."""
STRUCTURE = ("document", "matter", "role", "slot", "due")
"""What is read off the whole document, and so is known only once every text that begins alike agrees on it."""


class ExactReader:
    """Knows the truth about the pocket world's plain texts, and nothing about any other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        documents, self._facts, self._ambiguous = _plain_texts()
        self._tokenizer = tokenizer
        self._by_beginning: dict[str, list[Document]] = {}
        for document in documents:
            self._by_beginning.setdefault(document.text[:BEGINNING], []).append(document)
        self._known: dict[tuple[int, ...], list[frozenset[str]]] = {}

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`. Raises KeyError for a window that begins none of the pocket's plain texts."""
        return [
            MAX_LEVEL * np.array([description in said for said in self.said(window)], dtype=np.float64)
            for description, window in zip(descriptions, windows, strict=True)
        ]

    def said(self, window: Window) -> list[frozenset[str]]:
        """Of every token all descriptions that hold for it, as far as the text up to it tells."""
        if window.ids not in self._known:
            self._known[window.ids] = [_descriptions(word) for word in self._words(window)]
        return self._known[window.ids]

    def _words(self, window: Window) -> list[Word | None]:
        """Of each token the word that ends there, as far as it is known."""
        text = window.text
        found = self._by_beginning.get(text[:BEGINNING], [])
        for document in found if len(text) >= BEGINNING else chain.from_iterable(self._by_beginning.values()):
            if document.text.startswith(text):
                ids, offsets = encode_with_offsets(self._tokenizer, document.text)
                if tuple(ids[1 : len(window) + 1]) == window.ids:
                    words = annotate(document, offsets, self._facts)
                    known = {id(word): heard for word, heard in causal(words, self._ambiguous)}
                    ends = [word is not None and word is not after for word, after in pairwise([*words, None])]
                    heard = [known[id(word)] if end else None for word, end in zip(words, ends, strict=True)]
                    return heard[1 : len(window) + 1]
        raise KeyError(f"no plain text of the pocket world begins with this window: {text!r}")


def _descriptions(word: Word | None) -> frozenset[str]:
    """All descriptions that hold for a word, as far as it is known."""
    if word is None:
        return frozenset()
    return frozenset(text for rule in RULES.values() for text in rule(word) if UNKNOWN not in text)


def causal(words: Iterable[Word | None], ambiguous: Mapping[Hashable, frozenset[str]]) -> Iterator[tuple[Word, Word]]:
    """(Word, the same with only what is known once the text is read up to it) of each word of a document, in order."""
    earlier: tuple[str, ...] = ()
    for word, shape in _shapes(words):
        unclear = ambiguous.get(shape, frozenset())
        heard = replace(
            word,
            document=UNKNOWN if "document" in unclear else word.document,
            matter=UNKNOWN if "matter" in unclear else word.matter,
            role=UNKNOWN if "role" in unclear else word.role,
            slot=None if "slot" in unclear else word.slot,
            due=word.due and "due" not in unclear,
            truth=None if "matter" in unclear else word.truth,
            named=None if "matter" in unclear else word.named,
            listed=earlier if "role" in unclear else word.listed,
            following=None,
            following_class=None,
            correct=False,
        )
        earlier = heard.listed
        yield word, heard


def ambiguities(documents: Iterable[Sequence[Word]]) -> dict[Hashable, frozenset[str]]:
    """Of each beginning of a text, by its shape: the fields of its last word on which texts that begin so differ."""
    first: dict[Hashable, Word] = {}
    differ: dict[Hashable, set[str]] = {}
    for words in documents:
        for word, shape in _shapes(words):
            other = first.setdefault(shape, word)
            if found := {name for name in STRUCTURE if getattr(word, name) != getattr(other, name)}:
                differ.setdefault(shape, set()).update(found)
    return {shape: frozenset(found) for shape, found in differ.items()}


def _shapes(words: Iterable[Word | None]) -> Iterator[tuple[Word, Hashable]]:
    """Each word with its beginning of text, where words of a class count as the same word."""
    shape, last = 0, None
    for word in words:
        if word is not None and word is not last:
            shape, last = hash((shape, word.word_class or word.text)), word
            yield word, shape


@cache
def _plain_texts() -> tuple[list[Document], Knowledge, dict[Hashable, frozenset[str]]]:
    """The pocket world's plain texts, its facts, and what the beginnings of its texts leave open."""
    world = World(WORLD_SEED)
    corpus = Corpus(world, TEXT_SEED)
    documents = [corpus.document() for _ in range(TEXTS)]
    facts = knowledge(world)
    return documents, facts, ambiguities(words_of(document, facts) for document in documents)
