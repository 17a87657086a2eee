"""Calibrations and the first stage against their definitions, on lopsided data."""

import numpy as np
import pytest

from introspect_ray.features.exemplars import Exemplar
from introspect_ray.features.windows import Window
from introspect_ray.simulator.base_rate import firing_share, natural_weights, unweighted
from introspect_ray.simulator.calibration import LinearCalibration, QuantileCalibration
from introspect_ray.simulator.filter import FilteredSimulator, TokenLookup, measure

RNG = np.random.default_rng


def lopsided(count: int = 2000):
    """True activations of which 1% are not zero, and predictions that know a little about them."""
    rng = RNG(0)
    true = np.where(rng.random(count) < 0.01, rng.exponential(3.0, count), 0.0)
    return 0.02 * true + rng.random(count), true


def test_linear_is_least_squares():
    predicted, true = lopsided()
    fitted = LinearCalibration.fit(predicted, true)
    slope, intercept = np.polyfit(predicted, true, 1)
    assert (fitted.slope, fitted.intercept) == pytest.approx((slope, intercept))
    assert fitted.apply(np.array([2.0])) == pytest.approx([2 * slope + intercept])
    level = LinearCalibration.fit(np.ones(3), np.array([0.0, 0.0, 3.0]))
    assert (level.slope, level.intercept) == (0.0, 1.0)


def test_quantiles_give_the_predictions_the_distribution_of_the_truth():
    """On the tokens fitted on, without ties: exactly the true values, placed by the rank of the prediction."""
    predicted, true = lopsided()
    for ties in ("average", "jitter"):
        found = QuantileCalibration.fit(predicted, true, ties=ties).apply(predicted)
        assert np.array_equal(np.sort(found), np.sort(true))
        assert (np.diff(found[np.argsort(predicted)]) >= 0).all()
    fitted = QuantileCalibration.fit(predicted, true)
    assert len(fitted.predicted) == len(fitted.true) == (true > 0).sum()
    assert fitted.apply(np.array([-1.0, 99.0])).tolist() == [0.0, true.max()]


def test_quantiles_follow_the_definition_on_other_tokens():
    predicted, true = lopsided()
    fitted = QuantileCalibration.fit(predicted, true)
    other = RNG(1).random(300) * 1.2 - 0.1
    rank = np.array([(predicted < value).sum() for value in other])
    expected = np.sort(true)[np.minimum(rank, len(true) - 1)]
    # Between two predictions the rank is that of the upper; only where zeros end may a value lie below all kept ones.
    differs = fitted.apply(other) != expected
    assert differs.sum() <= 1 and (other[differs] < fitted.predicted[0]).all()
    assert (expected > 0).sum() > 10


def test_ties_take_their_middle_or_draw():
    predicted, true = np.array([0.0] * 8 + [5.0, 5.0]), np.array([0.0] * 7 + [1.0, 2.0, 4.0])
    average = QuantileCalibration.fit(predicted, true)
    assert average.apply(np.array([0.0, 5.0])).tolist() == [0.0, 4.0]  # rank 4 of 0..9 is a zero, rank 9 the largest
    jitter = QuantileCalibration.fit(predicted, true, ties="jitter")
    many = jitter.apply(np.zeros(8000))
    assert np.mean(many == 1.0) == pytest.approx(1 / 8, abs=0.02)  # the one of eight ranks that is not zero
    assert set(many) == {0.0, 1.0}
    assert set(jitter.apply(np.full(100, 5.0))) == {2.0, 4.0}
    state = np.random.get_state()[1].copy()
    assert np.array_equal(many, jitter.apply(np.zeros(8000)))
    assert np.array_equal(state, np.random.get_state()[1])


def test_a_latent_that_never_fires_stays_silent():
    silent = QuantileCalibration.fit(np.arange(5.0), np.zeros(5))
    assert silent.apply(np.array([-1.0, 3.0, 9.0])).tolist() == [0.0, 0.0, 0.0]
    for fitted in (silent, QuantileCalibration.fit(*lopsided(100), ties="jitter", seed=3)):
        assert QuantileCalibration.model_validate_json(fitted.model_dump_json()) == fitted


def exemplar(text: str, *activations: float, kind="random", quantile=None) -> Exemplar:
    pieces = tuple(text.split())
    return Exemplar(Window(tuple(range(len(pieces))), pieces), np.array(activations, dtype=np.float64), kind, quantile)


