"""The report of a rewriting run: loss against fraction, all conditions, and the latents that hurt most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from introspect_ray.config import RewriteConfig, RewriteLineConfig
from introspect_ray.evaluation.charts import LinesPlot, lines_plot
from introspect_ray.evaluation.page import render_page
from introspect_ray.rewrite.measure import TRUE, ZERO
from introspect_ray.rewrite.results import Condition, Harm, Results, shown_conditions
from introspect_ray.rewrite.scores import AgreementScores

HARMS_SHOWN = 20
CONTEXT_TOKENS = 12
"""Tokens of a text that are shown before a false alarm."""


@dataclass(frozen=True)
class _Plot:
    title: str
    phrase: str
    plot: LinesPlot
    tones: Mapping[str, str]


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
        plots=[plot for plot in (_plot(results, "increase"), _plot(results, "divergence")) if plot is not None],
        rows=rows,
        fraction=config.headline_fraction,
        confidence=config.confidence,
        headline=results.headline,
        harms=harms,
        alarms={harm.latent: _alarms(harm, pieces) for harm in harms},
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


def line_phrase(line: RewriteLineConfig) -> str:
    """What a line does, in words."""
    chosen = {"score": "best described first", "contribution": "most needed first", "random": "in random order"}
    if line.kind != "simulated":
        kinds = {
            "deleted": "chosen latents are zero",
            "oracle": "true values",
            "oracle_levels": "true values, rounded to the simulator's levels",
        }
        return f"{kinds[line.kind]}; {chosen[line.selection]}"
    words = [f"{line.source} by {line.simulator}", line.scale]
    words += [line.descriptions] if line.descriptions != "one" else []
    words += [f"{line.repaired.replace('_', ' ')} repaired"] if line.repaired != "nothing" else []
    return f"{', '.join(words)}; {chosen[line.selection]}"


def _plot(results: Results, measure: str) -> _Plot | None:
    names = list(dict.fromkeys(one.line for one in results.conditions if one.line is not None))
    lines = {
        name: [(one.fraction, getattr(one.scores, measure).value) for one in results.of_line(name)] for name in names
    }
    levels = {one.name: getattr(one.scores, measure).value for one in results.conditions if one.name in (TRUE, ZERO)}
    plot = lines_plot(lines, levels, is_log=measure == "divergence")
    if plot is None:
        return None
    titles = {
        "increase": ("Cross-entropy increase by fraction replaced", "Nats per token above the original"),
        "divergence": ("Divergence by fraction replaced", "KL from the original, nats per token, logarithmic axis"),
    }
    tones = {name: f"hsl({360 * index / len(names):.0f} 60% 48%)" for index, name in enumerate(names)}
    return _Plot(*titles[measure], plot, tones)


def _alarms(harm: Harm, pieces: Mapping[int, Sequence[str]]) -> list[tuple[str, str, float]]:
    """(text before, token, value) of the strongest false alarms."""
    shown = []
    for alarm in harm.false_alarms:
        text = pieces[alarm.row]
        before = "".join(text[max(0, alarm.position - CONTEXT_TOKENS) : alarm.position])
        shown.append((before, text[alarm.position], alarm.value))
    return shown[:3]
