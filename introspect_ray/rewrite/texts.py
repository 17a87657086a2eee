"""Texts that a target is rewritten on: which positions are replaced and measured, and what a simulator sees of them.

T tokens of a text; position 0 is begin-of-text where the tokenizer adds one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Where = Literal["all", "last"]


@dataclass(frozen=True)
class RewriteText:
    """One text; the target reads all ids but the last, and is measured on the id after each of `positions`."""

    row: int
    """Number of the source row that it comes from."""
    ids: tuple[int, ...]
    first: int
    """First position that a simulator sees; begin-of-text is not among them."""
    positions: tuple[int, ...]
    """Positions that are replaced and measured, ascending; never 0."""

    @property
    def window(self) -> tuple[int, ...]:
        """Ids that a simulator sees: up to the last measured position, because nothing later matters there."""
        return self.ids[self.first : self.positions[-1] + 1]

    @property
    def places(self) -> tuple[int, ...]:
        """Where in the window the measured positions are."""
        return tuple(position - self.first for position in self.positions)


def rewrite_text(row: int, ids: Sequence[int], where: Where, tokens: int, bos: bool, seed: int) -> RewriteText | None:
    """The text of one row, or `None` if it is too short to measure anything.

    Args:
        where: `all` measures every position of the first `tokens` tokens but the first, `last` only the last one of a
            window of at most `tokens` tokens that ends at random (P2: 32 tokens).
        bos: whether ids begin with a begin-of-text token.
    """
    if len(ids) < 3:
        return None
    if where == "all":
        cut = tuple(ids[: tokens + 1])
        return RewriteText(row, cut, 1, tuple(range(1, len(cut) - 1)))
    end = random.Random(f"{seed}/{row}").randrange(2, len(ids))
    start = max(0, end - tokens)
    cut = tuple(ids[start : end + 1])
    if len(cut) < 3:
        return None
    return RewriteText(row, cut, 1 if bos and start == 0 else 0, (len(cut) - 2,))


def every_position(text: RewriteText) -> RewriteText:
    """The same text with all positions of its window but the first."""
    return replace(text, positions=tuple(range(1, text.positions[-1] + 1)))
