"""What sparse coders read, from one forward pass that ends where the last of them has read. n tokens, D width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from introspect_ray.errors import UserError
from introspect_ray.features.coder import Kind
from introspect_ray.interventions.forward import TOKENS_PER_BATCH, padded, run_padded
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.models.structure import block_output, decoder_layers

Site = tuple[int, Kind]
"""Where a coder reads: after decoder layer l (`sae`), or before its MLP (`transcoder`)."""


class _AllRead(Exception):
    """Ends a forward pass."""


class CoderInputs:
    """Runs contexts through a target only as far as the last of `sites`. Not for several threads at once."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site]):
        """Raises `UserError` if the model has no such place."""
        layers = decoder_layers(model)
        for layer, kind in sites:
            if layer >= len(layers):
                raise UserError(f"a coder is of layer {layer}: {type(model).__name__} has {len(layers)} layers")
            if kind == "transcoder" and not isinstance(getattr(layers[layer], "mlp", None), nn.Module):
                raise UserError(
                    f"decoder layer {layer} of {type(model).__name__} has no part named mlp, which a transcoder needs"
                )
        self.model = model
        # The MLP runs before its layer's output is there.
        self.sites = sorted(set(sites), key=lambda site: (site[0], site[1] == "sae"))
        self._budget = TokenBudget(TOKENS_PER_BATCH, model.device)
        self._most = TOKENS_PER_BATCH

    @torch.no_grad()
    def batches(
        self, contexts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], dict[Site, Float[Tensor, "n D"]]]]:
        """Indices of contexts that ran together, and what each site read at their tokens but the first of each."""
        # The same batches every time, as long as memory allows: the last bits of a vector depend on what runs with it.
        self._budget.tokens = self._most
        lengths = [len(context) for context in contexts]

        def run(batch: Sequence[int]) -> dict[Site, Tensor]:
            ids, last = padded([contexts[index] for index in batch], self.model.device)
            seen = torch.arange(ids.shape[1], device=ids.device)[None, :] <= last[:, None]
            seen[:, 0] = False
            read: dict[Site, Tensor] = {}
            with self._reading(read):
                self.model.base_model(input_ids=ids, use_cache=False)
            return {site: hidden[seen.to(hidden.device)].float() for site, hidden in read.items()}

        yield from run_padded(lengths, self._budget, run)
        self._most = min(self._most, self._budget.tokens)

    @contextmanager
    def _reading(self, read: dict[Site, Tensor]) -> Iterator[None]:
        """Inside, a forward pass leaves in `read` what the sites read and ends with the last of them."""
        hooks = [self._hook(site, read) for site in self.sites]
        try:
            yield
        except _AllRead:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, site: Site, read: dict[Site, Tensor]) -> Any:
        layer, kind = site
        module: Any = decoder_layers(self.model)[layer]

        def keep(hidden: Tensor) -> None:
            read[site] = hidden
            if site == self.sites[-1]:
                raise _AllRead

        if kind == "sae":
            return module.register_forward_hook(lambda _module, _inputs, output: keep(block_output(output)))
        return module.mlp.register_forward_pre_hook(lambda _module, inputs: keep(inputs[0]))
