"""Decoder layers found by shape."""

import pytest
import torch
from tiny_models import FAMILIES, WIDTH, tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from introspect_ray.errors import UserError
from introspect_ray.models.structure import (
    block_output,
    decoder_layers,
    layer_blocks,
    layers_owner,
    model_width,
    num_layers,
    with_block_output,
)

LAYER_LISTS = {
    "llama": ("model.layers", 4),
    "qwen3": ("model.layers", 3),
    "mistral": ("model.layers", 4),
    "gemma2": ("model.layers", 4),
    "gpt_neox": ("gpt_neox.layers", 3),
    "gpt2": ("transformer.h", 4),
    "gptj": ("transformer.h", 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_where_each_family_keeps_them(family):
    model = tiny_model(family)
    name, count = LAYER_LISTS[family]
    assert decoder_layers(model) is model.get_submodule(name)
    assert (num_layers(model), model_width(model)) == (count, WIDTH)
    owner, attribute = layers_owner(model)
    assert getattr(owner, attribute) is decoder_layers(model)


def test_lists_inside_layers_and_lists_of_plain_modules_are_not_taken_for_layers():
    model = tiny_model("llama")
    model.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(4))
    for layer in decoder_layers(model):
        layer.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(4))
    assert decoder_layers(model) is model.model.layers


def test_a_mixture_of_experts_with_as_many_experts_as_layers():
    shape = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_local_experts=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=11,
    )
    model = MixtralForCausalLM(shape)
    assert decoder_layers(model) is model.model.layers


def test_two_candidate_lists_are_refused():
    model = tiny_model("llama")
    model.other = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(4))
    with pytest.raises(UserError) as caught:
        decoder_layers(model)
    assert str(caught.value) == (
        "the decoder layers of LlamaForCausalLM cannot be told: "
        "expected one list of 4 blocks, found model.layers, other"
    )


def test_block_outputs_are_tensors_or_tuples():
    hidden, new, rest = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), object()
    assert block_output(hidden) is hidden
    assert block_output((hidden, rest)) is hidden
    assert with_block_output(hidden, new) is new
    assert with_block_output((hidden, rest), new) == (new, rest)


def test_blocks_cover_the_layers_in_order_with_larger_blocks_first():
    assert layer_blocks(8, 4) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layer_blocks(7, 3) == [(0, 1, 2), (3, 4), (5, 6)]
    assert layer_blocks(3, 1) == [(0, 1, 2)]
    with pytest.raises(UserError, match="5 blocks of layers asked for, but the model has 4 layers"):
        layer_blocks(4, 5)
