"""Training of skip transcoders: it learns a known map, its export is the same function, dead latents come back."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from introspect_ray.features.batch_topk import (
    BatchTopKConfig,
    SkipTranscoder,
    _exported,
    shuffled_batches,
    train_skip_transcoder,
    unit_scale,
)
from introspect_ray.features.coder import SparseCoder, fraction_unexplained

WIDTH, CONCEPTS = 16, 24
CONFIG = BatchTopKConfig(
    num_latents=48, num_active=3, steps=400, batch_size=256, learning_rate=1e-2, dead_after=30, seed=0
)


def known_map() -> tuple[Tensor, Tensor]:
    """x is a sparse sum of directions; y adds a fixed answer for every direction that is present, and a linear part."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(CONCEPTS, WIDTH, generator=generator)
    answers = torch.randn(CONCEPTS, WIDTH, generator=generator)
    linear = 0.3 * torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    present = (torch.rand(6000, CONCEPTS, generator=generator) < 0.06).float()
    x = 5 * present @ directions
    return x, 0.01 * (present @ answers + x @ linear.T)


Trained = tuple[Tensor, Tensor, SparseCoder, list[float]]


@pytest.fixture(scope="module")
def trained() -> Trained:
    x, y = known_map()
    losses: list[float] = []
    coder = train_skip_transcoder(x[:5000], y[:5000], CONFIG, 2, lambda _, loss: losses.append(loss))
    return x[5000:], y[5000:], coder, losses


def test_explains_unseen_vectors_far_better_than_any_linear_map(trained: Trained) -> None:
    x, y, coder, losses = trained
    with_one = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    best_linear = fraction_unexplained(with_one @ torch.linalg.lstsq(with_one, y).solution, y)
    assert fraction_unexplained(coder.forward(x), y) < best_linear / 3
    assert len(losses) == CONFIG.steps


def test_threshold_lets_through_about_as_many_latents_as_in_training(trained: Trained) -> None:
    x, _, coder, _ = trained
    active = len(coder.encode_sparse(x)) / len(x)
    assert 0.5 * CONFIG.num_active < active < 2 * CONFIG.num_active


def test_feature_vectors_have_norm_one_and_the_layer_asked_for(trained: Trained) -> None:
    _, _, coder, _ = trained
    torch.testing.assert_close(coder.feature_vectors.norm(dim=-1), torch.ones(48))
    assert (coder.kind, coder.layer, coder.width) == ("transcoder", 2, WIDTH)


def test_export_is_the_trained_function_in_the_units_of_the_data() -> None:
    """Without training: every weight drawn at random, scales far from one."""
    torch.manual_seed(4)
    model = SkipTranscoder.begun(*known_map(), CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.threshold = 0.7
        x = torch.randn(20, WIDTH)
        scaled = x * 30.0
        before = (scaled @ model.encoder + model.encoder_bias) * model.decoder.norm(dim=-1)
        latents = before * (before > model.threshold)
        expected = (model.decode(latents) + model.decoder_bias + scaled @ model.skip.T) / 0.02
        torch.testing.assert_close(_exported(model, 30.0, 0.02, 0).forward(x), expected, rtol=1e-4, atol=1e-2)


def test_exactly_k_times_the_batch_stay() -> None:
    model = SkipTranscoder.begun(*known_map(), CONFIG)
    kept, before = model.latents(torch.randn(10, WIDTH))
    assert int((kept > 0).sum()) == 30
    assert kept[kept > 0].min() >= before[kept == 0].max()
    assert (kept > 0).sum(1).unique().numel() > 1


def test_every_row_comes_once_before_any_comes_twice() -> None:
    config = BatchTopKConfig(1, 1, steps=9, batch_size=4, learning_rate=1.0, dead_after=1, seed=7)
    rows = torch.cat(list(shuffled_batches(6, config))).tolist()
    assert all(sorted(rows[start : start + 6]) == list(range(6)) for start in range(0, 36, 6))
    assert rows[:6] != list(range(6))
    again = torch.cat(list(shuffled_batches(6, config))).tolist()
    assert rows == again
    assert Counter(rows) == dict.fromkeys(range(6), 6)


def test_unit_scale_makes_the_mean_norm_the_root_of_the_width() -> None:
    x = torch.tensor([[3.0, 4.0, 0, 0], [0, 0, 0, 1.0]])
    assert (x * unit_scale(x)).norm(dim=-1).mean().item() == pytest.approx(2)
