"""Scoring descriptions: scorers, controls, the best candidate of a latent, and means over latents with intervals.

    (description, held-out exemplars of its latent) x scorers -> name -> value or reason
    per source, and per control: mean over latents, interval over latents, how many have no value and why

A scorer is anything with the one method of `DescriptionScorer`; simulation is here, others ask language models.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from introspect_ray.evaluation.intervals import Bootstrap, Interval, bootstrap_mean
from introspect_ray.evaluation.page import render_page
from introspect_ray.features.descriptions import Description, Score, by_latent
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.simulator.base import Simulator
from introspect_ray.simulator.base_rate import natural_weights
from introspect_ray.simulator.filter import TokenLookup, measure
from introspect_ray.simulator.scores import NEVER_FIRES, NO_WINDOWS, simulation_scores

Control = Literal["shuffled", "empty"]
STAGE_METRICS = ("first_stage_recall", "first_stage_skipped")
CONTROLS: tuple[Control, ...] = ("shuffled", "empty")
Pair = tuple[str, LatentExemplars]
"""A description, and the held-out exemplars of the latent that it is of."""
Scores = Mapping[str, Score]


@runtime_checkable
class DescriptionScorer(Protocol):
    """One way to tell how good descriptions are."""

    def score(self, pairs: Sequence[Pair]) -> Sequence[Scores]:
        """Named scores of each pair. What cannot be computed is a score with a reason; nothing is left out."""


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
        """Simulates all windows of all pairs in one call, so that batches are full."""
        windows: list[tuple[list[Exemplar], list[Exemplar]]] = []
        for _, held_out in pairs:
            seen = self.train[held_out.layer, held_out.latent]
            # Held-out `top` windows are no fair draw, and the paper's protocol takes those of training texts.
            fair = [exemplar for exemplar in held_out.exemplars if exemplar.kind in ("quantile", "random")]
            windows.append((list(seen.exemplars), fair))
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
        for (_, held_out), (train, fair), stage in zip(pairs, windows, stages, strict=True):
            scores = simulation_scores(held_out.density, train, levels(train, stage), fair, levels(fair, stage))
            found.append({**scores, **_stage_scores(stage, held_out.density, fair)})
        return found

    def _stage(self, held_out: LatentExemplars) -> TokenLookup | None:
        """The latent's own table, whatever the description: what controls score behind it, the table gives."""
        if self.first_stage_share is None:
            return None
        train = self.train[held_out.layer, held_out.latent].exemplars
        return TokenLookup.fit([("", train)], self.first_stage_share)


def _stage_scores(stage: TokenLookup | None, density: float, fair: Sequence[Exemplar]) -> dict[str, Score]:
    """Share of the firing windows that the first stage lets pass, and of all windows that it skips."""
    if stage is None:
        return {}
    weights = natural_weights(density, fair) * [len(exemplar.window) for exemplar in fair]
    if not weights.any():
        return dict.fromkeys(STAGE_METRICS, Score(None, NO_WINDOWS))
    report = measure(stage, [("", exemplar) for exemplar in fair], weights)
    recall = Score(None, NEVER_FIRES) if report.recall is None else Score(report.recall)
    return dict(zip(STAGE_METRICS, (recall, Score(report.skipped)), strict=True))


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

    @property
    def filled(self) -> Description:
        """The description with these scores beside those that it had."""
        values = {name: score.value for name, score in self.scores.items()}
        return replace(self.description, scores={**self.description.scores, **values})


def best_of(scored: Sequence[Scored], metric: str) -> list[Scored]:
    """Of each latent the candidate with the largest value; of equals, and where none has a value, the first."""
    found: dict[tuple[int, int], Scored] = {}
    for one in scored:
        key = (one.description.layer, one.description.latent)
        if key not in found or _value(one, metric) > _value(found[key], metric):
            found[key] = one
    return [found[key] for key in sorted(found)]


def _value(scored: Scored, metric: str) -> float:
    value = scored.scores[metric].value
    return -math.inf if value is None else value


@dataclass(frozen=True)
class MetricSummary:
    """A metric over the latents of one source: the mean of those that have a value, and why others have none."""

    interval: Interval
    reasons: Mapping[str, int]


Summary = dict[str, dict[str, MetricSummary]]
"""Source -> metric -> summary."""


def summarise(scored: Sequence[Scored], best: Sequence[Scored], options: Bootstrap) -> Summary:
    """One entry per source, and `best` where a latent has several candidates.

    A latent counts once: several candidates of one source are their mean, so that the unit is the latent.
    """
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.description.source, []).append(one)
    own = [one for one in scored if one.description.source not in CONTROLS]
    if len(best) < len(own):
        groups = {"best": list(best), **groups}
    return {source: _summary(rows, options) for source, rows in groups.items()}


def _summary(rows: Sequence[Scored], options: Bootstrap) -> dict[str, MetricSummary]:
    names = dict.fromkeys(name for row in rows for name in row.scores)
    found: dict[str, MetricSummary] = {}
    for name in names:
        values: dict[tuple[int, int], list[float]] = {}
        missing: Counter[str] = Counter()
        for row in rows:
            score = row.scores.get(name, Score(None, "not_scored"))
            if score.value is None:
                missing[str(score.reason)] += 1
            else:
                values.setdefault((row.description.layer, row.description.latent), []).append(score.value)
        means = [sum(group) / len(group) for group in values.values()]
        found[name] = MetricSummary(bootstrap_mean(means, options), dict(missing))
    return found


def summary_json(summary: Summary) -> str:
    """`{source: {metric: {"value", "low", "high", "n", "undefined": {reason: count}}}}`; undefined values are null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    content = {
        source: {
            name: {
                "value": number(one.interval.value),
                "low": number(one.interval.low),
                "high": number(one.interval.high),
                "n": one.interval.n,
                "undefined": dict(one.reasons),
            }
            for name, one in metrics.items()
        }
        for source, metrics in summary.items()
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def summary_table(summary: Summary) -> str:
    """A line per source, a column `value [low, high] (n)` per metric."""
    names = list(dict.fromkeys(name for metrics in summary.values() for name in metrics))
    lines = [["source", *names]]
    for source, metrics in summary.items():
        lines.append([source, *(_cell(metrics[name].interval) if name in metrics else "" for name in names)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(interval: Interval) -> str:
    if not math.isfinite(interval.value):
        return f"n/a ({interval.n})"
    limits = f" [{interval.low:.3f}, {interval.high:.3f}]" if math.isfinite(interval.low) else ""
    return f"{interval.value:.3f}{limits} ({interval.n})"


def render_scores(summary: Summary, facts: Sequence[tuple[str, str]], confidence: float, metric: str) -> str:
    """The report: one self-contained HTML page."""
    names = list(dict.fromkeys(name for metrics in summary.values() for name in metrics))
    return render_page(
        "descriptions.html",
        summary=list(facts),
        scores=summary,
        names=names,
        featured=metric,
        confidence=confidence,
        controls=CONTROLS,
    )
