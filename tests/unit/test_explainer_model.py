"""Vectors really enter, losses equal their definition, answers do not depend on batching; four model families."""

import math

import numpy as np
import pytest
import torch
from explainer_helpers import FAMILIES, explainer, queries, vector

from introspect_ray.config import LoraConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.forward import logits_at, soft_tokens
from introspect_ray.explainer.query import Query, Vector

ANSWERS = ["yes", "a much longer answer than that", "", "no", "b", "maybe so"]


@pytest.fixture(scope="module", params=FAMILIES)
def family_explainer(request, tmp_path_factory):
    """Width 32, target width 20: vectors are projected."""
    made = explainer(tmp_path_factory.mktemp(request.param), request.param, target_width=20).eval()
    made.requires_grad_(True)
    return made


def test_loss_is_the_cross_entropy_of_the_answer_tokens(family_explainer):
    (encoded,) = family_explainer.encode([queries(3, 20)[2]], ["yes"])
    loss, count = family_explainer.loss([encoded])
    embeds = family_explainer.causal.get_input_embeddings()(torch.tensor([encoded.ids])).detach()
    for position, one in zip(encoded.vector_positions, encoded.vectors, strict=True):
        maps = [family_explainer.projections[str(layer)].weight for layer in one.layers]
        embeds[0, position] = torch.stack([m @ torch.tensor(one.values) for m in maps]).mean(dim=0).detach()
    logits = family_explainer.causal(inputs_embeds=embeds).logits[0].log_softmax(-1)
    expected = -sum(logits[t - 1, encoded.ids[t]] for t in range(len(encoded.ids)) if encoded.loss_mask[t])
    assert count == 4
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_gathered_logits_equal_full_logits(family_explainer):
    collated = family_explainer.collate(family_explainer.encode(queries(6, 20), ANSWERS), "right")
    inputs = family_explainer.inputs(collated, "right")._asdict()
    model = family_explainer.causal
    gathered = logits_at(model, model, collated.loss_positions, **inputs)
    full = model(**inputs).logits
    assert full.shape[:2] == collated.ids.shape
    torch.testing.assert_close(gathered, full.flatten(0, 1)[collated.loss_positions], rtol=1e-5, atol=1e-5)


def test_head_hook_leaves_when_the_forward_pass_raises(family_explainer):
    model = family_explainer.causal
    with pytest.raises(IndexError):
        logits_at(model, model, torch.tensor([10_000]), input_ids=torch.tensor([[1, 2]]))
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)


def test_batch_loss_is_the_sum_of_single_losses(family_explainer):
    encoded = family_explainer.encode(queries(6, 20), ANSWERS)
    assert len({len(one.ids) for one in encoded}) > 3
    together, count = family_explainer.loss(encoded)
    singles = [family_explainer.loss([one]) for one in encoded]
    torch.testing.assert_close(together, sum(loss for loss, _ in singles), rtol=1e-5, atol=1e-4)
    assert count == sum(number for _, number in singles) == sum(len(answer) + 1 for answer in ANSWERS)


def test_loss_changes_with_the_vector_and_with_its_place(family_explainer):
    def loss(*parts):
        return family_explainer.loss(family_explainer.encode([Query(parts)], ["yes"]))[0].item()

    one, other = vector(20, 1), vector(20, 2)
    assert abs(loss("a", one, "b") - loss("a", other, "b")) > 1e-3
    assert abs(loss("a", one, "b") - loss("a", Vector(np.zeros(20, np.float32), (1,)), "b")) > 1e-3
    assert abs(loss("a", one, "b") - loss("ab", one)) > 1e-3
    assert abs(loss("a", one, other) - loss("a", other, one)) > 1e-3


def test_gradient_reaches_projections_and_embeddings(family_explainer):
    family_explainer.zero_grad()
    family_explainer.loss(family_explainer.encode([Query(("a", vector(20, 1, layers=(1, 3))))], ["yes"]))[0].backward()
    norms = [family_explainer.projections[str(layer)].weight.grad for layer in range(4)]
    assert norms[0] is None and norms[2] is None
    assert norms[1].norm() > 1e-3
    torch.testing.assert_close(norms[1], norms[3])
    weight = family_explainer.causal.get_input_embeddings().weight
    if family_explainer.causal.get_output_embeddings().weight is not weight:
        placeholder, begin = family_explainer.encoder.vector_id, family_explainer.encoder.begin_id
        assert weight.grad[placeholder].norm() == 0
        assert weight.grad[begin].norm() > 0


