"""Two versions of one prompt, in one row: what both begin with is computed once.

    tokens      [ prefix | rest of the one | rest of the other ]
    positions     0 .. p    p + 1 ..         p + 1 ..

A mask keeps the other's rest from seeing the one's. For a hint near the end of a prompt this is almost half the work.
P pairs, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from introspect_ray.interventions.clean import attention_window, check_prompts, next_token_logits
from introspect_ray.interventions.forward import in_order, padded, run_padded, selected_logits
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.selfcheck import TOLERANCE
from introspect_ray.models.structure import text_config

logger = logging.getLogger(__name__)

Pair = tuple[Sequence[int], Sequence[int]]
PairLogits = tuple[Float[Tensor, "P V"], Float[Tensor, "P V"]]


class PairedRuns:
    """Next-token logits of pairs of prompts of one model; pairs that cannot share a prefix run apart."""

    def __init__(self, model: PreTrainedModel, budget: TokenBudget):
        self._model = model
        self._budget = budget
        self._window = attention_window(model)
        self._shares: bool | None = None
        self._no_sharing = ""
        self.apart_because = ""
        """Why some of the last pairs could not share a prefix; empty if all could."""

    @torch.no_grad()
    def logits(self, pairs: Sequence[Pair]) -> PairLogits:
        """Logits at the last position of the first and of the second prompt of each of P pairs.

        Raises `UserError` for prompts that are empty, too long or hold unknown ids.
        """
        ones, others = zip(*pairs, strict=True)
        check_prompts(self._model, [*ones, *others])
        if self._shares is None:
            self._shares = self._passes()
        found = torch.empty(2, len(pairs), 0)
        sharing = [index for index, pair in enumerate(pairs) if self._shares and self._fits(pair)]
        apart = sorted(set(range(len(pairs))) - set(sharing))
        too_long = not self._no_sharing and self._window and max(map(len, (*ones, *others))) > self._window
        self.apart_because = f"prompts have more than {self._window} tokens" if too_long else self._no_sharing
        for indices, method in ((sharing, self._together), (apart, self._apart)):
            if indices:
                logits = torch.stack(method([pairs[index] for index in indices]))
                if not found.shape[-1]:
                    found = logits.new_empty(2, len(pairs), logits.shape[-1])
                found[:, torch.tensor(indices, device=found.device)] = logits
        return found[0], found[1]

    def _fits(self, pair: Pair) -> bool:
        """Whether a mask of our own is right: a window of attention would have to be part of it."""
        return bool(prefix_length(*pair)) and (self._window is None or max(map(len, pair)) <= self._window)

    def _apart(self, pairs: Sequence[Pair]) -> PairLogits:
        ones, others = zip(*pairs, strict=True)
        one, other = next_token_logits(self._model, [*ones, *others], self._budget).chunk(2)
        return one, other

    def _together(self, pairs: Sequence[Pair]) -> PairLogits:
        prefixes = [prefix_length(*pair) for pair in pairs]
        rows = [[*one, *other[prefix:]] for (one, other), prefix in zip(pairs, prefixes, strict=True)]

        def run_batch(batch: Sequence[int]) -> Tensor:
            chosen = [rows[index] for index in batch]
            return self._batch(chosen, [len(pairs[index][0]) for index in batch], [prefixes[index] for index in batch])

        one, other = in_order(run_padded([len(row) for row in rows], self._budget, run_batch), dim=1)
        return one, other

    def _batch(self, rows: Sequence[Sequence[int]], splits: Sequence[int], prefixes: Sequence[int]) -> Tensor:
        """Logits [2, P, V] of rows in which the one ends at `split`, and the other leaves out `prefix` to `split`."""
        device = self._model.device
        ids, last = padded(rows, device)
        split, prefix = (torch.tensor(values, device=device)[:, None] for values in (splits, prefixes))
        place = torch.arange(ids.shape[1], device=device)
        is_other = place >= split
        # Padding counts on after the other, but not beyond the longest prompt: a model may know no further position.
        longest = torch.maximum(split, last[:, None] + 1 - split + prefix).max()
        positions = torch.where(is_other, place - split + prefix, place).minimum(longest - 1)
        unseen = is_other[:, :, None] & (place >= prefix)[:, None] & ~is_other[:, None]
        visible = (place[:, None] >= place) & ~unseen
        mask = torch.zeros(visible.shape, dtype=self._model.dtype, device=device)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
        count = torch.arange(len(rows), device=device).repeat(2)
        ends = torch.cat([split[:, 0] - 1, last])
        inputs = {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": positions, "use_cache": False}
        return selected_logits(self._model, count, ends, **inputs).unflatten(0, (2, -1))

    def _passes(self) -> bool:
        """Whether two small pairs get the same logits as their whole prompts; the reason is logged and kept if not."""
        vocabulary = text_config(self._model).vocab_size
        limit = min(self._window or 12, 12)
        one = [(7 * place + 3) % vocabulary for place in range(limit)]
        pairs = [(one, [*one[:4], *one[7:]]), ([*one[:3], *one[5:]], one)] if limit > 7 else []
        if not pairs:
            self._no_sharing = f"an attention window of {limit} tokens is too short"
            return False
        try:
            found, expected = torch.stack(self._together(pairs)), torch.stack(self._apart(pairs))
        except Exception as error:  # what a model's own code says to a mask of four dimensions cannot be foreseen
            reason = f"{type(error).__name__}: {error}"
        else:
            scale = (expected[0] - expected[1]).abs().amax().float()
            difference = ((found - expected).abs().amax().float() / scale).item()
            if difference <= TOLERANCE.get(self._model.dtype, 0.0):
                return True
            reason = f"logits differ by {difference:.2g} of what the difference between the two makes"
        self._no_sharing = reason
        logger.warning("pairs of prompts of %s run apart: %s", type(self._model).__name__, reason)
        return False


def prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, short of the last one of either."""
    both = zip(one[:-1], other[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], both))