def test_natural_weights_restore_the_density():
    """Firing windows have 1 and 3 firing tokens of 4; at a density of 1% that is 2% of the windows."""
    exemplars = [
        exemplar("a b c d", 9, 9, 9, 9, kind="top"),
        exemplar("a b c d", 0, 1, 0, 0, kind="quantile", quantile=0),
        exemplar("a b c d", 2, 0, 2, 2, kind="quantile", quantile=1),
        exemplar("a b c d", 0, 0, 0, 0, kind="silent"),
        *[exemplar("e f g h", 0, 0, 0, 0)] * 3,
    ]
    assert firing_share(0.01, exemplars[1:3]) == pytest.approx(0.02)
    weights = natural_weights(0.01, exemplars)
    assert weights.sum() * 4 == pytest.approx(1.0)
    assert weights[0] == weights[3] == 0
    fires = sum(weight * (one.activations > 0).sum() for weight, one in zip(weights, exemplars, strict=True))
    assert fires == pytest.approx(0.01)
    only_top = natural_weights(0.01, [exemplars[0], *exemplars[4:]])
    assert only_top[0] * 4 == pytest.approx(0.01)
    assert natural_weights(0.01, exemplars[4:]).tolist() == pytest.approx([1 / 12] * 3)
    assert natural_weights(0.01, exemplars[3:4]).tolist() == [0.0]
    # Without random windows silence has nothing to stand for it: firing windows are not all text.
    assert natural_weights(0.01, exemplars[:4]).tolist() == [0.0] * 4
    assert (unweighted(exemplars[:4]), unweighted([])) == ("no_random_windows", "no_windows")
    # One that fires in every random window is hardly ever silent.
    always = [exemplar("a b", 1, 0, kind="random"), exemplar("c d", 1, 1, kind="random")]
    assert natural_weights(0.7, always).tolist() == pytest.approx([0.25, 0.25])


def test_a_window_of_two_kinds_counts_once():
    both, other = [9.0, 9, 9, 0], [1.0, 0, 0, 0]
    exemplars = [
        exemplar("a b c d", *both, kind="quantile", quantile=1),
        exemplar("e f g h", *other, kind="quantile", quantile=0),
        exemplar("a b c d", *both),
        exemplar("i j k l", *other),
        *[exemplar("m n o p", 0, 0, 0, 0)] * 2,
    ]
    weights = natural_weights(0.1, exemplars)
    once = natural_weights(0.1, exemplars[:2] + exemplars[3:])
    assert weights[2] == 0 and np.delete(weights, 2).tolist() == once.tolist()
    # 5 of the 12 tokens of windows in which it fires, not 8 of 16.
    assert once[[0, 1, 2]].sum() * 4 == pytest.approx(0.1 * 12 / 5)
    # Equal words elsewhere, with other activations, are another window.
    exemplars[2] = exemplar("a b c d", 9, 0, 0, 0)
    assert natural_weights(0.1, exemplars)[2] > 0


def test_first_stage_skips_what_cannot_fire_and_says_what_it_loses():
    seen = [("cats", [exemplar("the cat sat", 0, 2, 0), exemplar("a kitten", 0, 0.01)])]
    lookup = TokenLookup.fit(seen, minimum_share=0.1)
    windows = [exemplar("cat food", 3, 0), exemplar("a kitten ran", 0, 1, 0), exemplar("the dog", 0, 0)]
    pairs = [("cats", one) for one in windows]
    assert [lookup.may_fire("cats", one.window) for one in windows] == [True, False, False]
    assert lookup.may_fire("never seen", windows[2].window)
    report = measure(lookup, pairs, np.array([1.0, 1.0, 8.0]))
    assert (report.recall, report.activation_recall, report.skipped) == (0.5, 0.75, 0.9)
    assert measure(lookup, pairs[2:], np.ones(1)).recall is None

    class Ones:
        def simulate(self, descriptions, windows):
            assert len(descriptions) == 1
            return [np.ones(len(one)) for one in windows]

    levels = FilteredSimulator(Ones(), lookup).simulate(["cats"] * 3, [one.window for one in windows])
    assert [row.tolist() for row in levels] == [[1, 1], [0, 0, 0], [0, 0]]
