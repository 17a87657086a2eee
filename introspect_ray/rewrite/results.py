"""All numbers of a run: conditions with intervals, agreement of every line, and the latents that hurt most."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from introspect_ray.evaluation.intervals import Bootstrap, Interval
from introspect_ray.rewrite.comparison import Comparison, Difference, compare
from introspect_ray.rewrite.lines import Line, count_of
from introspect_ray.rewrite.measure import BASELINES, FalseAlarm, MeasurePlan, condition_name
from introspect_ray.rewrite.scores import AgreementScores, ConditionScores, Losses, agreement_scores, condition_scores


@dataclass(frozen=True)
class Condition:
    """One row of the table."""

    name: str
    line: str | None
    """Line that it is a point of; none for baselines."""
    fraction: float
    num_latents: int
    scores: ConditionScores
    tokens: int
    """Tokens that a simulator reads for it on the evaluation texts, nothing shared: description and window of every
    pair of a distinct description and a text, in the target's tokens."""


@dataclass(frozen=True)
class Harm:
    """What simulating one latent costs at the headline, and where it is said to fire but does not."""

    latent: int
    texts: tuple[str, ...]
    contrast: str | None
    nats: float
    """Per measured token, to first order around the true latents."""
    scores: AgreementScores
    false_alarms: tuple[FalseAlarm, ...]


@dataclass(frozen=True)
class Results:
    conditions: Sequence[Condition]
    agreement: Mapping[str, AgreementScores]
    """Line -> overall, over all of its latents that the headline fraction replaces."""
    harms: Sequence[Harm]
    """The latents of the headline, the most harmful first."""
    headline: Condition
    comparison: Comparison
    """The headline step by step, and beside the lines that differ from it in one respect."""
    num_texts: int
    num_tokens: int

    def of_line(self, name: str) -> list[Condition]:
        return [condition for condition in self.conditions if condition.line == name]


def results(
    plan: MeasurePlan,
    losses: Losses,
    agreement: Mapping[str, np.ndarray],
    harm: np.ndarray,
    false_alarms: Sequence[FalseAlarm],
    costs: Mapping[str, int],
    exact: frozenset[str],
    options: Bootstrap,
) -> Results:
    """Everything that the measured sums say.

    Args:
        agreement: line -> sums of its latents, see `Agreement`.
        harm: nats of the headline's latents over all measured tokens.
        costs: condition -> tokens that a simulator reads.
        exact: names of the simulators that read descriptions without error.
    """
    conditions = [Condition(name, None, 0.0, 0, condition_scores(losses, name, None, options), 0) for name in BASELINES]
    for line in plan.lines:
        rival = _deleted(plan.lines, line)
        for fraction, count in plan.counts(line):
            name = condition_name(line.config.name, fraction)
            other = condition_name(rival.config.name, fraction) if rival is not None else None
            other = other if other in losses.cross_entropy else None
            scores = condition_scores(losses, name, other, options)
            conditions.append(Condition(name, line.config.name, fraction, count, scores, costs.get(name, 0)))
    count = count_of(plan.headline_fraction, len(plan.live))
    by_line = {name: agreement_scores(sums[:count]) for name, sums in agreement.items()}
    headline = condition_name(plan.headline, plan.headline_fraction)
    (line,) = [line for line in plan.lines if line.config.name == plan.headline]
    each = by_line[plan.headline][1] if plan.headline in by_line else []
    configs = [line.config for line in plan.lines]
    return Results(
        conditions=conditions,
        agreement={name: overall for name, (overall, _) in by_line.items()},
        harms=_harms(line, harm / losses.tokens.sum(), each, false_alarms),
        headline=next(condition for condition in conditions if condition.name == headline),
        comparison=compare(configs, plan.headline, plan.headline_fraction, exact, losses, options),
        num_texts=len(losses.tokens),
        num_tokens=int(losses.tokens.sum()),
    )


def _deleted(lines: Sequence[Line], line: Line) -> Line | None:
    """The line that deletes the same latents in the same order."""
    for other in lines:
        if other is not line and other.config.kind == "deleted" and other.config.selection == line.config.selection:
            return other
    return None


def _harms(
    line: Line, nats: np.ndarray, each: Sequence[AgreementScores], false_alarms: Sequence[FalseAlarm]
) -> list[Harm]:
    alarms: dict[int, list[FalseAlarm]] = {}
    for alarm in false_alarms:
        alarms.setdefault(alarm.latent, []).append(alarm)
    found = []
    for place in np.argsort(-nats, kind="stable").tolist():
        latent = int(line.latents[place])
        strongest = sorted(alarms.get(latent, []), key=lambda alarm: -alarm.value)
        contrast = line.contrast[place] if line.contrast else None
        if each:
            texts = line.texts[place] if line.texts else ()
            found.append(Harm(latent, texts, contrast, float(nats[place]), each[place], tuple(strongest)))
    return found


