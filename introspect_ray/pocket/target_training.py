"""Training of the pocket targets: small stock Hugging Face models on the world's documents. Shapes: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from introspect_ray.config import PocketTargetConfig
from introspect_ray.pocket.text import Corpus, Document

ANSWER_WEIGHT = 10.0
"""Loss weight of tokens that answer; binding an option to its letter is otherwise learned very slowly."""


@dataclass(frozen=True)
class Batch:
    ids: Int[Tensor, "B T"]
    weights: Float[Tensor, "B T"]


def new_model(config: PocketTargetConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Random weights of the named architecture, from torch's current seed."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.width // config.heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[float]]:
    """Ids with BOS, and the loss weight of every token."""
    encoded = tokenizer(document.text, return_offsets_mapping=True)
    weights, start, spans = [], 0, []
    for piece in document.pieces:
        spans.append((start, start + len(piece.text), ANSWER_WEIGHT if piece.role in ("answer", "value") else 1.0))
        start += len(piece.text)
    for first, last in encoded["offset_mapping"]:
        weights.append(
            next((weight for begin, end, weight in spans if begin < last <= end), 0.0) if last > first else 0.0
        )
    return encoded["input_ids"], weights


def batches(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> Iterator[Batch]:
    """Rows of whole documents, the last one of a row cut at its end."""
    while True:
        ids, weights = [], []
        for _ in range(rows):
            row_ids: list[int] = []
            row_weights: list[float] = []
            while len(row_ids) < length:
                more_ids, more_weights = encode(corpus.document(), tokenizer)
                row_ids += more_ids
                row_weights += more_weights
            ids.append(row_ids[:length])
            weights.append(row_weights[:length])
        yield Batch(torch.tensor(ids), torch.tensor(weights))


def weighted_loss(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """Next-token cross-entropy, averaged with the batch's weights."""
    logits = model(input_ids=batch.ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train_target(
    config: PocketTargetConfig,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    checkpoint: Path,
    seed: int,
    progress: Callable[[int, float], None],
) -> PreTrainedModel:
    """The trained model. A checkpoint every `config.checkpoint_every` steps lets the same call go on after a stop."""
    torch.manual_seed(seed)
    model = new_model(config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.05, cycle_momentum=False
    )
    done = _restore(checkpoint, model, optimizer, schedule)
    stream = batches(corpus, tokenizer, config.rows, config.row_length)
    for _ in range(done):
        next(stream)
    for step in range(done, config.steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(model, next(stream))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            _save(checkpoint, step + 1, model, optimizer)
        progress(step + 1, loss.item())
    return model.eval()


def _save(path: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{key}.{name}": state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def _restore(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """The step to go on from; 0 without a checkpoint."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
            step = int(tensors[f"step.{name}"])
    for _ in range(step):
        schedule.step()
    return step