def test_batched_answers_equal_single_ones_in_order(family_explainer):
    asked = [*queries(6, 20), queries(6, 20)[1]]
    family_explainer.train()
    batched = family_explainer.explain(asked, batch_size=4)
    assert family_explainer.training
    assert batched == [family_explainer.explain([one], batch_size=1)[0] for one in asked]
    assert batched[1] == batched[6]
    assert len(set(batched)) > 1


def test_answers_end_at_the_end_token(tmp_path):
    made = explainer(tmp_path)
    (encoded,) = made.encode([Query(("a",))], None)
    head = made.causal.get_output_embeddings()
    with torch.no_grad():
        state = made.causal(input_ids=torch.tensor([encoded.ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        head.weight[made.encoder.end_id] = 100 * state / state.norm()
    assert made.explain([Query(("a",))], batch_size=1) == [""]


def test_soft_tokens_are_mixtures_by_cosine():
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    vectors = torch.tensor([[0.2, 0.1], [0.0, 50.0], [0.0, 0.0]])
    sharp = soft_tokens(vectors, embeddings, 1e4)
    assert torch.allclose(sharp[:2], embeddings[:2]) and torch.allclose(sharp[2], embeddings.mean(0))
    cosines = torch.tensor([0.2, 0.1, -0.2]) / math.hypot(0.2, 0.1)
    expected = (2 * cosines).softmax(0) @ embeddings
    assert torch.allclose(soft_tokens(vectors[:1], embeddings, 2.0)[0], expected)


def test_vector_scale_sets_the_norm_relative_to_token_embeddings(tmp_path):
    made = explainer(tmp_path, vector_scale=3)
    embeddings = made.causal.get_input_embeddings().weight
    batch = made.encode([Query((vector(32, 0, norm=0.01), Vector(np.zeros(32, np.float32), (0,))))], None)
    inputs = made.inputs(made.collate(batch, "left"), "left")
    scaled, zero = (inputs.inputs_embeds[0, position] for position in batch[0].vector_positions)
    torch.testing.assert_close(scaled.norm(), 3 * embeddings.norm(dim=-1).mean())
    assert zero.norm() == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Vector(np.ones(5, np.float32), (0,)), "query 1: vector 0 has width 5, expected the target's width 32"),
        (Vector(np.full(32, np.nan, np.float32), (0,)), "query 1: vector 0 holds NaN or infinite values"),
        (Vector(np.ones(32, np.float32), (2, 4)), r"query 1: vector 0 names layers \[2, 4\], expected some of 0..3"),
        ("x" * 300, r"query 1: 309 tokens with its answer, the explainer reads at most 256"),
    ],
)
def test_bad_queries_are_named(tmp_path, bad, message):
    made = explainer(tmp_path)
    with pytest.raises(UserError, match=message):
        made.explain([Query(("fine",)), Query((bad,))], batch_size=2)


def test_bad_training_query_is_called_by_its_name(tmp_path):
    bad = Query((Vector(np.full(32, np.inf, np.float32), (0,)),))
    with pytest.raises(UserError, match="record abc: vector 0 holds NaN or infinite values"):
        explainer(tmp_path).encode([bad], ["yes"], names=["record abc"])


def test_adapter_trains_adapter_and_projections_only(tmp_path):
    made = explainer(tmp_path, target_width=20)
    made.add_adapter(LoraConfig(rank=2, target_modules=("q_proj",)), seed=0)
    made.projections.requires_grad_(True)
    names = made.trainable_parameters()
    assert len(names) == 2 * 2 + 4
    assert all("lora_" in name or name.startswith("projections.") for name in names)


def test_adapter_without_its_modules(tmp_path):
    with pytest.raises(UserError, match=r"lora.target_modules \['nothing'\]"):
        explainer(tmp_path).add_adapter(LoraConfig(target_modules=("nothing",)), seed=0)
