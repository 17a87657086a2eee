"""Evaluation while training: what is scored, who is best, when it stops, and that a killed run ends alike. No Ray."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import train_config, write_dataset

from introspect_ray.data.dataset import open_dataset
from introspect_ray.errors import UserError
from introspect_ray.evaluation.evaluate import evaluate_task
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.evaluation.sampling import spread
from introspect_ray.explainer.model import Explainer
from introspect_ray.tasks.registry import get_task
from introspect_ray.training import validation
from introspect_ray.training.checkpoint import Checkpoints, CheckpointStore
from introspect_ray.training.loop import fit
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.run import prepare, relevant
from introspect_ray.training.step import Stepper
from introspect_ray.training.validation import Evaluator, load_held_out
from introspect_ray.training.workers import Workers

ALONE = Workers(0, 1)


def config_of(folder, **changes):
    """A run on a dataset with a validation split, evaluated every second step."""
    if not (folder / "dataset").exists():
        write_dataset(folder / "dataset", count=36, splits=("train", "train", "validation"))
    return train_config(folder, **{"evaluation__every": 2, "explainer__max_new_tokens": 24, **changes})


def begun(config):
    run = prepare(config)
    run.record({})
    return run


def script(monkeypatch, values):
    """Evaluations give these values of exact_match, by step; returns the weights that each of them saw."""
    seen = {}

    def evaluate(self, state):
        seen[state.step] = {name: p.detach().clone() for name, p in self.explainer.causal.named_parameters()}
        self.value = values[state.step]
        return real(self, state)

    real = Evaluator.evaluate
    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    monkeypatch.setattr(Evaluator, "scores", lambda self: {"d": {"exact_match": self.value, "parse_rate": 1.0}})
    return seen


def exported(folder):
    return load_file(folder / "out" / "model.safetensors")


def equals(weights, seen):
    return all(torch.equal(weight, seen[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ("train", "test")}, "evaluation.every is 2, but dataset .* has no records in its validation split"),
        ({"metric": "exact"}, "evaluation.metric is 'exact', expected one of exact_match, has_changed_f1, content_m"),
        ({"metric": "description_match"}, "evaluation.metric is 'description_match', expected one of exact_match, "),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_loads(tmp_path, changes, message):
    write_dataset(tmp_path / "dataset", splits=changes.pop("splits", ("train", "validation")))
    with pytest.raises(UserError, match=message):
        prepare(config_of(tmp_path, **{f"evaluation__{name}": value for name, value in changes.items()}))


def test_scores_are_those_of_an_evaluation(tmp_path):
    config = config_of(tmp_path, evaluation__max_examples=7, optimization__steps=30)
    run = begun(config)
    results = fit(run, ALONE)
    dataset = open_dataset(config.datasets[0])
    explainer = Explainer.load(str(tmp_path / "out"), "cpu", "float32")

    def explain(queries):
        return explainer.explain(queries, 4)

    expected = evaluate_task(
        get_task("activation_patching"),
        [],
        spread(dataset.records("validation"), 7),
        explain,
        explain,
        methods=("explainer",),
        scales=(),
        bootstrap=Bootstrap(100, 0.95, 0),
    ).intervals["explainer"]
    assert results["best"] == {name: interval.value for name, interval in expected.items()}
    assert {interval.n for interval in expected.values()} == {7}
    lines = {line["step"]: line for line in read_metrics(run.folder)}
    assert [step for step, line in lines.items() if "validation" in line] == list(range(2, 31, 2))
    assert lines[results["exported_step"]]["validation"] == results["best"]
    assert results["best"]["parse_rate"] > 0, "an untrained model would not have shown which answers are compared"


def test_workers_share_the_answers_in_equal_steps(tmp_path, monkeypatch):
    config = config_of(tmp_path, optimization__steps=30)
    run = begun(config)
    fit(run, ALONE)
    explainer = Explainer.load(str(tmp_path / "out"), "cpu", "float32")
    (held_out,) = load_held_out(explainer, run.config)
    alone = Evaluator(explainer, [held_out], run.config, ALONE)._own_sums(held_out)
    assert alone["parse_rate"].tolist()[1] == 12
    calls = []
    real = Explainer.inputs
    monkeypatch.setattr(Explainer, "inputs", lambda self, *args: (calls.append(1), real(self, *args))[1])
    for size in (2, 3, 50):
        together = {name: np.zeros_like(sums) for name, sums in alone.items()}
        passes = set()
        for rank in range(size):
            sums_of_worker = Evaluator(explainer, [held_out], run.config, Workers(rank, size))._own_sums(held_out)
            for name, sums in sums_of_worker.items():
                together[name] += sums
            passes.add(len(calls))
            calls.clear()
        assert all((together[name] == sums).all() for name, sums in alone.items()), size
        assert len(passes) == 1, "with sharded weights, workers that answer in fewer batches leave the others waiting"


def test_metrics_are_averaged_over_the_datasets_that_have_them():
    nan = float("nan")
    mean = validation._mean([{"a": 0.2, "b": 1.0, "c": nan}, {"b": 0.5, "d": 0.4}, {"b": nan}])
    assert mean["a"] == 0.2 and mean["b"] == 0.75 and np.isnan(mean["c"]) and mean["d"] == 0.4


def test_best_weights_are_exported_and_kept_meanwhile(tmp_path, monkeypatch):
    seen = script(monkeypatch, {2: 0.1, 4: 0.5, 6: 0.5, 8: float("nan"), 10: 0.4, 11: 0.3})
    run = begun(config_of(tmp_path, optimization__steps=11, trainer__checkpoint_every=3))
    kept = []
    real = CheckpointStore.complete

    def complete(self, state, indices):
        real(self, state, indices)
        kept.append(self.steps())

    monkeypatch.setattr(CheckpointStore, "complete", complete)
    results = fit(run, ALONE)
    assert kept == [[2], [2, 3], [2, 3, 4], [4, 6], [4, 6, 9], [4, 9, 11]], "of equal ones the first is best"
    assert (results["exported_step"], results["stopped_early"], results["step"]) == (4, False, 11)
    assert results["best"] == {"exact_match": 0.5, "parse_rate": 1.0}
    assert equals(exported(tmp_path), seen[4])
    assert json.loads((tmp_path / "out" / "training.json").read_text())["results"] == results
    assert [line["validation"]["exact_match"] for line in read_metrics(run.folder) if "validation" in line] == [
        *(0.1, 0.5, 0.5, None, 0.4, 0.3)
    ]


def test_training_stops_when_patience_is_over(tmp_path, monkeypatch):
    seen = script(monkeypatch, {2: 0.3, 4: 0.1, 6: 0.4, 8: 0.4, 10: 0.2, 12: 0.9})
    results = fit(begun(config_of(tmp_path, optimization__steps=100, evaluation__patience=2)), ALONE)
    assert (results["step"], results["exported_step"], results["stopped_early"]) == (10, 6, True)
    assert equals(exported(tmp_path), seen[6])


@pytest.mark.parametrize("dies_at", [3, 7, 9])
@pytest.mark.parametrize("patience", [None, 2])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, dies_at, patience):
    values = {2: 0.3, 4: 0.1, 6: 0.4, 8: 0.4, 10: 0.2, 12: 0.1}
    options = {
        "evaluation__patience": patience,
        "optimization__steps": 12,
        "trainer__checkpoint_every": 5,
        "logging__tensorboard": False,
    }
    seen = script(monkeypatch, values)
    undisturbed = fit(begun(config_of(tmp_path, output=str(tmp_path / "undisturbed"), **options)), ALONE)
    run = begun(config_of(tmp_path, **options))
    real = Stepper.step

    def dies(self, number, optimizer):
        if number == dies_at:
            raise KeyboardInterrupt
        return real(self, number, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(run, ALONE)
    resumed = fit(run, ALONE)
    for results in (undisturbed, resumed):
        del results["tokens_per_second"]
    assert resumed == undisturbed
    assert resumed["exported_step"] == 6 and resumed["step"] == (12 if patience is None else 10)
    assert equals(exported(tmp_path), seen[6])
    lines = read_metrics(run.folder)
    assert [line["step"] for line in lines] == sorted({3, 9, *range(2, resumed["step"] + 1, 2)})


def test_a_best_checkpoint_that_is_lost_is_said(tmp_path, monkeypatch):
    seen = script(monkeypatch, {2: 0.3, 4: 0.1, 6: 0.1, 8: 0.1})
    run = begun(config_of(tmp_path))
    real = Checkpoints.restore_best

    def lose(self, step, *rest):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step_{step:06d}")
        return real(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "restore_best", lose)
    told = []
    results = fit(run, ALONE, told.append)
    last = results["step"]
    assert told == [f"the checkpoint of the best step, 2, is not there: step {last} is exported"]
    assert (results["best_step"], results["exported_step"]) == (2, last) and last > 2
    assert equals(exported(tmp_path), seen[last])


def test_settings_of_no_evaluation_and_loggers_are_not_relevant(tmp_path):
    plain = relevant(train_config(tmp_path, evaluation__every=0))
    same = train_config(tmp_path, evaluation__metric="parse_rate", logging__tensorboard=False, logging__mlflow_uri="x")
    assert relevant(same) == plain
    for changes in ({"every": 4}, {"metric": "parse_rate"}, {"patience": 1}, {"max_examples": 3}):
        changed = config_of(tmp_path, **{f"evaluation__{name}": value for name, value in changes.items()})
        assert relevant(changed) != relevant(config_of(tmp_path))
