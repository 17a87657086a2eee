"""The stream that coders train on: texts in order, windows wherever blocks end, batches that only the seed decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from introspect_ray.features.shuffling import Part, block_texts, pieces, window_batches, windows


def stream(lengths: list[int], block: int = 0, first: int = 0) -> Iterator[Part]:
    """Blocks of these lengths whose rows are 100 x block + row, cut into parts of at most 3 rows."""
    for number in range(block, len(lengths)):
        rows = torch.arange(first if number == block else 0, lengths[number])
        for part in rows.split(3):
            if len(part):
                yield Part(number, int(part[0]), ((100 * number + part).float()[:, None], -part.float()[:, None]))


LENGTHS = [4, 1, 7, 2, 9, 5]


@pytest.mark.parametrize("size", [1, 4, 5, 11])
def test_windows_are_the_stream_in_order_and_begin_where_they_say(size: int) -> None:
    whole = torch.cat([part.columns[0] for part in stream(LENGTHS)]).flatten()
    found = list(windows(stream(LENGTHS), size))
    assert len(found) == len(whole) // size
    for number, window in enumerate(found):
        assert torch.equal(window.columns[0].flatten(), whole[number * size : (number + 1) * size])
        assert window.columns[0].shape == window.columns[1].shape
        again = next(windows(stream(LENGTHS, window.block, window.first), size))
        assert torch.equal(again.columns[0], window.columns[0]) and torch.equal(again.columns[1], window.columns[1])


def test_batches_hold_every_row_once_in_an_order_of_the_seed_and_the_window() -> None:
    x = torch.arange(12.0, dtype=torch.bfloat16)[:, None]
    batches = list(window_batches([x, -x], 4, seed=3, number=5, skip=0))
    assert [len(batch[0]) for batch in batches] == [4, 4, 4]
    assert sorted(torch.cat([batch[0] for batch in batches]).flatten().tolist()) == list(range(12))
    assert all(torch.equal(batch[0], -batch[1]) and batch[0].dtype == torch.float32 for batch in batches)
    later = list(window_batches([x, -x], 4, seed=3, number=5, skip=2))
    assert len(later) == 1 and torch.equal(later[0][0], batches[2][0])
    other = next(window_batches([x], 4, seed=3, number=6, skip=0))
    assert not torch.equal(other[0], batches[0][0])


def test_texts_come_once_per_epoch_in_a_new_order_each_time() -> None:
    texts = [number for block in range(6) for number in block_texts(block, 10, 5, seed=1)]
    assert Counter(texts) == dict.fromkeys(range(10), 3)
    epochs = [texts[start : start + 10] for start in (0, 10, 20)]
    assert len({tuple(epoch) for epoch in epochs}) == 3 and all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert texts[:10] != [number for block in range(2) for number in block_texts(block, 10, 5, seed=2)]
    assert [block_texts(block, 7, 3, seed=None) for block in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_long_texts_are_cut_and_every_piece_begins_as_the_text_does() -> None:
    assert pieces([1, 5, 6, 7, 8, 9], 3, bos=1) == [[1, 5, 6], [1, 7, 8], [1, 9]]
    assert pieces([5, 6, 7], 2, bos=None) == [[5, 6], [7]]
    assert pieces([1, 5], 8, bos=1) == [[1, 5]] and pieces([1], 8, bos=1) == [[1]] and pieces([], 8, bos=1) == []
