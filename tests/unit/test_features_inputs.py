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
    found = collected(model, [(0, "sae"), (1, "sae")])
    for layer in (0, 1):
        expected = torch.cat([clean_residuals(model, context)[layer, 1:] for context in CONTEXTS])
        torch.testing.assert_close(found[layer, "sae"], expected, atol=2e-5, rtol=1e-4)


def test_a_transcoder_reads_before_the_mlp_of_its_layer():
    model = tiny_model("llama")
    sites = [(1, "transcoder"), (0, "sae"), (2, "transcoder"), (1, "sae")]
    found = collected(model, sites)
    for layer in (1, 2):
        expected, _ = mlp_inputs_outputs(model, CONTEXTS, layer)
        torch.testing.assert_close(found[layer, "transcoder"], expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(found[0, "sae"], collected(model, [(0, "sae")])[0, "sae"])


def test_nothing_runs_behind_the_last_site():
    model = tiny_model("llama")
    ran = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(f"mlp {number}"))
    collected(model, [(1, "transcoder")])
    assert set(ran) == {"mlp 0", 0}
    ran.clear()
    collected(model, [(1, "sae")])
    assert 1 in ran and 2 not in ran and "mlp 2" not in ran


def test_no_hook_outlives_an_error():
    model = tiny_model("llama")
    layer = decoder_layers(model)[1]
    with pytest.raises(IndexError):
        list(CoderInputs(model, [(1, "sae"), (1, "transcoder")]).batches([[1, 2], [1, 10**6]]))
    assert not layer._forward_hooks and not layer.mlp._forward_pre_hooks


def test_places_that_are_not_there_are_refused():
    model = tiny_model("gptj")
    with pytest.raises(UserError, match="a coder is of layer 7: GPTJForCausalLM has 3 layers"):
        CoderInputs(model, [(7, "sae")])
    del decoder_layers(model)[1].mlp
    with pytest.raises(UserError, match="decoder layer 1 of GPTJForCausalLM has no part named mlp"):
        CoderInputs(model, [(1, "transcoder")])
