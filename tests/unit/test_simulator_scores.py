"""Scores by simulation against their definitions, on windows that are nothing like plain text."""

import numpy as np
import pytest

from introspect_ray.evaluation.description_scores import SimulationScorer
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.windows import Window
from introspect_ray.simulator.base_rate import NO_RANDOM_WINDOWS, NO_WINDOWS
from introspect_ray.simulator.scores import (
    CONSTANT,
    METRICS,
    NEVER_FIRES,
    NOT_FINITE,
    NOTHING_PREDICTED,
    Tokens,
    best_threshold,
    correlation,
    detection_at,
    paper_correlation,
    reasons,
    simulation_scores,
    weighted_pearson,
)


def tokens(predicted, true, weights=None) -> Tokens:
    given = np.ones(len(true)) if weights is None else np.asarray(weights)
    return Tokens(np.asarray(predicted, float), np.asarray(true, float), np.asarray(given, float))


def exemplar(activations, kind, number=0) -> Exemplar:
    ids = tuple(range(number, number + len(activations)))
    return Exemplar(Window(ids, tuple(map(str, ids))), np.asarray(activations, float), kind)


def test_weighted_pearson_is_pearson_of_repeated_tokens():
    x, y, counts = np.array([0.0, 1, 5, 2]), np.array([0.0, 3, 4, 0]), np.array([7, 1, 2, 3])
    repeated = np.corrcoef(np.repeat(x, counts), np.repeat(y, counts))[0, 1]
    assert weighted_pearson(x, y, counts.astype(float)) == pytest.approx(repeated)
    assert abs(repeated - np.corrcoef(x, y)[0, 1]) > 0.05


def test_the_papers_protocol_turns_a_negative_correlation_over():
    predicted, true = [9.0, 8, 1, 0, 7], [0.0, 1, 5, 9, 2]
    expected = np.corrcoef(predicted, true)[0, 1]
    assert expected < -0.9
    assert paper_correlation(tokens(predicted, true)).value == pytest.approx(-expected)
    assert paper_correlation(tokens([0.0, 0, 1, 1], [1.0, 0, 0, 1])).value == 0.0
    assert paper_correlation(tokens([2, 2], [0, 1])).reason == CONSTANT
    assert paper_correlation(tokens([], [])).reason == NO_WINDOWS


def test_the_corrected_correlation_needs_the_sign_on_other_text():
    held_out = tokens([9.0, 8, 1, 0, 7], [0.0, 1, 5, 9, 2])
    r = np.corrcoef(held_out.predicted, held_out.true)[0, 1]
    assert correlation(tokens([0.0, 1], [0.0, 2]), held_out).value == pytest.approx(r)
    assert correlation(tokens([1.0, 0], [0.0, 2]), held_out).value == pytest.approx(-r)
    assert correlation(held_out, tokens([1, 2], [0, 0])).reason == NEVER_FIRES
    assert correlation(held_out, tokens([2, 2], [0, 1])).reason == CONSTANT
    assert correlation(held_out, tokens([1, 2, 3], [0, 0, 1], [1, 1, 0])).reason == NEVER_FIRES


def test_detection_counts_tokens_by_weight():
    """TP 1, FP 2 at weight 10, FN 1, TN 3 at weight 10: unlike the plain counts in every score."""
    found = detection_at(5.0, tokens([9, 8, 7, 1, 0, 0, 0], [2, 0, 0, 3, 0, 0, 0], [1, 10, 10, 1, 10, 10, 10]))
    assert found["precision"].value == pytest.approx(1 / 21)
    assert found["recall"].value == 0.5
    assert found["specificity"].value == pytest.approx(30 / 50)
    assert found["f1"].value == pytest.approx(2 / 23)
    nothing = detection_at(10.0, tokens([1, 2], [0, 1]))
    assert nothing["precision"].reason == NOTHING_PREDICTED
    assert (nothing["recall"].value, nothing["f1"].value) == (0, 0)


def test_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    true = (rng.random(400) < 0.05) * 1.0
    given = tokens(np.round(3 * true + rng.normal(size=400), 1), true, rng.random(400))
    best = detection_at(best_threshold(given), given)["f1"].value
    every = [detection_at(cut, given)["f1"].value for cut in np.unique(given.predicted) - 0.05]
    assert best == pytest.approx(max(every))


def test_scores_are_of_held_out_text_at_the_natural_base_rate():
    """A description that fires on everything is perfect on firing windows and worthless at a density of 0.1%."""
    firing = [exemplar([0, 5, 0, 0], "quantile", n) for n in range(5)]
    silent = [exemplar([0, 0, 0, 0], "random", n + 50) for n in range(10)]
    top = [exemplar([0, 9, 0, 0], "top", n + 90) for n in range(25)]
    windows = [*firing, *silent]
    eager = [np.array([0.0, 10, 0, 0]) for _ in windows]
    train_levels = [np.array([0.0, 10, 0, 0]) for _ in [*top, *windows]]
    found = simulation_scores(0.001, [*top, *windows], train_levels, windows, eager)
    assert set(found) == set(METRICS)
    assert found["paper_compat"].value == pytest.approx(1.0)
    assert found["recall"].value == 1.0
    assert found["precision"].value == pytest.approx(0.004)  # one in four tokens is claimed, one in 1000 fires
    assert found["specificity"].value == pytest.approx(0.75 / 0.999)
    assert found["correlation"].value == pytest.approx(
        weighted_pearson(np.array([10.0, 0, 10, 0]), np.array([5.0, 0, 0, 0]), np.array([0.001, 0.003, 0.249, 0.747]))
    )
    right = [10 * one.activations / 9 for one in windows]
    exact = simulation_scores(0.001, [*top, *windows], [one.activations for one in [*top, *windows]], windows, right)
    assert [exact[name].value for name in METRICS] == pytest.approx([1.0] * len(METRICS))


