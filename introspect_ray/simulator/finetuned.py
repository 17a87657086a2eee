"""Fine-tuned simulators: description and window in one pass, the level of a token read at the token itself.

    ids      begin-of-text, description, separator      window
    logits                                              the 11 level tokens, at every token of the window

On disk: a Hugging Face folder with `simulator.json`, written last. P1's published simulator is the same idea with
another prefix, the first 11 tokens of the vocabulary as levels, and special tokens that were given new ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import local_copy, local_target, read_versioned, write_versioned
from introspect_ray.features.windows import Window
from introspect_ray.models.loading import load_model, load_tokenizer, no_progress_bar
from introspect_ray.models.tokens import adds_bos, encode_text
from introspect_ray.simulator.base import NUM_LEVELS
from introspect_ray.simulator.levels import class_tokens
from introspect_ray.simulator.passes import Ask, LevelPasses
from introspect_ray.simulator.reading import Reading, read_window

FORMAT_VERSION = 1
SIMULATOR_FILE = "simulator.json"

PUBLISHED_PREFIX = "## Neuron Description: {description}\n\n ## Input: "
"""Prefix of P1's published simulator (observatory's simulator); its checkpoints know no other."""
PUBLISHED_IDS: Mapping[int, int] = {128000: 128257, 128006: 128258, 128007: 128259, 128009: 128260}
"""Ids that it gives the special tokens of Llama 3, in prefix and window alike; its vocabulary is 5 larger."""


class LatentSplit(BaseModel):
    """Which latents of which coder a simulator was trained without; training/simulator_split.py says how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    held_out_share: float
    """Share of the latents."""
    seed: int
    coder: str
    coder_digest: str


class SimulatorCard(BaseModel):
    """Everything that a simulator needs and that its weights and tokenizer do not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["own", "published"]
    level_ids: tuple[int, ...]
    """Tokens of the levels 0..10."""
    prefix: str
    """What stands before a window, with `{description}` in it."""
    separator: int | None = None
    """Special token between the two, which no description can spell; none if the prefix's own text has to do."""
    base: str
    """Model that training started from."""
    split: LatentSplit | None = None
    """None for what was not trained by jobs/train_simulator.py."""

    @property
    def ids(self) -> Mapping[int, int]:
        """Ids that stand for others."""
        return PUBLISHED_IDS if self.layout == "published" else {}


def own_card(base: str, tokenizer: PreTrainedTokenizerBase, split: LatentSplit | None = None) -> SimulatorCard:
    """The layout that we train: description, end-of-text, window; the first tokens of the vocabulary as levels.

    One token that stands nowhere else tells from its first layer on what is description and what is window.
    """
    separator = tokenizer.eos_token_id
    return SimulatorCard(
        layout="own",
        level_ids=tuple(range(NUM_LEVELS)),
        prefix="{description}" if separator is not None else "{description}\n",
        separator=separator,
        base=base,
        split=split,
    )


class FinetunedSimulator:
    """A causal language model whose level tokens say how active a latent is; P1, section on the simulator."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: SimulatorCard):
        self.model = model
        self.tokenizer = tokenizer
        self.card = card
        self.levels = class_tokens(card.level_ids)
        self._passes = LevelPasses(model, self.levels)
        self._add_bos = adds_bos(tokenizer)

    @classmethod
    def create(cls, config: ModelConfig, split: LatentSplit | None = None) -> FinetunedSimulator:
        """An untrained one of our layout, its weights those of `config`, to be trained without latents of `split`."""
        tokenizer = load_tokenizer(config)
        return cls(load_model(config), tokenizer, own_card(config.path, tokenizer, split))

    @classmethod
    def load(cls, config: ModelConfig) -> FinetunedSimulator:
        """A simulator that `save` wrote into the folder `config.path`. Raises UserError if it holds none."""
        card = read_simulator_card(config.path)
        with local_copy(config.path) as path:
            local = config.model_copy(update={"path": str(path)})
            return cls(load_model(local), load_tokenizer(local), card)

    @classmethod
    def load_published(cls, config: ModelConfig) -> FinetunedSimulator:
        """A checkpoint of P1's layout: plain weights and tokenizer, no `simulator.json`."""
        card = SimulatorCard(
            layout="published", level_ids=tuple(range(NUM_LEVELS)), prefix=PUBLISHED_PREFIX, base=config.path
        )
        return cls(load_model(config), load_tokenizer(config), card)

    def save(self, folder: str) -> None:
        """Weights, tokenizer and, last, the card."""
        with local_target(folder, last=SIMULATOR_FILE) as path, no_progress_bar():
            (path / SIMULATOR_FILE).unlink(missing_ok=True)
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            write_simulator_card(path, self.card)

    @property
    def device(self) -> Any:
        return self.model.device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, those that are set free."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`. Raises UserError for what is longer than the model takes."""
        readings = {window: self.read(window) for window in dict.fromkeys(windows)}
        return self._passes.read(
            [
                Ask(self.encode(description), readings[window])
                for description, window in zip(descriptions, windows, strict=True)
            ]
        )

    def encode(self, description: str) -> tuple[int, ...]:
        """Ids of the prefix. Special tokens that a description spells stay text."""
        if self.card.layout == "own":
            description = " ".join(description.split())
        before, after = self.card.prefix.split("{description}")
        ids = encode_text(self.tokenizer, before + description + after, self._add_bos)
        return self._moved([*ids, *([] if self.card.separator is None else [self.card.separator])])

    def read(self, window: Window) -> Reading:
        """Ids of a window, and where its levels are read."""
        reading = read_window(window, self.tokenizer)
        return Reading(self._moved(reading.ids), reading.positions)

    def _moved(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.card.ids.get(token, token) for token in ids)


def write_simulator_card(folder: Path, card: SimulatorCard) -> None:
    """Write `simulator.json` in one step."""
    write_versioned(folder / SIMULATOR_FILE, FORMAT_VERSION, card)


def read_simulator_card(folder: str) -> SimulatorCard:
    """The card of a simulator's folder (path or fsspec URL). Raises UserError if there is none that can be read."""
    card = read_versioned(folder, SIMULATOR_FILE, FORMAT_VERSION, SimulatorCard, "a finished simulator")
    if len(card.level_ids) != NUM_LEVELS or card.prefix.count("{description}") != 1:
        file = f"{folder.rstrip('/')}/{SIMULATOR_FILE}"
        raise UserError(f"{file}: expected {NUM_LEVELS} level_ids and a prefix with {{description}}")
    return card
