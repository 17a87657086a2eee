"""Coders trained on Ray from activations of the pocket target, through a lost trainer; what they are is computed here
without Ray, from the same blocks."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from dying_trainer import DyingTrainer

from introspect_ray.config import ModelConfig, SourceConfig, TrainSaeConfig, TrainTranscoderConfig
from introspect_ray.data.activations import ActivationStream, SharedTexts, StreamPlan, block_rows
from introspect_ray.data.cluster import connect
from introspect_ray.data.sources import load_source
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.features.sae import load_sae
from introspect_ray.features.shuffling import Part
from introspect_ray.interventions.target import Target
from introspect_ray.training import coders
from introspect_ray.training.coder_loop import export, train
from introspect_ray.training.coder_run import prepare
from introspect_ray.training.coders import train_coder

SMALL = {"num_latents": 200, "num_active": 6, "steps": 60, "batch_size": 128, "source": SourceConfig(limit=120)}
SMALL |= {"stream": {"texts_per_block": 16, "buffer_batches": 8}, "held_out_tokens": 100}
SMALL |= {"trainer": {"checkpoint_every": 10, "log_every": 10, "num_cpus": 0.5}, "actors": {"num_cpus": 0.5}}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        with connect():
            yield


def blocks(target, plan, texts, block=0, first=0):
    """The parts of a stream, one per block, computed here."""
    while plan.num_blocks is None or block < plan.num_blocks:
        rows = block_rows(target, plan, texts, block)
        columns = tuple(torch.from_numpy(rows[place])[first:] for place in plan.places)
        yield Part(block, first, columns)
        block, first = block + 1, 0


def without_ray(config):
    """The report of the same run, one block after another."""
    prepared = prepare(config)
    prepared.claim.write()
    run, target = prepared.run, Target.load(config.target)
    fitted, held_out = prepared.read(held_out=False), prepared.read(held_out=True)
    plans = [
        StreamPlan(config.target, config.layer, run.places, config.stream, len(texts), seed)
        for texts, seed in ((fitted, config.seed), (held_out, None))
    ]
    for _ in train(run, lambda block, first: blocks(target, plans[0], fitted, block, first)):
        pass
    return export(run, blocks(target, plans[1], held_out))


def test_coder_whose_trainer_died_is_the_one_made_without_ray(tmp_path, monkeypatch):
    """A transcoder, because importing sae_lens takes long; SAEs go on alike, see test_sae_lens_parity.py."""
    monkeypatch.setattr(coders, "CoderTrainer", DyingTrainer)
    config = TrainTranscoderConfig(output=str(tmp_path / "one"), **SMALL)
    steps = []
    summary = train_coder(config, lambda done, *_: steps.append(done))
    assert (tmp_path / "died").exists() and steps[-1] == 60 and sorted(set(steps)) == [10, 20, 30, 40, 50, 60]
    assert "transcoder of layer 1 after 60 steps; on 1" in summary.line and not summary.was_complete
    assert 0 < summary.report["held_out"]["unexplained"] < 0.8 and summary.report["lost_tokens"] == 0

    report = without_ray(config.model_copy(update={"output": str(tmp_path / "two")}))
    assert report == summary.report
    one, two = (tmp_path / name / "metrics.jsonl" for name in ("one", "two"))
    assert one.read_text() == two.read_text()
    found, expected = load_sae(str(tmp_path / "one")), load_sae(str(tmp_path / "two"))
    assert torch.equal(found.encoder, expected.encoder) and torch.equal(found.decoder, expected.decoder)
    assert not list((tmp_path / "one" / "work").iterdir())

    monkeypatch.setattr(coders, "connect", None)
    assert train_coder(config, lambda *_: None).line.startswith(f"{tmp_path / 'one'} was already complete: transcoder")


def test_stream_begins_at_any_place_and_keeps_its_order_with_several_actors(tmp_path):
    config = TrainSaeConfig(**SMALL | {"actors": {"num_cpus": 0.5, "initial_size": 2, "max_size": 2}})
    rows = load_source(config.source, "text", ("text",)).rows[:70]
    texts = pa.chunked_array([pa.array([row["text"] for row in rows], pa.large_string())])
    plan = StreamPlan(ModelConfig(), 1, ("residual",), config.stream, len(texts), None)
    stream = ActivationStream(plan, SharedTexts.of(texts), config.actors, Folder(str(tmp_path)))
    parts = list(stream.parts(1, 7))
    expected = list(blocks(Target.load(plan.target), plan, texts, 1, 7))
    assert [part.block for part in expected] == sorted({part.block for part in parts}) == [1, 2, 3, 4]
    for whole in expected:
        own = [part for part in parts if part.block == whole.block]
        assert own[0].first == whole.first
        assert torch.equal(torch.cat([part.columns[0] for part in own]), whole.columns[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that there is no GPU")
def test_what_actors_raise_comes_in_one_line(tmp_path):
    tree = SMALL | {"target": ModelConfig(device="cuda")}
    with pytest.raises(UserError, match=r"^device 'cuda' asked for, but this process has no GPU: use"):
        train_coder(TrainTranscoderConfig(output=str(tmp_path / "run"), **tree), lambda *_: None)
    with pytest.raises(UserError, match=r"trainer\.num_cpus and actors\.num_cpus need 1000\.5 CPUs together"):
        tree = SMALL | {"trainer": {"num_cpus": 1000}}
        train_coder(TrainTranscoderConfig(output=str(tmp_path / "large"), **tree), lambda *_: None)
