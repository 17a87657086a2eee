"""Ground truth of every token of a pocket document, read off the pieces that the document is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from introspect_ray.models.tokens import Offset
from introspect_ray.pocket.text import Document
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
    role: str
    """A `Role`."""
    document: str
    """Kind of the document, in the plural."""
    matter: str
    """What the document is about: a relation's value class, or a topic."""
    previous: Word | None
    following: str | None
    following_class: str | None
    slot: str | None
    """The option that it is part of or closes: `option A` where options have letters, else `the first option`."""
    traits: tuple[str, ...]
    """Facts about the subject that ends here: `people whose city is Paris`."""
    named: str | None
    """The option that a question asks for by name, at and after that name."""
    hint: str | None
    """The hinted option or letter, after the hint."""
    truth: str | None
    """What the world says of the document's subject and matter, after the subject."""
    due: bool
    """Whether the answer is due here: at the end of the sentence or question, and at the colons of hint and answer."""
    listed: tuple[str, ...]
    """Options named so far, this word included."""
    correct: bool
    """Whether it is an option that the document's answer confirms, at the place where the options are named."""


@dataclass(frozen=True)
class Knowledge:
    """What annotation needs to know about the world, by word and by subject."""

    classes: Mapping[str, str]
    """Word -> its class."""
    values: Mapping[str, Mapping[str, str]]
    """Subject -> matter -> the true value."""
    traits: Mapping[str, tuple[str, ...]]
    """Subject -> all that is true of it, in words."""


def knowledge(world: World) -> Knowledge:
    values: dict[str, dict[str, str]] = {}
    traits: dict[str, list[str]] = {}
    for fact in world.facts:
        plural = KIND_PLURALS[fact.relation.kind]
        values.setdefault(fact.subject, {})[fact.relation.value_class] = fact.value
        traits.setdefault(fact.subject, []).append(f"{plural} whose {fact.relation.name} is {fact.value}")
    return Knowledge(world.word_classes, values, {subject: tuple(found) for subject, found in traits.items()})


def annotate(document: Document, offsets: Sequence[Offset], known: Knowledge) -> list[Word | None]:
    """The word of every token; `offsets` are the characters `[start, end)` that each token stands for.

    A token belongs to the word that holds its last character; `None` for begin-of-text and for blanks.
    """
    text = document.text
    spans = [match.span() for match in _WORD.finditer(text)]
    words = _words(document, spans, known)
    at: list[Word | None] = [None] * len(text)
    for (start, end), word in zip(spans, words, strict=True):
        at[start:end] = [word] * (end - start)
    return [at[end - 1] if end > start else None for start, end in offsets]


def words_of(document: Document, known: Knowledge) -> list[Word]:
    """The words of a document, in order."""
    return _words(document, [match.span() for match in _WORD.finditer(document.text)], known)


def _words(document: Document, spans: Sequence[Offset], known: Knowledge) -> list[Word]:
    text, kind, ends, slots, due = document.text, _kind(document), _ends(document), _slots(document), _due(document)
    classes = known.classes
    answer = document.pieces[-1].text.strip() if document.pieces[-1].role == "answer" else None
    subjects = _subjects([text[start:end] for start, end in spans], known)
    words: list[Word] = []
    listed: tuple[str, ...] = ()
    number, hint, named, truth = 0, None, None, None
    for index, (start, end) in enumerate(spans):
        while end > ends[number]:
            number += 1
        piece, word, slot = document.pieces[number], text[start:end], slots[number]
        subject, ends_subject = subjects.get(index, ("", False))
        if text.startswith(NAMING_STEM) and piece.role == "relation" and classes.get(word) == document.subject_matter:
            named = word
        if piece.role == "option":
            listed = (*listed, word)
        following = text[slice(*spans[index + 1])] if index + 1 < len(spans) else None
        words.append(
            Word(
                text=word,
                word_class=classes.get(word),
                role="subject" if subject else piece.role,
                document=kind,
                matter=document.subject_matter,
                previous=words[-1] if words else None,
                following=following,
                following_class=classes.get(following) if following else None,
                slot=slot,
                traits=known.traits[subject] if ends_subject else (),
                named=named,
                hint=hint,
                truth=truth,
                due=(end == ends[number] and due[number]) or (piece.role == "hint" and word == ":"),
                listed=listed,
                correct=piece.role == "option" and answer in (word, (slot or "").removeprefix("option ")),
            )
        )
        if ends_subject:
            truth = known.values[subject].get(document.subject_matter)
        if piece.role == "hint" and (word in LETTERS or classes.get(word) == document.subject_matter):
            hint = word
    return words


def _subjects(words: Sequence[str], known: Knowledge) -> dict[int, tuple[str, bool]]:
    """Number of each word that belongs to a subject -> the subject, and whether the word ends it.

    Found by the words, because the pieces of a question do not set its subject apart.
    """
    found: dict[int, tuple[str, bool]] = {}
    for index, word in enumerate(words):
        pair = f"{words[index - 1]} {word}" if index else ""
        if pair in known.values:
            found |= {index - 1: (pair, False), index: (pair, True)}
        elif word in known.values:
            found[index] = (word, True)
    return found


def _due(document: Document) -> list[bool]:
    """Whether the answer is due at the end of each piece: before it, and where the sentence or question ends."""
    following = [piece.role for piece in document.pieces[1:]] + [None]
    return [
        role in ("value", "answer") or (piece.role == "relation" and role in ("instruction", "letter"))
        for piece, role in zip(document.pieces, following, strict=True)
    ]


def _ends(document: Document) -> list[int]:
    """Where each piece ends in the text."""
    ends, position = [], 0
    for piece in document.pieces:
        position += len(piece.text)
        ends.append(position)
    return ends


def _kind(document: Document) -> str:
    """What documents of this kind are called."""
    if any(piece.role == "letter" for piece in document.pieces):
        return "lettered questions"
    return "prose" if document.kind == "prose" else f"{document.kind}s"


def _slots(document: Document) -> list[str | None]:
    """The option that each piece is part of or closes: a letter goes with the next one, `or` with the last."""
    lettered = any(piece.role == "letter" for piece in document.pieces)
    slots: list[str | None] = []
    count, current = 0, None
    for piece in document.pieces:
        if piece.role == ("letter" if lettered else "option"):
            current = f"option {LETTERS[count]}" if lettered else f"the {ORDINALS[count]} option"
            count += 1
        elif piece.role != "option" and piece.text != SEPARATOR:
            current = None
        slots.append(current)
    return slots
