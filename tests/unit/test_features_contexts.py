"""Texts become contexts and windows: every token is seen once, in order, and knows the text that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny_tokenizer

from introspect_ray.features.contexts import Text, cut, window_ids
from introspect_ray.features.windows import window
from introspect_ray.models.tokens import encode_text

TEXTS = ["the cat sat on the mat in Paris", "a", "", "Paris é € 🙂 end", " Paris is the capital of France" * 3]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("context", "length"), [(8, 3), (2, 1), (500, 32), (5, 4)])
def test_every_token_is_seen_once(bos, context, length):
    tokenizer = tiny_tokenizer(bos)
    texts = [Text(number, number % 3, text) for number, text in enumerate(TEXTS)]
    cuts = cut(texts, tokenizer, context, length)
    seen: list[int] = []
    for text in TEXTS:
        seen += encode_text(tokenizer, text, add_bos=False)[0 if bos else 1 :]
    assert [token for context in cuts.contexts for token in context[1:]] == seen
    assert [token for found in cuts.windows for token in found.ids] == seen
    assert cuts.num_tokens == len(seen)
    assert max(map(len, cuts.contexts)) <= context and max(map(len, cuts.windows)) <= length
    assert np.diff(cuts.first).tolist() == [len(found) for found in cuts.windows]
    assert len(cuts.ids) == len(cuts.splits) == len(cuts.windows) == len(set(cuts.ids.tolist()))
    if bos:
        assert {context[0] for context in cuts.contexts} == {tokenizer.bos_token_id}
        assert "".join(found.text for found in cuts.windows) == "".join(TEXTS)


def test_pieces_are_those_of_the_window_of_the_ids():
    tokenizer = tiny_tokenizer(bos=True)
    texts = [Text(number, 0, text) for number, text in enumerate(TEXTS)]
    for found in cut(texts, tokenizer, 100, 100).windows:
        assert found == window(found.ids, tokenizer)


def test_a_token_before_the_context_stands_in_for_begin_of_text():
    tokenizer = tiny_tokenizer(bos=False)
    ids = encode_text(tokenizer, TEXTS[0], add_bos=False)
    contexts = cut([Text(0, 0, TEXTS[0])], tokenizer, 4, 9).contexts
    assert contexts[:2] == [ids[:4], ids[3:7]]


def test_special_tokens_in_a_text_are_spelled_out():
    tokenizer = tiny_tokenizer(bos=True)
    (found,) = cut([Text(0, 0, "a <|user|> b")], tokenizer, 100, 100).windows
    assert not set(tokenizer.all_special_ids) & set(found.ids)
    assert found.text == "a <|user|> b"


def test_window_ids_are_the_same_everywhere():
    assert window_ids("text", 3).tolist() == window_ids("text", 2).tolist() + window_ids("text", 3)[2:].tolist()
    assert window_ids("the cat", 2).tolist() == [17868053786485008579, 17334826215052768949]
    assert not set(window_ids("a", 100).tolist()) & set(window_ids("b", 100).tolist())
