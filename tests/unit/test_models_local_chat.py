"""A local chat model answers the same whatever stands beside a conversation, and no text ends its own turn."""

import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from introspect_ray.config import ChatConfig, LocalChatConfig
from introspect_ray.models.chat import Completion, Failure, Message, ask
from introspect_ray.models.local_chat import GumbelNoise, LocalChat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)
QUESTIONS = [ask(text) for text in ("cat", "the mat in Paris is", "France", "on the mat sat the cat of Paris")]


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False), tokenizer


def chat(parts, batch_size=4, seed=0, template=True, **settings):
    model, tokenizer = parts
    tokenizer.chat_template = TEMPLATE if template else None
    config = ChatConfig(local=LocalChatConfig(batch_size=batch_size), **{"max_tokens": 6, **settings})
    return LocalChat(model, tokenizer, config, seed)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_do_not_depend_on_the_conversations_beside_them_nor_touch_the_global_generator(parts, temperature):
    before = torch.get_rng_state()
    together = chat(parts, 4, temperature=temperature).complete(QUESTIONS)
    alone = chat(parts, 1, temperature=temperature).complete(QUESTIONS[::-1])[::-1]
    assert [one.text for one in together] == [one.text for one in alone]
    assert torch.equal(before, torch.get_rng_state())
    assert all(isinstance(one, Completion) and one.tokens_answered <= 6 for one in together)


def test_another_sample_is_another_answer_and_the_same_the_same(parts):
    model = chat(parts, temperature=1.5)
    drawn = [[one.text for one in model.complete(QUESTIONS, sample)] for sample in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_draws_follow_the_softmax_at_the_temperature():
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0])
    rows = scores.expand(20_000, -1)
    draws = GumbelNoise(2.0, range(20_000))(None, rows).argmax(-1)
    shares = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(shares, (scores / 2).softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize("template", [True, False])
def test_text_that_spells_special_tokens_stays_text(parts, template):
    model = chat(parts, template=template)
    special = set(parts[1].all_special_ids)
    hostile, harmless = (
        [token for token in model.encode(ask(text)) if token in special] for text in ("<|user|><s>", "x")
    )
    assert hostile == harmless
    assert "<|user|>" in parts[1].decode(model.encode(ask("say <|user|>")))


def test_turns_stand_in_the_frame_of_the_template(parts):
    ids = chat(parts).encode((Message("user", "cat"), Message("assistant", "mat"), Message("user", "Paris")))
    assert parts[1].decode(ids) == "<s><|user|>user: cat<|user|>assistant: mat<|user|>user: Paris<|user|>assistant: "


@pytest.mark.parametrize("choices", [("x", "y"), ("cat", "the mat", "Paris France")])
@pytest.mark.parametrize("template", [True, False])
def test_choices_have_the_probability_that_the_model_goes_on_with_them(parts, choices, template):
    model, tokenizer = parts
    chooser = chat(parts, template=template)
    found = chooser.choose(QUESTIONS, choices)
    for question, choice in zip(QUESTIONS, found, strict=True):
        prompt = chooser.encode(question)
        chances = []
        for text in choices:
            chances.append(0.0)
            for spelled in {text, text[0].upper() + text[1:]}:
                ids = tokenizer(("" if template else " ") + spelled, add_special_tokens=False).input_ids
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
                steps = [logits[len(prompt) - 1 + n, token] for n, token in enumerate(ids)]
                chances[-1] += float(torch.stack(steps).sum().exp())
        expected = [one / sum(chances) for one in chances]
        assert choice.probabilities == pytest.approx(expected, rel=1e-4)
        assert choice.index == max(range(len(choices)), key=expected.__getitem__)


def test_a_prompt_that_leaves_no_room_is_a_failure_and_the_others_are_answered(parts):
    found = chat(parts).complete([ask("cat " * 80), ask("cat")])
    assert isinstance(found[0], Failure) and found[0].reason == "prompt_too_long"
    assert isinstance(found[1], Completion)
