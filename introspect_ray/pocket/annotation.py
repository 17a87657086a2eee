"""Ground truth of every token of a pocket document, read off the pieces that the document is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from introspect_ray.models.tokens import Offset
from introspect_ray.pocket.text import Document, Role
from introspect_ray.pocket.world import KIND_PLURALS, World

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
LETTERS = ("A", "B", "C", "D")
NAMING_STEM = "Which one is "
SEPARATOR = " or "

_WORD = re.compile(r"\w+|\n|[^\w\s]")


@dataclass(frozen=True, eq=False)
class Word:
    """A word, a punctuation mark or a line break, with everything the lexicon may say about it."""

    text: str
    word_class: str | None
    """Plural name of the one class that the world puts the word in."""
    role: Role
    document: str
    """Kind of the document, in the plural."""
    matter: str
    """What the document is about: a relation's value class, or a topic."""
    previous: Word | None
    following: str | None
    following_class: str | None
    slot: str | None
    """The option that it is part of or closes: `option A` in questions, `the first option` in choices."""
    traits: tuple[str, ...]
    """Facts about the subject that ends here: `people whose city is Paris`."""
    named: str | None
    """The option that a question asks for by name, at and after that name."""
    hint: str | None
    """The hinted letter, after the hint."""
    correct: bool
    """Whether it is an option that the document's answer confirms, at the place where the options are named."""


def subject_traits(world: World) -> dict[str, tuple[str, ...]]:
    """Subject -> what is true of it, in words."""
    traits: dict[str, list[str]] = {}
    for fact in world.facts:
        plural = KIND_PLURALS[fact.relation.kind]
        traits.setdefault(fact.subject, []).append(f"{plural} whose {fact.relation.name} is {fact.value}")
    return {subject: tuple(found) for subject, found in traits.items()}


def annotate(
    document: Document, offsets: Sequence[Offset], classes: Mapping[str, str], traits: Mapping[str, tuple[str, ...]]
) -> list[Word | None]:
    """The word of every token; `offsets` are the characters `[start, end)` that each token stands for.

    A token belongs to the word that holds its last character; `None` for begin-of-text and for blanks.
    """
    text = document.text
    spans = [match.span() for match in _WORD.finditer(text)]
    words = _words(document, spans, classes, traits)
    at: list[Word | None] = [None] * len(text)
    for (start, end), word in zip(spans, words, strict=True):
        at[start:end] = [word] * (end - start)
    return [at[end - 1] if end > start else None for start, end in offsets]


def _words(
    document: Document, spans: Sequence[Offset], classes: Mapping[str, str], traits: Mapping[str, tuple[str, ...]]
) -> list[Word]:
    text, ends, slots = document.text, _ends(document), _slots(document)
    answer = document.pieces[-1].text.strip() if document.pieces[-1].role == "answer" else None
    kind = _kind(document)
    names_an_option = text.startswith(NAMING_STEM)
    words: list[Word] = []
    number, hint, named = 0, None, None
    for index, (start, end) in enumerate(spans):
        while end > ends[number]:
            number += 1
        piece, word, slot = document.pieces[number], text[start:end], slots[number]
        if names_an_option and piece.role == "relation" and classes.get(word) == document.subject_matter:
            named = word
        following = text[slice(*spans[index + 1])] if index + 1 < len(spans) else None
        words.append(
            Word(
                text=word,
                word_class=classes.get(word),
                role=piece.role,
                document=kind,
                matter=document.subject_matter,
                previous=words[-1] if words else None,
                following=following,
                following_class=classes.get(following) if following else None,
                slot=slot,
                traits=traits[piece.text] if piece.role == "subject" and end == ends[number] else (),
                named=named,
                hint=hint,
                correct=piece.role == "option" and slot is not None and answer in (word, slot.removeprefix("option ")),
            )
        )
        if piece.role == "hint" and (word in LETTERS or word in classes):
            hint = word
    return words


def _ends(document: Document) -> list[int]:
    """Where each piece ends in the text."""
    ends, position = [], 0
    for piece in document.pieces:
        position += len(piece.text)
        ends.append(position)
    return ends


def _kind(document: Document) -> str:
    """What documents of this kind are called."""
    if document.kind == "question" and document.pieces[0].role == "letter":
        return "lists"
    return "prose" if document.kind == "prose" else f"{document.kind}s"


def _slots(document: Document) -> list[str | None]:
    """The option that each piece is part of or closes: a letter goes with the option it announces, `or` with the last.

    An option that is named again later has none.
    """
    slots: list[str | None] = []
    lettered = any(piece.role == "letter" for piece in document.pieces)
    count, last = 0, None
    for index, piece in enumerate(document.pieces):
        announced = index > 0 and document.pieces[index - 1].role == "letter"
        if piece.role == "letter":
            last = f"option {LETTERS[count]}"
            count += 1
        elif not lettered and piece.role == "option":
            last = f"the {ORDINALS[count]} option"
            count += 1
        elif not announced and piece.text != SEPARATOR:
            last = None
        slots.append(last)
    return slots
