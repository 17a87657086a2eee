"""The place where latents are replaced: against a plain loop over single texts, on both kinds of coders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from unit.rewrite_helpers import target, texts, transcoder

from introspect_ray.features.coder import SparseCoder
from introspect_ray.interventions.target import Target
from introspect_ray.models.structure import block_output, decoder_layers, with_block_output
from introspect_ray.rewrite.site import Batch, Site

LAYER = 1


def coder_of(kind: str) -> SparseCoder:
    coder = transcoder(LAYER)
    return coder if kind == "transcoder" else replace(coder, kind="sae", skip=None)


def alone(model: Target, kind: str, ids: tuple[int, ...], change) -> torch.Tensor:
    """Logits of one text whose site writes `change(position, what it wrote)`, by a hook of its own."""
    module = decoder_layers(model.model)[LAYER]
    module = module.mlp if kind == "transcoder" else module

    def hook(_module, _inputs, output):
        hidden = block_output(output).clone()
        for position in range(hidden.shape[1]):
            hidden[0, position] = change(position, hidden[0, position])
        return with_block_output(output, hidden)

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.model(torch.tensor([ids])).logits[0]
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "family"), [("transcoder", "llama"), ("sae", "llama"), ("sae", "gptj")])
def test_losses_and_divergences_are_those_of_single_texts(kind, family):
    model, given = target(family), texts()
    site = Site(model, coder_of(kind))
    batch = Batch(given, model.device)
    clean = site.log_probabilities(batch, None)
    written = torch.randn(len(batch.rows), 32, generator=torch.Generator().manual_seed(9))
    found = site.losses(batch, clean, written)
    start = 0
    for number, text in enumerate(given):
        mine = written[start : start + len(text.positions)]
        start += len(text.positions)
        changed = alone(model, kind, text.ids[:-1], lambda p, old, mine=mine: old if p == 0 else mine[p - 1])
        plain = alone(model, kind, text.ids[:-1], lambda _p, old: old)
        following = torch.tensor(text.ids[2:])
        loss = functional.cross_entropy(changed[1:], following, reduction="sum").item()
        before, after = plain[1:].log_softmax(-1), changed[1:].log_softmax(-1)
        divergence = functional.kl_div(after, before, log_target=True, reduction="sum").item()
        np.testing.assert_allclose(found.cross_entropy[number], loss, rtol=1e-4)
        np.testing.assert_allclose(found.divergence[number], divergence, rtol=1e-3)
        assert divergence > 0.1


@pytest.mark.parametrize("kind", ["transcoder", "sae"])
def test_writing_what_was_written_changes_nothing(kind):
    model, given = target(), texts()
    site = Site(model, coder_of(kind))
    batch = Batch(given, model.device)
    clean = site.log_probabilities(batch, None)
    same = site.losses(batch, clean, site.read(batch).y)
    original = site.losses(batch, clean, None)
    np.testing.assert_allclose(same.cross_entropy, original.cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(same.divergence, 0, atol=1e-5)
    assert (original.divergence == 0).all()


def test_the_gradient_says_what_a_small_change_costs():
    model, given = target(), texts(2)
    site = Site(model, transcoder(LAYER))
    batch = Batch(given, model.device)
    clean = site.log_probabilities(batch, None)
    y = site.read(batch).y
    gradient = site.gradient(batch, y)
    step = torch.zeros_like(y)
    step[3, 5] = 1e-2
    up, down = (site.losses(batch, clean, y + sign * step).cross_entropy.sum() for sign in (1, -1))
    np.testing.assert_allclose((up - down) / 2e-2, gradient[3, 5].item(), rtol=5e-2, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
