"""Where a coder stands in its target, and the target's losses when something else is written there.

A transcoder stands for the MLP of its layer, an SAE for the residual stream that its layer puts out. Begin-of-text
is left as it is, always: coders were not trained on it (features/activations.py). B texts, T tokens, N measured
positions of all texts in their order, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from introspect_ray.errors import UserError
from introspect_ray.features.coder import SparseCoder
from introspect_ray.interventions.forward import padded, selected_logits
from introspect_ray.interventions.target import Target
from introspect_ray.models.structure import block_output, decoder_layers, with_block_output
from introspect_ray.rewrite.texts import RewriteText


@dataclass(frozen=True, eq=False)
class Written:
    """What the site reads and writes at N positions, in float32."""

    x: Float[Tensor, "N D_in"]
    y: Float[Tensor, "N D"]


@dataclass(frozen=True, eq=False)
class TextLosses:
    """Sums over the measured positions of each text, in nats."""

    cross_entropy: Float[np.ndarray, " B"]
    divergence: Float[np.ndarray, " B"]
    """KL(unchanged || changed) of the next-token distributions."""


class Batch:
    """A few texts side by side, with where in the padded batch their measured positions are."""

    def __init__(self, texts: Sequence[RewriteText], device: torch.device):
        self.ids, _ = padded([text.ids[:-1] for text in texts], device)
        rows = [row for row, text in enumerate(texts) for _ in text.positions]
        columns = [position for text in texts for position in text.positions]
        following = [text.ids[position + 1] for text in texts for position in text.positions]
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.columns = torch.tensor(columns, dtype=torch.long, device=device)
        self.following: Int[Tensor, " N"] = torch.tensor(following, dtype=torch.long, device=device)
        self.num_texts = len(texts)

    def per_text(self, values: Float[Tensor, " N"]) -> Float[np.ndarray, " B"]:
        """Sums over the positions of each text."""
        sums = torch.zeros(self.num_texts, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.rows, values.double()).cpu().numpy()


class Site:
    """The place in a target that a coder reads from and writes to."""

    def __init__(self, target: Target, coder: SparseCoder):
        layers = decoder_layers(target.model)
        if coder.layer >= len(layers):
            raise UserError(f"the coder is of layer {coder.layer}, the target has layers 0..{len(layers) - 1}")
        module = getattr(layers[coder.layer], "mlp", None) if coder.kind == "transcoder" else layers[coder.layer]
        if not isinstance(module, nn.Module):
            raise UserError(f"decoder layer {coder.layer} of {type(target.model).__name__} has no part named mlp")
        self.model, self.module, self.kind = target.model, module, coder.kind
        self.device = target.device

    @torch.no_grad()
    def read(self, batch: Batch) -> Written:
        """What the unchanged target reads and writes here. An SAE reads what it writes."""
        found: list[tuple[Tensor, Tensor]] = []

        def at(values: Tensor) -> Float[Tensor, "N width"]:
            # The site of a model that is spread over several devices may be on another one than its input.
            rows, columns = batch.rows.to(values.device), batch.columns.to(values.device)
            return values[rows, columns].float().to(self.device)

        def record(inputs: tuple[Any, ...], output: Tensor) -> None:
            y = at(output)
            found.append((at(inputs[0]) if self.kind == "transcoder" else y, y))

        with self._hooked(record):
            self.model.base_model(input_ids=batch.ids, use_cache=False)
        ((x, y),) = found
        return Written(x, y)

    @torch.no_grad()
    def log_probabilities(self, batch: Batch, written: Float[Tensor, "N D"] | None) -> Float[Tensor, "N V"]:
        """Log-probabilities of next tokens with `written` at the measured positions; `None` changes nothing."""
        return self._logits(batch, written).log_softmax(-1)

    def losses(self, batch: Batch, clean: Float[Tensor, "N V"], written: Float[Tensor, "N D"] | None) -> TextLosses:
        """Loss and divergence of each text; `clean` are the unchanged target's log-probabilities."""
        changed = clean if written is None else self.log_probabilities(batch, written)
        loss = -changed.gather(-1, batch.following[:, None])[:, 0]
        divergence = (clean.exp() * (clean - changed)).sum(-1)
        return TextLosses(batch.per_text(loss), batch.per_text(divergence))

    def gradient(self, batch: Batch, written: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Derivative of the summed loss by what is written: how many nats a small change costs, to first order."""
        with torch.enable_grad():
            leaf = written.detach().clone().requires_grad_()
            logits = self._logits(batch, leaf)
            loss = nn.functional.cross_entropy(logits, batch.following, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    def _logits(self, batch: Batch, written: Float[Tensor, "N D"] | None) -> Float[Tensor, "N V"]:
        def write(_inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if written is None:
                return None
            rows, columns = batch.rows.to(output.device), batch.columns.to(output.device)
            return output.index_put((rows, columns), written.to(output))

        with self._hooked(write):
            logits = selected_logits(self.model, batch.rows, batch.columns, input_ids=batch.ids, use_cache=False)
        return logits.float().to(self.device)

    @contextmanager
    def _hooked(self, look: Callable[[tuple[Any, ...], Tensor], Tensor | None]) -> Iterator[None]:
        """`look` sees what the module reads and writes, and may replace the latter."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            hidden = look(inputs, block_output(output))
            return None if hidden is None else with_block_output(output, hidden)

        handle = self.module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
