"""From levels to activations: each scale against its definition."""

from __future__ import annotations

import numpy as np

from introspect_ray.config import RewriteLineConfig
from introspect_ray.rewrite.lines import Levels, Line, count_of, fit_line, plan_line, ranking, shuffled
from introspect_ray.rewrite.quantiles import fit_shrunk
from introspect_ray.rewrite.scales import (
    combined,
    contrasts,
    fit_detected,
    fit_in_context,
    fit_slopes,
    linear,
    paper_activation,
    raw,
)
from introspect_ray.rewrite.statistics import LatentStatistics

NO_STARTS = np.array([True, False, False, False])
MAXIMUM = np.array([4.0, 20.0])


def statistics(**changes) -> LatentStatistics:
    values = {
        "num_tokens": 100,
        "firings": np.array([10, 20, 1, 30]),
        "maximum": np.array([4.0, 20.0, 1.0, 2.0]),
        "total": np.ones(4),
        "contribution": np.array([0.5, -0.2, 3.0, 0.1]),
        "output_sum": np.zeros(3),
    }
    return LatentStatistics(**(values | changes))


def test_linear_reaches_each_latents_maximum_and_raw_one_for_all():
    levels = np.array([[10.0, 10.0], [5.0, 0.0]])
    starts = np.array([True, False])
    np.testing.assert_allclose(linear(MAXIMUM).values(levels, starts), [[4.0, 20.0], [2.0, 0.0]])
    np.testing.assert_allclose(raw(MAXIMUM).values(levels, starts), [[12.0, 12.0], [6.0, 0.0]])


def test_p2_interpolates_ten_values_up_to_the_maximum_and_has_two_defects():
    # linspace(0, 18, 10) at 2.5 is 5; an unparsed reply (-1) gives the maximum, a certain 9 gives nothing.
    expected = np.array([[2.5], [0.0], [8.99], [-1.0], [9.0]])
    np.testing.assert_allclose(paper_activation(expected, np.array([18.0]))[:, 0], [5.0, 0.0, 17.98, 18.0, 0.0])


def test_detection_takes_the_threshold_and_height_of_least_squared_error():
    levels = np.array([[9.0], [8.0], [3.0], [3.0], [0.2]])
    truth = np.array([[6.0], [6.0], [0.0], [0.0], [5.0]])
    fitted = fit_detected(levels, truth)
    # From level 8 on: n = 2, t = 12, so the height is 12 / 3 and 48 is gained; from 3 on only 12 * 12 / 5.
    assert fitted.thresholds[0] == 8.0 and fitted.heights[0] == 4.0
    said = fitted.values(np.array([[8.0], [7.9], [np.nan]]), np.array([True, False, False]))
    np.testing.assert_array_equal(said[:, 0], [4.0, 0.0, np.nan])


def test_a_latent_that_detection_cannot_help_stays_silent():
    fitted = fit_detected(np.array([[9.0], [0.0]]), np.array([[0.0], [3.0]]))
    assert fitted.values(np.array([[10.0], [0.0]]), np.array([True, False])).max() == 0


def test_a_threshold_in_context_learns_from_the_token_before():
    """The latent fires where level 6 comes after level 6; the level alone cannot tell, the context can."""
    rng = np.random.default_rng(0)
    levels = np.where(rng.random((600, 1)) < 0.5, 6.0, 0.0)
    starts = np.zeros(600, dtype=bool)
    starts[::30] = True
    before = np.vstack([[[0.0]], levels[:-1]])
    before[starts] = 0
    truth = np.where((levels > 0) & (before > 0), 3.0, 0.0)
    every = np.arange(600)
    fitted = fit_in_context(levels, truth, starts, every, np.array([0.25]), np.array([1.0]))
    said = fitted.values(levels, starts)
    assert ((said > 0) == (truth > 0)).all()
    assert 2.8 < said.max() <= 3.0
    assert np.abs(fit_detected(levels, truth).values(levels, starts) - truth).sum() > 100


def test_a_threshold_in_context_sees_no_later_token():
    """The latent fires where its level is the window's highest so far; a beginning is read as in the whole."""
    rng = np.random.default_rng(0)
    levels = np.round(rng.uniform(1, 10, (600, 2)))
    starts = np.zeros(600, dtype=bool)
    starts[::6] = True
    windows = levels.reshape(100, 6, 2)
    highest = np.maximum.accumulate(windows, axis=1)
    truth = np.where(windows == highest, 3.0, 0.0).reshape(600, 2)
    fitted = fit_in_context(levels, truth, starts, np.arange(600), np.full(2, 0.3), np.ones(2))
    said = fitted.values(levels, starts)
    assert ((said > 0) == (truth > 0)).mean() > 0.95
    for end in (1, 2, 5, 6, 7, 40, 599):
        np.testing.assert_array_equal(fitted.values(levels[:end], starts[:end]), said[:end])
    later = levels.copy()
    later[5::6] = 10
    unseen = np.arange(600) % 6 < 5
    np.testing.assert_array_equal(fitted.values(later, starts)[unseen], said[unseen])


