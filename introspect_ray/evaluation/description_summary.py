"""Means of scores over latents, with intervals over independent groups of them: scores.json, the table, the report.

    per source, and per control: mean over latents, interval over groups, how many have no value and why

Latents with the same description are one group: they are often halves of one thing and fire on the same text, and what
a simulator makes of the words it makes of both.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from introspect_ray.evaluation.description_scores import CONTROLS, Scored
from introspect_ray.evaluation.intervals import Bootstrap, Interval, bootstrap_mean
from introspect_ray.evaluation.page import render_page
from introspect_ray.features.descriptions import Score, same_words

Key = tuple[int, int]
"""Layer and number of a latent."""


@dataclass(frozen=True)
class MetricSummary:
    """A metric over the latents of one source: the mean of those that have a value, and why others have none."""

    interval: Interval
    reasons: Mapping[str, int]


Summary = dict[str, dict[str, MetricSummary]]
"""Source -> metric -> summary."""


def summarise(
    scored: Sequence[Scored], best: Sequence[Scored], options: Bootstrap, related: Mapping[Key, str] | None = None
) -> Summary:
    """One entry per source, and `best` where a latent has several candidates.

    A latent counts once: several candidates of one source are their mean, so that the unit is the latent. Latents that
    share a text of the source are one group of the bootstrap; those of a control also where their own first
    descriptions are alike.

    Args:
        related: names of groups that latents belong to for other reasons, such as vectors of one text.
    """
    sources: dict[str, list[Scored]] = {}
    for one in scored:
        sources.setdefault(one.description.source, []).append(one)
    own = [one for one in scored if one.description.source not in CONTROLS]
    if len(best) < len(own):
        sources = {"best": list(best), **sources}
    first: dict[Key, str] = {}
    for one in own:
        first.setdefault(_key(one), one.description.text)
    known = {} if related is None else related
    found: Summary = {}
    for source, rows in sources.items():
        labels: dict[Key, set[tuple[str, str]]] = {}
        for row in rows:
            mine = labels.setdefault(_key(row), set())
            if row.description.text:
                mine.add(("text", same_words(row.description.text)))
            if source in CONTROLS:
                mine.add(("own text", same_words(first[_key(row)])))
            if _key(row) in known:
                mine.add(("related", known[_key(row)]))
        found[source] = _summary(rows, independent(labels), options)
    return found


def _key(scored: Scored) -> Key:
    return scored.description.layer, scored.description.latent


def independent(labels: Mapping[Key, Iterable[tuple[str, str]]]) -> dict[Key, int]:
    """Latent -> number of its group: latents that share a label, or are linked by others that do, are in one."""
    parent: dict[object, object] = {}

    def root(one: object) -> object:
        while parent.setdefault(one, one) != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for key, names in labels.items():
        for name in names:
            parent[root(name)] = root(key)
    numbers: dict[object, int] = {}
    return {key: numbers.setdefault(root(key), len(numbers)) for key in labels}


def _summary(rows: Sequence[Scored], groups: Mapping[Key, int], options: Bootstrap) -> dict[str, MetricSummary]:
    names = dict.fromkeys(name for row in rows for name in row.scores)
    found: dict[str, MetricSummary] = {}
    for name in names:
        values: dict[Key, list[float]] = {}
        missing: Counter[str] = Counter()
        for row in rows:
            score = row.scores.get(name, Score(None, "not_scored"))
            if score.value is None:
                missing[str(score.reason)] += 1
            else:
                values.setdefault(_key(row), []).append(score.value)
        means = [sum(several) / len(several) for several in values.values()]
        interval = bootstrap_mean(means, options, [groups[key] for key in values])
        found[name] = MetricSummary(interval, dict(missing))
    return found


def summary_json(summary: Summary) -> str:
    """`{source: {metric: {"value", "low", "high", "n", "groups", "undefined": {reason: count}}}}`.

    Undefined values are null.
    """

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    content = {
        source: {
            name: {
                "value": number(one.interval.value),
                "low": number(one.interval.low),
                "high": number(one.interval.high),
                "n": one.interval.n,
                "groups": one.interval.num_groups,
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
