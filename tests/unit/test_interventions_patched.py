"""Patched runs: ladder and plain hooks against one full forward per intervention."""

import logging

import pytest
import torch
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    WIDTH,
    blocks_of,
    clean_residuals,
    prompts_of,
    randomized,
    tiny_model,
    tiny_tokenizer,
)
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from introspect_ray.errors import UserError
from introspect_ray.interventions.clean import clean_runs
from introspect_ray.interventions.hooked import hooked_logits
from introspect_ray.interventions.ladder import Ladder
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.packing import Row, packs
from introspect_ray.interventions.selfcheck import checked_ladder
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import CleanSource, Intervention
from introspect_ray.models.structure import decoder_layers

LENGTHS = (11, 3, 7)
TOLERANCE = 1e-4


def vectors(*shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(len(shape)))


def reference(model, ids, layers, positions, values, mode):
    """Logits [V] of one full forward; `values` [layers, positions, D] as plain numbers, no code of the package."""
    hooks = []
    for index, layer in enumerate(layers):

        def hook(_module, _inputs, output, index=index):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for place, position in enumerate(positions):
                old = hidden[0, position] if mode == "add" else 0
                hidden[0, position] = old + values[index][place]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hooks.append(blocks_of(model)[layer].register_forward_hook(hook))
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()


def sweep(num_layers, length):
    """(layers, positions, values, mode) that cover ends and middles of the stack and of the prompt."""
    top, last, middle = num_layers - 1, length - 1, length // 2
    whole = tuple(range(num_layers))
    return [
        ((0,), (0,), vectors(1), "replace"),
        ((0,), (last,), vectors(1), "replace"),
        ((top,), (last,), vectors(1), "replace"),
        ((top,), (0,), vectors(1), "replace"),
        ((1,), (middle,), vectors(1), "add"),
        ((1, 2), (middle,), vectors(1), "replace"),
        ((1, 2), (0,), vectors(1), "add"),
        (whole, (middle,), vectors(1), "replace"),
        (whole, (last, 0), vectors(2), "add"),
        ((0, 1), (0, last), vectors(2, 2), "replace"),
        ((1, 2), (last,), vectors(2, 1), "add"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_logits_equal_one_full_forward_per_intervention(family):
    model = tiny_model(family)
    target = Target(model, tiny_tokenizer())
    prompts = prompts_of(LENGTHS)
    runs = target.clean_runs(prompts)
    assert checked_ladder(model)[0] is not None
    cases = [sweep(target.num_layers, len(prompt)) for prompt in prompts]
    interventions = [[Intervention(b, p, vectors=v, mode=m) for b, p, v, m in of_prompt] for of_prompt in cases]
    expected = [
        torch.stack([reference(model, ids, b, p, v.expand(len(b), -1, -1), m) for b, p, v, m in of_prompt])
        for ids, of_prompt in zip(prompts, cases, strict=True)
    ]
    flat_runs = [run for run, rows in zip(runs, interventions, strict=True) for _ in rows]
    flat = [row for rows in interventions for row in rows]
    by_ladder = Ladder(model).logits(flat_runs, flat)
    by_hooks = hooked_logits(model, flat_runs, flat)
    assert (by_ladder - torch.cat(expected)).abs().max() < TOLERANCE
    assert (by_hooks - torch.cat(expected)).abs().max() < TOLERANCE
    found = target.patched_logits(runs, interventions)
    for ids, one, two in zip(prompts, found, expected, strict=True):
        assert (one - two).abs().max() < TOLERANCE
        with torch.no_grad():
            clean = model(input_ids=torch.tensor([ids])).logits[0, -1]
        effect = (two - clean).abs().amax(1)
        assert effect[3] < TOLERANCE  # the top layer, away from the last position, cannot matter
        assert (effect[torch.arange(len(two)) != 3] > 100 * TOLERANCE).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_from_a_source_run(family):
    model = tiny_model(family)
    target = Target(model, tiny_tokenizer())
    ids, other = prompts_of((9, 6), seed=1)
    run, source = target.clean_runs([ids, other])
    block = clean_residuals(model, other)[1:3]
    found = target.patched_logits(
        [run],
        [
            [
                Intervention((1, 2), (4,), source=CleanSource(source, (5,), "mean")),
                Intervention((1, 2), (4, 1), source=CleanSource(source, (5, 0), "per_layer")),
            ]
        ],
    )[0]
    mean = (block[0, 5] + block[1, 5]) / 2
    each = torch.stack([torch.stack([block[0, 5], block[0, 0]]), torch.stack([block[1, 5], block[1, 0]])])
    assert (found[0] - reference(model, ids, (1, 2), (4,), mean.expand(2, 1, -1), "replace")).abs().max() < TOLERANCE
    assert (found[1] - reference(model, ids, (1, 2), (4, 1), each, "replace")).abs().max() < TOLERANCE


def test_results_do_not_depend_on_how_rows_are_packed():
    model = tiny_model("llama")
    runs = [run for run in clean_runs(model, prompts_of((12, 5, 9)), keep_cache=True) for _ in range(11)]
    rows = [Intervention(b, p, vectors=v, mode=m) for r in runs[::11] for b, p, v, m in sweep(4, len(r))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    ladder = Ladder(model)
    together = ladder.logits(runs, rows)
    ladder._budget = TokenBudget(20, model.device)
    apart = ladder.logits([runs[i] for i in order], [rows[i] for i in order])
    assert (together[order] - apart).abs().max() < TOLERANCE


def test_the_ladder_computes_nothing_below_or_before_an_intervention():
    model = tiny_model("llama")
    (run,) = clean_runs(model, prompts_of((10,)), keep_cache=True)
    rows = [
        Intervention((2,), (4,), vectors=vectors(1)),
        Intervention((0, 1), (7,), vectors=vectors(1)),
        Intervention((3,), (9,), vectors=vectors(1)),
    ]
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[1]))
        for layer in decoder_layers(model)
    ]
    Ladder(model).logits([run] * 3, rows)
    for hook in hooks:
        hook.remove()
    # One token per layer is the probe of what a layer returns. Row 1 (3 tokens) runs in layers 1-3, row 0 (6) in 3.
    assert seen == [1, 1, 1, 1, 3, 3, 9]


