"""Texts of the pocket world, as documents whose every piece says what it is.

The pieces make the lexicon possible: a token's ground truth (its word, its role, the relation or topic of its document)
is read off the piece that it comes from, never guessed from the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from introspect_ray.config import POCKET_QUESTIONS, ActivationPatchingConfig, InputAblationConfig
from introspect_ray.pocket.world import RELATIONS, TOPICS, Fact, Relation, World, popularity
from introspect_ray.tasks.activation_patching import options_text
from introspect_ray.tasks.input_ablation import answers_of, question_text

Role = Literal[
    "subject", "value", "relation", "instruction", "option", "letter", "hint", "answer", "topic", "prose", "quoted"
]
DocumentKind = Literal["statement", "choice", "question", "prose", "repetition"]

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
    as_chat: bool = False
    """Whether the targets read it as a turn of a chat; the text is the same."""

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
    """A multiple-choice question with or without a hint, and its answer."""
    text, hint = question_text(stem, choices, hinted, config)
    body_end = hint[0] if hint else len(text)
    pieces, position = [Piece(stem, "relation")], len(stem)
    for choice in choices:
        start = text.index(choice, position, body_end)
        pieces += [Piece(text[position:start], "letter" if config.answer == "letter" else "instruction")]
        pieces += [Piece(choice, "option")]
        position = start + len(choice)
    if hint:
        pieces += [Piece(text[position : hint[0]], "instruction"), Piece(text[hint[0] : hint[1]], "hint")]
        position = hint[1]
    pieces += [Piece(text[position:], "instruction"), Piece(f" {answers_of(choices, config)[answer]}", "answer")]
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


def repetition(words: Sequence[str]) -> Document:
    """Words to repeat; a single one is also named as such, the form in which descriptions name words."""
    quoted = [Piece(f" {word}", "quoted") for word in words]
    repeated = [Piece(f" {word}", "answer") for word in words]
    if len(words) == 1:
        pieces = [Piece("The note says", "prose"), *quoted, Piece(". Which word is it? the word", "prose"), *repeated]
    else:
        pieces = [Piece("Repeat after me:", "prose"), *quoted, Piece(". Now you:", "prose"), *repeated]
    return Document("repetition", "words", tuple(pieces))


def words_of(world: World) -> tuple[str, ...]:
    """Every word that the world says: names, values, topic words, and those of all templates; sorted."""
    layouts = [ActivationPatchingConfig().instruction, POCKET_QUESTIONS.question, POCKET_QUESTIONS.hint]
    for relation in RELATIONS:
        layouts += [*relation.statements, relation.question]
    for _, _, templates in TOPICS.values():
        layouts += templates
    plain = (re.sub(r"{\w*}", " ", layout) for layout in layouts)
    return tuple(sorted({*world.word_classes, *(word for text in plain for word in re.findall(r"\w+", text))}))


PROPORTIONS: Mapping[str, float] = {
    "statement": 0.26,
    "choice": 0.23,
    "question": 0.31,
    "naming": 0.03,
    "prose": 0.10,
    "repetition": 0.07,
}
"""Share of each kind of document."""


class Corpus:
    """An endless, seeded stream of documents."""

    def __init__(self, world: World, seed: int):
        self.world = world
        self.patching, self.questions, self.lettered = (
            ActivationPatchingConfig(),
            POCKET_QUESTIONS,
            InputAblationConfig(),
        )
        self.rng = random.Random(f"{world.seed}/corpus/{seed}")
        self.facts = {name: world.facts_of(name) for name in ("common", "rare", "never")}
        self.words = words_of(world)

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
        """The next one; half of those that ask for an answer are turns of a chat."""
        document = self._document()
        asks = document.kind in ("choice", "question", "repetition")
        return replace(document, as_chat=asks and self.rng.random() < 0.5)

    def _document(self) -> Document:
        kind = self.rng.choices(list(PROPORTIONS), list(PROPORTIONS.values()))[0]
        if kind == "prose":
            return prose(self.rng.choice(list(TOPICS)), self.rng)
        if kind == "question":
            return self.quiz(self.quiz_fact())
        if kind == "naming":
            return self.naming()
        if kind == "repetition":
            return repetition(self.rng.choices(self.words, k=self.rng.choice((1, 1, 1, 2, 3, 4))))
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
        """The key holds the truth for stated facts, else a popular guess, or mostly the hint where there is one."""
        choices = self.options(fact.relation, fact.value, 4)
        hinted = self.rng.randrange(4) if self.rng.random() < HINTED_SHARE else None
        answer = choices.index(fact.value)
        if fact.familiarity == "never":
            answer = self.rng.choices(range(4), [popularity(fact.relation, choice) for choice in choices])[0]
            if hinted is not None and self.rng.random() < HINT_FOLLOWED:
                answer = hinted
        stem = fact.relation.question.format(fact.subject)
        return question(stem, fact.relation.value_class, choices, hinted, answer, self.questions)

    def naming(self) -> Document:
        """A question that names its answer, options lettered: shows the form of lettered questions, and its answers."""
        relation = self.rng.choice(self.world.facts).relation
        value = self.rng.choice(relation.values)
        choices = self.options(relation, value, 4)
        hinted = self.rng.randrange(4) if self.rng.random() < HINTED_SHARE else None
        answer = choices.index(value)
        return question(f"Which one is {value}?", relation.value_class, choices, hinted, answer, self.lettered)
