"""Controls, the best candidate, and means over latents; the simulation scorer against one call per pair."""

import json
from dataclasses import replace

import numpy as np
import pytest

from introspect_ray.errors import UserError
from introspect_ray.evaluation.description_scores import (
    STAGE_METRICS,
    DescriptionScorer,
    Scored,
    SimulationScorer,
    best_of,
    control_descriptions,
    halves,
    score_all,
    score_candidates,
)
from introspect_ray.evaluation.description_summary import (
    independent,
    render_scores,
    summarise,
    summary_json,
    summary_table,
)
from introspect_ray.evaluation.intervals import Bootstrap, bootstrap_mean
from introspect_ray.features.descriptions import Description, Score
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.windows import Window
from introspect_ray.simulator.scores import simulation_scores

PARTS = ("scores", "selection", "report")
OPTIONS = Bootstrap(samples=500, confidence=0.9, seed=1)


def described(latent: int, text: str, source: str = "lexicon") -> Description:
    return Description(0, latent, text, source, {"label_f1": 0.5})


class Echo:
    """Says that a token is as active as its description is long, more where the token is that long."""

    def simulate(self, descriptions, windows):
        return [
            np.array([10.0 * (len(text) == token) for token in one.ids])
            for text, one in zip(descriptions, windows, strict=True)
        ]


def exemplars_of(latent: int, seed: int) -> LatentExemplars:
    rng = np.random.default_rng((latent, seed))
    made = []
    for kind in ("top", "quantile", "random", "random", "silent"):
        ids = rng.integers(0, 6, 12)
        active = np.where(ids == latent, 1.0 + rng.random(12), 0.0) * (kind != "silent")
        made.append(Exemplar(Window(tuple(map(int, ids)), tuple(map(str, ids))), active, kind))
    return LatentExemplars(0, latent, 0.05, 2.0, tuple(made))


def test_simulation_scorer_scores_each_pair_on_fair_held_out_windows():
    train = {(0, latent): exemplars_of(latent, 0) for latent in (1, 2)}
    held = {latent: exemplars_of(latent, 1) for latent in (1, 2)}
    scorer = SimulationScorer(Echo(), train)
    assert isinstance(scorer, DescriptionScorer)
    pairs = [("a", held[1]), ("abc", held[1]), ("ab", held[2])]
    for (text, latent), found in zip(pairs, scorer.score(pairs), strict=True):
        own = train[0, latent.latent].exemplars
        fair = [one for one in latent.exemplars if one.kind in ("quantile", "random")]
        levels = [Echo().simulate([text] * len(part), [one.window for one in part]) for part in (own, fair)]
        assert found == simulation_scores(0.05, own, levels[0], fair, levels[1])
    values = [row["correlation"].value for row in scorer.score(pairs)]
    assert values[0] > 0.9 and values[2] > 0.9 and values[1] < 0.3


def test_one_description_that_breaks_the_simulator_costs_no_other_its_scores(caplog):
    train = {(0, 1): exemplars_of(1, 0)}
    held = exemplars_of(1, 1)

    class Breaks(Echo):
        def simulate(self, descriptions, windows):
            if "too long" in descriptions:
                raise UserError("needs 600 positions of the simulator, which has 512")
            return super().simulate(descriptions, windows)

    class Length:
        def score(self, pairs):
            return [{"length": Score(float(len(text)))} for text, _ in pairs]

    descriptions = [described(1, text) for text in ("a", "too long", "abc")]
    rows = score_all([SimulationScorer(Breaks(), train), Length()], descriptions, {(0, 1): held})
    expected = SimulationScorer(Echo(), train).score([("a", held), ("abc", held)])
    assert [row.scores["length"].value for row in rows] == [1.0, 8.0, 3.0]
    assert {name: rows[0].scores[name] for name in expected[0]} == expected[0]
    assert {name: rows[2].scores[name] for name in expected[1]} == expected[1]
    assert {score.reason for name, score in rows[1].scores.items() if name != "length"} == {"failed"}
    assert "needs 600 positions" in caplog.text


def test_a_first_stage_skips_and_says_what_it_loses():
    train = {(0, 1): exemplars_of(1, 0)}
    held = exemplars_of(1, 1)
    asked = []

    class Counting(Echo):
        def simulate(self, descriptions, windows):
            asked.extend(windows)
            return super().simulate(descriptions, windows)

    (plain,) = SimulationScorer(Echo(), train).score([("a", held)])
    (found,) = SimulationScorer(Counting(), train, first_stage_share=0.0).score([("a", held)])
    assert {name: found[name] for name in plain} == plain  # the table misses nothing, and Echo is silent elsewhere
    assert (found["first_stage_recall"].value, set(found) - set(plain)) == (1.0, set(STAGE_METRICS))
    assert all("1" in one.pieces for one in asked)
    fair = [one for one in held.exemplars if one.kind in ("quantile", "random")]
    silent = [one for one in fair if "1" not in one.window.pieces]
    assert (found["first_stage_skipped"].value > 0) == bool(silent)
    (blind,) = SimulationScorer(Echo(), train, first_stage_share=1.0).score([("a", held)])
    assert blind["first_stage_recall"].value == 0.0 and blind["correlation"].value == 0.0


