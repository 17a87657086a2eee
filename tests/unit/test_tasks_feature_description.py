"""Feature description: vectors are decoder rows, and what cannot be described is counted with its reason."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from task_helpers import WIDTH, tiny_target

from introspect_ray.config import FeatureDescriptionConfig, GenerateConfig
from introspect_ray.data.writer import generate_records
from introspect_ray.explainer.query import Vector
from introspect_ray.features.sae import check_sae
from introspect_ray.tasks.base import Answer
from introspect_ray.tasks.feature_description import FeatureDescription

TASK = FeatureDescription()
LAYER, LATENTS = 2, 7


@pytest.fixture
def sae(tmp_path):
    """(config, decoder) of an SAE folder as sae-lens writes them."""
    decoder = torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(1))
    tensors = {"W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(LATENTS), "b_dec": torch.ones(WIDTH)}
    save_file({**tensors, "W_dec": decoder}, tmp_path / "sae_weights.safetensors")
    card = {"architecture": "standard", "d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32"}
    card |= {"metadata": {"hook_name": f"blocks.{LAYER}.hook_resid_post"}}
    (tmp_path / "cfg.json").write_text(json.dumps(card))
    assert check_sae(str(tmp_path), WIDTH).layer == LAYER
    settings = FeatureDescriptionConfig(sae=str(tmp_path), minimum_score=0.6)
    return GenerateConfig(task="feature_description", feature_description=settings), decoder


def label(row, index, score=0.9, layer=LAYER, description="names of cities", accepted=("cities",), vector=None):
    """A normalised row of latent labels."""
    return {
        "row": row,
        "layer": layer,
        "index": index,
        "score": score,
        "kind": "class",
        "description": description,
        "accepted": list(accepted),
        "vector": vector,
    }


def test_vectors_are_decoder_rows(sae):
    config, decoder = sae
    rows = [label(row, index, description=f"thing {index}") for row, index in enumerate((6, 0, 3))]
    plan = TASK.plan(rows, config, lambda _: "train")
    records = generate_records(TASK, tiny_target("llama", bos=True), plan.items, config)
    assert [record["latent"] for record in records] == [6, 0, 3]
    for record, index in zip(records, (6, 0, 3), strict=True):
        assert set(record) == set(TASK.schema(WIDTH, config).names)
        assert (record["status"], record["layer"], record["label_kind"]) == ("ok", LAYER, "class")
        assert np.array_equal(record["vector"], decoder[index].numpy())
        example = TASK.render(record)
        before, vector, after = example.query.parts
        assert (before, after, example.answer) == (f"At layer {LAYER}, ", " encodes what?", f" thing {index}")
        assert isinstance(vector, Vector) and vector.layers == (LAYER,)
        assert np.array_equal(vector.values, decoder[index].numpy())
        assert TASK.truth(record) == Answer(None, f"thing {index}") and TASK.accepted(record) == ("cities",)
        assert TASK.parse(example.answer) == TASK.truth(record)
        assert "".join(piece for piece, _ in TASK.display(record)[0]) == f"latent {index} at layer {LAYER}"


def test_a_latent_that_the_sae_does_not_have_is_a_row_with_that_reason(sae):
    config, _ = sae
    rows = [label(0, LATENTS - 1), label(1, LATENTS), label(2, 1, layer=LAYER + 1)]
    items = TASK.plan(rows, config, lambda _: "test").items
    records = TASK.generate(tiny_target("llama", bos=True), items, config)
    assert [record["status"] for record in records] == ["ok", "no_such_latent", "no_such_latent"]
    assert [record["detail"] for record in records[1:]] == [
        f"layer 2 latent {LATENTS}: layer 2 with {LATENTS} latents",
        f"layer 3 latent 1: layer 2 with {LATENTS} latents",
    ]
    assert all("vector" not in record for record in records[1:])
    assert len({record["record_id"] for record in records}) == 3


def test_labels_below_the_minimum_score_are_rejected_with_the_reason(sae):
    config, _ = sae
    rows = [label(4, 0, score=0.59), label(5, 1, score=0.6), label(7, 2, score=0.0), label(9, 3, score=1.0)]
    plan = TASK.plan(rows, config, lambda _: "train")
    assert plan.rejected == [(4, "label_score_too_low"), (7, "label_score_too_low")]
    assert [item["index"] for item in plan.items] == [1, 3] and plan.num_source_rows == 4


def test_a_latent_is_a_group_whatever_its_labels(sae):
    config, _ = sae
    asked = []
    rows = [label(0, 1, description="cities"), label(1, 1, description="towns"), label(2, 2), label(3, 1, layer=3)]
    items = TASK.plan(rows, config, lambda key: asked.append(key) or "train").items
    assert len({item["item_id"] for item in items}) == 4
    groups = [item["group"] for item in items]
    assert groups[0] == groups[1] and len(set(groups)) == 3
    assert asked[0] == asked[1] and len(set(asked)) == 3


def test_activations_bring_their_vector_and_only_train(sae):
    config, decoder = sae
    vectors = [[0.5 * column for column in range(WIDTH)], [1.0] * (WIDTH - 1)]
    rows = [label(0, 3), *(label(1 + n, 3, layer=4, vector=vector) for n, vector in enumerate(vectors))]
    plan = TASK.plan(rows, config, lambda _: "test")
    assert [item["split"] for item in plan.items] == ["test", "train", "train"]
    assert len({item["item_id"] for item in plan.items}) == 3
    assert plan.items[0]["group"] not in {item["group"] for item in plan.items[1:]}
    latent, activation, short = generate_records(TASK, tiny_target("llama", bos=True), plan.items, config)
    assert np.array_equal(latent["vector"], decoder[3].numpy()) and latent["latent"] == 3
    assert (activation["status"], activation["layer"], activation["latent"]) == ("ok", 4, None)
    assert activation["vector"].tolist() == vectors[0]
    assert TASK.render(activation).query.vectors[0].layers == (4,)
    assert short["status"] == "vector_width"
    assert short["detail"] == f"width {WIDTH - 1}, the target's is {WIDTH}" and "vector" not in short


def test_any_words_are_a_description_and_blanks_are_none():
    assert TASK.parse("  the word or\n") == Answer(None, "the word or")
    assert TASK.parse("]] 7") == Answer(None, "]] 7")
    assert TASK.parse("") is TASK.parse(" \n ") is TASK.parse("... ?") is None
