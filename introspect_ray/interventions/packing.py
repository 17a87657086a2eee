"""Rows that run together: the order they stand in, where each ends, and who sees whom.

The suffixes of all rows, of one prompt or of several, stand one after another in a batch of one, and a mask keeps them
apart. Nothing is padded, whatever the lengths; a prompt's clean keys and values are there once for all rows; and the
part of the pack that is in the stack grows from layer to layer, because rows are sorted by the layer they join after:

    keys     [ clean prefix of prompt A | clean prefix of B | row 0 | row 1 | row 2 ... ]
    queries                                                 [ row 0 | row 1 | row 2 ... ]
                                                  layer l runs the rows that joined below it

N tokens of a pack, S of one row, C clean prefix tokens, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from introspect_ray.interventions.edits import Edits
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.types import CleanRun, Intervention


@dataclass(frozen=True)
class Row:
    """One intervention on one prompt."""

    run: CleanRun
    intervention: Intervention

    @property
    def start(self) -> int:
        """First position that differs from the clean run."""
        return min(self.intervention.positions)

    @property
    def joins_after(self) -> int:
        """First layer whose output differs from the clean run."""
        return self.intervention.layers[0]

    @property
    def num_tokens(self) -> int:
        return len(self.run) - self.start


class Pack:
    """Rows that run together, in the order in which they join the stack, and all that is precomputed about them."""

    def __init__(self, rows: Sequence[Row], num_layers: int):
        self.rows = rows
        assert all(row.joins_after <= later.joins_after for row, later in pairwise(rows)), "rows must be sorted"
        prefixes: dict[int, tuple[CleanRun, int]] = {}
        for row in rows:
            length = prefixes.get(id(row.run), (row.run, 0))[1]
            prefixes[id(row.run)] = (row.run, max(length, row.start))
        self.runs = [run for run, _ in prefixes.values()]
        self.prefix_lengths = [length for _, length in prefixes.values()]
        self.offsets: list[int] = []
        self.num_tokens = 0
        joining = [0] * num_layers
        for row in self.rows:
            self.offsets.append(self.num_tokens)
            self.num_tokens += row.num_tokens
            joining[row.joins_after] += row.num_tokens
        self.num_entering = [sum(joining[:layer]) for layer in range(num_layers)]
        """Tokens that each layer is run over."""
        self.like = self.runs[0].residuals
        self.edits = Edits(
            [row.intervention for row in self.rows],
            [
                [offset + position - row.start for position in row.intervention.positions]
                for row, offset in zip(self.rows, self.offsets, strict=True)
            ],
            like=self.like,
        )

    def joining(self, layer: int) -> list[Float[Tensor, "S D"]]:
        """Clean outputs of `layer` over the suffix of every row that joins after it."""
        return [row.run.residuals[layer, row.start :] for row in self.rows if row.joins_after == layer]

    def positions(self) -> Int[Tensor, " N"]:
        """Position of every token in its own prompt."""
        device = self.like.device
        return torch.cat([torch.arange(row.start, len(row.run), device=device) for row in self.rows])

    def ends(self) -> Int[Tensor, " R"]:
        """Index of every row's last token."""
        ends = [offset + row.num_tokens - 1 for row, offset in zip(self.rows, self.offsets, strict=True)]
        return torch.tensor(ends, device=self.like.device)

    def ends_entering_last(self) -> Int[Tensor, " M"]:
        """Indices of the last tokens of the M rows that the last layer is run over."""
        ends = self.ends()
        return ends[ends < self.num_entering[-1]]

    def mask(self, positions: Int[Tensor, " N"]) -> Float[Tensor, "1 1 N C_plus_N"]:
        """Additive attention mask: a token sees its prompt's clean prefix up to its row, and its own row so far."""
        device = self.like.device
        number = {id(run): index for index, run in enumerate(self.runs)}
        per_row = torch.tensor([[number[id(row.run)], row.start, row.num_tokens] for row in self.rows], device=device)
        prompt, start, counts = per_row.unbind(1)
        row_of = torch.repeat_interleave(counts, output_size=self.num_tokens)
        prefix_position = torch.cat([torch.arange(length, device=device) for length in self.prefix_lengths])
        prefix_prompt = torch.repeat_interleave(torch.tensor(self.prefix_lengths, device=device))
        # Comparing one small row-by-key table and spreading it over the tokens is cheaper than comparing per token.
        sees_prefix = (prompt[:, None] == prefix_prompt) & (prefix_position < start[:, None])
        sees_own = (row_of[:, None] == row_of) & (positions[:, None] >= positions)
        visible = torch.cat([sees_prefix[row_of], sees_own], dim=1)
        hidden = torch.finfo(self.like.dtype).min
        return torch.zeros(visible.shape, dtype=self.like.dtype, device=device).masked_fill_(~visible, hidden)[
            None, None
        ]


def packs(rows: Sequence[Row], budget: TokenBudget) -> Iterator[list[int]]:
    """Indices of the rows that run together, in joining order: a prompt's rows first, prompts share what is left.

    A pack holds at most the budget of its time in suffix tokens and as many clean prefix tokens, or a single row.
    """
    first_seen: dict[int, int] = {}
    for index, row in enumerate(rows):
        first_seen.setdefault(id(row.run), index)
    pack: list[int] = []
    tokens = 0
    prefixes: dict[int, int] = {}

    # Within a prompt by layer, so that a pack of a long sweep holds neighbouring layers and skips all below them.
    for index in sorted(range(len(rows)), key=lambda index: (first_seen[id(rows[index].run)], rows[index].joins_after)):
        row = rows[index]
        known = prefixes.get(id(row.run), 0)
        added = max(0, row.start - known)
        if pack and (tokens + row.num_tokens > budget.tokens or sum(prefixes.values()) + added > budget.tokens):
            yield sorted(pack, key=lambda index: rows[index].joins_after)
            pack, tokens, prefixes, known = [], 0, {}, 0
        pack.append(index)
        tokens += row.num_tokens
        prefixes[id(row.run)] = max(known, row.start)
    if pack:
        yield sorted(pack, key=lambda index: rows[index].joins_after)
