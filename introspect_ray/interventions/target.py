"""The target: the model whose computations are explained, as the tasks see it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import ModelConfig
from introspect_ray.interventions.clean import clean_runs, next_token_logits
from introspect_ray.interventions.forward import padded_budget
from introspect_ray.interventions.hooked import hooked_logits
from introspect_ray.interventions.ladder import Ladder
from introspect_ray.interventions.pairs import Pair, PairedRuns, PairLogits
from introspect_ray.interventions.selfcheck import checked_ladder
from introspect_ray.interventions.types import CleanRun, Intervention
from introspect_ray.models.loading import load_model, load_tokenizer
from introspect_ray.models.structure import decoder_layers, max_positions, model_width, num_layers
from introspect_ray.models.tokens import Offset, encode_with_offsets

logger = logging.getLogger(__name__)


class Target:
    """A frozen causal language model with its tokenizer; clean runs, patched runs, next-token logits.

    P prompts, R rows (interventions on one prompt), T tokens, D width, V vocabulary. Not for several threads at once.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        decoder_layers(model)  # refuses a model whose layers cannot be found
        self.model = model
        self.tokenizer = tokenizer
        self._checked = False
        self._ladder: Ladder | None = None
        self._no_ladder = ""
        self._slow: set[str] = set()
        # What a batch keeps for later differs between these, and with it the memory that a token takes.
        self._budgets = {kind: padded_budget(model.device) for kind in ("clean", "answers", "hooked")}
        self._pairs = PairedRuns(model, padded_budget(model.device))

    @classmethod
    def load(cls, config: ModelConfig) -> Target:
        """The target of a config. Raises `UserError` if model or tokenizer cannot be loaded."""
        return cls(load_model(config), load_tokenizer(config))

    @property
    def num_layers(self) -> int:
        return num_layers(self.model)

    @property
    def width(self) -> int:
        """Width of the residual stream, d_M."""
        return model_width(self.model)

    @property
    def max_tokens(self) -> int | None:
        """Tokens that a prompt may have; None if the model sets no bound."""
        return max_positions(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens in it spelled out; begin-of-text first where the tokenizer adds it."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Offset]]:
        """The same ids, and the characters of `text` that each stands for (`(0, 0)` for begin-of-text)."""
        return encode_with_offsets(self.tokenizer, text)

    def clean_runs(self, prompts: Sequence[Sequence[int]]) -> list[CleanRun]:
        """One clean run per prompt. Raises `UserError` for prompts that are empty, too long or hold unknown ids."""
        keep_cache = self._find_ladder() is not None
        return clean_runs(self.model, prompts, keep_cache, self._budgets["clean"])

    def next_token_logits(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "P V"]:
        """Logits at the last position of each prompt. Raises `UserError` as `clean_runs` does."""
        return next_token_logits(self.model, prompts, self._budgets["answers"])

    def paired_logits(self, pairs: Sequence[Pair]) -> PairLogits:
        """Logits at the last position of both prompts of each pair; what a pair's prompts begin with is run once.

        Raises `UserError` as `clean_runs` does.
        """
        logits = self._pairs.logits(pairs)
        if self._pairs.apart_because:
            self._slow.add(f"pairs of prompts run apart: {self._pairs.apart_because}")
        return logits

    def patched_logits(
        self, runs: Sequence[CleanRun], interventions: Sequence[Sequence[Intervention]]
    ) -> list[Float[Tensor, "R V"]]:
        """Last-position logits: row j of item i is the prompt of `runs[i]` under `interventions[i][j]`.

        Raises `UserError` if an intervention does not fit its run (layer, position, width).
        """
        if not runs:
            return []
        pairs = [
            (run, intervention) for run, of_run in zip(runs, interventions, strict=True) for intervention in of_run
        ]
        for run, intervention in pairs:
            intervention.check(run)
        climbing = [index for index, (run, _) in enumerate(pairs) if self._climbs(run)]
        hooked = sorted(set(range(len(pairs))) - set(climbing))
        logits = runs[0].logits.new_empty(len(pairs), len(runs[0].logits))
        for method, indices in ((self._ladder and self._ladder.logits, climbing), (self._hooked, hooked)):
            if method and indices:
                of_runs, rows = zip(*(pairs[index] for index in indices), strict=True)
                logits[torch.tensor(indices, device=logits.device)] = method(of_runs, rows)
        return list(logits.split([len(of_run) for of_run in interventions]))

    def _hooked(self, runs: Sequence[CleanRun], interventions: Sequence[Intervention]) -> Float[Tensor, "R V"]:
        return hooked_logits(self.model, runs, interventions, self._budgets["hooked"])

    def take_slow_reasons(self) -> str:
        """Why anything since the last call took a slower way than targets can; empty if nothing did.

        A target works all the same, at a fraction of the speed, and what an actor logs is seldom read.
        """
        reasons, self._slow = sorted(self._slow), set()
        return "; ".join(reasons)

    def _find_ladder(self) -> Ladder | None:
        """The ladder if this model passes the self-check, which runs at first use; the reason is logged if not."""
        if not self._checked:
            self._ladder, reason = checked_ladder(self.model)
            self._checked = True
            if self._ladder is None:
                self._no_ladder = f"patched runs of {type(self.model).__name__} use plain hooks: {reason}"
                logger.warning(self._no_ladder)
        if self._no_ladder:
            self._slow.add(self._no_ladder)
        return self._ladder

    def _climbs(self, run: CleanRun) -> bool:
        """Whether this run's rows go up the ladder."""
        ladder = self._find_ladder()
        if ladder is None or run.cache is None:
            return False
        if ladder.window is None or len(run) <= ladder.window:
            return True
        self._slow.add(
            f"prompts of more than {ladder.window} tokens, the shortest attention window of"
            f" {type(self.model).__name__}, use plain hooks"
        )
        return False
