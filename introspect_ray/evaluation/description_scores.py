"""Scoring descriptions: scorers, controls, and the best candidate of a latent.

    (description, held-out exemplars of its latent) x scorers -> name -> value or reason
    several candidates: chosen on one half of the windows, reported on the other

A scorer is anything with the one method of `DescriptionScorer`; simulation is here, others ask language models.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import Description, Score, by_latent
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.windows import Window
from introspect_ray.interventions.memory import is_device_error
from introspect_ray.simulator.base import Simulator
from introspect_ray.simulator.base_rate import natural_weights, unweighted
from introspect_ray.simulator.filter import TokenLookup, measure
from introspect_ray.simulator.scores import METRICS, NEVER_FIRES, simulation_scores

Control = Literal["shuffled", "empty"]
logger = logging.getLogger(__name__)

FAILED = "failed"
"""Reason of a score whose computation raised; the log says what."""
CHOSEN_BY = "chosen_by_it"
"""Reason of the paper's score of a candidate that was chosen by it."""
STAGE_METRICS = ("first_stage_recall", "first_stage_skipped")
CONTROLS: tuple[Control, ...] = ("shuffled", "empty")
Pair = tuple[str, LatentExemplars]
"""A description, and the held-out exemplars of the latent that it is of."""
Scores = Mapping[str, Score]


@runtime_checkable
class DescriptionScorer(Protocol):
    """One way to tell how good descriptions are."""

    def score(self, pairs: Sequence[Pair]) -> Sequence[Scores]:
        """Named scores of each pair. What cannot be computed is a score with a reason; nothing is left out or raised
        because of one description."""


class SimulationScorer:
    """Scores by a simulator: see simulator/scores.py. Calibrations are fitted on training exemplars."""

    def __init__(
        self,
        simulator: Simulator,
        train: Mapping[tuple[int, int], LatentExemplars],
        first_stage_share: float | None = None,
    ):
        """`train`: exemplars of training texts by (layer, latent), of every latent that is scored.

        With `first_stage_share`, windows without a token on which the latent was seen to fire in them, at more than
        this share of its largest activation, are not simulated and count zero; the scores then say what the stage
        lets pass and what it skips, on the held-out windows at the natural base rate.
        """
        self.simulator = simulator
        self.train = train
        self.first_stage_share = first_stage_share

    def score(self, pairs: Sequence[Pair]) -> list[Scores]:
        """All windows of all pairs are simulated in one call, so that batches are full; pair by pair if that raises.

        A pair that breaks the simulator, such as one with too long a description, has the reason `failed`.
        """
        try:
            return self._score(pairs)
        except (UserError, RuntimeError, ValueError) as error:
            if is_device_error(error):
                raise  # nothing would work after it
            if len(pairs) > 1:
                return [self.score([pair])[0] for pair in pairs]
            logger.warning("description %r cannot be simulated: %s", pairs[0][0][:80], error)
            names = METRICS if self.first_stage_share is None else (*METRICS, *STAGE_METRICS)
            return [dict.fromkeys(names, Score(None, FAILED))]

    def _score(self, pairs: Sequence[Pair]) -> list[Scores]:
        windows: list[tuple[list[Exemplar], list[Exemplar]]] = []
        for _, held_out in pairs:
            seen = self.train[held_out.layer, held_out.latent]
            windows.append((list(seen.exemplars), fair(held_out.exemplars)))
        stages = [self._stage(held_out) for _, held_out in pairs]
        asked = [
            (text, exemplar.window)
            for (text, _), both, stage in zip(pairs, windows, stages, strict=True)
            for part in both
            for exemplar in part
            if stage is None or stage.may_fire("", exemplar.window)
        ]
        answers = iter(self.simulator.simulate([text for text, _ in asked], [window for _, window in asked]))

        def levels(part: Sequence[Exemplar], stage: TokenLookup | None) -> list[np.ndarray]:
            return [
                next(answers) if stage is None or stage.may_fire("", one.window) else np.zeros(len(one.window))
                for one in part
            ]

        found: list[Scores] = []
        for (_, held_out), (train, scored), stage in zip(pairs, windows, stages, strict=True):
            skipped = stage is not None and not any(stage.may_fire("", one.window) for one in scored)
            both = levels(train, stage), levels(scored, stage)
            scores = simulation_scores(held_out.density, train, both[0], scored, both[1], all_skipped=skipped)
            found.append({**scores, **_stage_scores(stage, held_out.density, scored)})
        return found

    def _stage(self, held_out: LatentExemplars) -> TokenLookup | None:
        """The latent's own table, whatever the description: what controls score behind it, the table gives."""
        if self.first_stage_share is None:
            return None
        train = self.train[held_out.layer, held_out.latent].exemplars
        return TokenLookup.fit([("", train)], self.first_stage_share)


