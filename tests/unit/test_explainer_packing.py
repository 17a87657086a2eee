"""Several examples in one row against one by one: equal loss and gradients, whatever the attention of the model."""

import logging

import pytest
import torch
from explainer_helpers import explainer, tokenizer, vector
from tiny_models import tiny_model

from introspect_ray.config import ExplainerConfig, LoraConfig, ModelConfig
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.encoding import Encoded
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.packing import can_pack, joined
from introspect_ray.explainer.query import Query

ANSWERS = ["up", "down and out", "", "left", "x", "yes"]


def tiny_explainer(folder, family, attention="sdpa", **config):
    """An explainer, without dropout, around `tiny_model`, whose vectors pass through trained projections."""
    text = tokenizer()
    model = tiny_model(family)
    model.resize_token_embeddings(len(text), mean_resizing=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for embeddings in {model.get_input_embeddings(), model.get_output_embeddings()}:
            embeddings.weight.copy_(0.3 * torch.randn(embeddings.weight.shape, generator=generator))
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    settings = ExplainerConfig(model=ModelConfig(path=str(folder), device="cpu", attention=attention))
    made = Explainer.create(settings, TargetInfo(path="target", width=20, num_layers=4), seed=0)
    return made.eval().requires_grad_(True)


def encoded_of(made):
    """Examples of 15 to 50 tokens with zero, one or two vectors."""
    asked = []
    for number in range(len(ANSWERS)):
        parts = ["so " * (3 * number % 7) + "what? "]
        for place in range(number % 3):
            parts += [vector(20, 10 * number + place, layers=(0, 1, 2)[: 1 + place]), f" at {place} "]
        asked.append(Query(tuple(parts)))
    return made.encode(asked, ANSWERS)


def gradients(made, batches):
    """Summed loss, and the gradient of every parameter, over all batches."""
    made.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = made.loss(batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def assert_same(made, one, other):
    (loss, gradient), (expected, expected_gradient) = gradients(made, one), gradients(made, other)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.keys() == expected_gradient.keys()
    for name, value in expected_gradient.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-3, atol=2e-5 * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen3", "sdpa"),
        ("mistral", "sdpa"),
        ("gemma2", "eager"),
        ("gpt_neox", "sdpa"),
        ("gpt2", "sdpa"),
    ],
)
def test_packed_rows_equal_one_by_one(tmp_path, family, attention):
    made = tiny_explainer(tmp_path, family, attention)
    examples = encoded_of(made)
    # One row has more tokens than the model has positions, and the rows are padded to one length.
    rows = [joined(examples[:4]), joined(examples[4:])]
    assert len(rows[0].ids) > 64 > max(len(one.ids) for one in examples)
    assert can_pack(made)
    assert_same(made, [rows], [[one] for one in examples])


@pytest.mark.parametrize(("family", "attention"), [("mistral", "sdpa"), ("gemma2", "eager")])
def test_windows_shorter_than_the_examples_stay_within_each(tmp_path, family, attention):
    made = tiny_explainer(tmp_path, family, attention, sliding_window=5)
    examples = encoded_of(made)
    assert can_pack(made)
    assert_same(made, [[joined(examples)]], [[one] for one in examples])


def test_adapters_take_packed_rows(tmp_path):
    made = explainer(tmp_path, "llama", 20).eval()
    made.add_adapter(LoraConfig(rank=2, dropout=0.0, target_modules=("q_proj", "down_proj")), seed=0)
    made.projections.requires_grad_(True)
    examples = encoded_of(made)
    assert can_pack(made)
    assert_same(made, [[joined(examples[:3]), joined(examples[3:])]], [[one] for one in examples])


def test_examples_see_each_other_unless_they_are_told_apart(tmp_path):
    """The check above can fail: the same row without its starts is another loss."""
    made = tiny_explainer(tmp_path, "llama")
    row = joined(encoded_of(made)[:3])
    mixed = Encoded(row.ids, row.loss_mask, row.vector_positions, row.vectors)
    assert abs(made.loss([mixed])[0].item() - made.loss([row])[0].item()) > 0.1


@pytest.mark.parametrize("is_autocast", [False, True])
def test_rounding_of_half_precision_is_no_difference(tmp_path, is_autocast):
    made = tiny_explainer(tmp_path, "llama")
    if not is_autocast:
        made = made.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        assert can_pack(made)
        made.model.forward = without_positions(made.model.forward)
        assert not can_pack(made)


def without_positions(forward):
    return lambda **inputs: forward(**{**inputs, "position_ids": None})


def test_a_model_that_ignores_positions_is_found_out(tmp_path, caplog):
    made = tiny_explainer(tmp_path, "llama").train()
    made.model.forward = without_positions(made.model.forward)
    with caplog.at_level(logging.WARNING):
        assert not can_pack(made)
    assert "examples are padded, not packed, for LlamaForCausalLM: logits differ by" in caplog.text
    assert made.training


def test_a_model_that_raises_is_found_out(tmp_path, caplog):
    made = tiny_explainer(tmp_path, "llama")

    def refuse(**inputs):
        raise NotImplementedError("no positions here")

    made.model.forward = refuse
    assert not can_pack(made)
    assert "NotImplementedError: no positions here" in caplog.text


def test_joined_rows_keep_every_field_in_place(tmp_path):
    made = explainer(tmp_path, "llama", 20)
    examples = encoded_of(made)[:3]
    row = joined([joined(examples[:2]), examples[2]])
    assert row.starts == (0, len(examples[0].ids), len(examples[0].ids) + len(examples[1].ids))
    assert row.num_loss_tokens == sum(one.num_loss_tokens for one in examples)
    assert [row.ids[position] for position in row.vector_positions] == [made.encoder.vector_id] * 3
    assert [vector.layers for vector in row.vectors] == [v.layers for one in examples for v in one.vectors]
