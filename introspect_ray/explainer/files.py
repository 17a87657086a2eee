"""Building, saving and loading an explainer's parts: weights or adapter, tokenizer, projections, card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
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
from introspect_ray.models.paths import resolve_device
from introspect_ray.models.streaming import (
    INDEX_FILE,
    SINGLE_FILE,
    Streamer,
    WeightFiles,
    empty_model,
    quantize_layers,
    weights_dtype,
)
from introspect_ray.models.structure import decoder_layers

Parts = tuple[nn.Module, PreTrainedTokenizerBase, Projections, ExplainerCard]
ADAPTER_FILE = "adapter_config.json"
EXPORT_FILE_BYTES = 5 * 10**9
README_FILE = "README.md"


def create_parts(config: ExplainerConfig, target: TargetInfo, seed: int) -> Parts:
    """Model, tokenizer, projections and card of an untrained explainer; nothing requires a gradient yet."""
    model, tokenizer, placeholders = _base(config.model)
    return model, tokenizer, *_rest(config, target, seed, model, tokenizer, placeholders)


def stream_parts(
    config: ExplainerConfig,
    target: TargetInfo,
    seed: int,
    lora: LoraConfig | None,
    compute_dtype: torch.dtype | None,
    loaded: Callable[[nn.Module], None],
) -> Parts:
    """Like `create_parts` and, if `lora` is given, `with_adapter`, but no weights exist before they are asked for.

    Whatever training changes requires a gradient already.

    Args:
        compute_dtype: what NF4 weights are computed in; none leaves all weights as they are.
        loaded: called with each decoder layer as soon as its weights are there, and before those of the next.
    """
    tokenizer = load_tokenizer(config.model)
    placeholders = choose_placeholders(tokenizer)
    files = WeightFiles(config.model)
    model = empty_model(config.model, weights_dtype(config.model, files), len(tokenizer))
    if compute_dtype is not None:
        quantize_layers(model, compute_dtype)
    model.requires_grad_(lora is None)
    whole = with_adapter(model, lora, seed) if lora is not None else model
    streamer = Streamer(
        model, files, resolve_device(config.model.device), lambda name, shape: adapter_start(name, shape, seed)
    )
    for layer in decoder_layers(model):
        streamer.load(layer)
        loaded(layer)
    streamer.load(model)
    projections, card = _rest(config, target, seed, model, tokenizer, placeholders)
    changes: dict[str, Any] = {"weights": "full" if lora is None else "lora"}
    if compute_dtype is not None:
        changes["base"] = config.model.model_copy(update={"quantization": "nf4_double"})
    return whole, tokenizer, projections, card.model_copy(update=changes)


def _rest(
    config: ExplainerConfig,
    target: TargetInfo,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    placeholders: PlaceholderTokens,
) -> tuple[Projections, ExplainerCard]:
    """Projections and card of an untrained explainer whose embeddings are there."""
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
    return projections.to(weight.device).requires_grad_(False), card


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
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    with torch.random.fork_rng():  # PEFT draws starts of its own
        try:
            # An empty model's adapters start empty too.
            adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=is_empty)
        except ValueError as error:
            raise UserError(f"lora.target_modules {list(config.target_modules)}: {error}") from None
    if not is_empty:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(adapter_start(name, parameter.shape, seed))
    return adapted


def check_modules(model: ModelConfig, config: LoraConfig) -> None:
    """Refuse names of modules that the model has none of, without its weights.

    Raises:
        UserError: names the modules that are not there, and those that could be meant.
    """
    names = [
        name
        for name, module in decoder_layers(empty_model(model, torch.float32, 0)).named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2
    ]
    unknown = [
        wanted for wanted in config.target_modules if not any(f".{name}".endswith(f".{wanted}") for name in names)
    ]
    if unknown:
        there = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"lora.target_modules names {', '.join(unknown)}, of which model path '{model.path}' has none: expected"
            f" some of {', '.join(there)}"
        )


def adapter_start(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Where an adapter's matrix starts, by its name and the seed alone: zeros for B, and for A uniform in +-1/sqrt(in).

    So it is the same in whatever order, and on however many workers, adapters are made.
    """
    if ".lora_A." not in name:
        return torch.zeros(shape)
    own_seed = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
    return (torch.rand(shape, generator=torch.Generator().manual_seed(own_seed)) * 2 - 1) / shape[-1] ** 0.5


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    projections: Projections,
    card: ExplainerCard,
    folder: str,
    weights: Iterable[tuple[str, Tensor]] | None,
    readme: str | None,
) -> None:
    """Write every file of an explainer's folder, the card last.

    Args:
        weights: the trained parameters of `model` by name, for a model that does not hold them whole; read one by one.
    """
    with local_target(folder) as path, no_progress_bar():
        (path / CARD_FILE).unlink(missing_ok=True)
        if card.weights == "lora":
            # Embeddings stay out: they are the base model's, and new rows are a function of it (see `_grow`).
            given = {} if weights is None else {"state_dict": dict(weights)}
            cast(Any, model).save_pretrained(path, save_embedding_layers=False, **given)
            cast(Any, model).get_base_model().config.save_pretrained(path)
        elif weights is None:
            cast(PreTrainedModel, model).save_pretrained(path)
        else:
            _save_streamed(cast(PreTrainedModel, model), weights, path)
        tokenizer.save_pretrained(path)
        state = {name: tensor.contiguous() for name, tensor in projections.state_dict().items()}
        save_file(state, path / PROJECTIONS_FILE)
        if readme is not None:
            (path / README_FILE).write_text(readme, encoding="utf-8")
        write_card(path, card)


