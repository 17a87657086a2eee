"""What a process that holds a simulator answers. No Ray here. T tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from introspect_ray.config import LimitsConfig, ModelConfig, ServedSimulator
from introspect_ray.errors import UserError
from introspect_ray.features.windows import Window, window
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.tokens import adds_bos, encode_with_offsets
from introspect_ray.pocket.reader import ExactReader
from introspect_ray.serving.api import Failed, Simulated, SimulateItem, Token, failed
from introspect_ray.serving.fields import FieldError, failing
from introspect_ray.serving.target_model import check_tokens, tokens_of
from introspect_ray.simulator.base import Simulator
from introspect_ray.simulator.loading import load_simulator

NOT_FINITE = "the simulator gave a level that is no number"


class Lexicon:
    """The exact reader of the pocket world, with an error in words for texts that it does not know."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._reader = ExactReader(tokenizer)

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`. Raises UserError for a window that begins no plain text of the pocket world."""
        try:
            return self._reader.simulate(descriptions, windows)
        except KeyError:
            raise UserError("the lexicon knows the plain texts of the pocket world only, and this is none") from None


class SimulatorService:
    """A simulator, and the tokenizer of the target whose tokens it reads. Not for several threads at once."""

    def __init__(self, simulator: Simulator, tokenizer: PreTrainedTokenizerBase, limits: LimitsConfig):
        self.simulator = simulator
        self.tokenizer = tokenizer
        self.limits = limits
        self._skipped = 1 if adds_bos(tokenizer) else 0

    @classmethod
    def load(cls, served: ServedSimulator, target: ModelConfig, limits: LimitsConfig) -> SimulatorService:
        """Raises UserError if it cannot be loaded."""
        tokenizer = load_tokenizer(target)
        simulator = Lexicon(tokenizer) if served.kind == "lexicon" else load_simulator(served.simulator)
        return cls(simulator, tokenizer, limits)

    def simulate(self, items: Sequence[SimulateItem]) -> list[Simulated | Failed]:
        """Levels per token; what one item does wrong fails that item alone."""
        answers: dict[int, Simulated | Failed] = {}
        reads: dict[int, tuple[list[Token], Window]] = {}
        for number, item in enumerate(items):
            read = self._read(item.text)
            if isinstance(read, Failed):
                answers[number] = read
            else:
                reads[number] = read
        found = self._levels([(items[number].description, shown) for number, (_, shown) in reads.items()])
        for (number, (tokens, _)), levels in zip(reads.items(), found, strict=True):
            answers[number] = (
                levels if isinstance(levels, Failed) else Simulated(tokens=tokens, activations=levels.tolist())
            )
        return [answers[number] for number in range(len(items))]

    @failing
    def _read(self, text: str) -> tuple[list[Token], Window]:
        ids, offsets = encode_with_offsets(self.tokenizer, text)
        check_tokens(len(ids), self.limits, "text")
        kept = ids[self._skipped :]
        if not kept:
            raise FieldError("the text has no tokens", "text")
        return tokens_of(text, offsets)[self._skipped :], window(kept, self.tokenizer)

    def _levels(self, asked: Sequence[tuple[str, Window]]) -> list[Float[np.ndarray, " T"] | Failed]:
        """All in one call; if that fails, each by itself."""
        if not asked:
            return []
        try:
            levels = self.simulator.simulate([one for one, _ in asked], [shown for _, shown in asked])
        except UserError as error:
            if len(asked) == 1:
                return [failed("bad_request", str(error), "text")]
            return [answer for one in asked for answer in self._levels([one])]
        return [one if np.isfinite(one).all() else failed("unavailable", NOT_FINITE) for one in levels]
