"""Edited codes against dense arithmetic, and what must hold exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from unit.rewrite_helpers import LATENTS, transcoder

from introspect_ray.features.coder import SparseCoder
from introspect_ray.rewrite import code as code_module
from introspect_ray.rewrite.code import (
    columns_of,
    decode,
    empty,
    joined,
    largest,
    moved,
    paper_random,
    replaced,
    vectors_of,
    without,
)

X = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))


def sae() -> SparseCoder:
    coder = transcoder()
    return replace(coder, kind="sae", skip=None, threshold=None, k=3, subtract_bias=True, rescale=True)


@pytest.mark.parametrize("coder", [transcoder(), sae()], ids=["skip transcoder", "rescaled top-k SAE"])
def test_decoding_a_code_is_decoding_its_dense_latents(coder):
    code = coder.encode_sparse(X)
    torch.testing.assert_close(decode(coder, code, X), coder.forward(X))
    torch.testing.assert_close(decode(coder, code, X), coder.decode(code.dense(), X))


def test_no_active_latent_keeps_bias_and_skip():
    coder = transcoder()
    written = decode(coder, empty(coder.encode_sparse(X)), X)
    torch.testing.assert_close(written, coder.decoder_bias + X @ coder.skip.T)
    assert written.abs().max() > 0.5


def test_replaced_latents_have_their_simulated_values_and_all_others_their_true_ones():
    coder = transcoder()
    code = coder.encode_sparse(X)
    chosen = torch.tensor([7, 2])
    simulated = torch.tensor([[0.0, 1.5]] * 4 + [[2.5, 0.0]] * 5)
    expected = code.dense()
    expected[:, [7, 2]] = simulated
    edited = replaced(code, chosen, simulated, None)
    torch.testing.assert_close(edited.dense(), expected)
    keys = edited.vectors * LATENTS + edited.latents
    assert (keys[1:] > keys[:-1]).all(), "entries are ordered, each once"


def test_replacing_nothing_and_replacing_by_the_truth_are_exact():
    coder = transcoder()
    code = coder.encode_sparse(X)
    true = decode(coder, code, X)
    nothing = replaced(code, torch.tensor([], dtype=torch.long), torch.zeros(9, 0), None)
    everything = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(0))
    oracle = replaced(code, everything, columns_of(code, everything), None)
    assert torch.equal(decode(coder, nothing, X), true)
    assert torch.equal(decode(coder, oracle, X), true)


def test_columns_are_the_dense_latents_in_the_order_asked_for():
    code = transcoder().encode_sparse(X)
    chosen = torch.tensor([11, 0, 5])
    assert torch.equal(columns_of(code, chosen), code.dense()[:, chosen])
    assert columns_of(code, torch.tensor([], dtype=torch.long)).shape == (9, 0)


def test_a_missing_value_keeps_the_truth():
    code = transcoder().encode_sparse(X)
    simulated = torch.full((9, 1), torch.nan)
    simulated[3] = 4.0
    expected = code.dense()
    expected[3, 5] = 4.0
    torch.testing.assert_close(replaced(code, torch.tensor([5]), simulated, None).dense(), expected)


def test_spans_change_nothing(monkeypatch):
    code = transcoder().encode_sparse(X)
    simulated = torch.rand(9, 2, generator=torch.Generator().manual_seed(4))
    whole = replaced(code, torch.tensor([1, 4]), simulated, None)
    monkeypatch.setattr(code_module, "ENTRIES_AT_ONCE", 4)
    assert torch.equal(replaced(code, torch.tensor([1, 4]), simulated, None).dense(), whole.dense())


def test_the_largest_k_stay_of_every_vector():
    code = transcoder().encode_sparse(X)
    dense = code.dense()
    kept = largest(code, 2)
    best = dense.topk(2)
    expected = torch.zeros_like(dense).scatter(-1, best.indices, best.values)
    assert torch.equal(kept.dense(), expected)
    assert torch.equal(largest(code, LATENTS).dense(), dense)
    # A simulated value that is larger than true ones pushes one of them out.
    edited = replaced(code, torch.tensor([9]), torch.full((9, 1), 99.0), 2)
    assert (edited.dense()[:, 9] == 99).all() and (edited.dense() > 0).sum(-1).max() == 2


def test_vectors_of_and_joined_are_inverse():
    code = transcoder().encode_sparse(X)
    parts = [vectors_of(code, 0, 2), vectors_of(code, 2, 2), vectors_of(code, 2, 9)]
    assert [part.num_vectors for part in parts] == [2, 0, 7]
    whole = joined(parts)
    assert torch.equal(whole.dense(), code.dense()) and torch.equal(whole.vectors, code.vectors)


def test_random_latents_keep_values_and_numbers_and_use_live_ones_only():
    code = transcoder().encode_sparse(X)
    live = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8])
    random = moved(code, live, seed=3)
    assert torch.equal((random.dense() > 0).sum(1), (code.dense() > 0).sum(1))
    torch.testing.assert_close(random.dense().sum(1), code.dense().sum(1))
    assert torch.isin(random.latents, live).all()
    assert not torch.equal(random.latents, code.latents)


def test_p2_gives_random_latents_the_number_of_the_first_active_one():
    code = without(transcoder().encode_sparse(X), torch.tensor([0, 1, 2]))
    random = paper_random(code, torch.arange(LATENTS), 4, seed=0).dense()
    for vector in range(9):
        first = code.latents[code.vectors == vector].min()
        assert (random[vector] > 0).sum() == 4
        assert set(random[vector][random[vector] > 0].tolist()) == {float(first)}
