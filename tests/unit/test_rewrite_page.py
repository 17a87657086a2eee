"""The report: one plot per order of latents and simulator, the headline's first, and every table that has rows."""

from __future__ import annotations

import re
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
from unit.rewrite_helpers import LATENTS
from unit.test_rewrite_measure import plan_of

from introspect_ray.config import RewriteConfig, RewriteLineConfig
from introspect_ray.evaluation.intervals import Bootstrap, Interval
from introspect_ray.rewrite.lines import Line
from introspect_ray.rewrite.measure import BASELINES, TRUE, ZERO, FalseAlarm, condition_name
from introspect_ray.rewrite.page import rewriting_page
from introspect_ray.rewrite.results import Results, results, tables, verdict
from introspect_ray.rewrite.scores import Losses

FACTS = {"target": "tiny", "coder": "hand", "layer": 1, "live_latents": LATENTS, "loss": 1.5}
CONFIGS = (
    RewriteLineConfig(name="by score", simulator="exact"),
    RewriteLineConfig(name="gone", kind="deleted", selection="contribution"),
    RewriteLineConfig(name="read", simulator="exact", selection="contribution"),
    RewriteLineConfig(name="mine", selection="contribution"),
    RewriteLineConfig(name="other", selection="contribution", descriptions="shuffled"),
    RewriteLineConfig(name="any", kind="deleted", selection="random"),
)


def test_plots_and_tables_of_a_page():
    texts = tuple((f"words of <{latent}>",) for latent in range(LATENTS))
    lines = [Line(one, np.arange(LATENTS), texts, np.ones(LATENTS)) for one in CONFIGS]
    plan = plan_of(lines, headline="mine")
    draw = np.random.default_rng(0)
    names = [*BASELINES, *(condition_name(one.name, fraction) for one in CONFIGS for fraction in plan.fractions)]
    loss = {name: draw.uniform(2, 3, 5) for name in names} | {TRUE: np.full(5, 1.0), ZERO: np.full(5, 4.0)}
    every = dict.fromkeys(names, np.ones(5, dtype=bool))
    losses = Losses(np.full(5, 4.0), loss, loss, every)
    agreement = {"mine": draw.uniform(1, 2, (LATENTS, 9))}
    harm = np.linspace(-1, 1, LATENTS // 2)
    alarms = [FalseAlarm(5, 7, 2, 3.5)]
    options = Bootstrap(200, 0.95, 0)
    found = results(plan, losses, agreement, harm, alarms, {}, frozenset({"exact"}), options)
    config = RewriteConfig(lines=CONFIGS, headline="mine", fractions=(0.25, 0.5, 1.0), headline_fraction=0.5)
    page = rewriting_page(config, found, FACTS, verdict(found), {7: ["one", " two", " <three>"]})
    titles = [title.strip() for title in re.findall(r"<h2>(.*?)</h2>", page)]
    assert titles == [
        "Latents most needed first, read by finetuned",
        "All conditions at 50% of the live latents",
        "From true latents to mine @ 0.5",
        "From mine @ 0.5 to",
        "Latents best described first, read by exact",
        "Latents most needed first, read by exact",
        "Latents in random order",
        "Latents that hurt most",
        "Every fraction",
    ]
    first = page[page.index("read by finetuned") : page.index("All conditions")]
    assert re.findall(r"<title>(.*?)</title>", first) == ["gone", "other", "mine"] * 2
    assert "<strong>mine</strong>" in first
    assert "words of &lt;5&gt;" in page and "<mark> &lt;three&gt;</mark> 3.5" in page
    assert page.count("<table") == page.count("</table>") == 5
    text = tables(found, 0.5)
    assert "simulator: finetuned instead of exact" in text and "descriptions: shuffled instead of one" in text


def test_the_verdict_says_better_worse_or_neither():
    def said(low: float, high: float, coverage: float = 1.0) -> str:
        interval = Interval((low + high) / 2, low, high, 10, 10)
        scores = SimpleNamespace(recovered=interval, below_deleted=interval, regained=None, coverage=coverage)
        return verdict(Mock(spec=Results, headline=SimpleNamespace(name="mine", num_latents=3, scores=scores)))

    assert said(0.1, 0.2).count("better than") == 2 and "not shown" not in said(0.1, 0.2)
    assert said(-0.2, -0.1).count("worse than") == 2
    assert said(-0.1, 0.2).count("not shown to be better than") == 2
    assert "no text is fully simulated" in said(float("nan"), float("nan"), 0.0)
