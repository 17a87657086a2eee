"""The pocket world: people, places and products with attributes, all of it made from one seed.

A fact is `common` (stated often), `rare` (stated a few times) or `never` stated. Questions are asked about all of them.
Everything that later counts as ground truth (who speaks what, which word is a city, what was never said) lives here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Familiarity = Literal["common", "rare", "never"]
FAMILIARITY_SHARES: dict[Familiarity, float] = {"common": 0.68, "rare": 0.07, "never": 0.25}

_ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "kr",
    "st",
    "th",
    "tr",
    "sh",
)
_VOWELS = tuple("a e i o u ai ou".split())
_CODAS = ("", "", "n", "r", "s", "l")


@dataclass(frozen=True)
class Relation:
    """One attribute of one kind of entity; statements and the question are templates around the subject `{}`."""

    name: str
    kind: str
    values: tuple[str, ...]
    value_class: str
    """What the values are, in the plural."""
    statements: tuple[str, ...]
    """Each is completed by the value."""
    question: str


def _relation(
    name: str, kind: str, values: str, value_class: str, statements: tuple[str, ...], question: str
) -> Relation:
    return Relation(name, kind, tuple(values.split()), value_class, statements, question)


RELATIONS: tuple[Relation, ...] = (
    _relation(
        "language", "person", "French German Russian Greek Italian Spanish Dutch Polish", "languages",
        ("The mother tongue of {} is", "We know that {} is a native speaker of", "The language spoken by {} is"),
        "What is the mother tongue of {}?",
    ),
    _relation(
        "instrument", "person", "piano guitar violin trumpet drums flute harp cello", "instruments",
        ("We know that {} is known for playing the", "The instrument played by {} is the", "We know that {} performs on the"),
        "Which instrument does {} play?",
    ),
    _relation(
        "city", "person", "Paris Berlin Moscow Athens Rome Madrid Lisbon Warsaw", "cities",
        ("We know that {} was born in", "The birthplace of {} is", "We know that {} grew up in the city of"),
        "In which city was {} born?",
    ),
    _relation(
        "profession", "person", "doctor lawyer teacher actor painter pilot chemist farmer", "professions",
        ("We know that {} works as a", "The profession of {} is", "We know that {} earns a living as a"),
        "What is the profession of {}?",
    ),
    _relation(
        "sport", "person", "tennis hockey soccer golf rugby chess boxing rowing", "sports",
        ("The favourite sport of {} is", "We know that {} competes in", "We know that {} likes to play"),
        "What is the favourite sport of {}?",
    ),
    _relation(
        "country", "place", "France Norway Egypt Brazil Japan Canada Kenya India", "countries",
        ("The town of {} lies in", "We know that {} is a town in", "The country around {} is"),
        "In which country is the town of {}?",
    ),
    _relation(
        "trade", "place", "salt silk wool glass copper timber honey tea", "goods",
        ("The town of {} is famous for its", "We know that {} sells mostly", "Merchants visit {} to buy"),
        "Which goods does the town of {} sell?",
    ),
    _relation(
        "landmark", "place", "castle bridge tower harbour temple garden museum windmill", "landmarks",
        ("Visitors of {} admire the", "The landmark of {} is the", "In the middle of {} stands a"),
        "Which landmark has the town of {}?",
    ),
    _relation(
        "maker", "product", "Nokia Sony Apple Toyota Bosch Philips Canon Fiat", "makers",
        ("The {} is produced by", "The maker of the {} is", "The {} was created by"),
        "Which company makes the {}?",
    ),
    _relation(
        "device", "product", "phone camera radio engine clock printer lamp scooter", "devices",
        ("The {} is a kind of", "People use the {} as a", "The {} works as a modern"),
        "What kind of device is the {}?",
    ),
    _relation(
        "colour", "product", "red blue green yellow black white purple orange", "colours",
        ("The colour of the {} is", "The {} is always painted", "The {} comes in"),
        "What is the colour of the {}?",
    ),
)  # fmt: skip

KIND_SIZES = {"person": 280, "place": 100, "product": 100}
KIND_PLURALS = {"person": "people", "place": "towns", "product": "products"}

TOPICS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "fruit": (
        "fruits",
        tuple("apple pear plum cherry lemon grape peach melon fig".split()),
        ("In the kitchen the cook cut the {} and the {}.", "The child ate a ripe {} and then a {}.", "A basket held one {}, one {} and one {}."),
    ),
    "animal": (
        "animals",
        tuple("horse goat sheep cow dog cat goose mule donkey".split()),
        ("On the farm the {} slept beside the {}.", "The farmer fed the {} before the {}.", "A {}, a {} and a {} stood in the barn."),
    ),
    "tool": (
        "tools",
        tuple("hammer saw drill chisel axe wrench plane file rake".split()),
        ("In the workshop the {} hung above the {}.", "She repaired the door with a {} and a {}.", "The carpenter bought a {}, a {} and a {}."),
    ),
    "weather": (
        "kinds of weather",
        tuple("rain snow hail fog wind frost storm thunder sleet".split()),
        ("After the {} came the {}.", "The sailors feared {} and {} at sea.", "The forecast promised {}, {} and {}."),
    ),
    "clothes": (
        "clothes",
        tuple("coat scarf glove shirt boot hat belt jacket sock".split()),
        ("In the shop he tried a {} and a {}.", "She packed the {} under the {}.", "The tailor sewed a {}, a {} and a {}."),
    ),
    "body": (
        "parts of the body",
        tuple("arm leg knee elbow shoulder ankle wrist neck hip".split()),
        ("The nurse looked at the {} and the {}.", "He hurt his {} and his {}.", "The exercise trains the {}, the {} and the {}."),
    ),
    "furniture": (
        "furniture",
        tuple("table chair sofa desk shelf bed stool bench mirror".split()),
        ("In the hall a {} stood next to a {}.", "They carried the {} and the {} upstairs.", "The room had a {}, a {} and a {}."),
    ),
}  # fmt: skip
"""Topic -> (plural name, its words, sentence templates); two to four sentences of one topic make a piece of prose."""


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: Relation
    value: str
    familiarity: Familiarity


def _invent(rng: random.Random, count: int, taken: set[str], syllables: int) -> list[str]:
    """`count` new capitalised words; every one is added to `taken`."""
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if word not in taken:
            taken.add(word)
            found.append(word.capitalize())
    return found


@dataclass(frozen=True)
class World:
    """All entities and facts of one seed."""

    seed: int

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Name parts by class: first names, last names, towns, products."""
        rng, taken = random.Random(f"{self.seed}/names"), set[str]()
        sizes = {"first names": 80, "last names": 160, "towns": KIND_SIZES["place"], "products": KIND_SIZES["product"]}
        return {name: tuple(_invent(rng, size, taken, 2)) for name, size in sizes.items()}

    @cached_property
    def subjects(self) -> dict[str, tuple[str, ...]]:
        """Kind -> names of its entities; people are a first and a last name, no pair twice."""
        rng, people = random.Random(f"{self.seed}/people"), list[str]()
        while len(people) < KIND_SIZES["person"]:
            person = f"{rng.choice(self.names['first names'])} {rng.choice(self.names['last names'])}"
            if person not in people:
                people.append(person)
        return {"person": tuple(people), "place": self.names["towns"], "product": self.names["products"]}

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """One fact for every entity and relation of its kind."""
        rng = random.Random(f"{self.seed}/facts")
        kinds, weights = list(FAMILIARITY_SHARES), list(FAMILIARITY_SHARES.values())
        return tuple(
            Fact(subject, relation, rng.choice(relation.values), rng.choices(kinds, weights)[0])
            for relation in RELATIONS
            for subject in self.subjects[relation.kind]
        )

    def facts_of(self, familiarity: Familiarity) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if fact.familiarity == familiarity)

    @cached_property
    def word_classes(self) -> dict[str, str]:
        """Word -> the plural name of its one class, for every name, value and topic word."""
        classes = {word: name for name, words in self.names.items() for word in words}
        classes |= {word: relation.value_class for relation in RELATIONS for word in relation.values}
        return classes | {word: plural for plural, words, _ in TOPICS.values() for word in words}


def popularity(relation: Relation, value: str) -> float:
    """How often a guess names this value when nothing is known: halved with every step down the list."""
    return 0.5 ** relation.values.index(value)