def _stage_scores(stage: TokenLookup | None, density: float, windows: Sequence[Exemplar]) -> dict[str, Score]:
    """Share of the firing windows that the first stage lets pass, and of all windows that it skips."""
    if stage is None:
        return {}
    weights = natural_weights(density, windows) * [len(exemplar.window) for exemplar in windows]
    if not weights.any():
        return dict.fromkeys(STAGE_METRICS, Score(None, unweighted(windows)))
    report = measure(stage, [("", exemplar) for exemplar in windows], weights)
    recall = Score(None, NEVER_FIRES) if report.recall is None else Score(report.recall)
    return dict(zip(STAGE_METRICS, (recall, Score(report.skipped)), strict=True))


def check_sources(descriptions: Iterable[Description]) -> None:
    """Refuse descriptions that could not be told from controls. Raises UserError."""
    if taken := {one.source for one in descriptions} & set(CONTROLS):
        raise UserError(f"descriptions have the source {min(taken)!r}, which is the name of a control: rename it")


def control_descriptions(
    descriptions: Sequence[Description], controls: Sequence[Control], seed: int
) -> list[Description]:
    """What is scored beside the descriptions, one per latent and control; the control is the source.

    `shuffled`: the first description of another latent, each used once where that is possible, never one with the same
    text. A latent for which there is none has no such control. `empty`: no words.
    """
    groups = by_latent(descriptions)
    first = {key: candidates[0] for key, candidates in groups.items()}
    found: list[Description] = []
    if "shuffled" in controls:
        texts = _exchanged([one.text for one in first.values()], seed)
        found += [
            Description(*key, text, "shuffled") for key, text in zip(first, texts, strict=True) if text is not None
        ]
    if "empty" in controls:
        found += [Description(*key, "", "empty") for key in first]
    return found


def _exchanged(texts: Sequence[str], seed: int) -> list[str | None]:
    """A seeded permutation of the texts in which none stays the same; None where all texts are alike."""
    order = list(range(len(texts)))
    draw = random.Random(f"shuffled descriptions {seed}")
    draw.shuffle(order)
    for index in range(len(order)):
        if texts[order[index]] == texts[index]:
            for other in draw.sample(range(len(order)), len(order)):
                fits = texts[order[other]] != texts[index] and texts[order[index]] != texts[other]
                if fits:
                    order[index], order[other] = order[other], order[index]
                    break
    found = [texts[place] for place in order]
    return [text if text != own else None for text, own in zip(found, texts, strict=True)]


@dataclass(frozen=True)
class Scored:
    """One description with all its scores, values and reasons."""

    description: Description
    scores: Scores
    """On all held-out windows."""
    selection: Scores | None = None
    """On the half of them that candidates are chosen by; where a latent has several."""
    report: Scores | None = None
    """On the other half."""

    @property
    def filled(self) -> Description:
        """The description with these scores beside those that it had."""
        values = {name: score.value for name, score in self.scores.items()}
        return replace(self.description, scores={**self.description.scores, **values})