def test_packs_keep_to_their_budget_and_prompts_together():
    model = tiny_model("llama")
    runs = clean_runs(model, prompts_of((12, 8)), keep_cache=True)
    rows = [
        Row(runs[number % 2], Intervention((layer,), (position,), vectors=vectors(1)))
        for number in range(2)
        for layer in (3, 0, 2)
        for position in (1, 6)
    ]
    found = list(packs(rows, TokenBudget(20, torch.device("cpu"))))
    assert sorted(index for pack in found for index in pack) == list(range(12))
    for pack in found:
        layers = [rows[index].joins_after for index in pack]
        assert layers == sorted(layers)
        assert sum(rows[index].num_tokens for index in pack) <= 20
    assert [{id(rows[index].run) for index in pack} for pack in found[:2]] == [{id(runs[0])}] * 2
    assert list(packs(rows[:1], TokenBudget(1, torch.device("cpu")))) == [[0]]


def test_prompts_longer_than_a_sliding_window_fall_back_and_are_right():
    shape = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_hidden_layers=3,
        sliding_window=4,
    )
    model = randomized(MistralForCausalLM(shape))
    target = Target(model, tiny_tokenizer())
    prompts = prompts_of((10, 4))
    runs = target.clean_runs(prompts)
    assert target._climbs(runs[1])
    assert target.take_slow_reasons() == ""
    found = target.patched_logits(runs, [[Intervention((1,), (1,), vectors=vectors(1))]] * 2)
    assert target.take_slow_reasons() == (
        "prompts of more than 4 tokens, the shortest attention window of MistralForCausalLM, use plain hooks"
    )
    target.patched_logits(runs[1:], [[Intervention((1,), (1,), vectors=vectors(1))]])
    assert target.take_slow_reasons() == "", "the short prompt goes up the ladder"
    for ids, one in zip(prompts, found, strict=True):
        assert (one[0] - reference(model, ids, (1,), (1,), vectors(1)[None], "replace")).abs().max() < TOLERANCE


