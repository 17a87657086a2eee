"""All conditions of a batch on a tiny target, measures against their definitions, and P2's released losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from unit.rewrite_helpers import LATENTS, target, texts, transcoder

from introspect_ray.config import RewriteLineConfig
from introspect_ray.evaluation.intervals import Bootstrap, ratio_interval
from introspect_ray.rewrite.code import columns_of, decode, empty
from introspect_ray.rewrite.lines import Levels, Line
from introspect_ray.rewrite.measure import (
    BASELINES,
    ORIGINAL,
    TRUE,
    ZERO,
    MeasurePlan,
    condition_name,
    measure,
    read_truth,
    text_batches,
)
from introspect_ray.rewrite.results import results, scores_json, simulation_costs, tables
from introspect_ray.rewrite.scores import Losses, agreement_scores, condition_scores
from introspect_ray.rewrite.site import Batch, Site

OPTIONS = Bootstrap(samples=500, confidence=0.95, seed=0)


class Constant:
    """A scale that says the same values whatever the levels."""

    def __init__(self, values: np.ndarray):
        self.said = values

    def values(self, levels, starts):  # noqa: ARG002
        return self.said


def plan_of(lines: list[Line], **changes) -> MeasurePlan:
    values = {
        "lines": lines,
        "fractions": [0.25, 0.5, 1.0],
        "live": np.arange(LATENTS),
        "mean_output": np.linspace(-1, 1, 32),
        "top_k": None,
        "headline": lines[0].config.name,
        "headline_fraction": 0.5,
        "paper_compat": False,
        "seed": 0,
    }
    return MeasurePlan(**(values | changes))


def line(name: str, kind: str, **changes) -> Line:
    order = np.array([3, 1, 0, 2, 5, 4, 7, 6, 9, 8, 11, 10])
    return Line(RewriteLineConfig(name=name, kind=kind), order, (), np.full(LATENTS, 2.0), **changes)


def no_levels(tokens: int) -> Levels:
    """For lines whose scale needs none."""
    starts = np.zeros(tokens, dtype=bool)
    return Levels({}, np.zeros((tokens, 0), dtype=np.float32), starts, np.arange(tokens))


def test_conditions_write_what_their_names_say():
    model, coder, given = target(), transcoder(), texts()
    site = Site(model, coder)
    lines = [line("oracle", "oracle"), line("deleted", "deleted")]
    found = measure(site, coder, given, {}, plan_of(lines))
    batch = Batch(given, model.device)
    clean = site.log_probabilities(batch, None)
    written = site.read(batch)
    code = coder.encode_sparse(written.x)

    def loss(output):
        return site.losses(batch, clean, output).cross_entropy

    assert set(BASELINES) <= set(found.losses)
    for name, output in {
        ORIGINAL: None,
        TRUE: coder.forward(written.x),
        ZERO: coder.decoder_bias + written.x @ coder.skip.T,
        "zero output": torch.zeros_like(written.y),
        "mean output": torch.linspace(-1, 1, 32).expand_as(written.y),
    }.items():
        np.testing.assert_allclose(found.losses[name].cross_entropy, loss(output), rtol=1e-5)
    # Oracles at full precision are true latents, exactly, at any fraction; deleting all live latents is zero latents.
    for fraction in (0.25, 0.5, 1.0):
        oracle = found.losses[condition_name("oracle", fraction)]
        assert np.array_equal(oracle.cross_entropy, found.losses[TRUE].cross_entropy)
    deleted = found.losses[condition_name("deleted", 1.0)]
    assert np.array_equal(deleted.cross_entropy, found.losses[ZERO].cross_entropy)
    dense = code.dense()
    dense[:, [3, 1, 0, 2, 5, 4]] = 0
    np.testing.assert_allclose(
        found.losses[condition_name("deleted", 0.5)].cross_entropy, loss(coder.decode(dense, written.x)), rtol=1e-5
    )
    losses = [found.losses[name].cross_entropy.sum() for name in (ORIGINAL, TRUE, ZERO, "zero output")]
    assert len({round(value, 3) for value in losses}) == 4, "conditions differ"


def test_a_line_ends_where_its_latents_do_but_all_means_all():
    whole, part = line("whole", "oracle"), line("part", "oracle")
    ten = Line(whole.config, whole.latents[:10], (), whole.maximum[:10])
    six = Line(part.config.model_copy(update={"max_fraction": 0.5}), part.latents[:6], (), part.maximum[:6])
    plan = plan_of([ten, six])
    assert list(plan.counts(ten)) == [(0.25, 3), (0.5, 6), (1.0, 10)]
    assert list(plan.counts(six)) == [(0.25, 3), (0.5, 6)]


def test_fraction_zero_is_true_latents_exactly():
    """No count of a fraction is zero, so this is about the edit itself: what is not chosen is not touched."""
    model, coder, given = target(), transcoder(), texts()
    site = Site(model, coder)
    batch = Batch(given, model.device)
    written = site.read(batch)
    code = coder.encode_sparse(written.x)
    from introspect_ray.rewrite.code import replaced

    none = replaced(code, torch.tensor([], dtype=torch.long), torch.zeros(code.num_vectors, 0), None)
    assert torch.equal(decode(coder, none, written.x), decode(coder, code, written.x))


def test_a_window_with_a_failed_simulation_is_not_covered():
    model, coder, given = target(), transcoder(), texts()
    site = Site(model, coder)
    tokens = sum(len(text.positions) for text in given)
    said = np.ones((tokens, LATENTS))
    said[2, 7] = np.nan  # the first text; column 7 is first replaced at fraction 1.0
    simulated = line("simulated", "simulated", scale=Constant(said))
    found = measure(site, coder, given, {"finetuned": no_levels(tokens)}, plan_of([simulated]))
    assert found.complete[condition_name("simulated", 0.5)].all()
    assert found.complete[condition_name("simulated", 1.0)].tolist() == [False, True, True, True]


def test_harm_is_what_a_small_error_costs():
    model, coder, given = target(), transcoder(), texts()
    site = Site(model, coder)
    batch = Batch(given, model.device)
    written = site.read(batch)
    code = coder.encode_sparse(written.x)
    truth = columns_of(code, torch.as_tensor(line("x", "oracle").latents)).numpy()
    wrong = truth.copy()
    wrong[:, 1] += 1e-2
    one = line("simulated", "simulated", scale=Constant(wrong))
    found = measure(site, coder, given, {"finetuned": no_levels(len(wrong))}, plan_of([one]))
    cost = found.losses[condition_name("simulated", 0.5)].cross_entropy.sum() - found.losses[TRUE].cross_entropy.sum()
    np.testing.assert_allclose(found.harm[1], cost, rtol=0.1)
    assert np.allclose(np.delete(found.harm, 1), 0)


def test_contributions_are_what_the_loss_rises_by_without_a_latent():
    model, coder, given = target(), transcoder(), texts()
    small = type(coder)(**{**coder.__dict__, "decoder": coder.decoder * 1e-2})
    code, statistics = read_truth(Site(model, small), small, given)
    site = Site(model, small)
    batch = Batch(given, model.device)
    clean, written = site.log_probabilities(batch, None), site.read(batch)
    latent = int(np.argmax(np.abs(statistics.contribution)))
    dense = code.dense()
    dense[:, latent] = 0
    true = site.losses(batch, clean, decode(small, code, written.x)).cross_entropy.sum()
    without = site.losses(batch, clean, small.decode(dense, written.x)).cross_entropy.sum()
    np.testing.assert_allclose(statistics.contribution[latent], without - true, rtol=0.1)
    assert statistics.firings.tolist() == (code.dense() > 0).sum(0).tolist()
    np.testing.assert_allclose(statistics.maximum, code.dense().amax(0))
    np.testing.assert_allclose(statistics.mean_output, written.y.mean(0), atol=1e-6)
    assert decode(small, empty(code), written.x).shape == written.y.shape


def test_batches_keep_log_probabilities_small(monkeypatch):
    given = texts(6)
    monkeypatch.setattr("introspect_ray.rewrite.measure.LOGITS_AT_ONCE", 97 * 20)
    ranges = list(text_batches(given, 97))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == 6
    sizes = [sum(len(text.positions) for text in given[start:stop]) for start, stop in ranges]
    assert all(size <= 20 or stop - start == 1 for size, (start, stop) in zip(sizes, ranges, strict=True))
    assert list(text_batches([], 97)) == []


# --- measures ---------------------------------------------------------------------------------------------------


def losses_of(**conditions: list[float]) -> Losses:
    """Three texts of 1, 2 and 7 tokens; the last one is not covered under `half`."""
    given = {ORIGINAL: [1.0, 1.0, 1.0], TRUE: [1.0, 2.0, 3.0], ZERO: [2.0, 4.0, 11.0], **conditions}
    loss = {name: np.array(values) for name, values in given.items()}
    complete = {name: np.ones(3, dtype=bool) for name in loss}
    complete["half"] = np.array([True, True, False])
    return Losses(np.array([1.0, 2.0, 7.0]), loss, {name: 2 * values for name, values in loss.items()}, complete)


def test_measures_are_sums_over_texts_by_sums_over_texts():
    losses = losses_of(mine=[1.5, 2.0, 7.0], deleted=[1.0, 4.0, 8.0], half=[1.0, 2.0, 99.0])
    scores = condition_scores(losses, "mine", "deleted", OPTIONS)
    assert scores.increase.value == pytest.approx((0.5 + 1 + 6) / 10)
    assert scores.divergence.value == pytest.approx(2 * 10.5 / 10)
    assert scores.below_zero.value == pytest.approx((0.5 + 2 + 4) / 10)
    assert scores.recovered.value == pytest.approx((0.5 + 2 + 4) / (1 + 2 + 8))
    assert scores.below_deleted.value == pytest.approx((-0.5 + 2 + 1) / 10)
    assert scores.divergence_below_deleted.value == pytest.approx(2 * 2.5 / 10)
    assert scores.regained.value == pytest.approx((-0.5 + 2 + 1) / (0 + 2 + 5)), "of what deleting the same costs"
    free = condition_scores(losses_of(mine=[1.5, 2.0, 7.0], deleted=[1.0, 2.0, 3.0]), "mine", "deleted", OPTIONS)
    assert math.isnan(free.regained.value), "deleting them costs nothing: nothing to regain"
    half = condition_scores(losses, "half", None, OPTIONS)
    assert half.coverage == pytest.approx(2 / 3) and half.below_deleted is None
    assert half.recovered.value == pytest.approx((1 + 2) / (1 + 2)), "only texts that are covered"
    assert condition_scores(losses, TRUE, None, OPTIONS).recovered.value == 1
    assert condition_scores(losses, ZERO, None, OPTIONS).recovered.value == 0


def test_a_ratio_is_resampled_over_groups_with_both_sums():
    above, below = np.array([1.0, 0.0, 5.0, 2.0]), np.array([2.0, 1.0, 5.0, 4.0])
    found = ratio_interval(above, below, Bootstrap(4000, 0.9, seed=3))
    assert found.value == pytest.approx(8 / 12) and found.num_groups == 4
    draws = np.random.default_rng(0).integers(4, size=(20000, 4))
    ratios = above[draws].sum(1) / below[draws].sum(1)
    np.testing.assert_allclose([found.low, found.high], np.quantile(ratios, [0.05, 0.95]), atol=0.03)
    constant = ratio_interval(3 * below, below, OPTIONS)
    assert (constant.low, constant.value, constant.high) == pytest.approx((3, 3, 3)), "paired: both sums resampled"


def test_a_ratio_without_a_positive_denominator_is_undefined():
    assert math.isnan(ratio_interval(np.array([1.0, 1.0]), np.array([-2.0, 1.0]), OPTIONS).value)
    assert math.isnan(ratio_interval(np.array([]), np.array([]), OPTIONS).low)
    alone = ratio_interval(np.array([1.0]), np.array([2.0]), OPTIONS)
    assert (alone.value, alone.low, alone.high) == (0.5, -math.inf, math.inf)


def test_agreement_on_a_lopsided_latent():
    """1000 tokens, 10 fire, 3 of them are found among 12 said to fire."""
    predicted = np.zeros(1000)
    true = np.zeros(1000)
    true[:10] = 2.0
    predicted[7:19] = 1.0
    sums = [1000, 3, 9, 7, *(v.sum() for v in (predicted, true, predicted**2, true**2, predicted * true))]
    silent = [1000, 0, 0, 0, 0, 0, 0, 0, 0]
    overall, each = agreement_scores(np.array([sums, silent], dtype=float))
    assert each[0].specificity == pytest.approx(981 / 990)
    assert each[0].precision == pytest.approx(3 / 12) and each[0].recall == pytest.approx(3 / 10)
    assert each[0].correlation == pytest.approx(np.corrcoef(predicted, true)[0, 1])
    assert math.isnan(each[1].precision) and math.isnan(each[1].correlation) and each[1].specificity == 1
    assert overall.specificity == pytest.approx((981 + 1000) / (990 + 1000))
    assert overall.correlation == pytest.approx(each[0].correlation), "latents without one are left out"


def test_results_of_a_run_are_complete_and_go_into_json():
    model, coder, given = target(), transcoder(), texts()
    lines = [line("levels", "oracle_levels"), line("deleted", "deleted")]
    plan = plan_of(lines)
    found = measure(Site(model, coder), coder, given, {}, plan)
    losses = Losses(
        np.array(found.tokens, dtype=float),
        {name: one.cross_entropy for name, one in found.losses.items()},
        {name: one.divergence for name, one in found.losses.items()},
        found.complete,
    )
    agreement = {one.line: one.sums for one in found.agreement}
    whole = results(plan, losses, agreement, found.harm, found.false_alarms, {}, frozenset(), OPTIONS)
    assert len(whole.conditions) == len(BASELINES) + 2 * 3
    assert whole.headline.name == "levels @ 0.5" and whole.headline.scores.below_deleted is not None
    content = json.loads(scores_json(whole, {"target": "tiny"}))
    assert content["conditions"]["levels @ 0.5"]["latents"] == 6
    assert content["agreement"]["levels"]["specificity"] == 1.0
    assert "levels @ 0.5" in tables(whole, 0.5) and "deleted @ 0.25" not in tables(whole, 0.5)


def test_costs_count_every_distinct_description_with_every_window():
    config = RewriteLineConfig(name="line")
    one = Line(config, np.arange(4), (("a",), ("a", "b"), ("c",), ("b",)), np.ones(4))
    plan = plan_of([one], fractions=[0.5, 1.0], live=np.arange(4))
    costs = simulation_costs([one], plan, {"a": 2, "b": 5, "c": 1}, [10, 20, 30])
    assert costs["line @ 0.5"] == (2 + 5) * 3 + 2 * 60
    assert costs["line @ 1"] == (2 + 5 + 1) * 3 + 3 * 60


# --- P2's released losses ---------------------------------------------------------------------------------------

P2 = json.loads((Path(__file__).parent / "data" / "p2_losses.json").read_text())
OVERFLOW = 43
"""One of the first hundred sentences, at 352 to 691 nats in half precision; the published reading leaves it out."""


def p2_losses() -> Losses:
    kept = [index for index in range(100) if index != OVERFLOW]
    names = {ORIGINAL: P2["loss_base"], TRUE: P2["loss_reconstruction"], ZERO: P2["loss_prediction"]["-1.0"]}
    names |= {name: P2["loss_prediction"][name] for name in ("0.01", "0.2", "0.2_random")}
    loss = {name: np.array(values)[kept] for name, values in names.items()}
    every = np.ones(99, dtype=bool)
    return Losses(np.ones(99), loss, loss, dict.fromkeys(loss, every))


@pytest.mark.parametrize(
    ("condition", "increase", "half_width", "above_zero"),
    [(TRUE, 0.03, 0.08, -0.29), (ZERO, 0.32, 0.17, 0.0), ("0.01", 0.46, 0.31, 0.15), ("0.2", 2.23, 0.52, 1.92)],
)
def test_our_statistics_of_p2s_losses_give_the_published_reading(condition, increase, half_width, above_zero):
    """interp-notes 4.5: mean increase and 1.96 standard errors; percentile limits are near those for 99 sentences."""
    scores = condition_scores(p2_losses(), condition, None, OPTIONS)
    assert scores.increase.value == pytest.approx(increase, abs=0.006)
    assert (scores.increase.high - scores.increase.low) / 2 == pytest.approx(half_width, rel=0.15, abs=0.01)
    assert -scores.below_zero.value == pytest.approx(above_zero, abs=0.006)


def test_p2s_reading_one_percent_is_level_with_deleting_and_choosing_the_best_is_no_better_than_chance():
    losses = p2_losses()
    one_percent = condition_scores(losses, "0.01", None, OPTIONS)
    assert one_percent.below_zero.low < 0 < one_percent.below_zero.high
    fifth = condition_scores(losses, "0.2", "0.2_random", OPTIONS)
    assert fifth.below_zero.high < 0, "worse than deleting all latents"
    assert fifth.recovered.high < 0
    assert fifth.below_deleted.low < 0 < fifth.below_deleted.high, "best-scored and random latents are level"
