"""Interventions, clean runs, next-token logits and ablation."""

import pytest
import torch
from jaxtyping import TypeCheckError
from tiny_models import FAMILIES, clean_residuals, prompts_of, tiny_model, tiny_tokenizer

from introspect_ray.errors import UserError
from introspect_ray.interventions.ablation import ablate_span, ablate_text
from introspect_ray.interventions.clean import next_token_logits
from introspect_ray.interventions.forward import batches
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import CleanRun, CleanSource, Intervention


def one_vector(width=4):
    return torch.ones(1, width)


def not_a_number():
    vectors = torch.ones(2, 4)
    vectors[1, 3] = torch.nan
    return vectors


BAD = {
    "layers (0, 2) are no block: expected consecutive layers, lowest first": ((0, 2), (0,), one_vector()),
    "layers (1, 0) are no block: expected consecutive layers, lowest first": ((1, 0), (0,), one_vector()),
    "positions () are invalid: expected at least one, each once": ((0,), (), one_vector()),
    "positions (2, 2) are invalid: expected at least one, each once": ((0,), (2, 2), torch.ones(2, 4)),
    "vector 1 holds NaN or infinity: expected finite numbers": ((0,), (0, 1), not_a_number()),
    "an intervention takes either vectors or a source: found neither": ((0,), (0,), None),
    "vectors of shape (1, 4) do not fit 1 layers and 2 positions: expected [2, width] or [1, 2, width]": (
        (0,),
        (0, 1),
        one_vector(),
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_an_invalid_intervention_is_refused_in_one_line(line):
    layers, positions, vectors = BAD[line]
    with pytest.raises(UserError) as caught:
        Intervention(layers, positions, vectors=vectors)
    assert str(caught.value) == line


def test_shapes_are_checked_in_every_test_run():
    with pytest.raises(TypeCheckError):
        CleanRun(ids=(1,), residuals=torch.zeros(2, 4), logits=torch.zeros(5))


def test_a_source_out_of_range_is_refused():
    target = Target(tiny_model("llama"), tiny_tokenizer())
    (run,) = target.clean_runs(prompts_of((5,)))
    with pytest.raises(UserError, match="source position 5 is out of range: the prompt has positions 0 to 4"):
        CleanSource(run, (5,), "mean").vectors((0, 1))
    with pytest.raises(UserError, match="2 source positions given for 1 positions"):
        Intervention((0,), (1,), source=CleanSource(run, (1, 2), "mean"))


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_runs_of_mixed_lengths_equal_each_prompt_alone(family):
    model = tiny_model(family)
    target = Target(model, tiny_tokenizer())
    prompts = prompts_of((9, 2, 14, 1))
    runs = target.clean_runs(prompts)
    assert [list(run.ids) for run in runs] == prompts
    logits = target.next_token_logits(prompts)
    head = model.get_output_embeddings()
    for ids, run, row in zip(prompts, runs, logits, strict=True):
        assert (run.residuals - clean_residuals(model, ids)).abs().max() < 1e-4
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids]))
        assert (run.logits - alone.logits[0, -1]).abs().max() < 1e-4
        assert (row - alone.logits[0, -1]).abs().max() < 1e-4
        # The last residual is what the final norm reads, not what it gives.
        assert (head(run.residuals[-1, -1]) - alone.logits[0, -1]).abs().max() > 1e-2


BAD_PROMPTS = {
    "no prompts given: expected at least one": [],
    "prompt 1 is empty: expected at least one token": [[1], []],
    "prompt 0 has 65 tokens: the model takes at most 64": [[1] * 65],
    "prompt 1 holds a token id outside the model's 0 to 96": [[1], [97]],
}


@pytest.mark.parametrize("line", BAD_PROMPTS)
def test_bad_prompts_are_refused_in_one_line(line):
    with pytest.raises(UserError) as caught:
        next_token_logits(tiny_model("llama"), BAD_PROMPTS[line])
    assert str(caught.value) == line


def test_batches_hold_every_item_once_and_keep_to_their_budget():
    lengths = [5, 30, 1, 9, 9, 2, 70]
    found = list(batches(lengths, TokenBudget(40, torch.device("cpu"))))
    assert sorted(index for batch in found for index in batch) == list(range(7))
    assert found[0] == [6]
    for batch in found[1:]:
        assert max(lengths[index] for index in batch) * len(batch) <= 40


def test_target_encodes_text_as_its_tokenizer_would_begin_it():
    target = Target(tiny_model("llama"), tiny_tokenizer(bos=True))
    ids, offsets = target.encode_with_offsets("the cat")
    assert target.encode("the cat") == ids
    assert ids[0] == 1
    assert offsets[0] == (0, 0)
    assert (target.num_layers, target.width, target.device.type) == (4, 32, "cpu")


def test_ablation_takes_out_exactly_the_span():
    assert ablate_span([5, 6, 7, 8], 1, 3) == [5, 8]
    assert ablate_span([5, 6, 7], 0, 1) == [6, 7]
    assert ablate_text("a hint here", 1, 6) == "a here"


@pytest.mark.parametrize(("start", "end"), [(2, 2), (3, 2), (-1, 2), (1, 5)])
def test_ablation_refuses_an_empty_or_outside_span(start, end):
    with pytest.raises(UserError) as caught:
        ablate_span([5, 6, 7, 8], start, end)
    assert str(caught.value) == f"span [{start}, {end}) is invalid: expected a non-empty part of 4 tokens"
