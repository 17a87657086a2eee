"""What a process that holds a target answers: activations, vectors, interventions and latents. No Ray here.

Everything is the library's own calls; a failure is a value, so that one item's does not take others along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from introspect_ray.config import InputAblationConfig, ServedTarget
from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.reading import read_places
from introspect_ray.features.sae import load_sae
from introspect_ray.interventions.ablation import ablate_text
from introspect_ray.interventions.clean import check_prompts
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

NEXT_TOKENS = 10


class TargetService:
    """A target and its coders. Not for several threads at once."""

    def __init__(self, target: Target, coders: Mapping[str, SparseCoder], vector_entries: int):
        """`vector_entries`: numbers that one answer's vectors may have."""
        self.target = target
        self.coders = dict(coders)
        self.vector_entries = vector_entries

    @classmethod
    def load(cls, served: ServedTarget, vector_entries: int) -> TargetService:
        """Raises UserError if the target or a coder cannot be loaded."""
        target = Target.load(served.model)
        coders = {coder.name: load_sae(coder.path).to(target.device) for coder in served.coders}
        service = cls(target, coders, vector_entries)
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
        if entries > self.vector_entries:
            message = f"{entries} numbers of vectors asked for, at most {self.vector_entries} are given"
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
        """What the items stand for; texts run together, each once."""
        encoded = {item.text: self._try_encode(item.text) for item in items if isinstance(item, TokenItem)}
        ids = {text: found for text, found in encoded.items() if not isinstance(found, Failed)}
        runs = dict(zip(ids, self.target.clean_runs(list(ids.values())), strict=True)) if ids else {}

        def vector(item: TokenItem | LatentItem) -> VectorAt | Failed:
            if isinstance(item, LatentItem):
                return self._latent_vector(item)
            found = encoded[item.text]
            return found if isinstance(found, Failed) else _residual(runs[item.text], item)

        return [vector(item) for item in items]

    @failing
    def _try_encode(self, text: str) -> list[int]:
        return self._encode(text, "text")[0]

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

    @failing
    def true_activations(self, text: str, coder: str, latent: int) -> TrueActivations | Failed:
        """A latent's activations on a text."""
        found = self._coder(coder, latent)
        if not adds_bos(self.target.tokenizer):
            raise FieldError("latents are read from targets that begin texts with a token of their own", "coder")
        ids, offsets = self._encode(text, "text")
        if len(ids) == 1:
            raise FieldError("the text has no tokens", "text")
        values = latent_activations(self.target, found, ids, latent)
        return TrueActivations(tokens_of(text, offsets)[1:], values.cpu().double().numpy())

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
        with field(name):
            check_prompts(self.target.model, [ids])
        return ids, offsets


def latent_activations(target: Target, coder: SparseCoder, ids: Sequence[int], latent: int) -> Float[Tensor, " T"]:
    """One latent's activation at every token of a prompt but the first, begin-of-text."""
    (read,) = read_places(target.model, [ids], coder.layer, [coder.reads])
    with torch.no_grad():
        return coder.encode(read)[:, latent]


def tokens_of(text: str, offsets: Sequence[Offset]) -> list[Token]:
    return [
        Token(index=index, text=text[start:end], start=start, end=end) for index, (start, end) in enumerate(offsets)
    ]


@failing
def _residual(run: CleanRun, item: TokenItem) -> VectorAt:
    with field("layer"):
        check_layers((item.layer,), len(run.residuals))
    with field("position"):
        check_positions((item.position,), len(run), "position")
    return VectorAt(run.residuals[item.layer, item.position].float().cpu().numpy(), item.layer)
