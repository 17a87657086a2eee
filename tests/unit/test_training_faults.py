"""Storage that is away for a moment, at each place where a run that has started uses it; and what a lost best costs."""

import pytest
import torch
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file
from training_helpers import train_config, write_dataset

from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed, StorageError, UserError
from introspect_ray.explainer.model import Explainer
from introspect_ray.training import loop
from introspect_ray.training.checkpoint import CheckpointStore
from introspect_ray.training.loop import fit, fit_or_record
from introspect_ray.training.metrics import MetricsLog, read_metrics
from introspect_ray.training.run import prepare
from introspect_ray.training.step import Stepper
from introspect_ray.training.train import Summary, _Trainer
from introspect_ray.training.validation import Evaluator
from introspect_ray.training.workers import Workers

ALONE = Workers(0, 1)
STEPS = 6


def begun(folder, output, **changes):
    if not (folder / "dataset").exists():
        write_dataset(folder / "dataset", count=12, splits=("train", "train", "validation"))
    settings = {"optimization__steps": STEPS, "evaluation__every": 3, "logging__tensorboard": False, **changes}
    run = prepare(train_config(folder, output=str(folder / output), **settings))
    run.record({})
    return run


def timeless(metrics):
    return {name: value for name, value in metrics.items() if name != "tokens_per_second"}


def fails_once(monkeypatch, method, part, number=0):
    """One call of this method of Folder, counted from 0, on a URL that ends in `part` raises; returns those calls."""
    calls, real = [], getattr(Folder, method)

    def once(self, name="", *rest, **options):
        if f"{self.url}/{name}".rstrip("/").endswith(part):
            calls.append(name)
            if len(calls) == number + 1:
                raise StorageError(f"{self.url}/{name}: timed out")
        return real(self, *([name] if name else []), *rest, **options)

    monkeypatch.setattr(Folder, method, once)
    return calls


def full_disk(*_):
    raise OSError("disk is full")


def counted_steps(monkeypatch):
    steps, real = [], Stepper.step

    def step(self, number, optimizer):
        steps.append(number)
        return real(self, number, optimizer)

    monkeypatch.setattr(Stepper, "step", step)
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def undisturbed(folder):
    return fit(begun(folder, "undisturbed"), ALONE), load_file(folder / "undisturbed" / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "part", "number"),
    [
        ("size", "explainer.json", 0),
        ("read", "dataset.json", 0),  # examples
        ("open", ".parquet", 0),
        ("read", "dataset.json", 1),  # what evaluations answer
        ("names", "checkpoints", 0),
        ("read", "metrics.jsonl", 0),
        ("write", "training.json", 0),  # results, when all steps are done
    ],
)
def test_storage_that_fails_once_is_nobodys_mistake(folder, undisturbed, monkeypatch, tmp_path, method, part, number):
    monkeypatch.setattr(loop, "scratch_folder", lambda _: tmp_path / "scratch" / "examples")
    name = f"{method}-{part}-{number}".replace("/", "")
    run = begun(folder, name)
    steps = counted_steps(monkeypatch)
    calls = fails_once(monkeypatch, method, part, number)
    with pytest.raises(StorageError, match="timed out"):
        fit_or_record(run, ALONE, pytest.fail)
    assert run.results() == {}, "no failure is recorded, so that Ray tries again"
    told = []
    fit_or_record(run, ALONE, told.append)
    assert len(calls) > number + 1
    assert len(steps) == STEPS
    results, weights = undisturbed
    assert timeless(run.results()) == timeless(results)
    found = load_file(folder / name / "model.safetensors")
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_what_a_retry_would_repeat_is_recorded(folder, monkeypatch):
    for error, by_user in ((UserError("a record is bad"), True), (RunFailed("loss is nan"), False)):
        run = begun(folder, f"recorded-{by_user}")

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(loop, "fit", fail)
        fit_or_record(run, ALONE, pytest.fail)
        assert run.results() == {"failure": str(error), "by_user": by_user}
        fit_or_record(run, Workers(1, 2), pytest.fail)  # others than rank 0 say nothing


def test_a_failed_export_costs_no_step(folder, monkeypatch):
    """Also after an early stop, where steps would be left."""
    steps = counted_steps(monkeypatch)
    scripted(monkeypatch, {3: 0.5, 6: 0.25, 9: 0.25})
    run = begun(folder, "export", optimization__steps=30, evaluation__patience=2)
    with monkeypatch.context() as patched:
        patched.setattr(Explainer, "save", full_disk)
        with pytest.raises(OSError, match="disk is full"):
            fit(run, ALONE)
    assert len(steps) == 9 and not run.is_complete()
    results = fit(run, ALONE)
    assert len(steps) == 9
    line = read_metrics(run.folder)[-1]
    assert {name: results[name] for name in line} == line and line["step"] == 9
    assert (results["exported_step"], results["stopped_early"]) == (3, True)