def test_a_contrast_takes_back_false_alarms():
    own = np.array([[8.0], [8.0], [8.0], [0.0]])
    truth = np.array([[8.0], [0.0], [0.0], [0.0]])
    pool = np.array([[0.0, 8.0], [10.0, 8.0], [9.0, 8.0], [0.0, 0.0]])
    assert contrasts(own, truth, pool).tolist() == [0]
    assert contrasts(own, own, pool).tolist() == [-1], "nothing to take back"


def test_several_descriptions_are_one_level():
    levels = [np.array([2.0, 9.0, np.nan]), np.array([4.0, 1.0, 3.0])]
    np.testing.assert_array_equal(combined(levels, "max"), [4.0, 9.0, np.nan])
    np.testing.assert_array_equal(combined(levels, "mean"), [3.0, 5.0, np.nan])


def test_rankings():
    candidates = np.array([0, 1, 2, 3])
    scores = {0: 0.5, 1: 0.9, 2: 0.5, 3: 0.1}
    assert ranking("score", candidates, scores, statistics(), 0).tolist() == [1, 0, 2, 3]
    assert ranking("contribution", candidates, scores, statistics(), 0).tolist() == [2, 0, 3, 1]
    drawn = ranking("random", candidates, scores, statistics(), 0).tolist()
    assert sorted(drawn) == [0, 1, 2, 3] and drawn == ranking("random", candidates, {}, statistics(), 0).tolist()


def test_fractions_count_live_latents():
    assert [count_of(f, 1016) for f in (0.001, 0.2, 0.4, 1.0)] == [1, 203, 406, 1016]
    assert count_of(0.01, 10) == 1 and count_of(0.3, 10) == 3, "0.3 * 10 is not a whole number in binary"


def test_shuffled_descriptions_move_all_and_lose_none():
    texts = tuple((name,) for name in "abcdefg")
    moved = shuffled(texts, 0)
    assert sorted(moved) == sorted(texts) and all(one != other for one, other in zip(texts, moved, strict=True))


def line(**changes) -> Line:
    config = RewriteLineConfig(name="line", **changes)
    rankings = {"score": np.array([1, 0]), "contribution": np.array([0, 1]), "random": np.array([1, 0])}
    return plan_line(config, 2, rankings, {0: ("a", "c"), 1: ("b",)}, statistics(), 0)


LEVELS = Levels(
    {"a": 0, "b": 1, "c": 2},
    np.array([[10.0, 0.0, 4.0], [0.0, 5.0, 8.0], [2.0, 0.0, 0.0], [0.0, 10.0, 0.0]]),
    NO_STARTS,
    np.array([0, 1, 2, 3]),
)
TRUTH = np.array([[0.0, 4.0], [10.0, 0.0], [6.0, 0.0], [0.0, 0.0]])
"""Of latents 1 and 0, in the order of the line."""


def fitted(**changes) -> np.ndarray:
    one = fit_line(line(**changes), LEVELS, TRUTH, statistics(), np.ones(4), paper_compat=False)
    return one.values(LEVELS, TRUTH)


def test_a_line_maps_the_right_description_to_the_right_latent():
    assert line().latents.tolist() == [1, 0] and line().texts == (("b",), ("a",))
    np.testing.assert_allclose(fitted(scale="linear"), [[0.0, 4.0], [10.0, 0.0], [0.0, 0.8], [20.0, 0.0]])
    assert line(descriptions="max").texts == (("b",), ("a", "c"))
    np.testing.assert_allclose(fitted(scale="linear", descriptions="max")[:, 1], [4.0, 3.2, 0.8, 0.0])


def test_repairs_take_back_what_is_wrong_and_leave_the_rest():
    said = fitted(scale="linear")
    np.testing.assert_allclose(fitted(scale="linear", repaired="false_alarms"), np.where(TRUTH > 0, said, 0))
    misses = fitted(scale="linear", repaired="misses")
    assert misses[2, 0] == 6.0 and misses[3, 0] == 20.0 and misses[1, 0] == 10.0
    np.testing.assert_allclose(
        fitted(scale="linear", repaired="both"), [[0.0, 4.0], [10.0, 0.0], [6.0, 0.0], [0.0, 0.0]]
    )


