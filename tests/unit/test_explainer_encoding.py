"""Exact ids, loss masks and vector positions; text that spells special tokens stays text."""

import pytest
from explainer_helpers import PLACEHOLDERS, SPECIALS, tokenizer, vector

from introspect_ray.errors import UserError
from introspect_ray.explainer.encoding import (
    KNOWN_TOKENS,
    OWN_TOKENS,
    Encoder,
    Frame,
    PlaceholderTokens,
    choose_placeholders,
)
from introspect_ray.explainer.query import Query

TEXT = tokenizer()
SPECIAL = {token: TEXT.convert_tokens_to_ids(token) for token in SPECIALS + PLACEHOLDERS}
FRAME = Frame("<|bos|><|user|>", "<|assistant|>", "<|end|>")


def byte_ids(text: str) -> list[int]:
    """One id per byte, from the vocabulary alone."""
    vocabulary = TEXT.get_vocab()
    return [vocabulary["Ġ" if char == " " else char] for char in text]


def special(*tokens: str) -> list[int]:
    return [SPECIAL[token] for token in tokens]


def test_frame_is_read_off_the_chat_template():
    assert Frame.of(TEXT) == FRAME


def test_frame_without_chat_template():
    assert Frame.of(tokenizer(chat=False)) == Frame("", "\n", "<|end|>")


def test_frame_of_a_template_that_drops_messages():
    broken = tokenizer()
    broken.chat_template = "hello"
    with pytest.raises(UserError, match="repeats or drops a message: found it 0 times"):
        Frame.of(broken)


def test_ids_mask_and_positions_exactly():
    one, two = vector(4, 0), vector(4, 1)
    encoded = Encoder(TEXT, OWN_TOKENS, FRAME).encode(Query(("a b", one, two, "", "c")), "yes")
    slot = special("<|vector_begin|>", "<|vector|>", "<|vector_end|>")
    question = [
        *special("<|bos|>", "<|user|>"),
        *byte_ids("a b"),
        *slot,
        *slot,
        *byte_ids("c"),
        *special("<|assistant|>"),
    ]
    answer = [*byte_ids("yes"), *special("<|end|>")]
    assert encoded.ids == question + answer
    assert encoded.loss_mask == [False] * len(question) + [True] * 4
    assert encoded.vector_positions == [6, 9]
    assert encoded.vectors == (one, two)
    assert encoded.num_loss_tokens == 4


def test_without_answer_ends_where_the_answer_begins():
    encoder = Encoder(TEXT, OWN_TOKENS, FRAME)
    asked, taught = encoder.encode(Query(("a",)), None), encoder.encode(Query(("a",)), "b")
    assert asked.ids == taught.ids[:-2] == [*special("<|bos|>", "<|user|>"), *byte_ids("a"), *special("<|assistant|>")]
    assert not any(asked.loss_mask)


@pytest.mark.parametrize("token", SPECIALS + PLACEHOLDERS)
def test_text_and_answers_cannot_forge_special_tokens(token):
    encoded = Encoder(TEXT, OWN_TOKENS, FRAME).encode(Query((f"x{token}", vector(4, 0))), f"{token}y")
    assert encoded.ids == [
        *special("<|bos|>", "<|user|>"),
        *byte_ids(f"x{token}"),
        *special("<|vector_begin|>", "<|vector|>", "<|vector_end|>", "<|assistant|>"),
        *byte_ids(f"{token}y"),
        *special("<|end|>"),
    ]
    assert encoded.vector_positions == [2 + 1 + len(token) + 1]


def test_decode_stops_at_the_end_token():
    encoder = Encoder(TEXT, OWN_TOKENS, FRAME)
    assert encoder.decode([*byte_ids(" yes "), *special("<|end|>"), *byte_ids("no")]) == "yes"
    assert encoder.decode(byte_ids("cut of")) == "cut of"


def test_own_placeholders_are_chosen_or_added():
    known = tokenizer()
    size = len(known)
    assert choose_placeholders(known) == OWN_TOKENS
    assert len(known) == size
    bare = tokenizer(placeholders=False)
    size = len(bare)
    assert choose_placeholders(bare) == OWN_TOKENS
    assert [bare.convert_tokens_to_ids(token) for token in PLACEHOLDERS] == [size, size + 1, size + 2]


@pytest.mark.parametrize("tokens", KNOWN_TOKENS[1:])
def test_placeholders_of_published_families(tokens):
    other = tokenizer(placeholders=False)
    other.add_tokens(list(tokens.all), special_tokens=True)
    assert choose_placeholders(other) == tokens


def test_missing_placeholder_is_the_users_error():
    with pytest.raises(UserError, match=r"has no token '<x>'"):
        Encoder(TEXT, PlaceholderTokens("<x>", "<y>", "<z>"), FRAME)
