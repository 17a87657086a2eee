"""Labels of latents: F1 against its definition, the choice among categories, and what is live."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from introspect_ray.features import labelling
from introspect_ray.features.coder import ActiveLatents
from introspect_ray.features.labelling import Category, LabellingConfig, Membership, Sample, f1_scores, label_latents


def active(dense: np.ndarray) -> ActiveLatents:
    values = torch.tensor(dense, dtype=torch.float32)
    vectors, latents = values.nonzero(as_tuple=True)
    return ActiveLatents(vectors, latents, values[vectors, latents], *values.shape)


def members(dense: np.ndarray) -> Membership:
    tokens, categories = np.nonzero(dense)
    return Membership(tokens, categories, len(dense))


def f1_by_definition(fires: np.ndarray, belongs: np.ndarray) -> float:
    true_positives = int((fires & belongs).sum())
    if true_positives == 0:
        return 0.0
    precision, recall = true_positives / fires.sum(), true_positives / belongs.sum()
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("pairs_at_once", [1, 7, 1 << 20])
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "PAIRS_AT_ONCE", pairs_at_once)
    rng = np.random.default_rng(5)
    activations = rng.random((60, 4)) * (rng.random((60, 4)) < [0.05, 0.3, 0.9, 0.0])
    belongs = rng.random((60, 6)) < [0.0, 0.02, 0.2, 0.5, 0.9, 1.0]
    belongs[10:20] = False
    thresholds = np.array([0.0, 0.5, 0.1, 0.0])
    scores, firings = f1_scores(Sample(active(activations), members(belongs)), thresholds, 6)
    fires = activations > thresholds
    for latent in range(4):
        assert firings[latent] == fires[:, latent].sum()
        for category in range(6):
            expected = f1_by_definition(fires[:, latent], belongs[:, category])
            assert scores[latent, category] == pytest.approx(expected)


CONFIG = LabellingConfig(active_share=0.2, minimum_firings=2, margin=0.05, accepted_score=0.7)


def one_latent(activations: list[float], columns: list[list[int]]) -> Sample:
    return Sample(active(np.array(activations)[:, None]), members(np.array(columns).T.astype(bool)))


def test_simpler_category_wins_within_the_margin_and_only_there() -> None:
    fires = [1.0] * 20 + [0.0] * 20
    exact, near = [1] * 20 + [0] * 20, [1] * 21 + [0] * 19
    far = [1] * 30 + [0] * 10
    catalog = [
        Category("phrase", 2, "exactly this"),
        Category("word", 0, "a bit more"),
        Category("word", 0, "much more"),
    ]
    sample = one_latent(fires, [exact, near, far])
    [label] = label_latents(3, catalog, sample, sample, CONFIG)
    assert (label.layer, label.index, label.kind, label.description) == (3, 0, "word", "a bit more")
    assert label.accepted == ["exactly this", "a bit more", "much more"]
    [strict] = label_latents(3, catalog, sample, sample, LabellingConfig(0.2, 2, 0.0, 0.9))
    assert strict.description == "exactly this"
    assert strict.accepted == ["exactly this", "a bit more"]


def test_score_comes_from_the_sample_that_did_not_choose() -> None:
    catalog = [Category("word", 0, "left"), Category("word", 0, "right")]
    fit = one_latent([1, 1, 1, 0, 0, 0], [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    held_out = one_latent([1, 1, 0, 1, 0, 0], [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    [label] = label_latents(0, catalog, fit, held_out, CONFIG)
    assert label.description == "left"
    assert label.fit_score == 1
    assert label.score == pytest.approx(2 / 3)
    assert label.accepted == []
    assert label.density == 0.5


def test_weak_activations_do_not_count_and_rare_latents_are_not_live() -> None:
    activations = np.zeros((10, 3))
    activations[:5, 0] = [10, 9, 8, 1.9, 1.9]  # at and below a fifth of the largest: not firing
    activations[7, 1] = 5  # fires once
    catalog = [Category("word", 0, "first three"), Category("word", 0, "first five")]
    belongs = np.zeros((10, 2), dtype=bool)
    belongs[:3, 0] = belongs[:5, 1] = True
    sample = Sample(active(activations), members(belongs))
    [label] = label_latents(0, catalog, sample, sample, CONFIG)
    assert (label.index, label.description, label.score) == (0, "first three", 1.0)


def test_equal_categories_are_told_apart_by_length_then_alphabet() -> None:
    catalog = [Category("word", 0, "bb"), Category("word", 0, "ab"), Category("word", 0, "aaa")]
    column = [1, 1, 0, 0]
    sample = one_latent([1, 1, 0, 0], [column, column, column])
    assert label_latents(0, catalog, sample, sample, CONFIG)[0].description == "ab"