def test_false_alarms_of_a_latent_that_is_silent_in_held_out_text_count():
    train = [exemplar([0, 4, 0, 0], "quantile", 7), *(exemplar([0, 0, 0, 0], "random", n) for n in range(2))]
    held_out = [exemplar([0, 0, 0, 0], "random", n + 20) for n in range(3)]
    levels, alarms = [np.array([0.0, 9, 0, 0]), *[np.zeros(4)] * 2], [np.array([0.0, 0, 0, 9])] * 3
    found = simulation_scores(0.01, train, levels, held_out, alarms)
    assert (found["specificity"].value, found["precision"].value, found["f1"].value) == (0.75, 0, 0)
    assert found["recall"].reason == found["correlation"].reason == NEVER_FIRES
    quiet = simulation_scores(0.01, train, levels, held_out, [np.zeros(4)] * 3)
    assert quiet["specificity"].value == 1
    assert (quiet["precision"].reason, quiet["f1"].reason) == (NOTHING_PREDICTED, NEVER_FIRES)


def test_a_level_that_is_no_number_leaves_nothing_defined():
    windows = [exemplar([0, 4], "quantile", 7), exemplar([0, 0], "random", 9)]
    levels, broken = [np.array([0.0, 9]), np.zeros(2)], [np.array([0.0, np.nan]), np.zeros(2)]
    for train, held_out in ((broken, levels), (levels, broken)):
        found = simulation_scores(0.01, windows, train, windows, held_out)
        assert {found[name].reason for name in METRICS} == {NOT_FINITE}


def test_a_latent_whose_windows_a_first_stage_skips_is_a_total_miss():
    """Two firing windows of other tokens than those of the training texts, among many silent ones."""
    silent = [exemplar([0, 0, 0, 0], "random", 10 * n + 100) for n in range(9)]
    train = LatentExemplars(0, 1, 0.01, 4.0, (exemplar([0, 4, 0, 0], "quantile", 0), *silent))
    missed = LatentExemplars(0, 1, 0.01, 4.0, (*(exemplar([0, 3, 1, 0], "quantile", n) for n in (40, 50)), *silent))

    class Ones:
        def simulate(self, _, windows):
            return [np.array([float(10 * (piece == "1")) for piece in one.pieces]) for one in windows]

    def scored(held_out, share):
        return SimulationScorer(Ones(), {(0, 1): train}, share).score([("x", held_out)])[0]

    found = scored(missed, 0.1)
    assert {name: found[name].value for name in METRICS} == {
        **dict.fromkeys(("correlation", "precision", "recall", "f1"), 0.0), "specificity": 1.0, "paper_compat": None,
    }  # fmt: skip
    assert (found["first_stage_recall"].value, found["first_stage_skipped"].value) == (0.0, pytest.approx(1.0))
    assert scored(missed, None)["correlation"].reason == CONSTANT, "without a stage nobody knows"
    never = scored(LatentExemplars(0, 1, 0.01, 4.0, tuple(silent)), 0.1)
    assert never["correlation"].reason == never["recall"].reason == NEVER_FIRES


def test_what_is_undefined_has_a_reason_and_is_no_zero():
    windows = [exemplar([0, 0], "random", n) for n in range(3)]
    levels = [np.array([0.0, 1.0])] * 3
    never = simulation_scores(0.0, windows, levels, windows, levels)
    assert {name: score.reason for name, score in never.items()} == {
        "correlation": NEVER_FIRES,
        "paper_compat": NO_WINDOWS,
        **dict.fromkeys(("specificity", "precision", "recall", "f1"), NEVER_FIRES),
    }
    fires = [exemplar([0, 4], "quantile", 7), *windows]
    flat = [np.zeros(2)] * 4
    constant = simulation_scores(0.01, fires, flat, fires, flat)
    assert {constant[name].reason for name in METRICS if name != "paper_compat"} == {CONSTANT}
    assert simulation_scores(0.01, [], [], [], [])["f1"].reason == NO_WINDOWS
    levels = [np.array([0.0, 1.0])] * 4
    for train, held_out in ((fires, fires[:1]), (fires[:1], fires)):
        found = simulation_scores(0.01, train, levels[: len(train)], held_out, levels[: len(held_out)])
        reasons_ = {name: score.reason for name, score in found.items() if name != "paper_compat"}
        assert set(reasons_.values()) == {NO_RANDOM_WINDOWS}, "all weight on windows that fire would be a perfect score"
    assert reasons([never, constant])["correlation"] == {NEVER_FIRES: 1, CONSTANT: 1}
