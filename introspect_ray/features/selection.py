"""Which entries of dense pre-activations an activation leaves, found without a pass of Python or a copy over all.

A scan for the few entries that stay costs more than the matrix product that made them if it is done entry by entry. So
both functions look at blocks of neighbours first, and at entries only where a block may hold one. n rows, F columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

BLOCK = 64
"""Neighbouring columns that `largest` looks at as one."""
_WORD = 8
"""Booleans in one 64-bit word."""

Entries = tuple[Int[Tensor, " entries"], Int[Tensor, " entries"], Float[Tensor, " entries"]]
"""Row, column and value of every entry that stays, by row, then by column."""


def largest(before: Float[Tensor, "n F"], k: int) -> Entries:
    """The k largest entries of each row, those among them that are positive.

    They lie in the k blocks with the largest maxima: any other block is beaten by k entries.
    """
    n, width = before.shape
    if width >= 4 * BLOCK * k:
        if width % BLOCK:
            before = functional.pad(before, (0, -width % BLOCK), value=-torch.inf)
        blocks = before.unflatten(1, (-1, BLOCK))
        chosen = blocks.amax(2).topk(k, sorted=False).indices
        candidates = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
        values, place = candidates.topk(k, sorted=False)
        columns = chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK
    else:
        values, columns = before.topk(k, sorted=False)
    columns, order = columns.sort(dim=1)
    values = values.gather(1, order)
    rows = torch.arange(n, device=before.device)[:, None].expand(n, k)
    stays = values > 0
    return rows[stays], columns[stays], values[stays]


def above(before: Float[Tensor, "n F"], threshold: Float[Tensor, " F"] | None) -> Entries:
    """The entries above 0 and above their column's threshold."""
    stays = before > (0 if threshold is None else threshold.clamp(min=0))
    if before.shape[1] % _WORD:
        rows, columns = stays.nonzero(as_tuple=True)
    else:
        rows, words = stays.view(torch.int64).nonzero(as_tuple=True)
        found, bit = stays.unflatten(1, (-1, _WORD))[rows, words].nonzero(as_tuple=True)
        rows, columns = rows[found], words[found] * _WORD + bit
    return rows, columns, before[rows, columns]
