"""The stages that make and label the pocket's coders: what trains, what is counted, and the files they leave."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from introspect_ray.config import PocketSparseConfig, PocketTargetConfig, SourceConfig
from introspect_ray.data.sources import load_source
from introspect_ray.features.coder import ActiveLatents
from introspect_ray.features.labelling import Membership, Sample
from introspect_ray.features.sae import check_sae
from introspect_ray.interventions.target import Target
from introspect_ray.pocket.sparse import _without_long, build_transcoder, sample_texts, training_rows
from introspect_ray.pocket.target_training import new_model
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.tokenizer import train_tokenizer
from introspect_ray.pocket.world import World

WORLD = World(0)
CONFIG = PocketSparseConfig(
    transcoder_layer=1,
    transcoder_latents=64,
    transcoder_active=4,
    documents=60,
    steps=20,
    batch_size=64,
    minimum_firings=3,
)


@pytest.fixture(scope="module")
def target() -> Target:
    corpus = Corpus(WORLD, 1)
    tokenizer = train_tokenizer((corpus.document().text for _ in range(300)), 1500)
    shape = PocketTargetConfig(architecture="llama", layers=3, width=32, mlp_width=48, heads=2)
    torch.manual_seed(0)
    return Target(new_model(shape, tokenizer).eval().requires_grad_(False), tokenizer)


def test_every_token_has_its_word(target: Target) -> None:
    texts = sample_texts(WORLD, target.tokenizer, 40, 5)
    assert len(texts.words) == sum(len(ids) - 1 for ids in texts.ids)
    tokens = [target.tokenizer.decode([token]).strip(" ") for ids in texts.ids for token in ids[1:]]
    for token, word in zip(tokens, texts.words, strict=True):
        assert word is not None and token in word.text
    assert len(set(tokens)) > 100


def test_no_word_trains_more_than_its_share(target: Target) -> None:
    texts = sample_texts(WORLD, target.tokenizer, 40, 5)
    rows = training_rows(texts, 7, seed=0).tolist()
    everywhere = Counter(word.text for word in texts.words if word)
    trained = Counter(texts.words[row].text for row in rows)
    assert rows == sorted(set(rows))
    assert trained == {word: min(7, count) for word, count in everywhere.items()}
    assert rows != training_rows(texts, 7, seed=1).tolist()


def test_attention_sinks_are_left_out_of_labelling() -> None:
    x = torch.tensor([[1.0, 0], [0, 2.0], [9.0, 0], [1.5, 0]])
    active = ActiveLatents(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 0, 1, 0]), torch.tensor([1.0, 50, 60, 2]), 4, 2)
    members = Membership(np.array([0, 1, 2, 2, 3]), np.array([0, 0, 0, 1, 1]), 4)
    kept = _without_long(Sample(active, members), x, 2)
    assert kept.active.vectors.tolist() == [0, 3] and kept.active.values.tolist() == [1, 2]
    assert (kept.membership.tokens.tolist(), kept.membership.categories.tolist()) == ([0, 1, 3], [0, 0, 1])


def test_stage_leaves_a_coder_and_labels_that_the_sources_read(target: Target, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = build_transcoder(
        tmp_path, target, WORLD, CONFIG, 0, lambda stage, step, steps, _: seen.append((stage, step, steps))
    )
    assert seen == [("transcoder", step, 20) for step in range(1, 21)]
    assert json.loads((tmp_path / "training.json").read_text())["live"] == report.live
    assert check_sae(str(tmp_path), target.width).layer == 1
    source = load_source(SourceConfig(path=str(tmp_path / "labels.jsonl")), "feature_description", ("latent_labels",))
    rows = source.rows
    assert not source.rejected
    assert len(rows) == report.live > 0
    assert sum(row["score"] >= CONFIG.accepted_score for row in rows) == report.labelled
    assert all(row["layer"] == 1 and 0 <= row["index"] < 64 for row in rows)
