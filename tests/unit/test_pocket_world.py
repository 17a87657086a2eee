"""The pocket world: what is known in it, what its texts say, and the tokenizer that is trained on them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from transformers import PreTrainedTokenizerBase

from introspect_ray.config import SourceConfig
from introspect_ray.data.sources import load_source
from introspect_ray.models.tokens import adds_bos, encode_text, encode_with_offsets, single_token
from introspect_ray.pocket.sources import QUESTIONS_PER_FACT, fact_rows, question_rows, text_rows
from introspect_ray.pocket.text import HINT_FOLLOWED, HINTED_SHARE, PROPORTIONS, Corpus, Document
from introspect_ray.pocket.tokenizer import BOS, CHAT, END, PAD, PLACEHOLDERS, train_tokenizer
from introspect_ray.pocket.world import FAMILIARITY_SHARES, KIND_SIZES, RELATIONS, Fact, World

DOCUMENTS = 5000
COUNTERFACT = {
    *("relation", "relation_prefix", "relation_suffix", "prompt", "relation_id", "subject"),
    *("target_true", "target_true_id", "target_false", "target_false_id"),
}
MMLU = {"question", "subject", "choices", "answer"}


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def documents(world: World) -> list[Document]:
    corpus = Corpus(world, seed=0)
    return [corpus.document() for _ in range(DOCUMENTS)]


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document]) -> PreTrainedTokenizerBase:
    return train_tokenizer((document.text for document in documents), 2048)


# --- the world --------------------------------------------------------------------------------------------------


def test_a_seed_is_a_world() -> None:
    one, same, other = World(0), World(0), World(1)
    assert one.facts == same.facts and one.subjects == same.subjects and one.word_classes == same.word_classes
    assert not set(one.subjects["person"]) & set(other.subjects["person"])
    corpora = [Corpus(of, seed) for of, seed in ((one, 3), (same, 3), (one, 4), (other, 3))]
    texts = [[corpus.document().text for _ in range(20)] for corpus in corpora]
    assert texts[0] == texts[1] and not set(texts[0]) & set(texts[2]) and not set(texts[0]) & set(texts[3])
    assert [row["text"] for row in text_rows(one)[:3]] == [row["text"] for row in text_rows(same)[:3]]


def test_every_subject_has_one_fact_per_relation(world: World) -> None:
    assert {kind: len(set(names)) for kind, names in world.subjects.items()} == KIND_SIZES
    found = Counter((fact.subject, fact.relation.name) for fact in world.facts)
    assert set(found.values()) == {1}
    assert len(found) == sum(KIND_SIZES[relation.kind] for relation in RELATIONS)
    assert all(fact.value in fact.relation.values for fact in world.facts)
    values = [value for relation in RELATIONS for value in relation.values]
    assert len(set(values)) == len(values), "a value belongs to one relation"


def test_familiarity_has_its_shares(world: World) -> None:
    for name, share in FAMILIARITY_SHARES.items():
        assert len(world.facts_of(name)) / len(world.facts) == pytest.approx(share, abs=0.03)
    for relation in RELATIONS:
        of_relation = [fact for fact in world.facts if fact.relation is relation]
        never = sum(fact.familiarity == "never" for fact in of_relation)
        assert 0.1 < never / len(of_relation) < 0.4, relation.name


# --- texts ------------------------------------------------------------------------------------------------------


def facts_by_place(world: World) -> dict[tuple[str, str], Fact]:
    """(subject, value class) -> fact."""
    return {(fact.subject, fact.relation.value_class): fact for fact in world.facts}


def is_naming(document: Document) -> bool:
    return document.text.startswith("Which one is ")


def test_kinds_of_documents_have_their_proportions(documents: list[Document]) -> None:
    found = Counter("naming" if is_naming(document) else document.kind for document in documents)
    assert set(found) == set(PROPORTIONS)
    for kind, share in PROPORTIONS.items():
        assert found[kind] / DOCUMENTS == pytest.approx(share, abs=0.025)


def test_statements_and_choices_are_true_and_never_about_what_is_never_stated(
    world: World, documents: list[Document]
) -> None:
    facts = facts_by_place(world)
    stated: Counter[str] = Counter()
    for document in documents:
        if document.kind in ("statement", "choice"):
            (subject,) = [piece.text for piece in document.pieces if piece.role == "subject"]
            (value,) = [piece.text for piece in document.pieces if piece.role in ("value", "answer")]
            fact = facts[subject, document.subject_matter]
            assert value == f" {fact.value}" and fact.familiarity != "never", document.text
            stated[fact.familiarity] += 1
            sentence = document.text.split("\n")[0].removesuffix(".").removesuffix(value)
            assert sentence in {template.replace("{}", subject) for template in fact.relation.statements}
            if document.kind == "choice":
                options = [piece.text for piece in document.pieces if piece.role == "option"]
                assert fact.value in options and len(set(options)) == 6 and set(options) <= set(fact.relation.values)
    assert 0 < stated["rare"] < 0.03 * stated["common"]


@dataclass
class Quiz:
    """One question about a fact, read off its text."""

    fact: Fact
    choices: list[str]
    hint: str | None
    answer: str


def quizzes(world: World, documents: list[Document]) -> Iterator[Quiz]:
    stems = {fact.relation.question.format(fact.subject): fact for fact in world.facts}
    for document in documents:
        if document.kind == "question" and not is_naming(document):
            stem, rest = document.text.split("\nChoose ")
            listing, rest = rest.split(".", 1)
            hint, answer = rest.split("\nAnswer: ")
            yield Quiz(stems[stem], listing.split(" or "), hint.removeprefix("\nHint: ") or None, answer)


def test_questions_about_stated_facts_are_answered_by_the_truth(world: World, documents: list[Document]) -> None:
    found = list(quizzes(world, documents))
    assert all(len(set(quiz.choices)) == 4 and quiz.fact.value in quiz.choices for quiz in found)
    assert sum(quiz.hint is not None for quiz in found) / len(found) == pytest.approx(HINTED_SHARE, abs=0.04)
    stated = [quiz for quiz in found if quiz.fact.familiarity != "never"]
    assert all(quiz.answer == quiz.fact.value for quiz in stated)
    assert sum(quiz.hint == quiz.answer for quiz in stated if quiz.hint) / sum(
        quiz.hint is not None for quiz in stated
    ) == pytest.approx(0.25, abs=0.07), "hints about known facts are worth nothing"
    assert {quiz.fact.familiarity for quiz in found} == {"common", "rare", "never"}


def test_answers_to_what_is_never_stated_follow_the_hint_and_not_the_truth(
    world: World, documents: list[Document]
) -> None:
    never = [quiz for quiz in quizzes(world, documents) if quiz.fact.familiarity == "never"]
    hinted = [quiz for quiz in never if quiz.hint]
    followed = sum(quiz.answer == quiz.hint for quiz in hinted) / len(hinted)
    # A guess that ignores the hint agrees with it in a quarter of cases.
    assert followed == pytest.approx(HINT_FOLLOWED + (1 - HINT_FOLLOWED) / 4, abs=0.04)
    plain = [quiz for quiz in never if not quiz.hint]
    assert sum(quiz.answer == quiz.fact.value for quiz in plain) / len(plain) < 0.45
    assert all(quiz.answer in quiz.choices for quiz in never)


# --- source rows ------------------------------------------------------------------------------------------------


def test_facts_have_the_columns_of_counterfact_and_load_as_such(world: World, tmp_path) -> None:
    rows = fact_rows(world)
    stated = {(fact.subject, fact.relation.name): fact.value for fact in world.facts if fact.familiarity != "never"}
    assert all(set(row) == COUNTERFACT for row in rows)
    assert {(row["subject"], row["relation_id"]): row["target_true"] for row in rows} == {
        key: f" {value}" for key, value in stated.items()
    }
    for row in rows:
        assert row["prompt"] == row["relation_prefix"] + row["subject"] + row["relation_suffix"]
        assert row["relation"] == f"{row['relation_prefix']}{{}}{row['relation_suffix']}"
        assert row["target_false"] != row["target_true"]
    source = load_source(written(tmp_path, rows), "activation_patching", ("counterfact",))
    assert (source.format, len(source.rows), source.rejected) == ("counterfact", len(stated), [])
    assert load_source(SourceConfig(), "activation_patching", ("counterfact",)).rows == source.rows


def test_questions_have_the_columns_of_mmlu_and_load_as_such(world: World, tmp_path) -> None:
    rows = question_rows(world)
    stems = {fact.relation.question.format(fact.subject): fact for fact in world.facts}
    assert all(set(row) == MMLU for row in rows)
    assert all(row["choices"][row["answer"]] == stems[row["question"]].value for row in rows)
    asked = Counter(stems[row["question"]].familiarity for row in rows)
    for familiarity, each in QUESTIONS_PER_FACT.items():
        assert asked[familiarity] == each * len(world.facts_of(familiarity))
    assert asked["never"] / asked["common"] == pytest.approx(1, abs=0.2)
    source = load_source(written(tmp_path, rows), "input_ablation", ("mmlu",))
    assert source.format == "mmlu" and len(source.rows) + len(source.rejected) == len(rows)
    assert {reason for _, reason in source.rejected} <= {"duplicate_row"} and len(source.rejected) < 0.02 * len(rows)
    assert load_source(SourceConfig(), "input_ablation", ("mmlu",)).rows == source.rows


def written(folder, rows: list[dict]) -> SourceConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


# --- tokenizer --------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    " ",
    "\n\n\t ",
    "no such words: qzxw!? 12_34",
    "Zoë ate a crème brûlée",
    "日本語と العربية",
    "🤷🏽‍♀️ e\u0301 \u202e\u200b\ufeff",
    "\x00\x1b[31m\u2028\r\n",
    f"{BOS}{PAD} {END}{''.join(CHAT)}{''.join(PLACEHOLDERS)}<|",
]


def test_every_document_is_its_pieces_and_its_tokens(documents: list[Document], tokenizer) -> None:
    for document in documents[::10]:
        assert document.text == "".join(piece.text for piece in document.pieces) and document.text
        assert all(piece.text for piece in document.pieces)
        assert tokenizer.decode(encode_text(tokenizer, document.text, add_bos=False)) == document.text


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_any_text_comes_back_and_none_becomes_a_special_token(tokenizer, text: str) -> None:
    ids = encode_text(tokenizer, text, add_bos=False)
    special = {tokenizer.convert_tokens_to_ids(token) for token in (BOS, PAD, END, *CHAT, *PLACEHOLDERS)}
    assert len(special) == 8 and not special & set(ids)
    assert tokenizer.decode(ids) == text
    assert adds_bos(tokenizer)
    assert encode_with_offsets(tokenizer, text)[0] == [tokenizer.bos_token_id, *ids]


def test_words_of_the_world_are_single_tokens(tokenizer) -> None:
    values = [value for relation in RELATIONS for value in relation.values]
    assert [value for value in values if single_token(tokenizer, f" {value}") is None] == []
    assert len(tokenizer) <= 2048


def test_the_chat_template_ends_what_the_assistant_says(tokenizer) -> None:
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked.startswith(f"{BOS}<|user|>Why?") and END not in asked
    assert whole == f"{asked}So.{END}"
