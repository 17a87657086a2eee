"""Activations at every token of many texts: the right tensor, the right order, and no hook left behind."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES
from transformers import PreTrainedModel

from introspect_ray.errors import UserError
from introspect_ray.features.activations import mlp_inputs_outputs, residual_outputs
from introspect_ray.interventions import forward
from introspect_ray.models.structure import decoder_layers

TEXTS = [[1, 5, 9, 11], [1, 7], [1, 20, 21, 22, 23, 24, 25], [1, 3, 4]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES["llama"]().eval()


@pytest.mark.parametrize("tokens_per_batch", [1, 10, 8192])
def test_residual_outputs_are_the_hidden_states_without_the_first_token(
    model: PreTrainedModel, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", tokens_per_batch)
    with torch.no_grad():
        states = [model(torch.tensor([text]), output_hidden_states=True).hidden_states for text in TEXTS]
    for layer in (0, 2):
        expected = torch.cat([state[layer + 1][0, 1:] for state in states])
        torch.testing.assert_close(residual_outputs(model, TEXTS, layer), expected, atol=1e-5, rtol=1e-4)


def test_mlp_pairs_are_inputs_and_outputs_of_the_same_call(model: PreTrainedModel) -> None:
    x, y = mlp_inputs_outputs(model, TEXTS, 1)
    assert x.shape == y.shape == (sum(map(len, TEXTS)) - len(TEXTS), 32)
    with torch.no_grad():
        torch.testing.assert_close(decoder_layers(model)[1].mlp(x), y, atol=1e-6, rtol=1e-4)
    before = residual_outputs(model, TEXTS, 0)
    assert not torch.allclose(x, before)


def test_no_hook_outlives_an_error(model: PreTrainedModel) -> None:
    layer = decoder_layers(model)[1]
    before = len(layer._forward_hooks), len(layer.mlp._forward_hooks)
    for collect in (residual_outputs, mlp_inputs_outputs):
        with pytest.raises(IndexError):
            collect(model, [[1, 2], [1, 10**6]], 1)
        assert (len(layer._forward_hooks), len(layer.mlp._forward_hooks)) == before


def test_layer_without_an_mlp_is_refused() -> None:
    model = FAMILIES["llama"]()
    del decoder_layers(model)[1].mlp
    with pytest.raises(UserError, match="decoder layer 1 of LlamaForCausalLM has no part named mlp"):
        mlp_inputs_outputs(model, TEXTS, 1)
