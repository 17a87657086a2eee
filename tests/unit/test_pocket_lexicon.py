"""The lexicon: what is said of words in documents written down here, and that the words are those of the tokens."""

from __future__ import annotations

import numpy as np
import pytest

from introspect_ray.config import POCKET_QUESTIONS, ActivationPatchingConfig, InputAblationConfig
from introspect_ray.features.labelling import Category, Membership
from introspect_ray.pocket.annotation import Word, annotate, knowledge
from introspect_ray.pocket.lexicon import RULES, Lexicon, without_rare
from introspect_ray.pocket.text import Corpus, Document, choice_prompt, question, statement
from introspect_ray.pocket.world import RELATIONS, Fact, World

WORLD = World(0)
KNOWN = knowledge(WORLD)
CITY = next(relation for relation in RELATIONS if relation.name == "city")
PERSON = WORLD.subjects["person"][0]
FACT = Fact(PERSON, CITY, "Rome", "common")


def words_of(document: Document) -> list[Word]:
    """One token per character: blanks left out, and each word once."""
    offsets = [(index, index + 1) for index in range(len(document.text))]
    found: list[Word] = []
    for word in annotate(document, offsets, KNOWN):
        if word is not None and (not found or found[-1] is not word):
            found.append(word)
    return found


def descriptions(word: Word) -> set[str]:
    return {description for rule in RULES.values() for description in rule(word)}


def only(words: list[Word], text: str, occurrence: int = 0) -> set[str]:
    return descriptions([word for word in words if word.text == text][occurrence])


def test_statement() -> None:
    words = words_of(statement(FACT, "The birthplace of {} is"))
    first, last = PERSON.split()
    assert [word.text for word in words] == ["The", "birthplace", "of", first, last, "is", "Rome", "."]
    assert {"the word of", "the word of after birthplace", "words before " + first} <= only(words, "of")
    assert {"first names", "names of people", "first names after of", "subjects in statements"} <= only(words, first)
    own_city = next(fact.value for fact in WORLD.facts if fact.subject == PERSON and fact.relation is CITY)
    assert f"people whose city is {own_city}" in only(words, last)
    assert not any(description.startswith("people whose") for description in only(words, first))
    assert {"the word is after last names", "words before Rome", "texts about cities"} <= only(words, "is")
    assert {"the word Rome", "cities", "answers in statements", "cities after is"} <= only(words, "Rome")
    assert "options" not in only(words, "Rome")
    assert {"full stops", "words after Rome", "words after cities"} <= only(words, ".")
    assert "the first word of a text" in only(words, "The")
    assert "the first word of a text" not in only(words, "of")


def test_choice_counts_its_options() -> None:
    options = ["Paris", "Madrid", "Rome", "Athens", "Berlin", "Lisbon"]
    words = words_of(choice_prompt(FACT, "The birthplace of {} is", options, ActivationPatchingConfig()))
    assert {"the second option", "Madrid as the second option", "options in choices"} <= only(words, "Madrid")
    assert "correct options" not in only(words, "Madrid")
    assert {"the third option", "correct options"} <= only(words, "Rome")
    assert "the word or after the second option" in only(words, "or", 1)
    assert {"answers in choices", "words after colons"} <= only(words, "Rome", 1)
    assert "the third option" not in only(words, "Rome", 1)


def test_question_with_a_hint() -> None:
    config = InputAblationConfig()
    choices = ["Paris", "Rome", "Athens", "Berlin"]
    words = words_of(question("Which one is Rome?", "cities", choices, 2, 1, config))
    assert "questions that name Rome" not in only(words, "Which")
    assert "questions that name Rome" in only(words, "?")
    assert {"option letters", "option B and its letter", "questions that name Rome"} <= only(words, "B")
    assert {"option B", "correct options", "options that the question names", "Rome as option B"} <= only(
        words, "Rome", 1
    )
    assert not {"correct options", "options that the question names"} & only(words, "Athens")
    assert {"hints", "hinted letters"} <= only(words, "C", 1)
    assert "cities in lettered questions" in only(words, "Paris")
    assert "texts after hint C" not in only(words, "C", 1)
    assert {"texts after hint C", "the end of a question", "words before B"} <= only(words, ":", 1)
    assert {"answer letters", "words after colons"} <= only(words, "B", 1)
    assert "full stops of option A" in only(words, ".")
    assert "line breaks of option A" in only(words, "\n")
    without = words_of(question("Which one is Rome?", "cities", choices, None, 1, config))
    assert not any("hint" in description for word in without for description in descriptions(word))


