"""Checks before a model loads, identity of a run, metrics and checkpoints on disk; no Ray."""

import json

import pytest
import torch
from training_helpers import train_config, write_dataset

from introspect_ray.config import OptimizationConfig
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.training.checkpoint import CheckpointStore, TrainState
from introspect_ray.training.metrics import MetricsLog, read_metrics
from introspect_ray.training.run import TrainingRun, prepare
from introspect_ray.training.schedule import make_optimizer


def test_run_ships_as_json(tmp_path):
    run = prepare(train_config(tmp_path))
    assert TrainingRun.from_json(json.loads(json.dumps(run.to_json()))) == run
    assert run.num_examples == 24


def test_dataset_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no dataset.json: it is not a dataset folder"):
        prepare(train_config(tmp_path, datasets=[str(tmp_path / "nowhere")]))


def test_dataset_that_is_torn(tmp_path):
    config = train_config(tmp_path)
    shard = tmp_path / "dataset" / "shards" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"dataset.json says"):
        prepare(config)


def test_dataset_without_training_records(tmp_path):
    write_dataset(tmp_path / "dataset", splits=("test",))
    with pytest.raises(UserError, match="has no records in its train split, expected at least one"):
        prepare(train_config(tmp_path))


def test_datasets_of_two_targets(tmp_path):
    config = train_config(tmp_path, datasets=[str(tmp_path / "dataset"), str(tmp_path / "other")])
    write_dataset(tmp_path / "other", width=20, target="b")
    with pytest.raises(UserError, match=r"different targets: .*target \(width 32\), .* of b \(width 20\)"):
        prepare(config)


def test_width_without_projection(tmp_path):
    write_dataset(tmp_path / "dataset", width=20)
    with pytest.raises(UserError, match="vector width 20 does not fit an explainer of width 32 without a projection"):
        prepare(train_config(tmp_path, explainer__projection="none"))


def test_model_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        prepare(train_config(tmp_path, explainer__model__path=str(tmp_path / "nowhere")))


def test_weights_must_be_one_per_dataset_and_positive(tmp_path):
    with pytest.raises(ValueError, match="weights has 2 numbers for 1 datasets"):
        train_config(tmp_path, weights=[1, 2])
    with pytest.raises(ValueError, match="greater than 0"):
        train_config(tmp_path, weights=[0])


def test_weights_are_part_of_a_run_unless_there_is_nothing_to_weigh(tmp_path):
    write_dataset(tmp_path / "other", count=10)
    plain = prepare(train_config(tmp_path))
    assert prepare(train_config(tmp_path, weights=[3])).run_key == plain.run_key
    both = [str(tmp_path / "dataset"), str(tmp_path / "other")]
    keys = {prepare(train_config(tmp_path, datasets=both, weights=w)).run_key for w in (None, [1, 1], [1, 2])}
    assert len(keys) == 3


def test_output_of_another_config_is_refused_and_of_an_equivalent_one_is_not(tmp_path):
    prepare(train_config(tmp_path)).record({})
    prepare(train_config(tmp_path, trainer__log_every=1, trainer__num_workers=5, lora__rank=3))
    with pytest.raises(UserError, match=r"another config \(optimization.steps is 8 there, 9 here\)"):
        prepare(train_config(tmp_path, optimization__steps=9))
    write_dataset(tmp_path / "dataset", count=30)
    with pytest.raises(UserError, match="the contents of its datasets or of its starting model have changed since"):
        prepare(train_config(tmp_path))


def test_output_that_is_something_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty and holds no training run \(thesis.tex, ...\)"):
        prepare(train_config(tmp_path))


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    folder = Folder(str(tmp_path))
    log = MetricsLog(folder, 0)
    for step in (3, 6, 9):
        log.append({"step": step, "loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    assert [line["step"] for line in read_metrics(folder)] == [3, 6, 9]
    MetricsLog(folder, 6).append({"step": 9, "loss": 7.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(folder)] == [(3, 1 / 3), (6, 1 / 6), (9, 7.0)]


def trained(seed, steps):
    """Parameters and optimizer after some steps on random gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "a": torch.nn.Parameter(torch.randn(3, 4, generator=generator)),
        "b": torch.nn.Parameter(torch.randn(4, generator=generator)),
    }
    optimizer = make_optimizer(parameters.values(), OptimizationConfig(learning_rate=0.1))
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("url", ["local", "memory://checkpoint-test"])
def test_checkpoint_goes_on_bitwise(tmp_path, url):
    folder = Folder(str(tmp_path) if url == "local" else url)
    store = CheckpointStore(folder, "key", keep=2)
    parameters, optimizer = trained(0, 5)
    store.save(parameters, optimizer, TrainState(5, 100, 2.5, 7))
    other, other_optimizer = trained(1, 0)
    assert store.restore(other, other_optimizer, None) == TrainState(5, 100, 2.5, 7)
    for both, at in ((parameters, optimizer), (other, other_optimizer)):
        for parameter in both.values():
            parameter.grad = torch.full_like(parameter, 0.3)
        at.step()
    assert all(torch.equal(parameters[name], other[name]) for name in parameters)
    store.clear()
    assert store.names() == []


def test_newest_checkpoints_stay_and_damaged_ones_are_passed_over(tmp_path, caplog):
    store = CheckpointStore(Folder(str(tmp_path)), "key", keep=3)
    parameters, optimizer = trained(0, 1)
    for step in (2, 4, 6, 8):
        store.save(parameters, optimizer, TrainState(step))
    assert store.names() == ["step_000004", "step_000006", "step_000008"]
    (tmp_path / "step_000008" / "state.json").unlink()
    weights = tmp_path / "step_000006" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert store.restore(parameters, optimizer, None).step == 4
    assert "step_000006 is passed over: weights.safetensors is not what was written" in caplog.text
    assert CheckpointStore(Folder(str(tmp_path)), "other key", keep=3).restore(parameters, optimizer, None).step == 0