def best_of(scored: Sequence[Scored], metric: str) -> list[Scored]:
    """Of each latent the candidate with the largest value on the selection half; of equals, and where none has a value,
    the first.

    The scores of a candidate that was chosen among several are those of the report half: the largest of several values
    on the windows that it was chosen on is too large by chance alone. One without a rival keeps those of all windows.
    The paper's score is of training windows that have no other half: by it a candidate can be chosen, not reported.
    """
    found: list[Scored] = []
    for _, candidates in sorted(_by_latent(scored).items()):
        chosen = candidates[0]
        if len(candidates) > 1:
            chosen = max(candidates, key=lambda one: _selected_by(one, metric))
            assert chosen.report is not None, "rivals are scored on both halves"
            by_paper = {metric: Score(None, CHOSEN_BY)} if metric == "paper_compat" else {}
            chosen = replace(chosen, scores={**chosen.report, **by_paper})
        found.append(chosen)
    return found


def _by_latent(scored: Sequence[Scored]) -> dict[tuple[int, int], list[Scored]]:
    found: dict[tuple[int, int], list[Scored]] = {}
    for one in scored:
        found.setdefault((one.description.layer, one.description.latent), []).append(one)
    return found


def _selected_by(scored: Scored, metric: str) -> float:
    assert scored.selection is not None, "rivals are scored on both halves"
    value = scored.selection[metric].value
    return -math.inf if value is None else value


def halves(latent: LatentExemplars) -> tuple[LatentExemplars, LatentExemplars]:
    """The fair windows of a latent parted in two, to choose a candidate by and to report it on.

    Drawn for the latent, half of every kind and range, and of those in which it fires; of an odd number the last
    is reported on. A window that is of several kinds is in one half with all of them.
    """
    strata: dict[tuple[str, int | None, bool], list[Window]] = {}
    placed: set[Window] = set()
    exemplars = fair(latent.exemplars)
    for one in exemplars:
        if one.window not in placed:
            placed.add(one.window)
            strata.setdefault((one.kind, one.quantile, bool(one.activations.any())), []).append(one.window)
    draw = random.Random(f"halves {latent.layer} {latent.latent}")
    order: list[Window] = []
    for windows in strata.values():
        draw.shuffle(windows)
        order += windows
    chosen = set(order[1::2])
    selection = tuple(one for one in exemplars if one.window in chosen)
    report = tuple(one for one in exemplars if one.window not in chosen)
    return replace(latent, exemplars=selection), replace(latent, exemplars=report)


def fair(exemplars: Sequence[Exemplar]) -> list[Exemplar]:
    """Those that are a fair draw: `top` ones are not, and the paper's protocol takes those of training texts."""
    return [exemplar for exemplar in exemplars if exemplar.kind in ("quantile", "random")]


def score_all(
    scorers: Sequence[DescriptionScorer],
    descriptions: Sequence[Description],
    held_out: Mapping[tuple[int, int], LatentExemplars],
) -> list[Scored]:
    """Every description with what all scorers say of it, by the held-out exemplars of its latent."""
    pairs = [(one.text, held_out[one.layer, one.latent]) for one in descriptions]
    merged: list[dict[str, Score]] = [{} for _ in pairs]
    for scorer in scorers:
        for scores, found in zip(merged, scorer.score(pairs), strict=True):
            assert not scores.keys() & found.keys(), "two scorers use one name"
            scores.update(found)
    return [Scored(one, scores) for one, scores in zip(descriptions, merged, strict=True)]


def score_candidates(
    scorers: Sequence[DescriptionScorer],
    descriptions: Sequence[Description],
    held_out: Mapping[tuple[int, int], LatentExemplars],
) -> list[Scored]:
    """`score_all`, and of latents with several candidates also on either half of their windows.

    The halves ask the scorers about the same pairs of description and window again.
    """
    scored = score_all(scorers, descriptions, held_out)
    candidates = _by_latent([one for one in scored if one.description.source not in CONTROLS])
    rivals = [one.description for several in candidates.values() if len(several) > 1 for one in several]
    parted = {key: halves(held_out[key]) for key, several in candidates.items() if len(several) > 1}
    selection, report = (
        iter(score_all(scorers, rivals, {key: both[half] for key, both in parted.items()})) for half in (0, 1)
    )
    return [
        replace(one, selection=next(selection).scores, report=next(report).scores)
        if (one.description.layer, one.description.latent) in parted and one.description.source not in CONTROLS
        else one
        for one in scored
    ]