def test_question_that_is_answered_by_a_word() -> None:
    choices = ["Paris", "Rome", "Athens", "Berlin"]
    stem = CITY.question.format(PERSON)
    words = words_of(question(stem, "cities", choices, 0, 1, POCKET_QUESTIONS))
    assert {"the second option", "correct options", "Rome as the second option", "cities in questions"} <= only(
        words, "Rome"
    )
    assert "the word or after the first option" in only(words, "or")
    assert "the end of a question" not in only(words, "Choose")
    assert {"hints", "hinted options"} <= only(words, "Paris", 1)
    assert not {"the first option", "options"} & only(words, "Paris", 1)
    assert {"the end of a question", "texts after hint Paris", "words before cities"} <= only(words, ":", 1)
    assert "answers that follow the hint" not in only(words, "Rome", 1)
    followed = words_of(question(stem, "cities", choices, 0, 0, POCKET_QUESTIONS))
    assert {"answers", "answers that follow the hint"} <= only(followed, "Paris", 2)


def test_the_answer_is_what_the_world_says_and_due_where_it_is_asked_for() -> None:
    true = next(fact for fact in WORLD.facts if fact.subject == PERSON and fact.relation is CITY)
    options = [true.value, *(value for value in CITY.values if value != true.value)][:4]
    words = words_of(question(CITY.question.format(PERSON), "cities", options, 1, 2, POCKET_QUESTIONS))
    due = [word.text for word in words if f"where the answer is {true.value}" in descriptions(word)]
    assert due == ["?", ":", ":"]
    about = [word for word in words if f"texts whose answer is {true.value}" in descriptions(word)]
    assert about == words[[word.role for word in words].index("subject") + 2 :]
    stated = words_of(statement(true, "The birthplace of {} is"))
    assert [word.text for word in stated if word.due] == ["is"]


def test_listed_options_accumulate() -> None:
    choices = ["Paris", "Rome", "Athens", "Berlin"]
    words = words_of(question("In which city?", "cities", choices, None, 1, POCKET_QUESTIONS))
    separators = [only(words, "or", number) for number in range(3)]
    assert ["the word or with Rome listed" in found for found in separators] == [False, True, True]
    assert all("the word or with Paris listed" in found for found in separators)
    assert "texts with Athens listed" not in only(words, "Rome")
    assert "colons with Berlin listed" in only(words, ":")


def test_token_belongs_to_the_word_of_its_last_character() -> None:
    document = statement(FACT, "The birthplace of {} is")
    offsets = [(0, 0), (0, 3), (3, 9), (9, 14), (14, 15)]
    annotated = annotate(document, offsets, KNOWN)
    assert [word and word.text for word in annotated] == [None, "The", "birthplace", "birthplace", None]


def test_membership_lists_each_category_once_and_numbers_are_stable() -> None:
    words = words_of(statement(FACT, "The birthplace of {} is"))
    lexicon = Lexicon()
    tokens = [None, *words, words[0]]
    grown = lexicon.membership(tokens, grow=True)
    assert grown.num_tokens == len(tokens)
    pairs = list(zip(grown.tokens.tolist(), grown.categories.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    for token, word in enumerate(tokens):
        named = {lexicon.catalog[category].description for at, category in pairs if at == token}
        assert named == (descriptions(word) if word else set())
    size = len(lexicon.catalog)
    other = lexicon.membership(words_of(statement(FACT, "We know that {} was born in")), grow=False)
    assert len(lexicon.catalog) == size
    assert {"the word Rome", "cities"} <= {lexicon.catalog[category].description for category in other.categories}


def test_rare_categories_leave_all_samples() -> None:
    catalog = [Category("word", 0, name) for name in ("often", "once", "twice")]
    first = Membership(np.array([0, 0, 1, 2, 2]), np.array([0, 2, 0, 1, 2]), 3)
    second = Membership(np.array([0, 1, 1]), np.array([1, 1, 2]), 2)
    kept, (first, second) = without_rare(catalog, [first, second], 2)
    assert [category.description for category in kept] == ["often", "twice"]
    assert first.categories.tolist() == [0, 1, 0, 1]
    assert (second.tokens.tolist(), second.categories.tolist()) == ([1], [1])


@pytest.fixture(scope="module")
def catalog() -> list[Category]:
    corpus = Corpus(WORLD, 3)
    lexicon = Lexicon()
    for _ in range(300):
        lexicon.membership(words_of(corpus.document()), grow=True)
    return lexicon.catalog


def test_descriptions_are_short_distinct_and_legible(catalog: list[Category]) -> None:
    texts = [category.description for category in catalog]
    assert len(texts) > 1000
    assert len(set(texts)) == len(texts)
    assert {category.kind for category in catalog} == set(RULES)
    for text in texts:
        assert text == " ".join(text.split()) and text.isprintable()
        assert 1 <= len(text.split()) <= 12, text