def test_recurrent_models_fall_back_with_one_logged_reason(caplog):
    model = randomized(MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY)))
    target = Target(model, tiny_tokenizer())
    prompts = prompts_of((6, 9))
    with caplog.at_level(logging.WARNING, logger="introspect_ray"):
        runs = target.clean_runs(prompts)
        found = target.patched_logits(runs, [[Intervention((0,), (2,), vectors=vectors(1))]] * 2)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("introspect_ray")]
    assert ours == [
        "patched runs of MambaForCausalLM use plain hooks: its cache has layers of kind LinearAttentionLayer"
    ]
    assert target.take_slow_reasons() == ours[0] and target.take_slow_reasons() == ""
    target.clean_runs(prompts)
    assert target.take_slow_reasons() == ours[0], "as often as it is asked after such work"
    for ids, one in zip(prompts, found, strict=True):
        assert (one[0] - reference(model, ids, (0,), (2,), vectors(1)[None], "replace")).abs().max() < TOLERANCE


def test_the_self_check_refuses_a_ladder_that_is_wrong():
    """A layer that does not see the positions it should: right with hooks, wrong on the ladder."""
    model = tiny_model("llama")
    layer = decoder_layers(model)[2]
    plain = layer.forward

    def by_index(hidden, **kwargs):
        index = torch.arange(hidden.shape[1])[:, None] / hidden.shape[1]
        return plain(hidden + index, **kwargs)

    layer.forward = by_index
    ladder, reason = checked_ladder(model)
    assert ladder is None
    assert reason.startswith("the self-check differs by")


@pytest.mark.parametrize("way", ["ladder", "hooked", "clean"])
def test_an_exception_leaves_no_hook_and_the_models_own_layers(way, monkeypatch):
    model = tiny_model("llama")
    runs = clean_runs(model, prompts_of((6,)), keep_cache=True)
    row = Intervention((0, 1), (2,), vectors=vectors(1))
    ladder, layers = Ladder(model), decoder_layers(model)
    before = list(layers)

    def fail(*_args, **_kwargs):
        raise RuntimeError("inside the layer")

    monkeypatch.setattr(layers[2], "forward", fail)
    calls = {
        "ladder": lambda: ladder.logits(runs, [row]),
        "hooked": lambda: hooked_logits(model, runs, [row]),
        "clean": lambda: clean_runs(model, prompts_of((6,)), keep_cache=True),
    }
    with pytest.raises(RuntimeError, match="inside the layer"):
        calls[way]()
    assert decoder_layers(model) is layers
    assert all(one is two for one, two in zip(layers, before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_without_interventions_gives_no_rows():
    target = Target(tiny_model("llama"), tiny_tokenizer())
    runs = target.clean_runs(prompts_of((6, 5)))
    found = target.patched_logits(runs, [[], [Intervention((1,), (0,), vectors=vectors(1))]])
    assert [one.shape for one in found] == [(0, VOCABULARY), (1, VOCABULARY)]
    assert target.patched_logits([], []) == []


def test_an_intervention_that_does_not_fit_is_refused_before_anything_runs():
    target = Target(tiny_model("llama"), tiny_tokenizer())
    runs = target.clean_runs(prompts_of((6,)))
    bad = {
        "layer 4 is out of range: the model has layers 0 to 3": Intervention((4,), (0,), vectors=vectors(1)),
        "position 6 is out of range: the prompt has positions 0 to 5": Intervention((0,), (6,), vectors=vectors(1)),
        "vector of width 31 does not fit a model of width 32": Intervention((0,), (0,), vectors=torch.zeros(1, 31)),
        "source position 9 is out of range: the prompt has positions 0 to 5": Intervention(
            (0,), (0,), source=CleanSource(runs[0], (9,), "mean")
        ),
    }
    for line, row in bad.items():
        with pytest.raises(UserError) as caught:
            target.patched_logits(runs, [[row]])
        assert str(caught.value) == line