def test_lines_that_need_no_simulator():
    deleted, oracle = line(kind="deleted"), line(kind="oracle")
    assert (deleted.values(None, TRUTH) == 0).all() and deleted.needed == []
    assert np.array_equal(oracle.values(None, TRUTH), TRUTH)
    rounded = line(kind="oracle_levels").values(None, np.array([[0.9, 0.19], [11.0, 9.0]]))
    # Units are 2 (latent 1) and 0.4 (latent 0), level 10 is the most there is.
    np.testing.assert_allclose(rounded, [[0.0, 0.0], [12.0, 4.0]])


def test_quantile_normalisation_gives_simulated_activations_the_true_distribution():
    said = fitted(scale="quantile")
    assert sorted(said[:, 0]) == [0.0, 0.0, 6.0, 10.0], "as rare as the truth, with its values"
    assert said[3, 0] == 10.0 and said[1, 0] == 6.0


def test_values_shrink_as_far_as_they_cannot_be_trusted():
    """Of (0, 10, 6, 0), 6 and 10 are said at the second and the last token: 60 of 136, and one more firing of two."""
    np.testing.assert_allclose(fitted(scale="shrunk")[:, 0], fitted(scale="quantile")[:, 0] * 60 / (136 * 1.5))
    levels = np.linspace(0, 10, 400)[:, None]
    true = np.where(levels > 9, levels, 0.0)
    starts = np.zeros(400, dtype=bool)
    np.testing.assert_allclose(fit_shrunk(levels, true).values(levels, starts), true, rtol=0.03)
    assert (fit_shrunk(levels, true[::-1]).values(levels, starts) == 0).all(), "always at the wrong tokens"


def test_a_fitted_level_is_worth_what_it_was_on_the_fit_texts():
    levels = np.array([[0.0, 0.0], [5.0, 8.0], [10.0, 0.0], [10.0, 8.0]])
    true = np.array([[3.0, 1.0], [2.0, 0.0], [6.0, 0.0], [0.0, 0.0]])
    units = np.array([(5 * 2 + 10 * 6) / (25 + 100 + 100 + 100), 0.0])
    scale = fit_slopes(levels, true)
    np.testing.assert_allclose(scale.values(levels, NO_STARTS), levels * units)
    assert (fit_slopes(np.zeros((4, 2)), true).units == 0).all()


def test_a_failed_simulation_is_missing_under_every_scale():
    broken = Levels(LEVELS.index, LEVELS.levels.copy(), NO_STARTS, LEVELS.measured)
    broken.levels[1, 1] = np.nan
    for scale in ("raw", "linear", "fitted", "quantile", "shrunk", "detected", "context"):
        one = fit_line(line(scale=scale), LEVELS, TRUTH, statistics(), np.ones(4), paper_compat=False)
        for repaired in ("nothing", "both"):
            config = one.config.model_copy(update={"repaired": repaired})
            values = Line(config, one.latents, one.texts, one.maximum, one.contrast, one.scale).values(broken, TRUTH)
            assert np.isnan(values[1, 0]) and np.isfinite(np.delete(values.ravel(), 2)).all(), scale


def test_failed_simulations_are_left_out_of_the_fit():
    """A third of a latent's tokens failed, with its highest activations among them: the fit is that of the others."""
    rng = np.random.default_rng(0)
    own = np.round(rng.uniform(0, 10, (90, 1)))
    truth = np.where(own > 6, own, 0.0)
    known = np.arange(90) % 3 < 2
    truth[~known] = 100.0
    index, starts = {"b": 0}, np.arange(90) % 3 == 0
    failed = np.where(known[:, None], own, np.nan)
    one = line(max_fraction=0.5)
    assert one.texts == (("b",),)
    for scale in ("fitted", "quantile", "shrunk", "detected", "context"):
        told = Line(one.config.model_copy(update={"scale": scale}), one.latents, one.texts, one.maximum)
        fits = [
            fit_line(told, Levels(index, failed, starts, measured), truth[measured], statistics(), np.ones(4), False)
            for measured in (np.arange(90), np.flatnonzero(known))
        ]
        levels = Levels(index, own, starts, np.arange(90))
        first, second = (fit.values(levels, truth) for fit in fits)
        np.testing.assert_allclose(first, second, err_msg=scale)
        assert first.max() < 11, scale
