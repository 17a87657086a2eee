"""The explainer: a stock causal language model, what it needs to read vectors, and how it is asked and trained.

    queries --Encoder--> Encoded --collate--> token embeddings, placeholder rows replaced by projected vectors
            --> loss (answer positions only) | generate (greedy) --> answers

Legend: B rows, T padded length, E explainer width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import ExplainerConfig, LoraConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer import files, published
from introspect_ray.explainer.card import ExplainerCard, TargetInfo
from introspect_ray.explainer.encoding import Encoded, Encoder
from introspect_ray.explainer.forward import Collated, collate, logits_at, scaled, soft_tokens
from introspect_ray.explainer.merging import merged
from introspect_ray.explainer.projections import Projections
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.explainer.streaming import AnswerStreamer


class Inputs(NamedTuple):
    """Keyword arguments of the language model."""

    inputs_embeds: Float[Tensor, "B T E"]
    attention_mask: Int[Tensor, "B T"] | None
    position_ids: Int[Tensor, "B T"]


class Explainer(nn.Module):
    """A language model that answers queries about vectors of its target."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, projections: Projections, card: ExplainerCard
    ):
        super().__init__()
        self.model = model
        self.projections = projections
        self.tokenizer = tokenizer
        self.card = card
        self.encoder = Encoder(tokenizer, card.placeholders, card.frame)
        # Sampling settings that a checkpoint brings along (temperature, repetition penalty) must not reach answers.
        self.causal.generation_config = GenerationConfig()

    @classmethod
    def create(cls, config: ExplainerConfig, target: TargetInfo, seed: int) -> Explainer:
        """An untrained explainer: the weights that the config names, projections initialised from the seed.

        Raises:
            UserError: the model cannot be loaded, or its width does not fit the target's without a projection.
        """
        return cls(*files.create_parts(config, target, seed))

    @classmethod
    def stream(
        cls,
        config: ExplainerConfig,
        target: TargetInfo,
        seed: int,
        lora: LoraConfig | None,
        compute_dtype: torch.dtype | None,
        loaded: Callable[[nn.Module], None],
    ) -> Explainer:
        """`create`, and `add_adapter` if `lora` is given, with weights that come decoder layer by decoder layer.

        Args:
            compute_dtype: what NF4 weights are computed in; none quantizes nothing.
            loaded: called with each decoder layer whose weights have come.
        """
        return cls(*files.stream_parts(config, target, seed, lora, compute_dtype, loaded))

    @classmethod
    def load(cls, folder: str, device: str, dtype: str) -> Explainer:
        """A saved explainer, full weights or adapter, from a folder or fsspec URL; also one that P1 published.

        Raises:
            UserError: the folder is not a whole explainer, or a file in it cannot be read.
        """
        if published.is_published(folder):
            return cls(*published.load_published(folder, device, dtype))
        return cls(*files.load_parts(folder, device, dtype))

    def save(self, folder: str, weights: Iterable[tuple[str, Tensor]] | None = None, readme: str | None = None) -> None:
        """Hugging Face files (weights or adapter, tokenizer), projections, README.md if any, `explainer.json` last.

        Args:
            weights: the trained parameters of `model` by name, for a model that does not hold them whole.
            readme: text of the model card.
        """
        files.save(self.model, self.tokenizer, self.projections, self.card, folder, weights, readme)

    @property
    def causal(self) -> PreTrainedModel:
        """The language model itself, without a PEFT wrapper; adapters live inside its layers."""
        unwrap = getattr(self.model, "get_base_model", None)
        return cast(PreTrainedModel, unwrap() if unwrap is not None else self.model)

    @property
    def device(self) -> torch.device:
        return files.embedding_weight(self.causal).device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter for all that training changes; tied weights appear once."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def merge_adapter(self) -> None:
        """Add the adapter to the weights that it adapts, in the dtype that 4-bit ones are computed in.

        What comes is an explainer of full weights that answers alike. One without an adapter stays as it is.
        """
        if self.card.weights == "lora":
            self.model = merged(self.model)
            base = self.card.base.model_copy(update={"quantization": "none"})
            self.card = self.card.model_copy(update={"weights": "full", "base": base})

    def add_adapter(self, config: LoraConfig, seed: int) -> None:
        """Freeze the language model and put low-rank adapters into it; projections stay trainable.

        Raises:
            UserError: the model has none of the modules that the config names.
        """
        self.model = files.with_adapter(self.causal, config, seed)
        self.card = self.card.model_copy(update={"weights": "lora"})

    def encode(
        self,
        queries: Sequence[Query],
        answers: Sequence[str] | None,
        names: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Encoded]:
        """Token ids, loss masks and vector positions, every query checked.

        Args:
            names: what an error calls each query; "query 0", "query 1", ... if absent.
            max_new_tokens: longest answer that will be asked for; the card's if absent.

        Raises:
            UserError: a vector does not fit the target or is not finite, or a query is longer than the model reads.
        """
        limit = getattr(self.causal.config, "max_position_embeddings", None)
        encoded = []
        for index, query in enumerate(queries):
            name = names[index] if names is not None else f"query {index}"
            for number, vector in enumerate(query.vectors):
                self._check_vector(vector, f"{name}: vector {number}")
            one = self.encoder.encode(query, answers[index] if answers is not None else None)
            length = len(one.ids) + ((max_new_tokens or self.card.max_new_tokens) if answers is None else 0)
            if limit is not None and length > limit:
                raise UserError(f"{name}: {length} tokens with its answer, the explainer reads at most {limit}")
            encoded.append(one)
        return encoded

    def _check_vector(self, vector: Vector, name: str) -> None:
        target = self.card.target
        if vector.values.shape != (target.width,):
            found = "x".join(map(str, vector.values.shape))
            raise UserError(f"{name} has width {found}, expected the target's width {target.width}")
        if not np.isfinite(vector.values).all():
            raise UserError(f"{name} holds NaN or infinite values")
        if not vector.layers or min(vector.layers) < 0 or max(vector.layers) >= target.num_layers:
            raise UserError(f"{name} names layers {list(vector.layers)}, expected some of 0..{target.num_layers - 1}")

    def collate(self, batch: Sequence[Encoded], side: Literal["left", "right"]) -> Collated:
        """The padded batch on the explainer's device."""
        return collate(batch, side, self.encoder.end_id, self.card.target.width, self.device)

    def inputs(self, batch: Collated, side: Literal["left", "right"]) -> Inputs:
        """Token embeddings with projected vectors in place of the placeholders, attention mask and positions."""
        embeds = self.causal.get_input_embeddings()(batch.ids)
        if len(batch.layers):
            projected = self.projections(batch.vectors, batch.layers)
            if self.card.soft_tokens is not None:
                projected = soft_tokens(projected, files.embedding_weight(self.causal), self.card.soft_tokens)
            projected = scaled(projected, self.card.vector_norm).to(embeds.dtype)
            # Out of place: embeddings are a leaf's view, and an in-place write would cut or corrupt their gradient.
            embeds = embeds.index_put((batch.vector_rows, batch.vector_columns), projected)
        if side == "right":
            # Right padding comes after every token that counts, so causal attention alone hides it.
            # Of packed rows transformers reads off the positions which tokens belong together.
            return Inputs(embeds, None, batch.positions)
        return Inputs(embeds, batch.mask.long(), batch.positions)

    def loss(self, batch: Sequence[Encoded]) -> tuple[Float[Tensor, ""], int]:
        """Cross-entropy in nats, summed over the answers' tokens and end tokens, and their number."""
        collated = self.collate(batch, "right")
        inputs = self.inputs(collated, "right")
        logits = logits_at(self.model, self.causal, collated.loss_positions, **inputs._asdict())
        loss = nn.functional.cross_entropy(logits.float(), collated.loss_targets, reduction="sum")
        return loss, len(collated.loss_targets)

    def explain(self, queries: Sequence[Query], batch_size: int) -> list[str]:
        """Greedy answers in the order of the queries; batching changes nothing but speed."""
        return self.answer(self.encode(queries, answers=None), batch_size)

    @torch.no_grad()
    def answer(
        self,
        encoded: Sequence[Encoded],
        batch_size: int,
        in_step: bool = False,
        max_new_tokens: int | None = None,
        streamer: AnswerStreamer | None = None,
    ) -> list[str]:
        """Greedy answers to encoded queries, in their order.

        Args:
            max_new_tokens: longest answer; the card's if absent.
            streamer: hears the answer of a single query while it is written, and may end it early.
            in_step: the weights are sharded over processes, which all call this with equally many queries; each goes
                on with its forward passes until all have finished a batch, because each needs all for every one.
        """
        assert streamer is None or len(encoded) == 1, "one answer is streamed at a time"
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
        answers = [""] * len(encoded)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens or self.card.max_new_tokens,
            eos_token_id=self.encoder.end_id,
            pad_token_id=self.encoder.end_id,
        )
        with self.evaluating():
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                inputs = self.inputs(self.collate([encoded[index] for index in indices], "left"), "left")
                generated = cast(Any, self.causal).generate(
                    inputs_embeds=inputs.inputs_embeds,
                    attention_mask=inputs.attention_mask,
                    generation_config=settings,
                    synced_gpus=in_step,
                    **({} if streamer is None else {"streamer": streamer, "stopping_criteria": [streamer.is_stopped]}),
                )
                for index, ids in zip(indices, generated.tolist(), strict=True):
                    answers[index] = self.encoder.decode(ids)
        return answers

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout inside the block."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)
