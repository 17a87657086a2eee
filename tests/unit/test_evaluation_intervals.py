"""Bootstrap over groups: coverage, a loop that resamples rows literally, and the degenerate cases."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
from evaluation_helpers import hits, row, rows

from introspect_ray.evaluation.intervals import Bootstrap, bootstrap_intervals, paired_difference
from introspect_ray.evaluation.metrics import METRICS, Scored, exact_match, has_changed_f1, parse_rate

OPTIONS = Bootstrap(samples=2000, confidence=0.95, seed=0)


def random_rows(num_groups: int, seed: int) -> list[Scored]:
    draw = random.Random(seed)
    verdicts = [True, True, True, False]
    made = []
    for group in range(num_groups):
        for place in range(draw.choice([1, 1, 2, 9])):
            truth = (draw.choice(verdicts), draw.choice("ab"))
            predicted = None if draw.random() < 0.2 else (draw.choice(verdicts), draw.choice("ab"))
            made.append(row(truth, predicted, group=f"g{group}", record_id=f"r{group}.{place}"))
    return made


def test_coverage_on_lopsided_groups_and_rows_are_too_narrow() -> None:
    """Group sizes from 1 to 12, half of the groups nearly always right and half nearly always wrong; truth is 0.5."""
    generator = np.random.default_rng(5)
    options = Bootstrap(samples=400, confidence=0.95, seed=1)
    covered = {"groups": 0, "rows": 0}
    repeats = 80
    for _ in range(repeats):
        sizes = generator.choice([1, 2, 12], size=40)
        rates = generator.choice([0.1, 0.9], size=40)
        scored = hits(
            [(generator.random(size) < rate).astype(int).tolist() for size, rate in zip(sizes, rates, strict=True)]
        )
        alone = [
            Scored(s.record_id, s.record_id, s.truth, s.accepted, s.predicted, s.text, s.reference) for s in scored
        ]
        for name, sample in (("groups", scored), ("rows", alone)):
            interval = bootstrap_intervals(sample, [exact_match], options)["exact_match"]
            covered[name] += interval.low <= 0.5 <= interval.high
    assert 0.9 <= covered["groups"] / repeats <= 1.0
    assert covered["rows"] / repeats < 0.75


def test_equals_a_loop_that_resamples_whole_groups() -> None:
    """The same distribution by brute force: concatenate drawn groups' rows, call the metric on them."""
    scored = random_rows(15, seed=3)
    members: dict[str, list[Scored]] = {}
    for one in scored:
        members.setdefault(one.group, []).append(one)
    draw = random.Random(0)
    samples = [
        [one for name in draw.choices(sorted(members), k=len(members)) for one in members[name]] for _ in range(1000)
    ]
    options = Bootstrap(samples=20_000, confidence=0.9, seed=0)
    found = bootstrap_intervals(scored, [exact_match, has_changed_f1, parse_rate], options)
    for metric in (exact_match, has_changed_f1, parse_rate):
        low, high = np.quantile([metric(sample) for sample in samples], [0.05, 0.95])
        interval = found[metric.name]
        assert interval.value == pytest.approx(metric(scored))
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.025)
        assert (interval.n, interval.num_groups) == (len(scored), 15)


def test_same_seed_same_limits_whatever_the_row_order_and_the_global_generator() -> None:
    scored = random_rows(30, seed=1)
    np.random.seed(7)
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    first = bootstrap_intervals(scored, [exact_match, has_changed_f1], OPTIONS)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr]
    np.random.seed(8)
    assert bootstrap_intervals(scored[::-1], [exact_match, has_changed_f1], OPTIONS) == first
    other = bootstrap_intervals(scored, [exact_match], Bootstrap(2000, 0.95, seed=1))
    assert other["exact_match"] != first["exact_match"]


def test_chunked_draws_equal_unchunked_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = random_rows(30, seed=2)
    whole = bootstrap_intervals(scored, [exact_match], OPTIONS)
    monkeypatch.setattr("introspect_ray.evaluation.intervals._WEIGHTS_PER_CHUNK", 7 * 30)
    assert bootstrap_intervals(scored, [exact_match], OPTIONS) == whole


def test_one_group_knows_nothing() -> None:
    interval = bootstrap_intervals(hits([[1, 1, 0]]), [exact_match], OPTIONS)["exact_match"]
    assert (interval.value, interval.low, interval.high) == (pytest.approx(2 / 3), 0.0, 1.0)
    one, other = hits([[1, 1, 0]]), hits([[0, 0, 0]])
    difference = paired_difference(one, other, exact_match, OPTIONS)
    assert (difference.value, difference.low, difference.high) == (pytest.approx(2 / 3), -1.0, 1.0)


@pytest.mark.parametrize("num_groups", [2, 20, 300])
def test_all_right_or_all_wrong_keeps_an_honest_width(num_groups: int) -> None:
    """At the limit, seeing all of G groups right has probability 2.5%: limit ** G = 0.025."""
    right = bootstrap_intervals(hits([[1, 1]] * num_groups), [exact_match], OPTIONS)["exact_match"]
    wrong = bootstrap_intervals(hits([[0]] * num_groups), [exact_match], OPTIONS)["exact_match"]
    assert right.high == 1 and right.low**num_groups == pytest.approx(0.025)
    assert wrong.low == 0 and (1 - wrong.high) ** num_groups == pytest.approx(0.025)


def test_undefined_values_stay_undefined() -> None:
    empty = bootstrap_intervals([], [exact_match], OPTIONS)["exact_match"]
    assert math.isnan(empty.value) and math.isnan(empty.low) and (empty.n, empty.num_groups) == (0, 0)
    silent = rows(((True, "x"), None, 4))
    interval = bootstrap_intervals(silent, [METRICS["paper_compat_has_changed_f1"]], OPTIONS)
    assert math.isnan(interval["paper_compat_has_changed_f1"].low)


def test_paired_difference_cancels_what_both_share() -> None:
    """Easy and hard groups: each method's score is uncertain, b fails exactly one row more in each group."""
    a = hits([[1, 1, 1, 1] if group % 2 else [1, 0, 0, 0] for group in range(40)])
    b = hits([[1, 1, 1, 0] if group % 2 else [0, 0, 0, 0] for group in range(40)])
    difference = paired_difference(a, b, exact_match, OPTIONS)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.25, 0.25, 0.25))
    single = bootstrap_intervals(a, [exact_match], OPTIONS)["exact_match"]
    assert single.high - single.low > 0.15
    back = paired_difference(b, a, exact_match, OPTIONS)
    assert back.value == -difference.value


def test_paired_difference_refuses_other_records() -> None:
    with pytest.raises(AssertionError, match="other records"):
        paired_difference(hits([[1], [1]]), hits([[1]]), exact_match, OPTIONS)


def test_a_thousand_rows_and_several_metrics_are_quick() -> None:
    scored = hits([[index % 3 == 0] for index in range(1000)])
    start = time.perf_counter()
    bootstrap_intervals(scored, [exact_match, has_changed_f1, parse_rate], OPTIONS)
    assert time.perf_counter() - start < 3  # a tenth of that on an idle core
