"""Checks before a model loads, identity of a run, metrics and checkpoints on disk; no Ray."""

import errno
import json
import os
import re
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from training_helpers import train_config, write_dataset

from introspect_ray.config import OptimizationConfig
from introspect_ray.data.storage import Folder
from introspect_ray.errors import StorageError, UserError
from introspect_ray.training.checkpoint import Checkpoints, CheckpointStore, TrainState
from introspect_ray.training.metrics import MetricsLog, read_metrics
from introspect_ray.training.run import TrainingRun, changed_draws, has_dropout, prepare
from introspect_ray.training.schedule import make_optimizer
from introspect_ray.training.trainable import Trainable
from introspect_ray.training.workers import Workers


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


def test_modules_that_the_model_does_not_have(tmp_path):
    with pytest.raises(UserError, match=r"names k, c_attn, of which .*base' has none: expected some of down_proj,"):
        prepare(train_config(tmp_path, method="lora", lora__target_modules=("k", "q_proj", "c_attn", "mlp.up_proj")))


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


def test_a_run_that_goes_on_with_other_draws_says_so(tmp_path, caplog):
    lora = {"method": "lora", "lora__dropout": 0.1}
    prepare(train_config(tmp_path, **lora)).record({})
    prepare(train_config(tmp_path, **lora, trainer__log_every=1, trainer__sharding="fsdp2"))
    assert caplog.text == "", "what these change is rounding at most"
    prepare(train_config(tmp_path, **lora, trainer__num_workers=2, trainer__packing=False))
    assert "not to the same weights: another trainer.num_workers and trainer.packing draws other dropout" in caplog.text
    caplog.clear()
    (tmp_path / "out" / "explainer.json").touch()
    prepare(train_config(tmp_path, **lora, trainer__num_workers=2))
    assert caplog.text == "", "nothing goes on"


def test_what_draws_and_what_does_not(tmp_path):
    plain = train_config(tmp_path)
    two = train_config(tmp_path, trainer__num_workers=2)
    assert not has_dropout(plain) and changed_draws(plain, two) == ""
    assert not has_dropout(train_config(tmp_path, method="qlora", lora__dropout=0))
    assert has_dropout(train_config(tmp_path, method="qlora", lora__dropout=0.1))
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.1}))
    assert has_dropout(plain) and "trainer.num_workers draws other dropout" in changed_draws(plain, two)


def test_sharding_is_more_than_rounding_in_bfloat16(tmp_path):
    half = {"trainer__compute_dtype": "bfloat16"}
    whole, sharded = train_config(tmp_path, **half), train_config(tmp_path, **half, trainer__sharding="fsdp2")
    assert "which operations are done in bfloat16" in changed_draws(whole, sharded)
    assert changed_draws(whole, train_config(tmp_path, **half, trainer__num_workers=3)) == ""


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


