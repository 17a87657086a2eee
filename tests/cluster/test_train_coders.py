"""Coders trained on Ray from activations of the pocket target: through a lost trainer, and read by sae-lens."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from introspect_ray.config import ModelConfig, SourceConfig, TrainSaeConfig, TrainTranscoderConfig
from introspect_ray.data.activations import ActivationStream, StreamPlan, block_rows
from introspect_ray.data.cluster import connect
from introspect_ray.data.sources import load_source
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.sae import load_sae
from introspect_ray.interventions.target import Target
from introspect_ray.training import coders
from introspect_ray.training.coders import CoderTrainer, train_coder

SMALL = {"num_latents": 200, "num_active": 6, "steps": 60, "batch_size": 128, "source": SourceConfig(limit=120)}
SMALL |= {"stream": {"texts_per_block": 16, "buffer_batches": 8}, "held_out_tokens": 400}
SMALL |= {"trainer": {"checkpoint_every": 10, "log_every": 10, "num_cpus": 0.5}, "actors": {"num_cpus": 0.5}}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        with connect():
            yield


class DyingTrainer(CoderTrainer):
    """Its process ends itself at the third line of metrics, unless one did so before."""

    def run(self, run, texts, held_out):
        mark = Path(run.config.output).parent / "died"
        for number, line in enumerate(super().run(run, texts, held_out)):
            if number == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield line


def test_sae_is_the_same_whether_or_not_its_trainer_died(tmp_path, monkeypatch):
    from sae_lens import SAE

    steps = []
    config = TrainSaeConfig(output=str(tmp_path / "one"), **SMALL)
    summary = train_coder(config, lambda done, *_: steps.append(done))
    assert steps == [10, 20, 30, 40, 50, 60] and not summary.was_complete
    assert "sae of layer 1 after 60 steps; on 4" in summary.line
    assert summary.report["held_out"]["unexplained"] < 0.8 and summary.report["lost_tokens"] == 0

    monkeypatch.setattr(coders, "CoderTrainer", DyingTrainer)
    again = train_coder(config.model_copy(update={"output": str(tmp_path / "two")}), lambda *_: None)
    assert (tmp_path / "died").exists()
    assert again.report == summary.report
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == (tmp_path / "two" / "metrics.jsonl").read_text()
    one, two = load_sae(str(tmp_path / "one")), load_sae(str(tmp_path / "two"))
    assert torch.equal(one.encoder, two.encoder) and torch.equal(one.decoder, two.decoder)

    theirs = SAE.load_from_disk(str(tmp_path / "one"))
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    x = 5 * torch.randn(50, one.width)
    with torch.no_grad():
        for found, expected in ((one.encode(x), theirs.encode(x)), (one.forward(x), theirs(x))):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    monkeypatch.setattr(coders, "connect", None)
    assert train_coder(config, lambda *_: None).line.startswith(f"{tmp_path / 'one'} was already complete: sae")


def test_transcoder_job_from_bfloat16_activations(tmp_path):
    from sae_lens import SAE

    config = TrainTranscoderConfig(output=str(tmp_path / "tc"), **SMALL | {"stream": {"dtype": "bfloat16"}})
    summary = train_coder(config, lambda *_: None)
    found = summary.report["held_out"]
    assert found["unexplained"] < 1 and "without latents" in summary.line
    ours, theirs = load_sae(str(tmp_path / "tc")), SAE.load_from_disk(str(tmp_path / "tc"))
    x = torch.randn(50, ours.width)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward(x), theirs(x), rtol=0, atol=1e-5 * theirs(x).abs().max().item())
    assert (
        json.loads((tmp_path / "tc" / "cfg.json").read_text())["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    )


def test_stream_has_every_row_in_order_from_any_place_with_any_number_of_actors():
    config = TrainSaeConfig(**SMALL, actors={"num_cpus": 0.5, "initial_size": 2, "max_size": 2})
    texts = [row["text"] for row in load_source(config.source, "text", ("text",)).rows][:70]
    plan = StreamPlan(ModelConfig(), 1, ("residual",), config.stream, len(texts), None)
    stream = ActivationStream(plan, texts, config.actors)
    parts = list(stream.parts())
    target = Target.load(plan.target)
    expected = [block_rows(target, plan, stream_texts(texts), block) for block in range(5)]
    assert plan.num_blocks == 5
    for block in range(5):
        own = [part for part in parts if part.block == block]
        assert own[0].first == 0
        rows = torch.cat([part.columns[0] for part in own])
        torch.testing.assert_close(rows, torch.from_numpy(expected[block]["residual"]), rtol=0, atol=1e-5)
    later = torch.cat([part.columns[0] for part in stream.parts(3, 7)])
    whole = torch.cat([part.columns[0] for part in parts if part.block >= 3])
    assert torch.equal(later, whole[7:])


def stream_texts(texts):
    import pyarrow as pa

    return pa.array(texts, pa.large_string())


def test_what_actors_raise_comes_in_one_line(tmp_path):
    empty = tmp_path / "short.jsonl"
    empty.write_text("".join(json.dumps({"text": letter}) + "\n" for letter in "abcdefgh"))
    config = TrainSaeConfig(output=str(tmp_path / "run"), **SMALL | {"source": SourceConfig(path=str(empty))})
    with pytest.raises((RunFailed, UserError)) as caught:
        train_coder(config, lambda *_: None)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"trainer.num_cpus and actors.num_cpus need 1000\.5 CPUs together"):
        train_coder(
            TrainSaeConfig(output=str(tmp_path / "large"), **SMALL | {"trainer": {"num_cpus": 1000}}), lambda *_: None
        )
