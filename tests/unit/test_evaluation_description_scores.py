"""Controls, the best candidate, and means over latents; the simulation scorer against one call per pair."""

import json

import numpy as np
import pytest

from introspect_ray.evaluation.description_scores import (
    STAGE_METRICS,
    DescriptionScorer,
    Scored,
    SimulationScorer,
    best_of,
    control_descriptions,
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
    assert blind["first_stage_recall"].value == 0.0 and blind["correlation"].reason == "constant_prediction"


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


def scored(latent: int, text: str, value, source: str = "lexicon") -> Scored:
    score = Score(value) if isinstance(value, float) else Score(None, value)
    return Scored(described(latent, text, source), {"correlation": score})


def test_the_best_candidate_of_each_latent_keeps_all_its_scores():
    rows = [scored(1, "a", 0.1), scored(1, "b", 0.7), scored(1, "c", 0.7), scored(0, "d", "never_fires")]
    best = best_of(rows, "correlation")
    assert [one.description.text for one in best] == ["d", "b"]
    assert best[1].filled.scores == {"label_f1": 0.5, "correlation": 0.7}
    assert best[0].filled.scores == {"label_f1": 0.5, "correlation": None}


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
    assert np.isnan(bootstrap_mean([], OPTIONS).value) and np.isnan(bootstrap_mean([1.0], OPTIONS).low)
