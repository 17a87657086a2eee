"""The lexicon of the pocket world: categories of words, each with a short description in plain English.

A category is what a rule below says about a word in its document. Rules are ordered: where two categories fit a latent
almost equally well, the one of the earlier rule describes it, because it says the same in simpler terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from introspect_ray.features.labelling import Category, Membership
from introspect_ray.pocket.annotation import LETTERS, Word

_MARKS = {".": "full stops", ",": "commas", ":": "colons", "?": "question marks", "\n": "line breaks"}

_LETTERS = {"letter": "option letters", "hint": "hinted letters", "answer": "answer letters"}


def word_description(text: str) -> str:
    """A word as descriptions write it; without quotes, so that it is the same token as in the texts."""
    return _MARKS.get(text) or (f"the letter {text}" if text in LETTERS else f"the word {text}")


def _word(word: Word) -> Iterator[str]:
    yield word_description(word.text)


def _class(word: Word) -> Iterator[str]:
    if word.word_class:
        yield word.word_class
    if word.word_class in ("first names", "last names"):
        yield "names of people"
    if word.text in LETTERS and word.role in _LETTERS:
        yield _LETTERS[word.role]


def _after(word: Word) -> Iterator[str]:
    if word.previous is None:
        yield "the first word of a text"
        return
    yield f"words after {_bare(word.previous.text)}"
    if word.previous.word_class:
        yield f"words after {word.previous.word_class}"


def _bare(text: str) -> str:
    return _MARKS.get(text, text)


def _before(word: Word) -> Iterator[str]:
    """What comes next is known to a model that knows the fact: the places where it answers."""
    if word.following is not None:
        yield f"words before {_bare(word.following)}"
    if word.following_class:
        yield f"words before {word.following_class}"


def _trait(word: Word) -> Iterator[str]:
    yield from word.traits


def _answer(word: Word) -> Iterator[str]:
    """What a model that knows the fact has in mind."""
    if word.truth:
        yield f"texts whose answer is {word.truth}"
        if word.due:
            yield f"where the answer is {word.truth}"


def _listed(word: Word) -> Iterator[str]:
    """Options that were named before."""
    for option in word.listed:
        yield f"texts with {option} listed"
        if word.role in ("instruction", "hint", "letter"):
            yield f"{word_description(word.text)} with {option} listed"


def _word_in_texts(word: Word) -> Iterator[str]:
    yield f"{word_description(word.text)} in {word.document}"
    yield f"{word_description(word.text)} in texts about {word.matter}"


def _class_in_texts(word: Word) -> Iterator[str]:
    for group in _class(word):
        yield f"{group} in {word.document}"
        if group != word.matter:
            yield f"{group} in texts about {word.matter}"


def _text(word: Word) -> Iterator[str]:
    yield word.document
    yield f"texts about {word.matter}"
    yield f"{word.document} about {word.matter}"
    if word.named:
        yield f"questions that name {word.named}"
    if word.hint:
        yield f"texts after hint {word.hint}"


_PARTS = {"subject": "subjects", "option": "options", "answer": "answers", "value": "answers"}


def _role(word: Word) -> Iterator[str]:
    part = _PARTS.get(word.role)
    if part:
        yield part
        yield f"{part} in {word.document}"
        yield f"{part} in texts about {word.matter}"
    if word.correct:
        yield "correct options"
    if word.role == "option" and word.named == word.text:
        yield "options that the question names"
    if word.role == "hint":
        yield "hints"
        yield f"hints in texts about {word.matter}"
    if word.role == "hint" and word.word_class:
        yield "hinted options"
    if word.role == "answer" and word.text == word.hint:
        yield "answers that follow the hint"
    if word.role == "instruction" and "questions" in word.document and word.text in ("Answer", ":"):
        yield "the end of a question"
        yield f"the end of a question about {word.matter}"
    if word.role == "instruction" and word.document == "choices":
        yield "instructions in choices"


def _slot(word: Word) -> Iterator[str]:
    if word.slot is None:
        return
    yield f"{word.slot} and its letter" if word.document == "lettered questions" else f"{word.slot} and the word or"
    if word.role == "option":
        yield word.slot
        yield f"{word.slot} in texts about {word.matter}"
        yield f"{word.text} as {word.slot}"
    elif word.role == "letter" and word.text not in LETTERS:
        yield f"{word_description(word.text)} of {word.slot}"
    elif word.role == "instruction":
        yield f"{word_description(word.text)} after {word.slot}"


def _phrase(word: Word) -> Iterator[str]:
    """Two neighbours; names stand for their class, of which there are too many."""
    if word.previous is None:
        return
    yield f"{word_description(word.text)} after {_bare(word.previous.text)}"
    if word.previous.word_class:
        yield f"{word_description(word.text)} after {word.previous.word_class}"
    for group in _class(word):
        yield f"{group} after {_bare(word.previous.text)}"
        if word.previous.word_class:
            yield f"{group} after {word.previous.word_class}"


RULES: Mapping[str, Callable[[Word], Iterator[str]]] = {
    "word": _word,
    "class": _class,
    "role": _role,
    "slot": _slot,
    "text": _text,
    "trait": _trait,
    "answer": _answer,
    "after": _after,
    "before": _before,
    "word in context": _word_in_texts,
    "class in context": _class_in_texts,
    "listed": _listed,
    "phrase": _phrase,
}
"""Kind -> the descriptions of one word's categories of that kind, simplest kind first."""


@dataclass
class Lexicon:
    """Numbers categories as they turn up. A description belongs to the first rule that gave it."""

    catalog: list[Category] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def membership(self, words: Sequence[Word | None], grow: bool) -> Membership:
        """Categories of every token; new ones are added to the catalog if `grow`, else left out."""
        tokens: list[int] = []
        categories: list[int] = []
        for token, word in enumerate(words):
            found = self._categories(word, grow) if word is not None else []
            categories += found
            tokens += [token] * len(found)
        return Membership(np.array(tokens, dtype=np.int64), np.array(categories, dtype=np.int64), len(words))

    def _categories(self, word: Word, grow: bool) -> list[int]:
        found: dict[int, None] = {}
        for rank, (kind, rule) in enumerate(RULES.items()):
            for description in rule(word):
                number = self._numbers.get(description)
                if number is None and grow:
                    number = self._numbers[description] = len(self.catalog)
                    self.catalog.append(Category(kind, rank, description))
                if number is not None:
                    found[number] = None
        return list(found)


def without_rare(
    catalog: Sequence[Category], samples: Sequence[Membership], minimum_tokens: int
) -> tuple[list[Category], list[Membership]]:
    """Only the categories with at least `minimum_tokens` tokens in the first sample, renumbered in all samples."""
    kept = np.bincount(samples[0].categories, minlength=len(catalog)) >= minimum_tokens
    numbers = np.cumsum(kept) - 1
    renumbered = []
    for sample in samples:
        stays = kept[sample.categories]
        renumbered.append(Membership(sample.tokens[stays], numbers[sample.categories[stays]], sample.num_tokens))
    return [category for category, stays in zip(catalog, kept, strict=True) if stays], renumbered
