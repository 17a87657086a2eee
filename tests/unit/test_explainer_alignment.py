"""Fitted projections against least squares by hand, character alignment of tokens, files and their refusal."""

import json

import numpy as np
import pytest
import torch
from explainer_helpers import model_folder
from safetensors.torch import save_file
from training_helpers import train_config, write_dataset

from introspect_ray.config import ExplainerConfig, FitProjectionConfig, ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.alignment import _align, _Moments
from introspect_ray.explainer.fitted import read_alignment, read_maps
from introspect_ray.explainer.model import Explainer
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.training.projection import fit_projection
from introspect_ray.training.run import prepare

TEXTS = [f"the cat number {number} sat on mat {number * number} and saw {chr(97 + number)}" for number in range(20)]


def test_map_is_weighted_ridge_regression_and_explained_is_its_share_of_variance():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 4)) * [1, 5, 0.2, 1]
    y = x @ generator.normal(size=(4, 3)) + generator.normal(size=(50, 3)) + [3, 0, 0]
    weights = generator.uniform(0.1, 9, size=50)
    moments = _Moments.zero(4, 3)
    for part in (slice(0, 7), slice(7, 50)):
        moments.add(*(torch.tensor(array[part]) for array in (x, y, weights)))
    root = np.sqrt(weights)[:, None]
    penalty = 0.01 * np.mean(np.sum(weights[:, None] * x * x, axis=0))
    stacked_x, stacked_y = np.vstack([root * x, np.sqrt(penalty) * np.eye(4)]), np.vstack([root * y, np.zeros((4, 3))])
    expected = np.linalg.lstsq(stacked_x, stacked_y, rcond=None)[0].T
    found = moments.solve(0.01)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)
    mean = np.average(y, axis=0, weights=weights)
    variance = np.sum(weights[:, None] * (y - mean) ** 2)
    share = 1 - np.sum(weights[:, None] * (y - x @ expected.T) ** 2) / variance
    assert moments.explained(found) == pytest.approx(share, rel=1e-9)


def test_tokens_are_paired_where_they_end_at_the_same_character():
    """The pocket tokenizer has one token per word, the other one per byte."""
    target = Target.load(ModelConfig(path="pocket:target_a"))
    other = load_tokenizer(ModelConfig(path="pocket:target_b"))
    same = _align(target, other, "The town of Paris.")
    assert same.tokens.tolist() == same.ids[1:] and same.positions.tolist() == list(range(1, len(same.ids)))
    assert same.num_unaligned == 0


def test_tokenizers_may_differ(tmp_path):
    bytes_only = load_tokenizer(ModelConfig(path=str(model_folder(tmp_path / "m", "llama"))))
    target = Target.load(ModelConfig(path="pocket:target_a"))
    pairs = _align(target, bytes_only, "The town of Paris")
    assert [bytes_only.decode([token]) for token in pairs.tokens.tolist()] == list("enfs")
    assert pairs.num_unaligned == 0
    reverse = _align(Target.load(ModelConfig(path=str(tmp_path / "m"))), target.tokenizer, "The town of Paris")
    assert target.tokenizer.convert_ids_to_tokens(reverse.tokens.tolist()) == ["The", "Ġtown", "Ġof", "ĠParis"]
    assert reverse.num_unaligned == len("The town of Paris") - 4


def fit_config(tmp_path, **options) -> FitProjectionConfig:
    folder = tmp_path / "model"
    if not folder.exists():
        model_folder(folder, "llama")
        lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
        (tmp_path / "texts.jsonl").write_text("".join(lines))
    content = {
        "output": str(tmp_path / "fitted"),
        "target": {"path": str(folder), "device": "cpu"},
        "explainer": {"path": str(folder), "device": "cpu"},
        "source": {"path": str(tmp_path / "texts.jsonl")},
    }
    return FitProjectionConfig.model_validate({**content, **options})


