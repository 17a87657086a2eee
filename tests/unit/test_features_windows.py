"""A window's pieces are its text, also where a character spans several tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from introspect_ray.features.windows import Window, window


@pytest.fixture(scope="module")
def bytes_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: index for index, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["a b.", "größer als 漢字", "🙂!"])
def test_pieces_join_to_the_text_and_characters_stay_whole(bytes_tokenizer, text):
    ids = bytes_tokenizer(text, add_special_tokens=False)["input_ids"]
    found = window(ids, bytes_tokenizer)
    assert found.text == text
    assert len(found) == len(text.encode())
    assert [piece for piece in found.pieces if piece] == list(text)


def test_a_cut_character_ends_the_window(bytes_tokenizer):
    ids = bytes_tokenizer("aé", add_special_tokens=False)["input_ids"]
    assert window(ids[:2], bytes_tokenizer).pieces == ("a", "\N{REPLACEMENT CHARACTER}")


def test_ids_and_pieces_must_agree():
    with pytest.raises(AssertionError, match="2 ids for 1 pieces"):
        Window((1, 2), ("a",))