def test_shuffled_descriptions_are_of_other_latents():
    own = [described(latent, f"text {latent % 3}") for latent in range(9)] + [described(4, "second")]
    controls = control_descriptions(own, ("shuffled", "empty"), seed=0)
    shuffled = {one.latent: one.text for one in controls if one.source == "shuffled"}
    assert sorted(shuffled) == list(range(9))
    assert sorted(shuffled.values()) == sorted(f"text {latent % 3}" for latent in range(9))
    assert all(text != f"text {latent % 3}" for latent, text in shuffled.items())
    assert [one.text for one in controls if one.source == "empty"] == [""] * 9
    assert all(one.scores == {} for one in controls)
    assert controls == control_descriptions(own, ("shuffled", "empty"), seed=0)
    alike = [described(0, "same"), described(1, "same")]
    assert control_descriptions(alike, ("shuffled",), seed=0) == []
    lopsided = control_descriptions([*alike, described(2, "other")], ("shuffled",), seed=0)
    assert all(one.text != {0: "same", 1: "same", 2: "other"}[one.latent] for one in lopsided)


def scored(latent: int, text: str, value, source: str = "lexicon", halved=None) -> Scored:
    """`halved`: values on the two halves, the same on both as on all windows if not given."""
    score, selection, report = (
        {"correlation": Score(one) if isinstance(one, float) else Score(None, one)}
        for one in (value, *(halved or (value, value)))
    )
    return Scored(described(latent, text, source), score, selection, report)


def test_the_best_candidate_is_chosen_on_one_half_and_reported_on_the_other():
    rows = [
        scored(1, "a", 0.9, halved=(0.1, 0.9)),
        scored(1, "b", 0.5, halved=(0.7, 0.3)),
        scored(1, "c", 0.6, halved=(0.7, 0.6)),
        scored(0, "d", 0.2),
        scored(2, "e", 0.4, halved=("never_fires", 0.5)),
        scored(2, "f", 0.6, halved=("never_fires", 0.8)),
    ]
    best = best_of(rows, "correlation")
    assert [one.description.text for one in best] == ["d", "b", "e"]
    assert [one.filled.scores["correlation"] for one in best] == [0.2, 0.3, 0.5]
    assert best[1].filled.scores["label_f1"] == 0.5
    paper = [replace(row, **{part: {"paper_compat": Score(0.5)} for part in PARTS}) for row in rows[:3]]
    assert best_of(paper, "paper_compat")[0].scores["paper_compat"].reason == "chosen_by_it"


class Noise:
    """Levels that have nothing to do with anything, the same whenever a pair is asked about."""

    def simulate(self, descriptions, windows):
        return [
            np.random.default_rng([int(text), *one.ids]).random(len(one.ids))
            for text, one in zip(descriptions, windows, strict=True)
        ]


def test_choosing_among_many_worthless_candidates_makes_none_of_them_good():
    """Forty candidates that know nothing: the best of them on the windows that it is chosen on looks like something."""
    rng = np.random.default_rng(0)

    def latent(number):
        made = []
        for index in range(24):
            ids = (number, index, *map(int, rng.integers(0, 50, 4)))
            kind, quantile = ("quantile", index % 4) if index < 8 else ("random", None)
            active = np.zeros(6)
            active[rng.integers(6)] = float(index < 8)
            made.append(Exemplar(Window(ids, tuple(map(str, ids))), active, kind, quantile))
        return LatentExemplars(0, number, 0.08, 1.0, tuple(made))

    train, held = ({(0, n): latent(n) for n in range(12)} for _ in range(2))
    everything = [Description(0, n, str(text), "made-up") for n in range(12) for text in range(40)]
    rows = score_candidates([SimulationScorer(Noise(), train)], everything, held)
    chosen = best_of(rows, "correlation")
    assert len(chosen) == 12
    by_chance = max(0.0, np.mean([one.scores["correlation"].value for one in chosen]))
    largest = {
        part: np.mean([max(one["correlation"].value for one in scores) for scores in np.reshape(found, (12, 40))])
        for part, found in {"all": [row.scores for row in rows], "half": [row.selection for row in rows]}.items()
    }
    assert largest["half"] > largest["all"] > 0.2 and by_chance < 0.1


def test_halves_part_every_kind_and_share_no_window():
    latent = exemplars_of(1, 3)
    many = []
    for index in range(41):
        kind, quantile = [("quantile", index % 4), ("random", None), ("top", None), ("silent", None)][index % 4]
        active = np.array([0.0, float(index % 8 < 4)])
        many.append(Exemplar(Window((index, index), (f"{index}", "")), active, kind, quantile))
    twice = Exemplar(many[0].window, many[0].activations, "random")
    latent = LatentExemplars(0, 1, 0.1, 2.0, (*many, twice))
    selection, report = halves(latent)
    windows = [{one.window for one in half.exemplars} for half in (selection, report)]
    assert not windows[0] & windows[1]
    assert {one.kind for half in (selection, report) for one in half.exemplars} == {"quantile", "random"}
    assert len(selection.exemplars) + len(report.exemplars) == 11 + 10 + 1
    for kind in ("quantile", "random"):
        for fires in (True, False):
            sizes = [
                len({one.window for one in half.of_kind(kind) if one.activations.any() == fires and one is not twice})
                for half in (selection, report)
            ]
            assert abs(sizes[0] - sizes[1]) <= 1
    assert [one.window for one in halves(latent)[0].exemplars] == [one.window for one in selection.exemplars]


