"""Similarity of two texts by their embeddings: cosine of mean-pooled hidden states of any local model.

B texts, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import ModelConfig
from introspect_ray.features.descriptions import Score
from introspect_ray.models.loading import load_tokenizer, no_progress_bar
from introspect_ray.models.paths import load_error, resolve_device, resolve_model_path
from introspect_ray.models.structure import text_config


class Embedder:
    """A model whose last hidden states, averaged over a text's tokens, stand for the text."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @classmethod
    def load(cls, config: ModelConfig) -> Embedder:
        """The model of `config`, a causal language model without its head or an encoder. Raises UserError."""
        try:
            with no_progress_bar():
                model: Any = AutoModel.from_pretrained(
                    resolve_model_path(config.path),
                    revision=config.revision,
                    trust_remote_code=config.trust_remote_code,
                    dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
                    use_safetensors=True,
                )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise load_error(config.path, error) from error
        model = model.to(resolve_device(config.device)).eval().requires_grad_(False)
        return cls(model, load_tokenizer(config))

    def similarity(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Score]:
        """For each (text, labels) the largest cosine to a label."""
        texts = list(dict.fromkeys(one for text, labels in pairs for one in (text, *labels)))
        vectors = dict(zip(texts, self.embed(texts), strict=True))
        found = []
        for text, labels in pairs:
            if not labels or not vectors[text].any():
                found.append(Score(None, "no_label" if not labels else "text_without_tokens"))
                continue
            found.append(Score(max(float(vectors[text] @ vectors[label]) for label in labels)))
        return found

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Mean over each text's tokens of the last hidden states, scaled to length 1; zeros for a text without tokens.

        A text longer than the model reads is cut. Special tokens that the tokenizer adds are read, not averaged.
        """
        rows = [self._encoded(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        vectors = torch.zeros(len(rows), text_config(self.model).hidden_size)
        for start in range(0, len(order), self.batch_size):
            chosen = [row for row in order[start : start + self.batch_size] if any(rows[row][1])]
            if chosen:
                vectors[chosen] = self._pooled([rows[row] for row in chosen])
        return vectors

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text and, for each, whether it counts."""
        limit = getattr(text_config(self.model), "max_position_embeddings", None)
        encoded = self.tokenizer(
            text,
            split_special_tokens=True,
            return_special_tokens_mask=True,
            truncation=limit is not None,
            max_length=limit,
        )
        return list(encoded["input_ids"]), [1 - one for one in encoded["special_tokens_mask"]]

    def _pooled(self, rows: Sequence[tuple[list[int], list[int]]]) -> Float[Tensor, "B D"]:
        # Padded on the right, so that position ids count from a text's first token in every kind of model.
        length, device = max(len(ids) for ids, _ in rows), self.model.device
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row, _ in rows], device=device)
        read = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows], device=device)
        counted = torch.tensor([[*mask, *[0] * (length - len(mask))] for _, mask in rows], device=device)
        model: Any = self.model
        states = model(input_ids=ids, attention_mask=read).last_hidden_state.float()
        sums = (states * counted[..., None]).sum(1)
        return torch.nn.functional.normalize(sums / counted.sum(1, keepdim=True), dim=-1).cpu()
