"""Building, saving and loading an explainer's parts: weights or adapter, tokenizer, projections, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import ExplainerConfig, LoraConfig, ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import (
    CARD_FILE,
    PROJECTIONS_FILE,
    ExplainerCard,
    TargetInfo,
    local_copy,
    local_target,
    read_card,
    write_card,
)
from introspect_ray.explainer.encoding import Frame, PlaceholderTokens, choose_placeholders
from introspect_ray.explainer.fitted import read_maps
from introspect_ray.explainer.projections import Projections, resolve_kind
from introspect_ray.models.loading import load_model, load_tokenizer, no_progress_bar

Parts = tuple[nn.Module, PreTrainedTokenizerBase, Projections, ExplainerCard]
ADAPTER_FILE = "adapter_config.json"
README_FILE = "README.md"


def create_parts(config: ExplainerConfig, target: TargetInfo, seed: int) -> Parts:
    """Model, tokenizer, projections and card of an untrained explainer; nothing requires a gradient yet."""
    model, tokenizer, placeholders = _base(config.model)
    weight = embedding_weight(model)
    width = weight.shape[1]
    projections = Projections(resolve_kind(config, target.width, width), target.num_layers, target.width, width)
    projections.initialize(seed)
    if config.fitted_projection is not None:
        projections.start_from(read_maps(config.fitted_projection))
    card = ExplainerCard(
        target=target,
        base=config.model,
        weights="full",
        placeholders=placeholders,
        frame=Frame.of(tokenizer),
        projection=projections.kind,
        vector_norm=_vector_norm(config, model),
        soft_tokens=config.soft_tokens,
        max_new_tokens=config.max_new_tokens,
    )
    return model, tokenizer, projections.to(weight.device).requires_grad_(False), card


def embedding_weight(model: nn.Module) -> Tensor:
    """Token embeddings, vocabulary x width; also tells a model's device and dtype."""
    return cast(Tensor, cast(PreTrainedModel, model).get_input_embeddings().weight)


def with_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> nn.Module:
    """The model frozen, with fresh low-rank adapters that depend on the seed alone."""
    import peft  # Slow, and it brings bitsandbytes along: only adapters need it.

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, settings)
        except ValueError as error:
            raise UserError(f"lora.target_modules {list(config.target_modules)}: {error}") from None


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    projections: Projections,
    card: ExplainerCard,
    folder: str,
    readme: str | None,
) -> None:
    """Write every file of an explainer's folder, the card last."""
    with local_target(folder) as path, no_progress_bar():
        (path / CARD_FILE).unlink(missing_ok=True)
        if card.weights == "lora":
            # Embeddings stay out: they are the base model's, and new rows are a function of it (see `_grow`).
            cast(Any, model).save_pretrained(path, save_embedding_layers=False)
            cast(Any, model).get_base_model().config.save_pretrained(path)
        else:
            cast(PreTrainedModel, model).save_pretrained(path)
        tokenizer.save_pretrained(path)
        state = {name: tensor.contiguous() for name, tensor in projections.state_dict().items()}
        save_file(state, path / PROJECTIONS_FILE)
        if readme is not None:
            (path / README_FILE).write_text(readme, encoding="utf-8")
        write_card(path, card)


def load_parts(folder: str, device: str, dtype: str) -> Parts:
    """Model, tokenizer, projections and card of a saved explainer."""
    card = read_card(folder)
    with local_copy(folder) as path:
        # What a folder says of running its own code is not this process's consent to run it.
        base = card.base.model_copy(update={"device": device, "dtype": dtype, "trust_remote_code": False})
        try:
            if card.weights == "lora":
                import peft

                start, _, _ = _base(base)
                tokenizer = load_tokenizer(base.model_copy(update={"path": str(path), "revision": None}))
                model: nn.Module = peft.PeftModel.from_pretrained(start, str(path))
            else:
                own = base.model_copy(update={"path": str(path), "revision": None})
                model, tokenizer = load_model(own), load_tokenizer(own)
            projections = _load_projections(path, card, model)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"explainer {folder} cannot be loaded: {error}") from None
    return model.eval(), tokenizer, projections, card


def _load_projections(path: Path, card: ExplainerCard, model: nn.Module) -> Projections:
    weight = embedding_weight(model)
    projections = Projections(card.projection, card.target.num_layers, card.target.width, weight.shape[1])
    projections.load_state_dict(load_file(path / PROJECTIONS_FILE))
    return projections.to(weight.device).requires_grad_(False)


def _base(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PlaceholderTokens]:
    """A model and its tokenizer, both with placeholder tokens."""
    model, tokenizer = load_model(config), load_tokenizer(config)
    placeholders = choose_placeholders(tokenizer)
    _grow(model, len(tokenizer))
    return model, tokenizer, placeholders


@torch.no_grad()
def _grow(model: PreTrainedModel, num_tokens: int) -> None:
    """Give new tokens rows in the embeddings and in the head: the mean of all others, so nothing is drawn at random."""
    old = embedding_weight(model).shape[0]
    if num_tokens <= old:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            weight = cast(Tensor, module.weight)
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


@torch.no_grad()
def input_embeddings(model: PreTrainedModel, ids: Int[Tensor, " N"]) -> Float[Tensor, "N E"]:
    """Token embeddings as they enter the first layer (some models scale them on the way), in float32."""
    embeddings = model.get_input_embeddings()
    return embeddings(ids.to(embedding_weight(model).device)).float()


def _vector_norm(config: ExplainerConfig, model: PreTrainedModel) -> float | None:
    """Norm that every projected vector is scaled to: `vector_scale` times the mean norm of all token embeddings."""
    if config.vector_scale is None:
        return None
    ids = torch.arange(embedding_weight(model).shape[0])
    norms = [input_embeddings(model, chunk).norm(dim=-1) for chunk in ids.split(8192)]
    return config.vector_scale * float(torch.cat(norms).mean())
