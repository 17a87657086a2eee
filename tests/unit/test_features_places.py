"""Where coders read: names in files, and the tensors found by structure in models of several families."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from introspect_ray.errors import UserError
from introspect_ray.features.places import named_place, transcoder_places
from introspect_ray.features.reading import read_places
from introspect_ray.models.structure import decoder_layers

TEXTS = [[1, 5, 9, 11], [1, 7], [1, 20, 21, 22, 23]]
PLACES = ["residual_mid", "mlp_normalized", "mlp_input", "mlp_output", "mlp_added", "residual"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.7.hook_resid_post", (7, "residual")),
        ("blocks.7.hook_resid_pre", (6, "residual")),
        ("blocks.7.hook_mlp_out", (7, "mlp_added")),
        ("blocks.7.hook_mlp_in", (7, "residual_mid")),
        ("blocks.3.ln2.hook_normalized", (3, "mlp_normalized")),
        ("model.layers.12", (12, "residual")),
        ("model.language_model.layers.12.mlp", (12, "mlp_output")),
        ("transformer.h.0", (0, "residual")),
    ],
)
def test_names_of_hooks_and_modules(name: str, expected: tuple[int, str]) -> None:
    assert named_place(name) == expected


@pytest.mark.parametrize(
    "name", ["", "hook_embed", "blocks.1.attn.hook_z", "layers.x", "blocks.2.hook_resid_post.more"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="names no place that is read"):
        named_place(name)


def test_a_transcoder_stays_within_one_mlp() -> None:
    assert transcoder_places("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out") == (2, "mlp_input", "mlp_added")
    assert transcoder_places("blocks.2.ln2.hook_normalized", "") == (2, "mlp_normalized", "mlp_added")
    assert transcoder_places("layers.4.mlp", "") == (4, "mlp_input", "mlp_output")
    for names in (
        ("blocks.2.mlp.hook_in", "blocks.3.hook_mlp_out"),
        ("blocks.2.hook_resid_post", "blocks.2.hook_mlp_out"),
        ("layers.2", ""),
    ):
        with pytest.raises(UserError, match="names no place of one MLP"):
            transcoder_places(*names)


def by_hand(family: str, hidden: Tensor) -> list[Tensor]:
    """The places of layer 1 in the order of `PLACES`, computed from the output of its attention part."""
    layer = decoder_layers(tiny_model(family))[1]
    if family == "gpt2":
        normalized = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=layer.ln_2.eps)
        given = layer.ln_2(hidden)
        returned = added = layer.mlp(given)
    else:
        norm = layer.pre_feedforward_layernorm if family == "gemma2" else layer.post_attention_layernorm
        epsilon = norm.eps if family == "gemma2" else norm.variance_epsilon
        normalized = hidden / (hidden.square().mean(-1, keepdim=True) + epsilon).sqrt()
        given = norm(hidden)
        returned = layer.mlp(given)
        added = layer.post_feedforward_layernorm(returned) if family == "gemma2" else returned
    return [hidden, normalized, given, returned, added, hidden + added]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_places_are_what_the_layer_computes_there(family: str) -> None:
    found = read_places(tiny_model(family), TEXTS, 1, PLACES)
    for place, values, expected in zip(PLACES, found, by_hand(family, found[0]), strict=True):
        assert values.shape == (sum(map(len, TEXTS)) - len(TEXTS), 32), place
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5, msg=place)
    if family == "gemma2":
        assert not torch.allclose(found[3], found[4])


def test_what_follows_the_layer_is_not_computed() -> None:
    model = tiny_model("llama")
    expected = read_places(model, TEXTS, 1, ["residual"])[0]
    decoder_layers(model)[2].forward = None
    assert torch.equal(read_places(model, TEXTS, 1, ["residual"])[0], expected)


def test_a_norm_without_an_epsilon_is_refused() -> None:
    model = tiny_model("gpt_neox")
    decoder_layers(model)[1].post_attention_layernorm = torch.nn.Sequential()
    with pytest.raises(UserError, match="Sequential has no eps"):
        read_places(model, TEXTS, 1, ["mlp_normalized"])
