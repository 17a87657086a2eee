"""Entries found by blocks are those that a look at every entry finds."""

from __future__ import annotations

import pytest
import torch

from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.selection import BLOCK, above, largest


def dense(entries, shape):
    rows, columns, values = entries
    order = rows * shape[1] + columns
    assert (order[1:] > order[:-1]).all(), "entries come by row, then by column"
    found = torch.zeros(shape)
    found[rows, columns] = values
    return found


@pytest.mark.parametrize("width", [4 * BLOCK * 3, 4 * BLOCK * 3 + 5, 4 * BLOCK * 3 - 1, 7])
@pytest.mark.parametrize("shift", [0.0, -2.5, -100.0])
def test_largest_are_those_of_topk(width, shift):
    before = torch.randn(40, width, generator=torch.Generator().manual_seed(width)) + shift
    before[:20, 3:6] += 4  # several in one block
    values, indices = before.topk(3, dim=1)
    expected = torch.zeros_like(before).scatter(1, indices, values.relu())
    assert torch.equal(dense(largest(before, 3), before.shape), expected)


def test_largest_leaves_out_what_is_not_positive():
    before = torch.full((2, 4 * BLOCK), -1.0)
    before[1, 70] = 0.5
    rows, columns, values = largest(before, 1)
    assert (rows.tolist(), columns.tolist(), values.tolist()) == ([1], [70], [0.5])


@pytest.mark.parametrize("width", [64, 65, 3])
@pytest.mark.parametrize("has_threshold", [True, False])
def test_above_is_every_entry_above(width, has_threshold):
    generator = torch.Generator().manual_seed(width)
    before = torch.randn(30, width, generator=generator)
    threshold = torch.randn(width, generator=generator) if has_threshold else None
    before[0, 0] = 0.0
    if threshold is not None:
        before[1, 1] = threshold[1] = 0.7  # not above itself
    expected = before.relu() * (before > (threshold if threshold is not None else -torch.inf))
    assert torch.equal(dense(above(before, threshold), before.shape), expected)


@pytest.mark.parametrize("changes", [{"k": 2}, {"threshold": torch.full((4 * BLOCK * 2,), 0.3)}, {}])
def test_sparse_latents_are_the_dense_ones(changes, monkeypatch):
    monkeypatch.setattr("introspect_ray.features.coder.ENCODE_ENTRIES", 3 * 4 * BLOCK * 2)
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(8, 4 * BLOCK * 2, generator=generator)
    zeros = torch.zeros(4 * BLOCK * 2)
    coder = SparseCoder("sae", 0, encoder, zeros, encoder.T.contiguous(), torch.zeros(8), **changes)
    x = torch.randn(11, 8, generator=generator)
    torch.testing.assert_close(coder.encode_sparse(x).dense(), coder.encode(x))
