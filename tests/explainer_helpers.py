"""Tiny models of four families around one byte-level tokenizer, for the explainer's tests."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from introspect_ray.config import ExplainerConfig, ModelConfig
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query, Vector

SPECIALS = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
PLACEHOLDERS = ["<|vector_begin|>", "<|vector|>", "<|vector_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = ("gpt2", "llama", "qwen3", "gemma2")


def tokenizer(placeholders: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte; the special tokens come after the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>")
    fast.add_tokens(SPECIALS + (PLACEHOLDERS if placeholders else []), special_tokens=True)
    fast.chat_template = TEMPLATE if chat else None
    return fast


def model(family: str, vocabulary: int, width: int = 32, seed: int = 0) -> PreTrainedModel:
    """A random two-layer model whose outputs depend visibly on its inputs."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2
                )
            )
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**common))
        if family == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**common))
        return Gemma2ForCausalLM(
            Gemma2Config(**common, query_pre_attn_scalar=8, sliding_window=16, final_logit_softcapping=3.0)
        )


def model_folder(folder: Path, family: str, width: int = 32, placeholders: bool = True, chat: bool = True) -> Path:
    """A checkpoint of `model` with its tokenizer."""
    text = tokenizer(placeholders, chat)
    model(family, len(text), width).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def explainer(folder: Path, family: str = "llama", target_width: int = 32, **options: object) -> Explainer:
    """An untrained explainer of width 32 for a target of `target_width` with 4 layers."""
    path = model_folder(folder, family)
    attention = "eager" if family == "gemma2" else "sdpa"
    config = ExplainerConfig(
        model=ModelConfig(path=str(path), device="cpu", attention=attention), max_new_tokens=6, **options
    )
    return Explainer.create(config, TargetInfo(path="target", width=target_width, num_layers=4), seed=0)


def vector(width: int, seed: int, layers: tuple[int, ...] = (1,), norm: float = 4.0) -> Vector:
    values = np.random.default_rng(seed).normal(size=width).astype(np.float32)
    return Vector(values * norm / np.linalg.norm(values), layers)


def queries(count: int, width: int = 32) -> list[Query]:
    """Queries of very different lengths, with zero, one or two vectors."""
    made = []
    for number in range(count):
        parts: list[str | Vector] = ["What is it? " + "so " * (5 * number % 17)]
        for place in range(number % 3):
            parts += [vector(width, 10 * number + place, layers=(0, 1, 2)[: 1 + place]), f" at layer {place} "]
        made.append(Query(tuple(parts)))
    return made
