"""Where the loss of a headline comes from: which lines are compared, and that steps add up."""

from __future__ import annotations

import numpy as np
import pytest

from introspect_ray.config import RewriteConfig, RewriteLineConfig
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.rewrite.comparison import compare
from introspect_ray.rewrite.measure import ORIGINAL, TRUE, ZERO
from introspect_ray.rewrite.scores import Losses

OPTIONS = Bootstrap(samples=300, confidence=0.95, seed=0)
EXACT = frozenset({"exact"})


def line(name: str, **changes) -> RewriteLineConfig:
    return RewriteLineConfig(name=name, **({"selection": "contribution"} | changes))


LINES = [
    line("mine"),
    line("other order", simulator="exact", selection="random"),
    line("levels", kind="oracle_levels"),
    line("deleted", kind="deleted"),
    line("two changes", scale="raw", simulator="exact"),
    line("read", simulator="exact"),
    line("linear", scale="linear"),
    line("nowhere", descriptions="shuffled"),
]


def losses() -> Losses:
    """Four texts of 1, 2, 3 and 4 tokens; `linear` lacks the last one."""
    draw = np.random.default_rng(3)
    names = [f"{one.name} @ 0.2" for one in LINES if one.name != "nowhere"]
    loss = {name: draw.uniform(2, 8, 4) for name in [ORIGINAL, *names]}
    loss |= {TRUE: np.full(4, 2.0), ZERO: np.array([4.0, 5.0, 9.0, 10.0])}
    complete = {name: np.array([True, True, True, name != "linear @ 0.2"]) for name in loss}
    return Losses(np.arange(1.0, 5.0), loss, {name: 3 * values for name, values in loss.items()}, complete)


def test_the_path_goes_over_levels_and_exact_reading_and_adds_up():
    given = losses()
    path = compare(LINES, "mine", 0.2, EXACT, given, OPTIONS).path
    assert [(step.before, step.after) for step in path] == [
        (TRUE, "levels @ 0.2"),
        ("levels @ 0.2", "read @ 0.2"),
        ("read @ 0.2", "mine @ 0.2"),
    ]
    assert [step.what.split(":")[0] for step in path] == ["format", "descriptions", "simulator"]
    total = (given.cross_entropy["mine @ 0.2"] - given.cross_entropy[TRUE]).sum()
    assert sum(step.loss.value for step in path) == pytest.approx(total / 10)
    assert sum(step.share.value for step in path) == pytest.approx(total / (28 - 8))
    assert sum(step.divergence.value for step in path) == pytest.approx(3 * total / 10)


def test_a_step_without_its_line_is_part_of_the_next():
    given = losses()
    alone = compare([one for one in LINES if one.name != "read"], "mine", 0.2, EXACT, given, OPTIONS).path
    assert [(step.before, step.after) for step in alone] == [(TRUE, "levels @ 0.2"), ("levels @ 0.2", "mine @ 0.2")]
    (whole,) = compare(LINES, "deleted", 0.2, EXACT, given, OPTIONS).path
    assert (whole.before, whole.after) == (TRUE, "deleted @ 0.2")


def test_changes_are_lines_that_differ_in_one_respect_on_the_texts_that_both_cover():
    given = losses()
    changes = {one.after: one for one in compare(LINES, "mine", 0.2, EXACT, given, OPTIONS).changes}
    assert set(changes) == {"deleted @ 0.2", "read @ 0.2", "linear @ 0.2"}
    assert changes["read @ 0.2"].what == "simulator: exact instead of finetuned"
    apart = (given.cross_entropy["linear @ 0.2"] - given.cross_entropy["mine @ 0.2"])[:3].sum()
    assert changes["linear @ 0.2"].loss.value == pytest.approx(apart / 6), "positive: the headline loses less"
    assert changes["linear @ 0.2"].loss.num_groups == 3


def test_the_pocket_worlds_headline_has_all_steps_and_every_option():
    config = RewriteConfig()
    names = {one.name for one in config.lines}
    given = losses()
    loss = {f"{name} @ 0.2": given.cross_entropy[ZERO] for name in names} | given.cross_entropy
    every = {name: np.ones(4, dtype=bool) for name in loss}
    found = compare(config.lines, config.headline, 0.2, EXACT, Losses(given.tokens, loss, loss, every), OPTIONS)
    assert len(found.path) == 3
    said = " ".join(one.what for one in found.changes)
    for what in ("deleted", "exact", "detected", "context", "contrast", "max", "mean", "shuffled", "none", "misses"):
        assert what in said, what
