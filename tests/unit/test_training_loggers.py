"""Metrics reach every place that was asked for, and no place can hurt a run. No Ray, no network."""

import logging
import sys
import time
import types
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from training_helpers import train_config

from introspect_ray.errors import UserError
from introspect_ray.training.loggers import Loggers, flat
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.run import prepare

LINES = [
    {"step": 2, "loss": 2.0, "validation": {"exact_match": 0.5, "parse_rate": None}},
    {"step": 4, "loss": 1.0, "validation": {"exact_match": 0.25, "parse_rate": 1.0}},
]


def run_of(folder, **changes):
    return prepare(train_config(folder, **changes))


def log(run, step, lines):
    with Loggers(run, step) as loggers:
        for line in lines:
            loggers.append(line)


def events(folder: Path) -> list[Event]:
    """Of all files, oldest first, each a series of (length 8, checksum 4, content, checksum 4)."""
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[12 + size + 4 :]
    return found


def scalars(found: list[Event]) -> list[tuple[str, int, float]]:
    return [(value.tag, event.step, value.simple_value) for event in found for value in event.summary.value]


def test_numbers_are_flattened():
    line = {"step": 3, "loss": 1, "validation": {"a": 0.5, "b": None, "c": float("nan")}, "name": "x"}
    assert flat(line) == {"loss": 1.0, "validation/a": 0.5}


def test_tensorboard_has_every_number_and_forgets_what_is_done_again(tmp_path):
    run = run_of(tmp_path)
    log(run, 0, LINES)
    log(run, 2, LINES[1:])
    found = events(tmp_path / "out" / "tensorboard")
    loss = [(step, value) for name, step, value in scalars(found) if name == "loss"]
    assert loss == [(2, 2.0), (4, 1.0), (4, 1.0)]
    assert ("validation/exact_match", 4, 0.25) in scalars(found)
    restarts = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert restarts == [1, 3], "TensorBoard drops what earlier files say of these steps and later ones"
    assert read_metrics(run.folder) == LINES


def test_tensorboard_of_a_remote_folder(tmp_path):
    run = run_of(tmp_path, output="memory://loggers-test/out")
    log(run, 0, LINES)
    import fsspec

    memory = fsspec.filesystem("memory")
    (name,) = memory.ls("/loggers-test/out/tensorboard", detail=False)
    memory.get_file(name, str(tmp_path / "events"))
    (tmp_path / "alone").mkdir()
    (tmp_path / "events").rename(tmp_path / "alone" / "events")
    assert [value for tag, _, value in scalars(events(tmp_path / "alone")) if tag == "loss"] == [2.0, 1.0]


def test_tensorboard_can_be_switched_off(tmp_path):
    log(run_of(tmp_path, logging__tensorboard=False), 0, LINES)
    assert not (tmp_path / "out" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("field", "package"),
    [("logging__tensorboard", "tensorboardX"), ("logging__wandb_project", "wandb"), ("logging__mlflow_uri", "mlflow")],
)
def test_a_missing_package_is_one_line_before_anything_starts(tmp_path, monkeypatch, field, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    value = True if package == "tensorboardX" else "x"
    with pytest.raises(UserError, match=f"{field.replace('__', '.')} is set, but the package {package} is not inst"):
        run_of(tmp_path, **{"logging__tensorboard": False, field: value})


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_of(tmp_path, logging__wandb_project="explainers")
    log(run, 0, LINES)
    (file,) = (tmp_path / "out" / "wandb").rglob("*.wandb")
    deadline = time.monotonic() + 120  # another process writes it
    while b"validation/exact_match" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"validation/exact_match" in file.read_bytes()


class FakeClient:
    """As much of MLflow's client as is used; keeps what it was told for all clients of a server."""

    servers: dict = {}  # noqa: RUF012

    def __init__(self, tracking_uri):
        self.experiments, self.runs = self.servers.setdefault(tracking_uri, ({}, {}))

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name):
        return self.experiments.setdefault(name, f"id of {name}")

    def search_runs(self, _experiments, filter_string):
        wanted = filter_string.split("'")[1]
        return [made["run"] for made in self.runs.values() if made["tags"]["introspect_ray_run"] == wanted]

    def create_run(self, _experiment, tags, run_name):
        made = types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run {len(self.runs)}"))
        self.runs[made.info.run_id] = {"run": made, "tags": tags, "name": run_name, "metrics": [], "params": {}}
        return made

    def log_param(self, run_id, name, value):
        self.runs[run_id]["params"][name] = value

    def log_batch(self, run_id, metrics):
        self.runs[run_id]["metrics"] += [(metric[0], metric[3], metric[1]) for metric in metrics]

    def set_terminated(self, run_id, status):
        self.runs[run_id]["status"] = status


@pytest.fixture
def mlflow(monkeypatch):
    fake = types.ModuleType("mlflow")
    fake.MlflowClient = FakeClient
    fake.entities = types.SimpleNamespace(Metric=lambda *values: values)
    fake.__spec__ = types.SimpleNamespace(name="mlflow")
    FakeClient.servers.clear()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return FakeClient.servers


def test_mlflow_goes_on_with_the_same_run(tmp_path, mlflow):
    run = run_of(tmp_path, logging__mlflow_uri="http://tracking")
    log(run, 0, LINES[:1])
    with pytest.raises(KeyboardInterrupt), Loggers(run, 2):
        raise KeyboardInterrupt
    (made,) = mlflow["http://tracking"][1].values()
    assert made["status"] == "FAILED"
    log(run, 2, LINES[1:])
    assert [value for name, _, value in made["metrics"] if name == "loss"] == [2.0, 1.0]
    assert ("validation/parse_rate", 4, 1.0) in made["metrics"]
    assert made["status"] == "FINISHED" and made["params"]["optimization.steps"] == "8"
    log(run_of(tmp_path, output=str(tmp_path / "other"), logging__mlflow_uri="http://tracking"), 0, LINES)
    assert len(mlflow["http://tracking"][1]) == 2, "another folder is another run"


@pytest.mark.usefixtures("mlflow")
def test_a_place_that_fails_is_left_out(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise ConnectionError("no server\nat all")

    monkeypatch.setattr(FakeClient, "log_batch", refuse)
    run = run_of(tmp_path, logging__mlflow_uri="http://tracking")
    with caplog.at_level(logging.WARNING):
        log(run, 0, LINES)
    assert [record.message for record in caplog.records] == [
        "MLflow is left out from here on, training goes on: no server"
    ]
    assert read_metrics(run.folder) == LINES
    assert len(scalars(events(tmp_path / "out" / "tensorboard"))) == 5