def test_fitted_maps_start_an_explainer(tmp_path):
    heard = []
    first = fit_projection(fit_config(tmp_path), lambda done, of_all: heard.append((done, of_all)))
    assert heard[-1] == (20, 20) and not first.was_complete
    card = read_alignment(str(tmp_path / "fitted"))
    assert card == first.card and card.layers == (0, 1) and card.num_unaligned == 0
    assert card.num_pairs == sum(len(text) for number, text in enumerate(TEXTS) if number % 10)
    assert set(card.explained) == {0, 1} and all(share <= 1 for share in card.explained.values())
    config = ExplainerConfig(model=fit_config(tmp_path).explainer, fitted_projection=str(tmp_path / "fitted"))
    run = prepare(train_config(tmp_path, explainer=config.model_dump()))
    explainer = Explainer.create(config, run.target, seed=0)
    maps = read_maps(str(tmp_path / "fitted"))
    for layer in (0, 1):
        assert torch.equal(explainer.projections[str(layer)].weight, maps[layer])
    again = fit_projection(fit_config(tmp_path), lambda *_: pytest.fail("nothing is left to do"))
    assert again.was_complete and again.card == card


@pytest.mark.parametrize("left", ["projections.safetensors", ".alignment.json.tmp"])
def test_a_fit_that_was_stopped_before_its_card_is_done_again(tmp_path, left):
    (tmp_path / "fitted").mkdir()
    (tmp_path / "fitted" / left).write_bytes(b"torn")
    assert not fit_projection(fit_config(tmp_path), lambda *_: None).was_complete
    assert set(read_maps(str(tmp_path / "fitted"))) == {0, 1}


def test_other_texts_or_settings_are_refused_in_the_same_folder(tmp_path):
    fit_projection(fit_config(tmp_path), lambda *_: None)
    with pytest.raises(UserError, match="holds a projection of another config"):
        fit_projection(fit_config(tmp_path, ridge=0.5), lambda *_: None)


def test_layer_out_of_range_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"layers is \[2\], but .* has 2 layers: expected some of 0 to 1"):
        fit_projection(fit_config(tmp_path, layers=[2]), lambda *_: None)


def test_too_few_texts_to_fit_and_score_on_are_refused(tmp_path):
    source = {"path": str(tmp_path / "texts.jsonl"), "limit": 1}
    with pytest.raises(UserError, match=r"the 1 texts align 0 token types .* to fit on and \d+ to score on"):
        fit_projection(fit_config(tmp_path, source=source), lambda *_: None)


def test_training_refuses_maps_that_were_fitted_for_something_else(tmp_path):
    fit_projection(fit_config(tmp_path), lambda *_: None)
    explainer = {"model": fit_config(tmp_path).explainer.model_dump(), "fitted_projection": str(tmp_path / "fitted")}
    write_dataset(tmp_path / "other", width=20)
    with pytest.raises(UserError, match=r"is for targets of width 32, expected 20"):
        prepare(train_config(tmp_path, explainer=explainer, datasets=[str(tmp_path / "other")]))
    weights = {f"{layer}.weight": torch.full((32, 32), float("nan")) for layer in (0, 1)}
    save_file(weights, tmp_path / "fitted" / "projections.safetensors")
    with pytest.raises(UserError, match="layer 0 has no finite map of 32 x 32"):
        prepare(train_config(tmp_path, explainer=explainer))
    (tmp_path / "fitted" / "projections.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"fitted projection .* cannot be read"):
        prepare(train_config(tmp_path, explainer=explainer))
    with pytest.raises(UserError, match=r"nowhere is no fitted projection: it has no alignment.json"):
        prepare(train_config(tmp_path, explainer=explainer | {"fitted_projection": str(tmp_path / "nowhere")}))


def test_fitted_maps_without_projection_are_a_contradiction():
    with pytest.raises(ValueError, match="fitted_projection needs projection linear or auto"):
        ExplainerConfig(projection="none", fitted_projection="somewhere")
