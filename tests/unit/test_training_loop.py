"""The real loop in this process: resumption is bitwise, splits do not change the gradient, NaN is named. No Ray."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import train_config, write_dataset

from introspect_ray.errors import RunFailed, UserError
from introspect_ray.explainer.model import Explainer
from introspect_ray.training.checkpoint import CheckpointStore
from introspect_ray.training.loop import build, fit
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.run import prepare
from introspect_ray.training.step import Stepper
from introspect_ray.training.workers import Workers

ALONE = Workers(0, 1)


def finished(config):
    run = prepare(config)
    run.record({})
    fit(run, ALONE)
    return run


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, method):
    (tmp_path / "one").mkdir()
    options = {"method": method, "lora__rank": 2, "lora__dropout": 0.3}
    undisturbed = finished(train_config(tmp_path, output=str(tmp_path / "undisturbed"), **options))
    run = prepare(train_config(tmp_path, output=str(tmp_path / "killed"), **options))
    run.record({})
    real = Stepper.step

    def dies(self, number, optimizer):
        if number == 5:
            raise Killed
        return real(self, number, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", dies)
        with pytest.raises(Killed):
            fit(run, ALONE)
    # The newest may still have been on its way to the disk.
    assert CheckpointStore(run.checkpoints, run.run_key, 2).newest(None) in (2, 4)
    assert not run.is_complete()
    fit(run, ALONE)
    assert run.is_complete()
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    one, other = (load_file(tmp_path / place / name) for place in ("undisturbed", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    timeless = [
        [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
        for lines in (read_metrics(undisturbed.folder), read_metrics(run.folder))
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[0]] == [3, 6, 8]
    assert CheckpointStore(run.checkpoints, run.run_key, 2).steps() == []


def test_training_learns_and_exports_a_whole_explainer(tmp_path):
    run = finished(train_config(tmp_path, optimization__steps=40))
    losses = [line["loss"] for line in read_metrics(run.folder)]
    assert losses[-1] < 0.5 * losses[0]
    content = json.loads((tmp_path / "out" / "training.json").read_text())
    assert content["results"]["step"] == 40
    assert content["config"]["optimization"]["steps"] == 40
    assert Explainer.load(str(tmp_path / "out"), device="cpu", dtype="float32").card.target.width == 32


def test_gradient_is_that_of_the_token_mean_however_it_is_split(tmp_path):
    """Workers and micro-batches against one plain pass over the global batch."""
    run = prepare(train_config(tmp_path))
    explainer, examples = build(run)
    explainer.eval()
    chosen = [0, 1, 2, 3, 7]
    loss, count = explainer.loss([examples[index] for index in chosen])
    (loss / count).backward()
    parameters = explainer.trainable_parameters()
    expected = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    splits = [(1, 10_000, False), (1, 64, False), (2, 64, False), (3, 10_000, True), (1, 300, True)]
    for size, tokens, packing in splits:
        total = dict.fromkeys(expected, 0)
        loss_sum = 0.0
        for rank in range(size):
            config = run.config.model_copy(
                update={
                    "trainer": run.config.trainer.model_copy(update={"micro_batch_tokens": tokens, "packing": packing})
                }
            )
            stepper = Stepper(explainer, examples, config, Workers(rank, size))
            loss_sum += float(stepper._accumulate(chosen, examples, count))
            total = {name: total[name] + parameter.grad for name, parameter in parameters.items()}
        assert loss_sum == pytest.approx(loss.item(), rel=1e-5)
        for name in expected:
            torch.testing.assert_close(total[name], expected[name], rtol=1e-4, atol=1e-6)


def test_steps_draw_from_the_datasets_by_weight(tmp_path):
    write_dataset(tmp_path / "other", count=6)
    both = [str(tmp_path / "dataset"), str(tmp_path / "other")]
    config = train_config(tmp_path, datasets=both, weights=[1, 4], trainer__packing=False)
    stepper = Stepper(*build(prepare(config)), config, ALONE)
    drawn = [index for step in range(20) for index in stepper._chosen(step)]
    assert sum(index >= 24 for index in drawn) == 96  # of 120


def test_nan_stops_the_run_and_names_the_records(tmp_path, monkeypatch):
    run = prepare(train_config(tmp_path))
    run.record({})
    real = Explainer.loss

    def poisoned(self, batch):
        loss, count = real(self, batch)
        return loss * float("nan"), count

    monkeypatch.setattr(Explainer, "loss", poisoned)
    with pytest.raises(RunFailed, match=r"step 1: loss is nan .*records of the batch: [0-9a-f]{16}, ") as error:
        fit(run, ALONE)
    _, examples = build(run)
    named = str(error.value).split("records of the batch: ")[1].split(", ")
    assert len(named) == 6
    assert set(named) <= {examples.record_id(index) for index in range(len(examples))}
    assert not run.is_complete()


def test_a_record_that_is_too_long_is_named(tmp_path):
    config = train_config(tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 80}))
    with pytest.raises(UserError, match=r"dataset .*, record [0-9a-f]{16}: \d+ tokens .* at most 80"):
        build(prepare(config))


def test_who_comes_when_all_is_done_trains_nothing(tmp_path, monkeypatch):
    """A worker that dies after the export, and storage that does not let checkpoints go, cost nothing."""

    def stays(_store):
        raise OSError("denied")

    monkeypatch.setattr(CheckpointStore, "clear", stays)
    run, told = prepare(train_config(tmp_path)), []
    run.record({})
    results = fit(run, ALONE, told.append)
    assert told == [f"checkpoints in {run.checkpoints.url} could not be removed: denied"]
    monkeypatch.setattr(Stepper, "step", lambda *_: pytest.fail("nothing is left to do"))
    assert fit(run, ALONE) == results
