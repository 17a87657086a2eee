"""Shorthands of the config, P2's protocol, what is refused, the exact reader, and the page."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError
from unit.rewrite_helpers import texts, transcoder
from unit.test_rewrite_measure import line, plan_of, target

from introspect_ray.config import P2_FRACTIONS, ModelConfig, RewriteConfig, RewriteLineConfig
from introspect_ray.data.identity import identify_target
from introspect_ray.data.rewrite_texts import text_shards
from introspect_ray.evaluation.charts import lines_plot
from introspect_ray.features.windows import window
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.tokens import encode_with_offsets
from introspect_ray.pocket.reader import ExactReader
from introspect_ray.pocket.sources import rows
from introspect_ray.rewrite.code import largest, paper_random
from introspect_ray.rewrite.measure import TRUE, measure
from introspect_ray.rewrite.page import line_phrase
from introspect_ray.rewrite.settings import effective
from introspect_ray.rewrite.site import Batch, Site
from introspect_ray.training.rewriting import run_key


def test_defaults_stay_as_they_are():
    config = RewriteConfig()
    assert effective(config) == config
    assert effective(effective(config)) == effective(config)


def test_an_explainer_is_one_more_source_with_lines_by_every_simulator():
    config = effective(RewriteConfig(explainer="runs/explainer"))
    added = config.lines[len(RewriteConfig().lines) :]
    assert {(one.simulator, one.selection) for one in added} == {
        ("finetuned", "contribution"),
        ("exact", "contribution"),
    }
    assert all(one.source == "explainer" and one.max_fraction == config.headline_fraction for one in added)
    assert config.sources[-1].path == "runs/explainer" and config.explainer is None


def test_a_given_simulator_takes_the_place_of_the_first():
    config = effective(RewriteConfig(simulator="runs/simulator"))
    first, second = config.simulators
    assert (first.name, first.kind, first.given.model.path) == ("finetuned", "given", "runs/simulator")
    assert second.kind == "exact"


def test_a_target_in_another_precision_is_another_run():
    identity = identify_target(ModelConfig())
    given = [{}, {"dtype": "bfloat16"}, {"quantization": "nf4"}]
    configs = [RewriteConfig(target=ModelConfig(**changes)) for changes in given]
    assert len({run_key(config, identity, []) for config in configs}) == 3
    assert run_key(configs[0], identity, []) == run_key(RewriteConfig(seed=1), identity, [])


def test_only_the_evaluation_measures_the_last_token_alone():
    tokenizer = load_tokenizer(ModelConfig())
    counts = {"evaluation_texts": 4, "fit_texts": 4, "statistics_texts": 4}
    given = RewriteConfig(where="last", window_tokens=32, **counts)
    shards = text_shards(given, tokenizer)
    last = [text for shard in shards["evaluation"] for text in shard.texts]
    assert all(text.positions == (len(text.ids) - 2,) for text in last)
    for use in ("statistics", "fit"):
        for text in (text for shard in shards[use] for text in shard.texts):
            assert text.positions == tuple(range(1, len(text.ids) - 1))


def test_p2s_protocol():
    config = effective(RewriteConfig(paper_compat=True, where="all", top_k=None))
    assert (config.where, config.window_tokens, config.top_k, config.fractions) == ("last", 32, 32, P2_FRACTIONS)
    assert [(one.selection, one.scale) for one in config.lines] == [("score", "linear"), ("random", "linear")]


def test_p2s_baselines_and_top_k_reach_the_measurement():
    model, coder, given = target(), transcoder(), texts()
    site = Site(model, coder)
    batch = Batch(given, model.device)
    written = site.read(batch)
    code = coder.encode_sparse(written.x)
    plan = plan_of([line("oracle", "oracle")], paper_compat=True, top_k=2)
    found = measure(site, coder, given, {}, plan)
    clean = site.log_probabilities(batch, None)
    import torch

    drawn = paper_random(code, torch.arange(12), 32, plan.seed + given[0].row).dense()
    expected = site.losses(batch, clean, coder.decode(drawn, written.x))
    np.testing.assert_allclose(found.losses["random latents"].cross_entropy, expected.cross_entropy, rtol=1e-4)
    two = site.losses(batch, clean, coder.decode(largest(code, 2).dense(), written.x))
    np.testing.assert_allclose(found.losses["oracle @ 0.25"].cross_entropy, two.cross_entropy, rtol=1e-4)
    assert not np.allclose(two.cross_entropy, found.losses[TRUE].cross_entropy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"headline": "nothing"}, "headline is 'nothing'"),
        ({"headline_fraction": 0.3}, "headline_fraction is 0.3"),
        ({"lines": (RewriteLineConfig(name="needed: quantile", source="mine"),)}, "has source mine"),
        ({"lines": (RewriteLineConfig(name="needed: quantile"),) * 2}, "each name once"),
        ({"sources": ({"name": "mine", "kind": "file"},)}, "has path ''"),
        ({"simulators": ({"name": "mine", "kind": "given"},)}, "has given: None"),
        ({"question": "What is it?"}, "expected {vector}"),
    ],
)
def test_combinations_that_say_nothing_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        RewriteConfig(**changes)


def test_every_default_line_can_be_said_in_words():
    phrases = [line_phrase(one) for one in RewriteConfig().lines]
    assert len(set(phrases)) == len(phrases), "no two lines do the same"


def test_the_exact_reader_says_where_a_description_holds():
    tokenizer = load_tokenizer(ModelConfig())
    reader = ExactReader(tokenizer)
    for row in rows("text")[:20]:
        ids, _ = encode_with_offsets(tokenizer, row["text"])
        one = window(ids[1:], tokenizer)
        words = row["text"].replace(".", " ").replace("?", " ").replace(",", " ").replace(":", " ").split()
        word = next(word for word in words[1:] if words.count(word) == 1 and len(word) > 1)
        levels, nothing = reader.simulate([f"the word {word}", ""], [one, one])
        said = [piece for piece, level in zip(one.pieces, levels, strict=True) if level == 10]
        assert "".join(said).strip() == word and set(levels) == {0.0, 10.0}
        assert nothing.max() == 0
    with pytest.raises(KeyError, match="no plain text"):
        reader.simulate(["x"], [window(ids[::-1], tokenizer)])


def test_the_exact_reader_says_nothing_that_only_the_following_text_tells():
    """Texts that begin alike are read alike as far as they do, by all rules, and a beginning as in the whole."""
    tokenizer = load_tokenizer(ModelConfig())
    reader = ExactReader(tokenizer)
    texts = sorted({tuple(encode_with_offsets(tokenizer, row["text"])[0][1:]) for row in rows("text")[:1500]})
    heard = [reader.said(window(ids, tokenizer)) for ids in texts]
    shared = 0
    for (one, first), (other, second) in pairwise(zip(texts, heard, strict=True)):
        same = next(
            (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        assert first[:same] == second[:same]
        shared += same
    assert shared > 5000
    for ids, whole in zip(texts[::100], heard[::100], strict=True):
        for end in range(5, len(ids)):
            assert reader.said(window(ids[:end], tokenizer)) == whole[:end]
    every = {text for of_text in heard for of_token in of_text for text in of_token}
    assert not any(text.startswith("words before") or text == "correct options" for text in every)
    assert {"cities", "texts about cities", "statements", "words after or", "the second option"} <= every
    assert all("statements" not in of_text[0] and "texts about cities" not in of_text[0] for of_text in heard)


def test_lines_of_a_plot_share_their_axes():
    plot = lines_plot({"a": [(0.01, 1.0), (1.0, 3.0)], "b": [(0.1, 2.0), (1.0, float("nan"))]}, {"zero": 4.0}, False)
    assert plot is not None
    assert [tick.label for tick in plot.x_ticks] == ["0.01", "0.1", "1"]
    np.testing.assert_allclose([tick.place for tick in plot.x_ticks], [0, 50, 100])
    (first, last), (alone,) = (one.points for one in plot.lines)
    assert first[0] == 0 and last[0] == 100 and alone[0] == pytest.approx(50)
    assert first[1] > alone[1] > last[1], "y grows upwards"
    assert 100 - plot.levels[0].place < last[1]
    assert lines_plot({"a": [(1.0, 1.0)]}, {}, False) is None
    logarithmic = lines_plot({"a": [(0.1, 0.0), (0.2, 1.0), (1.0, 10.0)]}, {}, True)
    assert logarithmic is not None and len(logarithmic.lines[0].points) == 2


def test_a_line_far_above_the_others_leaves_the_plot():
    lines = {"a": [(0.1, 1.0), (1.0, 2.0)], "b": [(0.1, 3.0), (1.0, 100.0)]}
    wide, cut = lines_plot(lines, {"zero": 4.0}, False), lines_plot(lines, {"zero": 4.0}, False, highest=6.0)
    assert wide is not None and cut is not None
    assert not wide.is_cut and cut.is_cut
    assert max(float(tick.label) for tick in cut.y_ticks) <= 6.3 < max(float(tick.label) for tick in wide.y_ticks)
    assert cut.lines[1].points[0][1] > 0 > cut.lines[1].points[1][1], "b begins in the picture and ends above it"
    assert cut.levels[0].place == pytest.approx(100 * 4 / 6.3)
