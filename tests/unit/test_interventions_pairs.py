"""Pairs of prompts that share a beginning: the same answers as apart, for less work."""

import logging

import pytest
import torch
from tiny_models import FAMILIES, prompts_of, tiny_model, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from introspect_ray.errors import UserError
from introspect_ray.interventions.clean import next_token_logits
from introspect_ray.interventions.pairs import prefix_length
from introspect_ray.interventions.target import Target

LONG, OTHER, THIRD = prompts_of((14, 9, 11))
PAIRS = [
    (LONG, [*LONG[:6], *LONG[9:]]),  # a span in the middle ablated
    ([*OTHER[:7], *OTHER[8:]], OTHER),  # near the end, the shorter one first
    (LONG, OTHER),  # nothing in common but, at most, the beginning
    (THIRD, THIRD),
    ([5], [6]),
]


def seen_tokens(model):
    """A list that fills up with the tokens of every forward pass."""
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].numel()))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_both_answers_are_those_of_whole_prompts(family, caplog):
    model = tiny_model(family)
    with caplog.at_level(logging.WARNING):
        target = Target(model, tiny_tokenizer())
        one, other = target.paired_logits(PAIRS)
    assert target.take_slow_reasons() == ""
    expected = next_token_logits(model, [prompt for pair in PAIRS for prompt in pair])
    torch.testing.assert_close(one, expected[0::2], rtol=0, atol=1e-4)
    torch.testing.assert_close(other, expected[1::2], rtol=0, atol=1e-4)
    assert not caplog.text, "no family falls back"


def test_what_two_prompts_begin_with_is_run_once():
    model = tiny_model("llama")
    target = Target(model, tiny_tokenizer())
    target.paired_logits(PAIRS[:1])  # the self-check, at first use
    seen = seen_tokens(model)
    target.paired_logits([PAIRS[0]])
    assert seen == [14 + 11 - 6]


def test_a_model_that_takes_no_mask_of_ours_runs_pairs_apart_and_says_why(caplog):
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)
    torch.manual_seed(0)
    model = MambaForCausalLM(config).eval()
    with caplog.at_level(logging.WARNING):
        target = Target(model, tiny_tokenizer())
        one, other = target.paired_logits(PAIRS[:2])
    assert target.take_slow_reasons().startswith("pairs of prompts run apart: ")
    expected = next_token_logits(model, [prompt for pair in PAIRS[:2] for prompt in pair])
    torch.testing.assert_close(one, expected[0::2], rtol=0, atol=1e-4)
    torch.testing.assert_close(other, expected[1::2], rtol=0, atol=1e-4)
    assert "pairs of prompts of MambaForCausalLM run apart" in caplog.text


def test_prompts_longer_than_an_attention_window_run_apart():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 10}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    target = Target(model, tiny_tokenizer())
    one, other = target.paired_logits(PAIRS)
    assert target.take_slow_reasons() == "pairs of prompts run apart: prompts have more than 10 tokens"
    target.paired_logits([([5, 6, 7], [5, 6, 8])])
    assert target.take_slow_reasons() == ""
    expected = next_token_logits(model, [prompt for pair in PAIRS for prompt in pair])
    torch.testing.assert_close(one, expected[0::2], rtol=0, atol=1e-4)
    torch.testing.assert_close(other, expected[1::2], rtol=0, atol=1e-4)


def test_a_pair_with_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt 1 is empty"):
        Target(tiny_model("llama"), tiny_tokenizer()).paired_logits([([5, 6], [7]), ([], [1])])


def test_the_common_beginning_leaves_each_prompt_a_token_of_its_own():
    assert prefix_length([1, 2, 3, 4], [1, 2, 9]) == 2
    assert prefix_length([1, 2, 3], [1, 2, 3]) == 2
    assert prefix_length([1], [1, 2]) == 0
