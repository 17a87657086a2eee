"""Lines: which latents are replaced, in which order, by what. A fraction f replaces the first f of a line's latents.

F latents, S latents of a line, U descriptions, N tokens of windows, M of them measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from introspect_ray.config import RewriteConfig, RewriteLineConfig, Selection
from introspect_ray.errors import RunFailed
from introspect_ray.features.descriptions import Description
from introspect_ray.rewrite.quantiles import fit_quantiles, fit_shrunk
from introspect_ray.rewrite.scales import (
    HALF_LEVEL,
    PaperScale,
    Scale,
    combined,
    contrasts,
    fit_detected,
    fit_in_context,
    fit_slopes,
    linear,
    raw,
)
from introspect_ray.rewrite.statistics import LatentStatistics
from introspect_ray.simulator.base import MAX_LEVEL

Texts = Mapping[int, tuple[str, ...]]
"""Latent -> its descriptions by one source, the best first."""


@dataclass(frozen=True, eq=False)
class Levels:
    """Simulated levels of some descriptions over the windows of some texts."""

    index: Mapping[str, int]
    """Description -> its column."""
    levels: Float[np.ndarray, "N U"]
    """`nan` where the simulator failed."""
    starts: Bool[np.ndarray, " N"]
    """Tokens that begin a window."""
    measured: Int[np.ndarray, " M"]
    """Tokens at which the target is measured."""


@dataclass(frozen=True, eq=False)
class Line:
    """A line with everything that it needs to know about its S latents, in the order in which they are replaced."""

    config: RewriteLineConfig
    latents: Int[np.ndarray, " S"]
    texts: tuple[tuple[str, ...], ...]
    """What the simulator is told of each latent; empty for lines that need none."""
    maximum: Float[np.ndarray, " S"]
    contrast: tuple[str | None, ...] = ()
    scale: Scale | None = None

    @property
    def needed(self) -> list[str]:
        """Descriptions whose levels it needs, each once."""
        return list(dict.fromkeys(text for texts in self.texts for text in texts))

    def first(self, count: int) -> Int[np.ndarray, " count"]:
        return self.latents[:count]

    def values(self, levels: Levels | None, truth: Float[np.ndarray, "M S"]) -> Float[np.ndarray, "M S"]:
        """What the latents are replaced by at the measured tokens; `nan` where the simulator failed."""
        if self.config.kind == "oracle":
            return truth
        if self.config.kind == "deleted":
            return np.zeros_like(truth)
        unit = np.maximum(self.maximum, 1e-12) / MAX_LEVEL
        if self.config.kind == "oracle_levels":
            return np.minimum(np.round(truth / unit), MAX_LEVEL) * unit
        assert levels is not None and self.scale is not None
        said = self.scale.values(self._levels(levels), levels.starts)[levels.measured]
        fires, missing = fired(said, self.maximum), np.isnan(said)
        if self.config.repaired in ("false_alarms", "both"):
            said = np.where(truth > 0, said, 0.0)
        if self.config.repaired in ("misses", "both"):
            said = np.where((truth > 0) & ~fires, truth, said)
        return np.where(missing, np.nan, said)

    def _levels(self, levels: Levels) -> Float[np.ndarray, "N S"]:
        own = line_levels(self, levels)
        for column, other in enumerate(self.contrast):
            if other is not None:
                own[:, column] = np.maximum(0.0, own[:, column] - levels.levels[:, levels.index[other]])
        return own


def fired(values: Float[np.ndarray, "M S"], maximum: Float[np.ndarray, " S"]) -> Bool[np.ndarray, "M S"]:
    """Whether a value rounds to a level above zero; a missing one does not."""
    return np.nan_to_num(values) >= np.maximum(maximum, 1e-12) * (HALF_LEVEL / MAX_LEVEL)


def line_levels(line: Line, levels: Levels) -> Float[np.ndarray, "N S"]:
    """Levels of each latent under its descriptions, before any contrast."""
    own = np.empty((len(levels.levels), len(line.latents)), dtype=np.float32)
    how = "mean" if line.config.descriptions == "mean" else "max"
    for column, texts in enumerate(line.texts):
        own[:, column] = combined([levels.levels[:, levels.index[text]] for text in texts], how)
    return own


def ranking(
    selection: str,
    candidates: Int[np.ndarray, " C"],
    scores: Mapping[int, float],
    statistics: LatentStatistics,
    seed: int,
) -> Int[np.ndarray, " C"]:
    """The candidates in the order in which they are replaced; ties in ascending order of latent."""
    order = candidates.tolist()
    if selection == "random":
        random.Random(f"{seed}/ranking").shuffle(order)
    elif selection == "contribution":
        order.sort(key=lambda latent: (-statistics.contribution[latent], latent))
    else:
        order.sort(key=lambda latent: (-scores[latent], latent))
    return np.array(order, dtype=np.int64)


def plan_line(
    config: RewriteLineConfig,
    num_live: int,
    rankings: Mapping[str, Int[np.ndarray, " C"]],
    texts: Texts,
    statistics: LatentStatistics,
    seed: int,
) -> Line:
    """The line before anything is simulated: its latents, at most `max_fraction` of the live ones, and their texts."""
    latents = rankings[config.selection][: count_of(config.max_fraction, num_live)]
    told: tuple[tuple[str, ...], ...] = ()
    if config.kind == "simulated":
        several = config.descriptions in ("max", "mean")
        told = tuple(texts[latent] if several else texts[latent][:1] for latent in latents.tolist())
        if config.descriptions == "shuffled":
            told = shuffled(told, seed)
    return Line(config, latents, told, statistics.maximum[latents])


def plan_lines(
    config: RewriteConfig,
    live: Int[np.ndarray, " L"],
    descriptions: Mapping[str, Sequence[Description]],
    statistics: LatentStatistics,
) -> list[Line]:
    """All lines of a config before anything is simulated; `descriptions` by name of their source.

    Latents that lack a description in any source are in no line, so that sources are compared on the same latents.
    Raises RunFailed if too few are left for the headline.
    """
    of_source = {name: best_texts(said, config.score) for name, said in descriptions.items()}
    described = set.intersection(*(set(texts) for texts, _ in of_source.values()))
    candidates = np.array([latent for latent in live.tolist() if latent in described], dtype=np.int64)
    if len(candidates) < count_of(config.headline_fraction, len(live)):
        raise RunFailed(
            f"{len(candidates)} of {len(live)} live latents have descriptions in every source, fewer than"
            f" headline_fraction {config.headline_fraction:g} asks for"
        )
    _, scores = of_source[config.sources[0].name]
    rankings = {one: ranking(one, candidates, scores, statistics, config.seed) for one in get_args(Selection)}
    return [
        plan_line(line, len(live), rankings, of_source[line.source][0], statistics, config.seed)
        if line.kind == "simulated"
        else plan_line(line, len(live), rankings, {}, statistics, config.seed)
        for line in config.lines
    ]


def count_of(fraction: float, num_live: int) -> int:
    """Latents that a fraction of the live ones are: the whole part, and at least one (P2)."""
    return max(int(fraction * num_live + 1e-9), 1)


def shuffled(texts: Sequence[tuple[str, ...]], seed: int) -> tuple[tuple[str, ...], ...]:
    """Every latent gets the description of another one, each description as often as before.

    A shift by one along a random order, so that none stays where it was; equal descriptions of different latents
    may still meet.
    """
    order = list(range(len(texts)))
    random.Random(f"{seed}/shuffled").shuffle(order)
    moved = list(texts)
    for place, latent in enumerate(order):
        moved[latent] = texts[order[place - 1]]
    return tuple(moved)


def fit_line(
    line: Line,
    levels: Levels | None,
    truth: Float[np.ndarray, "M S"],
    statistics: LatentStatistics,
    norms: Float[np.ndarray, " F"],
    paper_compat: bool,
) -> Line:
    """The line with its contrasts and its scale, fitted on the fit texts; `truth` are its latents' values there.

    Tokens whose simulation failed are left out, of each latent by itself.
    """
    if line.config.kind != "simulated":
        return line
    assert levels is not None
    own = line_levels(line, levels)
    own_measured = own[levels.measured]
    contrast: tuple[str | None, ...] = ()
    if line.config.descriptions == "contrast":
        contrast = _contrast(line, levels, own_measured, truth)
        line = Line(line.config, line.latents, line.texts, line.maximum, contrast)
        own = line._levels(levels)
        own_measured = own[levels.measured]
    scale: Scale
    if line.config.scale == "raw":
        scale = raw(line.maximum)
    elif line.config.scale == "linear":
        scale = PaperScale(line.maximum) if paper_compat else linear(line.maximum)
    elif line.config.scale == "fitted":
        scale = fit_slopes(own_measured, truth)
    elif line.config.scale == "quantile":
        scale = fit_quantiles(own_measured, truth)
    elif line.config.scale == "shrunk":
        scale = fit_shrunk(own_measured, truth)
    elif line.config.scale == "detected":
        scale = fit_detected(own_measured, truth)
    else:
        density = statistics.density[line.latents]
        scale = fit_in_context(own, truth, levels.starts, levels.measured, density, norms[line.latents])
    return Line(line.config, line.latents, line.texts, line.maximum, contrast, scale)


def _contrast(
    line: Line, levels: Levels, own: Float[np.ndarray, "M S"], truth: Float[np.ndarray, "M S"]
) -> tuple[str | None, ...]:
    names = line.needed
    columns = np.array([levels.index[name] for name in names], dtype=np.int64)
    pool = levels.levels[levels.measured][:, columns]
    unit = np.maximum(line.maximum, 1e-12) / MAX_LEVEL
    chosen = contrasts(own, np.minimum(truth / unit, MAX_LEVEL), pool)
    return tuple(names[column] if column >= 0 else None for column in chosen.tolist())


def best_texts(
    descriptions: Sequence[Description], score: str | None
) -> tuple[dict[int, tuple[str, ...]], dict[int, float]]:
    """Texts of each latent, the best-scored first, and the best one's score (0 where nothing was scored).

    Args:
        score: its name; none takes the first score that a description has.
    """
    found: dict[int, list[tuple[float, str]]] = {}
    for description in descriptions:
        known = description.scores if score is None else {score: description.scores.get(score)}
        value = next((value for value in known.values() if value is not None), None)
        found.setdefault(description.latent, []).append((0.0 if value is None else value, description.text))
    texts, scores = {}, {}
    for latent, candidates in found.items():
        candidates.sort(key=lambda candidate: -candidate[0])
        texts[latent] = tuple(dict.fromkeys(text for _, text in candidates))
        scores[latent] = candidates[0][0]
    return texts, scores
