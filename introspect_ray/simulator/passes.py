"""Forward passes of a simulator: rows share the keys and values of what they begin with, in batches by token budget.

    base (instructions)        once per simulator      \
    + description              once per description     > keys and values, shared by all rows after them
    + window                   one row per window      /

A description whose windows are few is put at the beginning of its rows instead, so that rows of many descriptions fill
one batch. What is shared changes no level by more than float rounding.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from introspect_ray.errors import UserError
from introspect_ray.interventions.forward import padded, padded_budget, run_padded
from introspect_ray.models.structure import max_positions
from introspect_ray.simulator.levels import LevelTokens, levels_only
from introspect_ray.simulator.reading import Reading

logger = logging.getLogger(__name__)

Ids = tuple[int, ...]

SHARED_FROM = 512
"""Tokens that sharing a description has to save: below, one more small pass costs more than the tokens."""
PREFIXES_KEPT = 4
TOLERANCE_LEVELS = {torch.float32: 1e-3}
"""Largest difference between shared and repeated prefixes that counts as rounding, by dtype; else `HALF_TOLERANCE`."""
HALF_TOLERANCE = 0.25


@dataclass(frozen=True)
class Ask:
    """One description and one window, in the simulator's tokens."""

    description: Ids
    window: Reading


class LevelPasses:
    """Reads expected levels off one model. Not for several threads at once."""

    def __init__(self, model: PreTrainedModel, tokens: LevelTokens, base: Sequence[int] = ()):
        """`base`: what every row begins with, before the description."""
        self.model = model
        self.tokens = tokens
        self.base: Ids = tuple(base)
        self._budget = padded_budget(model.device)
        self._prefixes: OrderedDict[tuple[Ids, ...], Any] = OrderedDict()

    def read(self, asks: Sequence[Ask]) -> list[Float[np.ndarray, " T"]]:
        """Expected levels at every token of every window, in the order of `asks`.

        Raises UserError if one has more tokens than the model takes.
        """
        self._check_lengths(asks)
        groups: dict[Ids, list[int]] = {}
        for index, ask in enumerate(asks):
            groups.setdefault(ask.description, []).append(index)
        found: list[np.ndarray | None] = [None] * len(asks)
        base: tuple[Ids, ...] = (self.base,) if self.base else ()
        rest: list[int] = []
        for description, members in groups.items():
            if self.shares and (len(members) - 1) * len(description) >= SHARED_FROM:
                self._rows((*base, description), [asks[index].window for index in members], members, found)
            else:
                rest += members
        together = [_joined(asks[index].description, asks[index].window) for index in rest]
        if base and not self.shares:
            together = [_joined(self.base, row) for row in together]
            base = ()
        self._rows(base, together, rest, found)
        return [levels for levels in found if levels is not None]

    def _rows(
        self,
        parts: tuple[Ids, ...],
        rows: Sequence[Reading],
        places: Sequence[int],
        found: list[np.ndarray | None],
    ) -> None:
        """Fill `found[places[i]]` with the levels of row i, which follows `parts`."""
        if not rows:
            return
        length = sum(map(len, parts))
        for batch, logits in run_padded(
            [length + len(row.ids) for row in rows],
            self._budget,
            lambda batch: self._levels(parts, [rows[index].ids for index in batch]),
        ):
            for row, index in enumerate(batch):
                found[places[index]] = logits[row, list(rows[index].positions)]

    @torch.no_grad()
    def _levels(self, parts: tuple[Ids, ...], rows: Sequence[Ids]) -> Float[np.ndarray, "R T"]:
        """Expected levels at every token of the rows, padded on the right."""
        ids, _ = padded(rows, self.model.device)
        cache: dict[str, Any] = {}
        if parts:
            prefix = copy.deepcopy(self._prefix(parts))
            prefix.batch_repeat_interleave(len(rows))
            cache = {"past_key_values": prefix}
        with levels_only(self.model, self.tokens):
            logits = self.model(input_ids=ids, use_cache=bool(parts), **cache).logits
        return self.tokens.expected(logits).cpu().numpy().astype(np.float64)

    @torch.no_grad()
    def _prefix(self, parts: tuple[Ids, ...]) -> Any:
        """Keys and values of `parts` in a row; those of all but the last part are taken from what is kept."""
        if parts in self._prefixes:
            self._prefixes.move_to_end(parts)
            return self._prefixes[parts]
        before = copy.deepcopy(self._prefix(parts[:-1])) if len(parts) > 1 else None
        ids = torch.tensor([parts[-1]], device=self.model.device)
        with levels_only(self.model, self.tokens):
            kept = self.model(input_ids=ids, use_cache=True, past_key_values=before).past_key_values
        self._prefixes[parts] = kept
        if len(self._prefixes) > PREFIXES_KEPT:
            self._prefixes.popitem(last=False)
        return kept

    @cached_property
    def shares(self) -> bool:
        """Whether a shared prefix gives this model the same levels as a repeated one; seen on two made-up rows.

        Models with recurrent state have no keys and values to share, and are read row by row in full.
        """
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary: int = embeddings.weight.shape[0]
        made_up = [
            tuple((17 * start + 5 * index) % vocabulary for index in range(length)) for start, length in _MADE_UP
        ]
        prefix, rows = made_up[0], made_up[1:]
        whole = [self._levels((), [prefix + row])[0, len(prefix) :] for row in rows]
        try:
            shared = self._levels((prefix[:3], prefix[3:]), rows)
            worst = max(float(np.abs(shared[i, : len(row)] - whole[i]).max()) for i, row in enumerate(rows))
        except (AttributeError, NotImplementedError, TypeError, ValueError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            if worst <= TOLERANCE_LEVELS.get(self.model.dtype, HALF_TOLERANCE):
                return True
            reason = f"levels differ by {worst:.3g}"
        logger.warning("%s shares no prefixes (%s): every row is read in full", type(self.model).__name__, reason)
        return False

    def _check_lengths(self, asks: Sequence[Ask]) -> None:
        most = max_positions(self.model)
        if most is None or not asks:
            return
        worst = max(asks, key=lambda ask: len(ask.description) + len(ask.window.ids))
        length = len(self.base) + len(worst.description) + len(worst.window.ids)
        if length > most:
            raise UserError(
                f"a description of {len(worst.description)} tokens with a window of {len(worst.window.ids)} needs"
                f" {length} positions of the simulator, which has {most}: use shorter windows or descriptions"
            )


_MADE_UP = ((1, 7), (2, 5), (3, 8))
"""Start and length of token sequences that no one wrote."""


def _joined(before: Ids, row: Reading) -> Reading:
    return Reading(before + row.ids, tuple(len(before) + position for position in row.positions))
