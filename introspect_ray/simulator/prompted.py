"""Prompted simulators: any causal language model, asked for a level after every token, all tokens in one pass.

    instructions and examples | description | token <tab> ?
                                              token <tab> ? ...

As in delphi's all-at-once simulator the level of a token is read where the question mark is to be predicted, so that no
prediction depends on an earlier one. The softmax is over the level tokens alone; nothing is generated or parsed. The
model sees a window's tokens up to the one in question and none after it, like the latent itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import ModelConfig
from introspect_ray.features.windows import Window
from introspect_ray.models.loading import load_model, load_tokenizer
from introspect_ray.models.tokens import adds_bos, encode_text
from introspect_ray.simulator.levels import digit_tokens
from introspect_ray.simulator.passes import Ask, LevelPasses
from introspect_ray.simulator.reading import Reading

INSTRUCTIONS = (
    "A unit of a neural network reads a text token by token. A description says what makes it active. After each token"
    " and a tab, write how active it is on that token: a whole number from 0 (not at all) to {most} (as much as it ever"
    " is). Units are silent on almost every token, so nearly all numbers are 0."
)
EXAMPLES: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = (
    ("names of colours", (("She", 0), (" painted", 1), (" the", 0), (" door", 0), (" dark", 3), (" green", 10))),
    ("the word bank where it means the side of a river", (("The", 0), (" bank", 0), (" was", 0), (" closed", 0))),
    ("numbers that count years", ((" It", 0), (" took", 0), (" 12", 8), (" years", 4), (".", 0))),
)
UNKNOWN = "?"
_PLACE = "\ue000"
"""Stands for the description while the prompt is put together; a private character that no prompt has."""


class PromptedSimulator:
    """A language model as it is, told by a prompt what to do."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.levels = digit_tokens(tokenizer)
        before, after = _prompt(tokenizer, most=len(self.levels.ids) - 1).split(_PLACE)
        self._after = self._with_special_tokens(after)
        self._tab, self._rest = self._plain("\t"), self._plain(UNKNOWN) + self._plain("\n")
        bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        base = self._with_special_tokens(before)
        base = base if base[: len(bos)] == bos else bos + base
        self.passes = LevelPasses(model, self.levels, base)
        self._line = lru_cache(maxsize=1 << 16)(self._encode_line)

    @classmethod
    def load(cls, config: ModelConfig) -> PromptedSimulator:
        """Raises UserError if model or tokenizer cannot be loaded, or the tokenizer has no digits."""
        return cls(load_model(config), load_tokenizer(config))

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`. Raises UserError for what is longer than the model takes."""
        readings = {window: self.read(window) for window in dict.fromkeys(windows)}
        return self.passes.read(
            [
                Ask(self.encode(description), readings[window])
                for description, window in zip(descriptions, windows, strict=True)
            ]
        )

    def encode(self, description: str) -> tuple[int, ...]:
        """Ids of a description, and of the prompt up to the window's first token."""
        return (*self._plain(" ".join(description.split())), *self._after)

    def read(self, window: Window) -> Reading:
        """One line per piece of text; tokens that are parts of one character share the line of the character."""
        ids: list[int] = []
        positions: list[int] = []
        waiting = 0
        for index, piece in enumerate(window.pieces):
            waiting += 1
            if piece or index == len(window) - 1:
                line = self._line(piece)
                ids += [*line, *self._tab]
                positions += [len(ids) - 1] * waiting
                ids += self._rest
                waiting = 0
        return Reading(tuple(ids), tuple(positions))

    def _encode_line(self, piece: str) -> tuple[int, ...]:
        # A line break or a tab of the text would look like the end of the line, or of the token.
        return tuple(self._plain(piece.replace("\n", "\\n").replace("\t", "\\t")))

    def _plain(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text, add_bos=False)

    def _with_special_tokens(self, text: str) -> list[int]:
        """Ids of our own text, in which the chat template's special tokens count."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def _prompt(tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """Everything before the window's first token, `_PLACE` for the description; as a chat if there is a template."""
    shown = [
        (description, "".join(f"{token}\t{round(level * most / 10)}\n" for token, level in lines))
        for description, lines in EXAMPLES
    ]
    instructions = INSTRUCTIONS.format(most=most)
    if not tokenizer.chat_template:
        blocks = [f"Description: {description}\n{lines}" for description, lines in shown]
        return "\n".join([instructions, "", *blocks, f"Description: {_PLACE}\n"])
    turns: list[dict[str, str]] = []
    for number, (description, lines) in enumerate([*shown, (_PLACE, "")]):
        # Not every template has a system role.
        start = f"{instructions}\n\n" if number == 0 else ""
        turns.append({"role": "user", "content": f"{start}Description: {description}"})
        if lines:
            turns.append({"role": "assistant", "content": lines})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text
