"""What a process that holds a target answers: activations, vectors, interventions and latents. No Ray here.

Everything is the library's own calls; a failure is a value, so that one item's does not take others along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from introspect_ray.config import InputAblationConfig, LimitsConfig, ServedTarget
from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.reading import read_places
from introspect_ray.features.sae import load_sae
from introspect_ray.interventions.ablation import ablate_text
from introspect_ray.interventions.clean import check_prompts
from introspect_ray.interventions.forward import padded_budget, run_padded
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import CleanRun, Intervention, check_layers, check_positions
from introspect_ray.models.tokens import Offset, adds_bos, token_text
from introspect_ray.serving.api import (
    AblateRequest,
    Activations,
    ActivationsRequest,
    Clean,
    Failed,
    LatentItem,
    NextToken,
    PatchRequest,
    ScoreLatentItem,
    Token,
    TokenItem,
    Truth,
    encoded_vectors,
    failed,
)
from introspect_ray.serving.fields import FieldError, failing, field
from introspect_ray.serving.hints import is_hint
from introspect_ray.serving.values import Question, TrueActivations, VectorAt
from introspect_ray.tasks.activation_patching import ActivationPatching
from introspect_ray.tasks.input_ablation import MARKED, InputAblation
from introspect_ray.tasks.verdict import has_text

T = TypeVar("T")

NEXT_TOKENS = 10


@dataclass(frozen=True)
class _Read:
    """A text as tokens, and the numbers of the items that ask about it."""

    text: str
    ids: list[int]
    offsets: list[Offset]
    items: list[int]


class TargetService:
    """A target and its coders. Not for several threads at once."""

    def __init__(self, target: Target, coders: Mapping[str, SparseCoder], limits: LimitsConfig):
        self.target = target
        self.coders = dict(coders)
        self.limits = limits
        # Of all that a batch of texts needs, and of its forward pass alone.
        self._budget, self._pass_budget = padded_budget(target.device), padded_budget(target.device)

    @classmethod
    def load(cls, served: ServedTarget, limits: LimitsConfig) -> TargetService:
        """Raises UserError if the target or a coder cannot be loaded."""
        target = Target.load(served.model)
        coders = {coder.name: load_sae(coder.path).to(target.device) for coder in served.coders}
        service = cls(target, coders, limits)
        service.warm_up()
        return service

    def warm_up(self) -> None:
        """The checks that a target makes of itself at its first use."""
        ids = self.target.encode("a b c")
        self.target.clean_runs([ids])
        self.target.paired_logits([(ids, ids[:-1])])

    @failing
    def activations(self, request: ActivationsRequest) -> Activations | Failed:
        """Residual norms and vectors, and the most likely next tokens."""
        layers = request.layers if request.layers is not None else list(range(self.target.num_layers))
        ids, offsets = self._encode(request.text, "text")
        with field("layers"):
            check_layers(tuple(layers), self.target.num_layers)
        with field("positions"):
            check_positions(tuple(request.positions or ()), len(ids), "position")
        positions = (request.positions or list(range(len(ids)))) if request.vectors else []
        entries = len(layers) * len(positions) * self.target.width
        if entries > self.limits.vector_entries:
            message = f"{entries} numbers of vectors asked for, at most {self.limits.vector_entries} are given"
            return failed("too_large", f"{message}: ask for fewer layers or positions", "positions")
        (run,) = self.target.clean_runs([ids])
        chosen = run.residuals[layers].float()
        best = run.logits.float().softmax(-1).topk(min(NEXT_TOKENS, len(run.logits)))
        return Activations(
            tokens=tokens_of(request.text, offsets),
            layers=layers,
            norms=chosen.norm(dim=-1).tolist(),
            positions=positions,
            vectors=encoded_vectors(chosen[:, positions].cpu().numpy()) if request.vectors else None,
            next_tokens=[
                NextToken(text=str(self.target.tokenizer.decode([token])), probability=probability)
                for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ],
        )

    def vectors(self, items: Sequence[TokenItem | LatentItem]) -> list[VectorAt | Failed]:
        """What the items stand for; each text runs once."""

        places = {n: (one.layer, one.position) for n, one in enumerate(items) if isinstance(one, TokenItem)}

        def read(texts: list[_Read]) -> list[list[VectorAt | Failed]]:
            # A clean run holds all layers and positions: only what is asked for outlives its batch.
            runs = self.target.clean_runs([one.ids for one in texts])
            return [[_residual(run, *places[n]) for n in one.items] for one, run in zip(texts, runs, strict=True)]

        of_texts = self._of_texts({n: one.text for n, one in enumerate(items) if isinstance(one, TokenItem)}, read)
        return [self._latent_vector(one) if isinstance(one, LatentItem) else of_texts[n] for n, one in enumerate(items)]

    def _of_texts(
        self, texts: Mapping[int, str], read: Callable[[list[_Read]], list[list[T | Failed]]]
    ) -> dict[int, T | Failed]:
        """What `read` finds in the texts of items, by the items' numbers; as many texts at once as memory allows.

        `read`: for each text, the answers to its items.
        """
        answers: dict[int, T | Failed] = {}
        items: dict[str, list[int]] = {}
        for number, text in texts.items():
            items.setdefault(text, []).append(number)
        reads: list[_Read] = []
        for text, numbers in items.items():
            encoded = self._try_encode(text)
            if isinstance(encoded, Failed):
                answers |= dict.fromkeys(numbers, encoded)
            else:
                reads.append(_Read(text, *encoded, numbers))
        lengths = [len(one.ids) for one in reads]
        for batch, found in run_padded(lengths, self._budget, lambda batch: read([reads[index] for index in batch])):
            for index, of_text in zip(batch, found, strict=True):
                answers |= dict(zip(reads[index].items, of_text, strict=True))
        return answers

    @failing
    def _try_encode(self, text: str) -> tuple[list[int], list[Offset]]:
        return self._encode(text, "text")

    @failing
    def _latent_vector(self, item: LatentItem) -> VectorAt | Failed:
        coder = self._coder(item.coder, item.latent)
        return VectorAt(coder.feature_vectors[item.latent].float().cpu().numpy(), coder.layer)

    def _coder(self, name: str, latent: int) -> SparseCoder:
        coder = self.coders.get(name)
        if coder is None:
            known = f"expected one of {', '.join(self.coders)}" if self.coders else "it has none"
            raise FieldError(f"the target has no coder of this name: {known}", "coder")
        if latent >= coder.num_latents:
            raise FieldError(f"latent {latent} is out of range: the coder has {coder.num_latents}", "latent")
        return coder

    def true_activations(self, items: Sequence[ScoreLatentItem]) -> list[TrueActivations | Failed]:
        """Each item's latent's activations on its text."""
        answers: dict[int, TrueActivations | Failed] = {}
        by_coder: dict[str, dict[int, str]] = {}
        for number, item in enumerate(items):
            if failure := self._unreadable(item):
                answers[number] = failure
            else:
                by_coder.setdefault(item.coder, {})[number] = item.text
        for name, texts in by_coder.items():
            answers |= self._of_texts(texts, partial(self._read_latents, self.coders[name], items))
        return [answers[number] for number in range(len(items))]

    @failing
    def _unreadable(self, item: ScoreLatentItem) -> None:
        """A failure if the item's latent has no activations on any text."""
        self._coder(item.coder, item.latent)
        if not adds_bos(self.target.tokenizer):
            raise FieldError("latents are read from targets that begin texts with a token of their own", "coder")

    def _read_latents(
        self, coder: SparseCoder, items: Sequence[ScoreLatentItem], texts: list[_Read]
    ) -> list[list[TrueActivations | Failed]]:
        ids = [one.ids for one in texts]
        (vectors,) = read_places(self.target.model, ids, coder.layer, [coder.reads], self._pass_budget)
        answers: list[list[TrueActivations | Failed]] = []
        for one, rows in zip(texts, vectors.split([len(one) - 1 for one in ids]), strict=True):
            if not len(rows):
                answers.append([failed("bad_request", "the text has no tokens", "text")] * len(one.items))
                continue
            with torch.no_grad():  # text by text, because a coder has far more latents than a layer has dimensions
                latents = coder.encode(rows)[:, [items[number].latent for number in one.items]]
            tokens = tokens_of(one.text, one.offsets)[1:]
            answers.append([TrueActivations(tokens, column) for column in latents.T.cpu().double().numpy()])
        return answers

    @failing
    def patch(self, request: PatchRequest) -> Question | Failed:
        """The question about a patch as the task asks it, and what the target says with and without it."""
        first, last = request.layers
        text, offsets = self._encode(request.text, "text")
        source, _ = self._encode(request.source_text, "source_text")
        if first > last:
            raise FieldError(f"layers {first} to {last} are no block: expected the lower one first", "layers")
        with field("layers"):
            check_layers((first, last), self.target.num_layers)
        with field("position"):
            check_positions((request.position,), len(text), "position")
        with field("source_position"):
            check_positions((request.source_position,), len(source), "position")
        block = tuple(range(first, last + 1))
        clean, other = self.target.clean_runs([text, source])
        vector = other.residuals[first : last + 1, request.source_position].float().mean(0)
        patched = Intervention(layers=block, positions=(request.position,), vectors=vector[None], mode="replace")
        (after,) = self.target.patched_logits([clean], [[patched]])[0]
        start, end = offsets[request.position]
        record = {
            "text": request.text,
            "token_start": start,
            "token_end": end,
            "layers": list(block),
            "vector": vector.cpu().numpy(),
        }
        return self._question(ActivationPatching(), record, clean.logits, after)

    @failing
    def ablate(self, request: AblateRequest, layout: InputAblationConfig) -> Question | Failed:
        """The question about a span as the task asks it, and what the target says with and without the span.

        `layout`: how hints were worded in the explainer's training; other spans are marked in the text.
        """
        start, end = request.span
        with field("span"):
            shorter = ablate_text(request.text, start, end)
        whole, _ = self._encode(request.text, "text")
        rest, _ = self._encode(shorter, "span")
        one, other = self.target.paired_logits([(whole, rest)])
        record = {
            "text": request.text,
            "hint_start": start,
            "hint_end": end,
            "hint_is": "hint" if is_hint(request.text[start:end], layout) else MARKED,
        }
        return self._question(InputAblation(), record, one[0], other[0])

    def _question(
        self,
        task: ActivationPatching | InputAblation,
        record: dict[str, Any],
        before: Float[Tensor, " V"],
        after: Float[Tensor, " V"],
    ) -> Question:
        original, content = (token_text(self.target.tokenizer, int(logits.argmax())) for logits in (before, after))
        for said, which in ((original, "without"), (content, "with")):
            if not has_text(said):
                raise FieldError(f"{which} the intervention the target says nothing that is text", "text")
        truth = Truth(changed=content != original, content=content)
        query = task.render({**record, "original": original, **truth.model_dump()}).query
        return Question(query, Clean(token=original), truth)

    def _encode(self, text: str, name: str) -> tuple[list[int], list[Offset]]:
        """Ids and offsets of a text that the target takes."""
        ids, offsets = self.target.encode_with_offsets(text)
        check_tokens(len(ids), self.limits, name)
        with field(name):
            check_prompts(self.target.model, [ids])
        return ids, offsets


def check_tokens(count: int, limits: LimitsConfig, name: str) -> None:
    """Raises FieldError for a text of more tokens than one may have, begin-of-text included."""
    if count > limits.text_tokens:
        raise FieldError(f"{count} tokens found, at most {limits.text_tokens} are taken", name, "too_large")


def tokens_of(text: str, offsets: Sequence[Offset]) -> list[Token]:
    return [
        Token(index=index, text=text[start:end], start=start, end=end) for index, (start, end) in enumerate(offsets)
    ]


@failing
def _residual(run: CleanRun, layer: int, position: int) -> VectorAt:
    with field("layer"):
        check_layers((layer,), len(run.residuals))
    with field("position"):
        check_positions((position,), len(run), "position")
    # A copy, because a view would keep the whole run.
    return VectorAt(run.residuals[layer, position].float().cpu().numpy().copy(), layer)