def test_latents_with_equal_descriptions_are_one_group():
    """Two values that ten latents share are two draws, not eleven."""
    rows = [scored(n, "the word cat", 0.9) for n in range(10)] + [
        scored(10, "the  Word cat", 0.9),
        scored(11, "a", 0.1),
    ]
    rows += [scored(n, "", 0.5 - n / 100, "empty") for n in range(12)]
    summary = summarise(rows, rows[:12], Bootstrap(samples=2000, confidence=0.95, seed=0))
    lexicon, empty = summary["lexicon"]["correlation"].interval, summary["empty"]["correlation"].interval
    assert lexicon.value == pytest.approx((11 * 0.9 + 0.1) / 12) and (lexicon.n, lexicon.num_groups) == (12, 2)
    assert (lexicon.low, lexicon.high) == (pytest.approx(0.1), pytest.approx(0.9))
    assert (empty.n, empty.num_groups) == (12, 2), "no words are no text that latents share; their own descriptions are"
    swapped = [scored(n, f"text {n}", float(n)) for n in range(6)]
    swapped += [scored(n, f"text {(n + 1) % 6}", float(n), "shuffled") for n in range(6)]
    assert summarise(swapped, swapped[:6], OPTIONS)["shuffled"]["correlation"].interval.num_groups == 6
    alone = summarise(rows[:11], rows[:11], OPTIONS)["lexicon"]["correlation"].interval
    assert alone.num_groups == 1 and np.isnan(alone.low)
    related = {(0, n): f"text {n % 2}" for n in range(3)}
    different = [scored(n, f"text {n}", float(n)) for n in range(3)]
    found = summarise(different, different, OPTIONS, related)["lexicon"]["correlation"].interval
    assert (found.n, found.num_groups) == (3, 2)
    chain = {(0, 0): {("text", "a")}, (0, 1): {("text", "b")}, (0, 2): {("text", "a"), ("text", "b")}, (0, 3): {}}
    groups = independent(chain)
    assert groups[0, 0] == groups[0, 1] == groups[0, 2] != groups[0, 3]


def test_latents_count_once_and_undefined_scores_not_at_all():
    rows = [
        scored(0, "a", 0.2),
        scored(0, "b", 0.4),
        scored(1, "c", 0.9),
        scored(2, "d", "never_fires"),
        scored(0, "x", -0.1, "shuffled"),
    ]
    summary = summarise(
        rows, best_of([row for row in rows if row.description.source == "lexicon"], "correlation"), OPTIONS
    )
    lexicon = summary["lexicon"]["correlation"]
    assert lexicon.interval.value == pytest.approx((0.3 + 0.9) / 2)
    assert (lexicon.interval.n, lexicon.reasons) == (2, {"never_fires": 1})
    assert summary["best"]["correlation"].interval.value == pytest.approx((0.4 + 0.9) / 2)
    assert list(summary) == ["best", "lexicon", "shuffled"]
    content = json.loads(summary_json(summary))
    assert content["lexicon"]["correlation"]["undefined"] == {"never_fires": 1}
    assert content["shuffled"]["correlation"] == {
        "value": pytest.approx(-0.1),
        "low": None,
        "high": None,
        "n": 1,
        "groups": 1,
        "undefined": {},
    }
    assert "0.600 [" in summary_table(summary)
    hostile = summarise([scored(0, "a", 0.2, "<script>alert(1)</script>")], [scored(0, "a", 0.2)], OPTIONS)
    page = render_scores(hostile, [("Latents", "1")], 0.9, "correlation")
    assert "<script>alert" not in page and "&lt;script&gt;" in page


def test_mean_interval_resamples_latents():
    values = np.random.default_rng(0).exponential(size=40)
    found = bootstrap_mean(values.tolist(), Bootstrap(samples=4000, confidence=0.95, seed=0))
    error = 1.96 * values.std() / np.sqrt(40)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * error, rel=0.1)
    assert found.n == found.num_groups == 40
    grouped = bootstrap_mean(
        np.repeat(values, 5).tolist(), Bootstrap(4000, 0.95, 0), np.repeat(np.arange(40), 5).tolist()
    )
    assert (grouped.low, grouped.high) == (pytest.approx(found.low), pytest.approx(found.high)) and grouped.n == 200
    lopsided = bootstrap_mean([0.0] * 9 + [1.0], OPTIONS, [0] * 9 + [1])
    assert lopsided.value == pytest.approx(0.1) and (lopsided.low, lopsided.high) == (0.0, 1.0)
    assert np.isnan(bootstrap_mean([], OPTIONS).value) and np.isnan(bootstrap_mean([1.0], OPTIONS).low)
