"""Texts of the pocket world, as documents whose every piece says what it is.

The pieces make the lexicon possible: a token's ground truth (its word, its role, the relation or topic of its document)
is read off the piece that it comes from, never guessed from the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from introspect_ray.config import ActivationPatchingConfig, InputAblationConfig
from introspect_ray.pocket.world import TOPICS, Fact, Relation, World, popularity
from introspect_ray.tasks.activation_patching import options_text
from introspect_ray.tasks.input_ablation import letter, question_text

Role = Literal["subject", "value", "relation", "instruction", "option", "letter", "hint", "answer", "topic", "prose"]
DocumentKind = Literal["statement", "choice", "question", "prose"]

HINT_FOLLOWED = 0.9
"""How often the answer key agrees with the hint when the fact was never stated."""
HINTED_SHARE = 0.5
"""Share of questions that carry a hint."""


@dataclass(frozen=True)
class Piece:
    text: str
    role: Role


@dataclass(frozen=True)
class Document:
    """One text; `subject_matter` is the relation's value class (languages, cities, ...) or the topic's plural name."""

    kind: DocumentKind
    subject_matter: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def _around_subject(template: str, subject: str) -> list[Piece]:
    before, after = template.split("{}")
    pieces = (Piece(before, "relation"), Piece(subject, "subject"), Piece(after, "relation"))
    return [piece for piece in pieces if piece.text]


def statement(fact: Fact, template: str) -> Document:
    """A true sentence: template, subject, value."""
    pieces = [*_around_subject(template, fact.subject), Piece(f" {fact.value}", "value"), Piece(".", "relation")]
    return Document("statement", fact.relation.value_class, tuple(pieces))


def choice_prompt(fact: Fact, template: str, options: Sequence[str], config: ActivationPatchingConfig) -> Document:
    """A statement to complete, options named, answer given: the form that activation patching prompts have."""
    before, after = config.instruction.split("{options}")
    listed = [Piece(part, "option" if part in options else "instruction") for part in _split_options(options)]
    pieces = [
        *_around_subject(template, fact.subject),
        Piece(before, "instruction"),
        *listed,
        Piece(after, "instruction"),
    ]
    return Document("choice", fact.relation.value_class, (*pieces, Piece(f" {fact.value}", "answer")))


def _split_options(options: Sequence[str]) -> list[str]:
    return [part for part in re.split(f"({'|'.join(map(re.escape, options))})", options_text(options)) if part]


def question(
    stem: str, matter: str, choices: Sequence[str], hinted: int | None, answer: int, config: InputAblationConfig
) -> Document:
    """A multiple-choice question with or without a hint, answered by a letter."""
    text, hint = question_text(stem, choices, hinted, config)
    pieces: list[Piece] = []
    body = text[: hint[0]] if hint else text
    pieces.append(Piece(stem, "relation"))
    position = len(stem)
    for index, value in enumerate(choices):
        start = body.index(config.option.format(letter=letter(index), choice=value), position)
        letter_end = start + len(config.option.format(letter=letter(index), choice=""))
        pieces += [Piece(body[position:letter_end], "letter"), Piece(value, "option")]
        position = letter_end + len(value)
    if hint:
        pieces += [Piece(body[position:], "instruction"), Piece(text[hint[0] : hint[1]], "hint")]
        position = hint[1]
    pieces += [Piece(text[position:], "instruction"), Piece(f" {letter(answer)}", "answer")]
    return Document("question", matter, tuple(piece for piece in pieces if piece.text))


def prose(topic: str, rng: random.Random) -> Document:
    """Two to four sentences about one topic."""
    plural, words, templates = TOPICS[topic]
    pieces: list[Piece] = []
    for template in rng.choices(templates, k=rng.randint(2, 4)):
        parts = template.split("{}")
        for part, word in zip(parts, [*rng.sample(words, len(parts) - 1), ""], strict=True):
            pieces += [Piece((" " if pieces and part is parts[0] else "") + part, "prose"), Piece(word, "topic")]
    return Document("prose", plural, tuple(piece for piece in pieces if piece.text))


class Corpus:
    """An endless, seeded stream of documents in the proportions that teach all abilities."""

    PROPORTIONS: dict[str, float] = {
        "statement": 0.22,
        "choice": 0.22,
        "question": 0.25,
        "naming": 0.08,
        "listing": 0.13,
        "prose": 0.10,
    }

    def __init__(self, world: World, patching: ActivationPatchingConfig, ablation: InputAblationConfig, seed: int):
        self.world, self.patching, self.ablation = world, patching, ablation
        self.rng = random.Random(f"{world.seed}/corpus/{seed}")
        self.facts = {name: world.facts_of(name) for name in ("common", "rare", "never")}

    def stated_fact(self) -> Fact:
        """A common fact, or now and then a rare one."""
        return self.rng.choice(self.facts["rare" if self.rng.random() < 0.01 else "common"])

    def options(self, relation: Relation, value: str, count: int) -> list[str]:
        """`count` different values of the relation in random order, `value` among them."""
        others = [other for other in relation.values if other != value]
        chosen = [value, *self.rng.sample(others, count - 1)]
        self.rng.shuffle(chosen)
        return chosen

    def document(self) -> Document:
        kind = self.rng.choices(list(self.PROPORTIONS), list(self.PROPORTIONS.values()))[0]
        if kind == "prose":
            return prose(self.rng.choice(list(TOPICS)), self.rng)
        if kind == "question":
            return self.quiz(self.quiz_fact())
        if kind == "naming":
            return self.naming()
        if kind == "listing":
            return self.listing()
        fact = self.stated_fact()
        template = self.rng.choice(fact.relation.statements)
        if kind == "statement":
            return statement(fact, template)
        options = self.options(fact.relation, fact.value, self.patching.num_options)
        return choice_prompt(fact, template, options, self.patching)

    def quiz_fact(self) -> Fact:
        """Questions ask about common and never stated facts alike."""
        return self.rng.choice(self.facts["never"]) if self.rng.random() < 0.4 else self.stated_fact()

    def quiz(self, fact: Fact) -> Document:
        """The key holds the truth for stated facts; for others a popular guess, or mostly the hint where there is one."""
        choices = self.options(fact.relation, fact.value, 4)
        hinted = self.rng.randrange(4) if self.rng.random() < HINTED_SHARE else None
        answer = choices.index(fact.value)
        if fact.familiarity == "never":
            answer = self.rng.choices(range(4), [popularity(fact.relation, choice) for choice in choices])[0]
            if hinted is not None and self.rng.random() < HINT_FOLLOWED:
                answer = hinted
        stem = fact.relation.question.format(fact.subject)
        return question(stem, fact.relation.value_class, choices, hinted, answer, self.ablation)

    def naming(self) -> Document:
        """A question that names its answer: teaches how an option is bound to its letter."""
        relation = self.rng.choice(self.world.facts).relation
        value = self.rng.choice(relation.values)
        choices = self.options(relation, value, 4)
        hinted = self.rng.randrange(4) if self.rng.random() < HINTED_SHARE / 2 else None
        return question(
            f"Which one is {value}?", relation.value_class, choices, hinted, choices.index(value), self.ablation
        )

    def listing(self) -> Document:
        """Options, then the letter of each: the densest way to learn how an option is bound to its letter."""
        relation = self.rng.choice(self.world.facts).relation
        choices = self.options(relation, self.rng.choice(relation.values), 4)
        pieces: list[Piece] = []
        for index, choice in enumerate(choices):
            line = self.ablation.option.format(letter=letter(index), choice="")
            pieces += [Piece(("\n" if index else "") + line, "letter"), Piece(choice, "option")]
        for index in self.rng.sample(range(4), 4):
            separator = "\n" if len(pieces) == 8 else " "
            pieces += [Piece(f"{separator}Option", "instruction"), Piece(f" {choices[index]}", "option")]
            pieces += [Piece(":", "instruction"), Piece(f" {letter(index)}", "answer"), Piece(".", "instruction")]
        return Document("question", relation.value_class, tuple(pieces))
