"""The report of a rewriting run: loss against fraction, all conditions, and the latents that hurt most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from introspect_ray.config import RewriteConfig, RewriteLineConfig
from introspect_ray.evaluation.charts import LinesPlot, PlotLine, lines_plot
from introspect_ray.evaluation.page import render_page
from introspect_ray.rewrite.measure import TRUE, ZERO
from introspect_ray.rewrite.results import Condition, Harm, Results, shown_conditions
from introspect_ray.rewrite.scores import AgreementScores

HARMS_SHOWN = 20
GOLDEN_ANGLE = 137.508
"""Degrees between the hues of lines that follow each other: no two of a few dozen are alike."""
HIGHEST = 1.5
"""Highest value that a plot makes room for, in those of zero latents."""
CONTEXT_TOKENS = 12
"""Tokens of a text that are shown before a false alarm."""


@dataclass(frozen=True)
class _Plot:
    phrase: str
    plot: LinesPlot
    legend: Sequence[PlotLine]
    """Its lines, the one that ends highest first."""
    tones: Mapping[str, str]


@dataclass(frozen=True)
class _Group:
    """Lines that replace the same latents, read by one simulator, and those on the same latents that need none."""

    title: str
    plots: Sequence[_Plot]


@dataclass(frozen=True)
class _Row:
    condition: Condition
    agreement: AgreementScores | None
    phrase: str


def rewriting_page(
    config: RewriteConfig, results: Results, facts: Mapping[str, Any], verdict: str, pieces: Mapping[int, Sequence[str]]
) -> str:
    """The whole page. `pieces`: source row -> the pieces of its ids, for showing where latents are said to fire."""
    lines = {line.name: line for line in config.lines}
    agreement = results.agreement
    rows = [
        _Row(one, agreement.get(one.line or ""), line_phrase(lines[one.line]) if one.line else _BASELINES[one.name])
        for one in shown_conditions(results, config.headline_fraction)
    ]
    harms = [harm for harm in results.harms if harm.nats > 0][:HARMS_SHOWN]
    return render_page(
        "rewriting.html",
        title="What do the descriptions carry?",
        subtitle=f"{facts['target']} with latents of {facts['coder']} (layer {facts['layer']}) replaced",
        summary=[
            ("Evaluated on", f"{results.num_texts:,} texts, {results.num_tokens:,} tokens"),
            ("Loss of the original", f"{facts['loss']:.4f} nats per token"),
            ("Live latents", f"{facts['live_latents']:,}"),
            ("Positions", "all but the first" if config.where == "all" else "the last of each window"),
            ("Protocol", "P2 as coded" if config.paper_compat else "ours"),
        ],
        verdict=verdict,
        groups=_groups(config, results),
        rows=rows,
        fraction=config.headline_fraction,
        confidence=config.confidence,
        headline=results.headline,
        harms=harms,
        alarms={harm.latent: _alarms(harm, pieces) for harm in harms},
        differences=[
            (f"From true latents to {results.headline.name}", _PATH, results.comparison.path),
            (f"From {results.headline.name} to", _CHANGES, results.comparison.changes),
        ],
        conditions=[condition for condition in results.conditions if condition.line is not None],
    )


_BASELINES = {
    "original": "nothing is changed",
    TRUE: "the coder's own code, decoded",
    ZERO: "no latent is active; bias and skip term stay",
    "zero output": "the site writes zero",
    "mean output": "the site writes its mean",
    "random latents": "as many latents as truly, drawn at random",
}


_PATH = "What each step costs; the steps add up to all that the headline loses against the true latents."
_CHANGES = "Lines that differ from the headline in one respect; positive: the headline is better."
_CHOSEN = {"score": "best described first", "contribution": "most needed first", "random": "in random order"}
_MEASURES = {
    "increase": "Cross-entropy above the original, nats per token",
    "divergence": "KL from the original, nats per token, logarithmic axis",
}


def line_phrase(line: RewriteLineConfig) -> str:
    """What a line does, in words."""
    if line.kind != "simulated":
        kinds = {
            "deleted": "chosen latents are zero",
            "oracle": "true values",
            "oracle_levels": "true values, rounded to the simulator's levels",
        }
        return f"{kinds[line.kind]}; {_CHOSEN[line.selection]}"
    words = [f"{line.source} by {line.simulator}", line.scale]
    words += [line.descriptions] if line.descriptions != "one" else []
    words += [f"{line.repaired.replace('_', ' ')} repaired"] if line.repaired != "nothing" else []
    return f"{', '.join(words)}; {_CHOSEN[line.selection]}"


def _groups(config: RewriteConfig, results: Results) -> list[_Group]:
    """One group for every order of the latents and simulator, that of the headline first."""
    (headline,) = [line for line in config.lines if line.name == config.headline]
    simulated = [line for line in config.lines if line.kind == "simulated"]
    keys: dict[tuple[str, str | None], None] = {(line.selection, line.simulator): None for line in simulated}
    keys |= {
        (line.selection, None): None
        for line in config.lines
        if line.selection not in {one.selection for one in simulated}
    }
    groups = []
    for selection, simulator in sorted(keys, key=lambda key: key != (headline.selection, headline.simulator)):
        names = [
            line.name
            for line in config.lines
            if line.selection == selection and (line.kind != "simulated" or line.simulator == simulator)
        ]
        plots = [plot for measure in _MEASURES if (plot := _plot(results, names, measure)) is not None]
        if plots:
            read = f", read by {simulator}" if simulator is not None else ""
            groups.append(_Group(f"Latents {_CHOSEN[selection]}{read}", plots))
    return groups


def _plot(results: Results, names: Sequence[str], measure: str) -> _Plot | None:
    """The lines of some names; the headline is drawn last, above all others, in the colour of text."""
    headline = results.headline.line
    lines = {
        name: [(one.fraction, getattr(one.scores, measure).value) for one in results.of_line(name)]
        for name in sorted(names, key=lambda name: name == headline)
    }
    levels = {one.name: getattr(one.scores, measure).value for one in results.conditions if one.name in (TRUE, ZERO)}
    # A line may be far worse than zero latents: how far is in the table; here it would press the others flat.
    highest = HIGHEST * levels[ZERO] if levels.get(ZERO, 0) > 0 else math.inf
    plot = lines_plot(lines, levels, measure == "divergence", highest)
    if plot is None:
        return None
    legend = sorted((line for line in plot.lines if line.points), key=lambda line: line.points[-1][1])
    tones = {
        name: f"hsl({index * GOLDEN_ANGLE % 360:.0f} 62% {(42, 56)[index % 2]}%)" if name != headline else "var(--ink)"
        for index, name in enumerate(lines)
    }
    return _Plot(_MEASURES[measure], plot, legend, tones)


def _alarms(harm: Harm, pieces: Mapping[int, Sequence[str]]) -> list[tuple[str, str, float]]:
    """(text before, token, value) of the strongest false alarms."""
    shown = []
    for alarm in harm.false_alarms:
        text = pieces[alarm.row]
        before = "".join(text[max(0, alarm.position - CONTEXT_TOKENS) : alarm.position])
        shown.append((before, text[alarm.position], alarm.value))
    return shown[:3]