def test_metrics_that_the_storage_does_not_take_at_the_start_come_later(tmp_path, monkeypatch, caplog):
    folder = Folder(str(tmp_path))
    log = MetricsLog(folder, 0)
    for step in (1, 2, 3):
        log.append({"step": step})
    calls = fails_once(monkeypatch, "write", "metrics.jsonl")
    log = MetricsLog(folder, 1)
    assert len(calls) == 1 and "cannot be written for now" in caplog.text
    log.append({"step": 2, "again": True})
    assert read_metrics(folder) == [{"step": 1}, {"step": 2, "again": True}]


def test_a_shard_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    dataset = open_dataset(str(write_dataset(tmp_path / "dataset")))
    from fsspec.implementations.local import LocalFileOpener

    def lost(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(LocalFileOpener, "read", lost, raising=False)
        with pytest.raises(StorageError, match=r"shard-00000.parquet cannot be read: Input/output error"):
            dataset.records("train")
    assert len(dataset.records("train")) == 24


def scripted(monkeypatch, values):
    """Evaluations give these values of exact_match, by step; returns the weights that each of them saw."""
    seen, real = {}, Evaluator.evaluate

    def evaluate(self, state):
        seen[state.step] = {name: p.detach().clone() for name, p in self.explainer.causal.named_parameters()}
        self.value = values[state.step]
        return real(self, state)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    monkeypatch.setattr(Evaluator, "scores", lambda self: {"d": {"exact_match": self.value, "parse_rate": 1.0}})
    return seen


@pytest.mark.parametrize(
    ("values", "exported"),
    [
        ({2: 0.3, 4: 0.5, 6: 0.1, 8: 0.1, 10: 0.2}, 2),  # the best of those that are there
        ({2: 0.3, 4: 0.5, 6: 0.1, 8: 0.1, 10: 0.4}, 10),  # the last scored more
    ],
)
def test_a_best_that_could_not_be_written_does_not_push_out_the_one_before(tmp_path, monkeypatch, values, exported):
    seen = scripted(monkeypatch, values)
    run = begun(
        tmp_path, "out", optimization__steps=10, evaluation__every=2, trainer__checkpoint_every=2, trainer__log_every=2
    )
    real = Folder.create

    def refuses(self, name):
        if self.url.endswith("step_000004"):
            raise StorageError("disk is full")
        return real(self, name)

    monkeypatch.setattr(Folder, "create", refuses)
    kept, complete = [], CheckpointStore.complete
    monkeypatch.setattr(
        CheckpointStore,
        "complete",
        lambda self, state, indices: (complete(self, state, indices), kept.append(self.steps()))[0],
    )
    told = []
    results = fit(run, ALONE, told.append)
    whole = [[step for step in steps if step != 4] for steps in kept]
    assert whole == [[2], [2, 6], [2, 6, 8], [2, 8, 10]]
    assert "checkpoint of step 4 could not be written" in told[0]
    assert told[1:] == [f"the checkpoint of the best step, 4, is not there: step {exported} is exported"]
    assert (results["best_step"], results["best"]["exact_match"]) == (4, 0.5)
    assert (results["exported_step"], results["exported_scores"]["exact_match"]) == (exported, values[exported])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weight, seen[exported][name]) for name, weight in weights.items())
    check_what_is_said(run, exported, values[exported])


def check_what_is_said(run, exported, value):
    """Line and card name the step whose weights these are, and its scores."""
    line = Summary(run.config.output, run.num_examples, run.results(), was_complete=False).line
    assert f"its weights are of step {exported}, because those of the best, step 4, were lost: " in line
    assert f"exact_match {value:.2f}, parse_rate 1.00" in line and "0.50" not in line
    card = run.folder.read("README.md").decode()
    assert f"step {exported} (exact_match {value:.2f}); those of the best, step 4, were lost" in card
    assert f"| exact_match | {value:.2f} |" in card and "0.50" not in card


def test_only_rank_0_says_what_was_lost(tmp_path, monkeypatch):
    """Alone in its group, rank 1 writes no checkpoints, and so goes without its best."""
    scripted(monkeypatch, {2: 0.5, 4: 0.1, 6: 0.1})
    results = fit(begun(tmp_path, "out", evaluation__every=2), Workers(1, 1), pytest.fail)
    assert (results["best_step"], results["exported_step"]) == (2, STEPS)


def test_ray_train_asks_the_method_that_keeps_its_hands_off_ctrl_c():
    """It is no public one: should a release of Ray lose it, Ctrl-C would end training with status 1 and no word."""
    assert callable(getattr(TorchTrainer, "_register_sigint_handler", None))
    assert "_register_sigint_handler" in vars(_Trainer)
