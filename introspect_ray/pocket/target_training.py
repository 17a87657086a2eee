"""Training of the pocket targets: small stock Hugging Face models on the world's documents.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
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
from introspect_ray.pocket.tokenizer import CHAT
from introspect_ray.pocket.world import World

ANSWER_WEIGHT = 10.0
"""Loss weight of tokens that answer; binding an option to its letter is otherwise learned very slowly."""

HELD_OUT_SEED, HELD_OUT_BATCHES = 1005, 20


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
    """Ids and the loss weight of every token: BOS, the text, the end token.

    What asks for an answer is a turn of a chat half of the time: a user token stands between BOS and the text.
    """
    encoded = tokenizer(document.text, return_offsets_mapping=True)
    weights, start, spans = [], 0, []
    for piece in document.pieces:
        spans.append((start, start + len(piece.text), ANSWER_WEIGHT if piece.role in ("answer", "value") else 1.0))
        start += len(piece.text)
    for first, last in encoded["offset_mapping"]:
        weights.append(
            next((weight for begin, end, weight in spans if begin < last <= end), 0.0) if last > first else 0.0
        )
    ids = list(encoded["input_ids"])
    if document.as_chat:
        ids[1:1], weights[1:1] = [tokenizer.convert_tokens_to_ids(CHAT[0])], [0.0]
    return [*ids, tokenizer.eos_token_id], [*weights, 1.0]


def batches(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: PocketTargetConfig) -> Iterator[Batch]:
    """Rows of whole documents, the last one of a row cut at its end."""
    while True:
        ids, weights = [], []
        for _ in range(config.rows):
            row_ids: list[int] = []
            row_weights: list[float] = []
            while len(row_ids) < config.row_length:
                more_ids, more_weights = encode(corpus.document(), tokenizer)
                row_ids += more_ids
                row_weights += more_weights
            ids.append(row_ids[: config.row_length])
            weights.append(row_weights[: config.row_length])
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
    world: World,
    checkpoint: Path,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> PreTrainedModel:
    """The trained model; `progress` hears (step, steps, loss).

    A checkpoint every `config.checkpoint_every` steps lets the same call go on after a stop, to the same weights.
    """
    torch.manual_seed(seed)
    model = new_model(config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    steps = config.steps
    stream = islice(batches(Corpus(world, seed), tokenizer, config), steps)
    done = _restore(checkpoint, model, optimizer)
    for step, batch in islice(enumerate(stream, start=1), done, None):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % config.checkpoint_every == 0 and step < steps:
            _save(checkpoint, step, model, optimizer)
        progress(step, steps, loss.item())
    return model.eval()


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, config: PocketTargetConfig
) -> float:
    """Mean training loss (nats, weighted as in training) over batches of a corpus that no stage trains on."""
    stream = islice(batches(Corpus(world, HELD_OUT_SEED), tokenizer, config), HELD_OUT_BATCHES)
    losses = [weighted_loss(model, batch).item() for batch in stream]
    return sum(losses) / len(losses)


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant for the first half, then linear to a fiftieth."""
    return min(1.0, step / 100, max(0.02, 2 * (steps - step) / steps))


def _save(path: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{key}.{name}": state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def _restore(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from; 0 without a checkpoint."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    step = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
            step = int(tensors[f"step.{name}"])
    return step
