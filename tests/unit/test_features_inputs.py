"""What coders read in a pass that ends early is what they would read in a whole one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, clean_residuals, prompts_of, tiny_model

from introspect_ray.errors import UserError
from introspect_ray.features.activations import mlp_inputs_outputs
from introspect_ray.features.inputs import CoderInputs
from introspect_ray.models.structure import decoder_layers

CONTEXTS = prompts_of([7, 2, 12, 5, 3])


def collected(model, sites):
    """Per site, what was read, in the order of the contexts."""
    rows: dict = {site: [None] * len(CONTEXTS) for site in sites}
    for batch, read in CoderInputs(model, sites).batches(CONTEXTS):
        for site in sites:
            for index, part in zip(batch, read[site].split([len(CONTEXTS[i]) - 1 for i in batch]), strict=True):
                rows[site][index] = part
    return {site: torch.cat(parts) for site, parts in rows.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_read_what_a_whole_pass_leaves_there(family):
    model = tiny_model(family)
    found = collected(model, [(0, "residual"), (1, "residual")])
    for layer in (0, 1):
        expected = torch.cat([clean_residuals(model, context)[layer, 1:] for context in CONTEXTS])
        torch.testing.assert_close(found[layer, "residual"], expected, atol=2e-5, rtol=1e-4)


def test_a_transcoder_reads_before_the_mlp_of_its_layer():
    model = tiny_model("llama")
    sites = [(1, "mlp_input"), (0, "residual"), (2, "mlp_input"), (1, "residual")]
    found = collected(model, sites)
    for layer in (1, 2):
        expected, _ = mlp_inputs_outputs(model, CONTEXTS, layer)
        torch.testing.assert_close(found[layer, "mlp_input"], expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(found[0, "residual"], collected(model, [(0, "residual")])[0, "residual"])


def test_nothing_runs_behind_the_last_site():
    model = tiny_model("llama")
    ran = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    collected(model, [(0, "residual"), (1, "residual")])
    assert set(ran) == {0, 1}


def test_no_hook_outlives_an_error():
    model = tiny_model("llama")
    layer = decoder_layers(model)[1]
    with pytest.raises(IndexError):
        list(CoderInputs(model, [(1, "residual"), (1, "mlp_input")]).batches([[1, 2], [1, 10**6]]))
    assert not layer._forward_hooks and not layer.mlp._forward_hooks


def test_a_place_that_is_not_there_is_refused():
    model = tiny_model("gptj")
    del decoder_layers(model)[1].mlp
    with pytest.raises(UserError, match="decoder layer 1 of GPTJForCausalLM has no part named mlp"):
        list(CoderInputs(model, [(1, "mlp_input")]).batches([[1, 2]]))