def test_metrics_that_the_disk_refuses_come_with_the_next_line(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    log = MetricsLog(folder, 0)
    log.append({"step": 1})
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "_append", full_disk)
        log.append({"step": 2})
    assert [line["step"] for line in read_metrics(folder)] == [1]
    log.append({"step": 3})
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def trained(seed, steps):
    """Parameters after some steps on random gradients, and their optimizer."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "a": torch.nn.Parameter(torch.randn(3, 4, generator=generator)),
        "b": torch.nn.Parameter(torch.randn(4, generator=generator)),
        "c": torch.nn.Parameter(torch.randn((), generator=generator)),
    }
    optimizer = make_optimizer(parameters.values(), OptimizationConfig(learning_rate=0.1))
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


def checkpoints_of(folder, seed, steps, told=None, key="key"):
    """Checkpoints of a small training run that keep two, its parameters, and its optimizer."""
    parameters, optimizer = trained(seed, steps)
    explainer = SimpleNamespace(trainable_parameters=lambda: parameters, device=torch.device("cpu"))
    store = CheckpointStore(folder, key, keep=2)
    made = Checkpoints(store, Trainable(explainer, Workers(0, 1)), optimizer, (told if told is not None else []).append)
    return made, parameters, optimizer


def saved(checkpoints, step):
    checkpoints.start(TrainState(step, 100, 2.5, 7))
    checkpoints.settle(wait=True)


@pytest.mark.parametrize("url", ["local", "memory://checkpoint-test"])
def test_checkpoint_goes_on_bitwise(tmp_path, url):
    folder = Folder(str(tmp_path) if url == "local" else url)
    checkpoints, parameters, optimizer = checkpoints_of(folder, 0, 5)
    saved(checkpoints, 5)
    others, other, other_optimizer = checkpoints_of(folder, 1, 0)
    assert others.restore() == TrainState(5, 100, 2.5, 7)
    for both, at in ((parameters, optimizer), (other, other_optimizer)):
        for parameter in both.values():
            parameter.grad = torch.full_like(parameter, 0.3)
        at.step()
    assert all(torch.equal(parameters[name], other[name]) for name in parameters)
    checkpoints.store.clear()
    assert checkpoints.store.steps() == []


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is written are the weights of the step that it is of, though they change before the disk takes them."""
    checkpoints, parameters, _ = checkpoints_of(Folder(str(tmp_path)), 0, 5)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    goes_on = threading.Event()
    real = Folder.create

    @contextmanager
    def slow(self, name):
        assert goes_on.wait(60)
        with real(self, name) as stream:
            yield stream

    monkeypatch.setattr(Folder, "create", slow)
    checkpoints.start(TrainState(5))
    for parameter in parameters.values():
        parameter.data += 1
    checkpoints.settle(wait=False)
    assert checkpoints.store.newest(None) == 0
    goes_on.set()
    checkpoints.settle(wait=True)
    others, other, _ = checkpoints_of(Folder(str(tmp_path)), 1, 0)
    assert others.restore().step == 5
    assert all(torch.equal(other[name], before[name]) for name in before)


def test_newest_checkpoints_stay_and_damaged_ones_are_passed_over(tmp_path, caplog):
    folder = Folder(str(tmp_path))
    checkpoints, _, _ = checkpoints_of(folder, 0, 1)
    for step in (2, 4, 6, 8):
        saved(checkpoints, step)
    assert checkpoints.store.steps() == [6, 8]
    (weights,) = (tmp_path / "step_000008").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert checkpoints.restore().step == 6
    assert "step_000008 is passed over: c:exp_avg_sq in" in caplog.text
    # What counts is what was completed: neither an interrupted folder nor a damaged one pushes out a whole one.
    (tmp_path / "step_000006" / "state.json").rename(tmp_path / "state.json")
    assert checkpoints.restore().step == 0
    (tmp_path / "state.json").rename(tmp_path / "step_000006" / "state.json")
    saved(checkpoints, 7)
    assert checkpoints.store.steps() == [6, 7]
    assert checkpoints_of(folder, 0, 1, key="other")[0].restore().step == 0


def test_checkpoint_that_cannot_be_written_is_told_and_costs_nothing_else(tmp_path, monkeypatch):
    told = []
    checkpoints, parameters, _ = checkpoints_of(Folder(str(tmp_path)), 0, 1, told)
    saved(checkpoints, 2)
    first = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    parameters["a"].data += 1
    for broken in ("create", "write"):
        with monkeypatch.context() as patched:
            patched.setattr(Folder, broken, full_disk)
            saved(checkpoints, 4)
    assert len(told) == 2
    assert re.match(r"checkpoint of step 4 could not be written \(.*No space left.*\); training goes on and", told[0])
    others, other, _ = checkpoints_of(Folder(str(tmp_path)), 1, 0)
    assert others.restore().step == 2
    assert all(torch.equal(other[name], first[name]) for name in first)
    saved(checkpoints, 6)
    assert others.restore().step == 6
    assert torch.equal(other["a"], parameters["a"])


def test_storage_that_cannot_be_reached_is_no_reason_to_pass_a_checkpoint_over(tmp_path, monkeypatch):
    checkpoints, _, _ = checkpoints_of(Folder(str(tmp_path)), 0, 1)
    saved(checkpoints, 2)
    saved(checkpoints, 4)
    real = Folder.read

    def unreachable(self, name, *span):
        if name.endswith(".safetensors"):
            raise StorageError(f"{self.url}/{name} cannot be read: timed out")
        return real(self, name, *span)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "read", unreachable)
        with pytest.raises(StorageError, match="timed out"):
            checkpoints.restore()
    assert checkpoints.restore().step == 4