def _save_streamed(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """What `save_pretrained` writes for full weights, holding no more of them at a time than one file takes."""
    for old in path.glob("model*.safetensors*"):
        old.unlink()  # left by an export that was interrupted
    files: list[dict[str, Tensor]] = [{}]
    written: list[dict[str, int]] = []

    def flush() -> None:
        save_file(files[0], path / f"part-{len(written)}.safetensors", metadata={"format": "pt"})
        written.append({name: tensor.nbytes for name, tensor in files[0].items()})
        files[0] = {}

    for name, tensor in weights:
        if files[0] and sum(kept.nbytes for kept in files[0].values()) + tensor.nbytes > EXPORT_FILE_BYTES:
            flush()
        files[0][name] = tensor.contiguous()
    flush()
    if len(written) == 1:
        (path / "part-0.safetensors").rename(path / SINGLE_FILE)
    else:
        names = [f"model-{number + 1:05d}-of-{len(written):05d}.safetensors" for number in range(len(written))]
        for number, name in enumerate(names):
            (path / f"part-{number}.safetensors").rename(path / name)
        content = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in written)},
            "weight_map": {key: name for name, sizes in zip(names, written, strict=True) for key in sizes},
        }
        (path / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(path)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(path)


def load_parts(
    folder: str, device: str, dtype: str, adapter: str = "default", shared: nn.Module | None = None
) -> Parts:
    """Model, tokenizer, projections and card of a saved explainer.

    Args:
        adapter: what PEFT calls its adapter, if it is one.
        shared: a model that holds other adapters of the same base; the adapter is put beside them.
    """
    card = read_card(folder)
    with local_copy(folder) as path:
        # What a folder says of running its own code is not this process's consent to run it.
        base = card.base.model_copy(update={"device": device, "dtype": dtype, "trust_remote_code": False})
        try:
            if card.weights == "lora":
                import peft

                tokenizer = load_tokenizer(base.model_copy(update={"path": str(path), "revision": None}))
                if shared is None:
                    start, _, _ = _base(base)
                    model: nn.Module = peft.PeftModel.from_pretrained(start, str(path), adapter_name=adapter)
                else:
                    model = shared
                    cast(Any, shared).load_adapter(str(path), adapter_name=adapter)
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
