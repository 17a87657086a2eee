"""What several coders read, from one forward pass over the contexts of a batch. n tokens, D width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from introspect_ray.features.reading import Site, read_sites
from introspect_ray.interventions.forward import TOKENS_PER_BATCH, padded, run_padded
from introspect_ray.interventions.memory import TokenBudget


class CoderInputs:
    """Runs contexts through a target only as far as the last of `sites`. Not for several threads at once."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site]):
        self.model = model
        self.sites = frozenset(sites)
        self._budget = TokenBudget(TOKENS_PER_BATCH, model.device)
        self._most = TOKENS_PER_BATCH

    @torch.no_grad()
    def batches(
        self, contexts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], dict[Site, Float[Tensor, "n D"]]]]:
        """Indices of contexts that ran together, and the vectors at each site at their tokens but the first of each.

        Raises `UserError` if the model has no such place.
        """
        # The same batches every time, as long as memory allows: the last bits of a vector depend on what runs with it.
        self._budget.tokens = self._most
        lengths = [len(context) for context in contexts]

        def run(batch: Sequence[int]) -> dict[Site, Tensor]:
            ids, last = padded([contexts[index] for index in batch], self.model.device)
            seen = torch.arange(ids.shape[1], device=ids.device)[None, :] <= last[:, None]
            seen[:, 0] = False
            return {
                site: hidden[seen.to(hidden.device)].float()
                for site, hidden in read_sites(self.model, self.sites, ids).items()
            }

        yield from run_padded(lengths, self._budget, run)
        self._most = min(self._most, self._budget.tokens)
