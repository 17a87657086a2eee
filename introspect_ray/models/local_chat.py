"""Chat models in this process: any causal LM, by its chat template where it has one, else as a plain prompt.

Only the frame around the messages, which comes from the template, is tokenized with special tokens enabled; what is
said is tokenized with them disabled, so that no text can end its own turn. B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import ChatConfig
from introspect_ray.errors import UserError
from introspect_ray.models.chat import Choice, Completion, Conversation, Failure
from introspect_ray.models.loading import load_model, load_tokenizer
from introspect_ray.models.structure import text_config
from introspect_ray.models.tokens import adds_bos, encode_text

TOO_LONG = "prompt_too_long"
_MARK = "introspect-ray-message-{}-text"
_PLAIN_ANSWER = "\n\nAnswer:"


class LocalChat:
    """A `ChatModel` of a loaded causal language model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ChatConfig, seed: int):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self._seed = seed
        self._end_ids = _end_ids(model, tokenizer)

    @classmethod
    def load(cls, config: ChatConfig, seed: int) -> LocalChat:
        """The model that `config.local` names. Raises UserError if it cannot be loaded."""
        return cls(load_model(config.local.model), load_tokenizer(config.local.model), config, seed)

    def complete(self, conversations: Sequence[Conversation], sample: int = 0) -> list[Completion | Failure]:
        """Greedy answers, or drawn ones whose chance depends on seed, sample and conversation alone."""
        prompts = [self.encode(conversation) for conversation in conversations]
        answers: dict[int, Completion | Failure] = self._too_long(prompts, self.config.max_tokens)
        for rows in self._batches(prompts, answers):
            for row, answer in zip(rows, self._generate([prompts[row] for row in rows], sample), strict=True):
                answers[row] = answer
        return [answers[row] for row in range(len(prompts))]

    def choose(self, conversations: Sequence[Conversation], choices: Sequence[str]) -> list[Choice | Failure]:
        """The likeliest choice, by the exact probability that the model begins its answer with it.

        A choice counts as it is written and with a capital; probabilities are shares of those of all choices.
        """
        variants = [
            (number, ids) for number, choice in enumerate(choices) for ids in self._spellings(choice)
        ]  # of every choice, each way to write it
        prompts = [self.encode(conversation) for conversation in conversations]
        answers: dict[int, Choice | Failure] = self._too_long(prompts, max(len(ids) for _, ids in variants))
        for rows in self._batches(prompts, answers):
            logs = self._log_probabilities([prompts[row] for row in rows], [ids for _, ids in variants])
            for row, of_variants in zip(rows, logs.double(), strict=True):
                totals = torch.stack(
                    [
                        torch.logsumexp(of_variants[[n for n, (of, _) in enumerate(variants) if of == number]], 0)
                        for number in range(len(choices))
                    ]
                )
                shares = totals.softmax(0)
                answers[row] = Choice(int(shares.argmax()), tuple(shares.tolist()))
        return [answers[row] for row in range(len(prompts))]

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation up to where the answer begins."""
        ids: list[int] = []
        for part in _framed(self.tokenizer, conversation):
            if part.is_trusted:
                ids += self.tokenizer(part.text, add_special_tokens=False)["input_ids"] if part.text else []
            else:
                ids += encode_text(self.tokenizer, part.text, add_bos=False)
        return ids

    def _spellings(self, choice: str) -> list[tuple[int, ...]]:
        lead = "" if self.tokenizer.chat_template else " "
        texts = dict.fromkeys((choice, choice[:1].upper() + choice[1:]))
        return [tuple(encode_text(self.tokenizer, lead + text, add_bos=False)) for text in texts]

    def _too_long(self, prompts: Sequence[Sequence[int]], num_answered: int) -> dict[int, Any]:
        """Row -> failure, of prompts that leave no room for an answer."""
        limit = getattr(text_config(self.model), "max_position_embeddings", None)
        return {
            row: Failure(TOO_LONG, f"{len(prompt)} tokens and {num_answered} of the answer, the model takes {limit}")
            for row, prompt in enumerate(prompts)
            if limit is not None and len(prompt) + num_answered > limit
        }

    def _batches(self, prompts: Sequence[Sequence[int]], failed: dict[int, Any]) -> Iterator[list[int]]:
        """Rows that are answered together, of similar length."""
        order = sorted((row for row in range(len(prompts)) if row not in failed), key=lambda row: len(prompts[row]))
        size = self.config.local.batch_size
        for start in range(0, len(order), size):
            yield order[start : start + size]

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], sample: int) -> list[Completion]:
        ids, mask = self._padded(prompts)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.config.max_tokens,
            eos_token_id=self._end_ids or None,
            pad_token_id=self._pad_id,
        )
        drawn = [GumbelNoise(self.config.temperature, [self._draw(prompt, sample) for prompt in prompts])]
        generated = cast(Any, self.model).generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=drawn if self.config.temperature else [],
        )
        return [
            self._completion(prompt, answer)
            for prompt, answer in zip(prompts, generated[:, ids.shape[1] :].tolist(), strict=True)
        ]

    def _completion(self, prompt: Sequence[int], answer: list[int]) -> Completion:
        ends = [position for position, token in enumerate(answer) if token in self._end_ids]
        kept = answer[: ends[0]] if ends else answer
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        return Completion(text, len(prompt), len(kept), truncated=not ends)

    def _draw(self, prompt: Sequence[int], sample: int) -> int:
        content = json.dumps([self._seed, sample, list(prompt)]).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")

    @torch.no_grad()
    def _log_probabilities(
        self, prompts: Sequence[Sequence[int]], endings: Sequence[Sequence[int]]
    ) -> Float[Tensor, "B endings"]:
        """Log of the chance that each prompt goes on with each ending."""
        if all(len(ending) == 1 for ending in endings):
            ids, mask = self._padded(prompts)
            logits = cast(Any, self.model)(input_ids=ids, attention_mask=mask, position_ids=_positions(mask)).logits
            return logits[:, -1].float().log_softmax(-1)[:, [ending[0] for ending in endings]].cpu()
        columns = []
        for ending in endings:
            ids, mask = self._padded([[*prompt, *ending] for prompt in prompts])
            logits = cast(Any, self.model)(input_ids=ids, attention_mask=mask, position_ids=_positions(mask)).logits
            before = logits[:, -len(ending) - 1 : -1].float().log_softmax(-1)
            tokens = torch.tensor(ending, device=before.device).expand(len(prompts), -1)
            columns.append(before.gather(-1, tokens[..., None])[..., 0].sum(-1).cpu())
        return torch.stack(columns, dim=1)

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else (self._end_ids[0] if self._end_ids else 0)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Ids and mask, padded on the left."""
        length = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([[self._pad_id] * (length - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids, mask


class GumbelNoise(LogitsProcessor):
    """Makes the largest score a draw from softmax(scores / temperature), with a generator for every row.

    So a row's draw depends neither on the rows beside it nor on the global generators.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]):
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002
        width = scores.shape[-1]
        noise = torch.stack([-torch.empty(width).exponential_(generator=one).log() for one in self.generators])
        return scores / self.temperature + noise.to(scores.device)


@dataclass(frozen=True)
class _Part:
    """A stretch of a prompt: from the template, or said by someone."""

    text: str
    is_trusted: bool


def _framed(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[_Part]:
    """The conversation in parts, in order. Raises UserError if the template repeats or drops a message."""
    if not tokenizer.chat_template:
        return _plain(tokenizer, conversation)
    marks = [_MARK.format(number) for number in range(len(conversation))]
    rendered = str(
        tokenizer.apply_chat_template(
            [{"role": message.role, "content": mark} for message, mark in zip(conversation, marks, strict=True)],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # read by templates of reasoning models and ignored by all others
        )
    )
    parts: list[_Part] = []
    for message, mark in zip(conversation, marks, strict=True):
        before, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            raise UserError(f"the chat template of {tokenizer.name_or_path!r} repeats or drops a message")
        parts += [_Part(before, True), _Part(message.content, False)]
    return [*parts, _Part(rendered, True)]


def _plain(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[_Part]:
    parts = [_Part(str(tokenizer.bos_token), True)] if adds_bos(tokenizer) else []
    for message in conversation:
        text = message.content + _PLAIN_ANSWER if message.role == "user" else f" {message.content}\n\n"
        parts.append(_Part(text, False))
    return parts


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer, by the tokenizer and by the checkpoint's own settings."""
    settings: Any = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(settings if isinstance(settings, list | tuple) else [settings])]
    return list(dict.fromkeys(int(cast(Any, one)) for one in found if one is not None))


def _positions(mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of every token, counted from its row's first."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