def simulation_costs(
    lines: Sequence[Line], plan: MeasurePlan, description_tokens: Mapping[str, int], window_tokens: Sequence[int]
) -> dict[str, int]:
    """Condition -> tokens of every distinct description with every window of the evaluation texts."""
    costs = {}
    for line in lines:
        for fraction, count in plan.counts(line):
            told = {text for texts in line.texts[:count] for text in texts}
            told |= {text for text in line.contrast[:count] if text is not None}
            read = sum(description_tokens[text] for text in told) * len(window_tokens) + len(told) * sum(window_tokens)
            costs[condition_name(line.config.name, fraction)] = read
    return costs


def scores_json(results: Results, facts: Mapping[str, Any]) -> str:
    """Everything as JSON text; undefined values are null."""
    content = {
        **facts,
        "texts": results.num_texts,
        "tokens": results.num_tokens,
        "headline": results.headline.name,
        "conditions": {
            condition.name: {
                "line": condition.line,
                "fraction": condition.fraction,
                "latents": condition.num_latents,
                "simulator_tokens": condition.tokens,
                **_plain(condition.scores),
            }
            for condition in results.conditions
        },
        "agreement": {name: _plain(scores) for name, scores in results.agreement.items()},
        "path": [_plain(step) for step in results.comparison.path],
        "changes": [_plain(change) for change in results.comparison.changes],
        "harms": [
            {"latent": harm.latent, "texts": list(harm.texts), "nats": harm.nats, **_plain(harm.scores)}
            for harm in results.harms
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Dataclasses as objects; numbers that are not finite as null."""
    if isinstance(value, ConditionScores | AgreementScores | Difference | Interval):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables(results: Results, fraction: float) -> str:
    """The tables for a terminal: all conditions, and where the loss of the headline comes from."""
    parts = [_conditions(results, fraction)]
    for title, differences in (
        (f"From true latents to {results.headline.name}", results.comparison.path),
        (f"From {results.headline.name} to", results.comparison.changes),
    ):
        if differences:
            head = [title, *DIFFERENCE_COLUMNS]
            rows = [[one.what, cell(one.loss), cell(one.share, 2), cell(one.divergence)] for one in differences]
            parts.append(_aligned([head, *rows]))
    return "\n\n".join(parts)


def _conditions(results: Results, fraction: float) -> str:
    """Baselines, and every line at `fraction` or the largest that it reaches below."""
    rows = [["condition", *COLUMNS, *AGREEMENT]]
    for condition in shown_conditions(results, fraction):
        scores = condition.scores
        agreement = results.agreement.get(condition.line or "")
        rows.append(
            [
                condition.name,
                cell(scores.increase),
                cell(scores.divergence),
                cell(scores.recovered, 2),
                cell(scores.regained, 2),
                cell(scores.below_deleted),
                cell(scores.divergence_below_deleted),
                f"{scores.coverage:.0%}",
                f"{condition.tokens:,}" if condition.tokens else "",
                *(f"{getattr(agreement, name):.4g}" if agreement is not None else "" for name in AGREEMENT),
            ]
        )
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows with their cells one below the other, the first column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


COLUMNS = (
    "CE increase",
    "KL",
    "recovered",
    "regained",
    "CE below deleting",
    "KL below deleting",
    "covered",
    "tokens",
)
AGREEMENT = ("specificity", "precision", "recall", "correlation")
DIFFERENCE_COLUMNS = ("CE", "share of the gap", "KL")


def shown_conditions(results: Results, fraction: float) -> list[Condition]:
    """Baselines, and of every line the condition at `fraction`, or the nearest smaller one that there is."""
    shown = [condition for condition in results.conditions if condition.line is None]
    for name in dict.fromkeys(condition.line for condition in results.conditions if condition.line is not None):
        reached = [condition for condition in results.of_line(name) if condition.fraction <= fraction + 1e-9]
        shown += reached[-1:]
    return shown


def verdict(found: Results) -> str:
    """One sentence about the headline."""
    scores = found.headline.scores
    recovered = scores.recovered
    if scores.coverage == 0:
        return f"{found.headline.name}: no text is fully simulated, so nothing can be said"
    if not math.isfinite(recovered.value):
        return f"{found.headline.name}: the true latents are no better than none, so nothing can be recovered"
    reached = _against(recovered)
    text = (
        f"{found.headline.name} ({found.headline.num_latents} latents): {reached} deleting all latents, share of the"
        f" gap recovered {recovered.value:.2f} [{recovered.low:.2f}, {recovered.high:.2f}]"
    )
    if (deleted := scores.below_deleted) is not None:
        same = _against(deleted)
        text += f"; {same} deleting the same latents ({deleted.value:+.4f} [{deleted.low:+.4f}, {deleted.high:+.4f}])"
    if (regained := scores.regained) is not None and math.isfinite(regained.value):
        text += f", of whose cost {regained.value:.2f} [{regained.low:.2f}, {regained.high:.2f}] is regained"
    return text


def _against(gain: Interval) -> str:
    """What an interval of how much better something is shows."""
    if gain.low > 0:
        return "better than"
    return "worse than" if gain.high < 0 else "not shown to be better than"


def cell(interval: Interval | None, digits: int = 4) -> str:
    """`value [low, high]`, n/a where it is undefined, nothing where there is none."""
    if interval is None:
        return ""
    if not math.isfinite(interval.value):
        return "n/a"
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
