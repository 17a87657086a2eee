"""Tiny random targets that read and write text, for the tasks' tests."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_models import randomized, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from introspect_ray.interventions.target import Target

WIDTH = 32


def tiny_target(family: str, bos: bool) -> Target:
    """A random target (Llama of 5 layers, or Qwen3 of 4) whose vocabulary is its tokenizer's."""
    tokenizer = tiny_tokenizer(bos)
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = (
            LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=5))
            if family == "llama"
            else Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=4, head_dim=16))
        )
    return Target(randomized(model), tokenizer)


def says_only(target: Target, words: Sequence[str]) -> None:
    """Make every token but these unlikely: each of `words` must be one token."""
    head = target.model.get_output_embeddings().weight
    ids = [target.tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(one) == 1 for one in ids), list(zip(words, ids, strict=True))
    with torch.no_grad():
        kept = head[[one[0] for one in ids]].clone()
        head.zero_()
        head[[one[0] for one in ids]] = kept - kept.mean(0)


def says_text(target: Target) -> None:
    """Make tokens unlikely that are blank or a part of a character."""
    head = target.model.get_output_embeddings().weight
    said = [target.tokenizer.decode([token]).strip() for token in range(len(head))]
    unsaid = torch.tensor([not text or "\ufffd" in text for text in said])
    with torch.no_grad():
        head[unsaid] = 0


def say_various(target: Target, texts: Sequence[str]) -> None:
    """Take out of the head what the last hidden states of `texts` share, so that no token wins on all of them."""
    head = target.model.get_output_embeddings().weight
    with torch.no_grad():
        ids = [torch.tensor([target.encode(text)]) for text in texts]
        shared = torch.stack([target.model.model(input_ids=one).last_hidden_state[0, -1] for one in ids]).mean(0)
        shared /= shared.norm()
        head -= torch.outer(head @ shared, shared)


def greedy(target: Target, text: str) -> str:
    """The most likely next token after `text`, by one plain forward pass."""
    ids = target.tokenizer(text).input_ids
    with torch.no_grad():
        token = target.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
    return target.tokenizer.decode([int(token)]).strip()


def split_by(**splits: Sequence[str]) -> Callable[[str], str]:
    """Group key -> split, from lists of keys."""
    table = {key: split for split, keys in splits.items() for key in keys}
    return table.__getitem__


def fact(
    row: int, subject: str, answer: str, relation: str = "P1", template: str = "The city of {} is"
) -> dict[str, Any]:
    """A normalised CounterFact row."""
    prompt = template.replace("{}", subject)
    return {
        "row": row,
        "subject": subject,
        "relation_id": relation,
        "template": template,
        "prompt": prompt,
        "target_true": answer,
    }
