"""FSDP2 through Ray Train on two CPU workers: equal to one process, and undisturbed by kills of workers and driver."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import train_config, write_dataset

from introspect_ray.cli import as_yaml
from introspect_ray.config import TrainConfig
from introspect_ray.data.cluster import connect
from introspect_ray.training import notices
from introspect_ray.training.loop import fit
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.run import prepare
from introspect_ray.training.train import train_explainer
from introspect_ray.training.workers import Workers

JOB = Path(__file__).parents[2] / "jobs" / "train_explainer.py"
START_LIMIT_S = 300
STEPS = 32
WORKER_TITLE = "RayTrainWorker"

pytestmark = pytest.mark.timeout(3 * START_LIMIT_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharded")
    write_dataset(made / "dataset", count=36, splits=("train", "train", "validation"))
    train_config(made)
    with connect():
        yield made


def config_of(folder: Path, output: str, method: str, **changes: object) -> TrainConfig:
    """Two sharded workers, whose numbers of micro-batches differ in most steps."""
    settings = {
        "method": method,
        "lora__rank": 4,
        "lora__dropout": 0.0,
        "explainer__projection": "linear",
        "optimization__steps": STEPS,
        "optimization__batch_size": 5,
        "optimization__learning_rate": 1e-3,
        "trainer__num_workers": 2,
        "trainer__sharding": "fsdp2",
        "trainer__checkpoint_every": 4,
        "trainer__log_every": 1,
        "trainer__micro_batch_tokens": 128,
        "evaluation__every": 16,  # all workers generate, as long as the slowest of them does
    }
    return train_config(folder, output=str(folder / output), **{**settings, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file) | load_file(folder / "projections.safetensors")


def losses(config: TrainConfig) -> list[float]:
    lines = read_metrics(prepare(config).folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


class Killer(threading.Thread):
    """Kills a worker of this process's cluster once a checkpoint is there, and one of the next group at a later one."""

    def __init__(self, config: TrainConfig, after: tuple[int, ...]):
        super().__init__(daemon=True)
        self.checkpoints = Path(config.output) / "checkpoints"
        self.after = after
        self.killed: list[int] = []
        self.gone: set[int] = set()

    def run(self) -> None:
        for step in self.after:
            # Whom to kill is found out before it is time: the steps that are left may take less than looking.
            while not (workers := self._workers()):
                time.sleep(0.1)
            while not any(self._step(path) >= step for path in self.checkpoints.glob("step_*/state.json")):
                time.sleep(0.01)
            self.killed.append(workers[0].pid)
            workers[0].send_signal(signal.SIGKILL)
            self.gone |= {process.pid for process in workers}

    def _step(self, path: Path) -> int:
        return int(path.parent.name.removeprefix("step_"))

    def _workers(self) -> list[psutil.Process]:
        """The two processes of a group that was not killed yet, or none; after a kill in the other order of age."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] and WORKER_TITLE in process.cmdline()[0]:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        found = [process for process in found if process.pid not in self.gone]
        ordered = sorted(found, key=lambda process: process.create_time(), reverse=bool(self.killed))
        return ordered if len(ordered) == 2 else []


@pytest.mark.parametrize("method", ["full", "qlora"])  # LoRA alone is what the killed driver trains
def test_killed_workers_leave_no_trace_and_two_equal_one(folder, monkeypatch, method):
    told: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", told.append)
    undisturbed = config_of(folder, f"{method}-undisturbed", method)
    train_explainer(undisturbed, lambda *_: None)
    config = config_of(folder, f"{method}-killed", method)
    killer = Killer(config, after=(4, 12))
    killer.start()
    train_explainer(config, lambda *_: None)
    assert len(set(killer.killed)) == 2
    resumed = [line for line in told if line.startswith("goes on from the checkpoint of step")]
    assert len(resumed) == 2 and all(line.endswith("with 2 worker(s)") for line in resumed)
    expected, found = weights(folder / f"{method}-undisturbed"), weights(folder / f"{method}-killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(config) == losses(undisturbed)
    scores = [line["validation"] for line in read_metrics(prepare(config).folder) if "validation" in line]
    assert len(scores) == 2
    # One process, its weights not sharded, in one micro-batch per step.
    alone = config_of(
        folder,
        f"{method}-alone",
        method,
        trainer__num_workers=1,
        trainer__sharding="none",
        trainer__micro_batch_tokens=4096,
    )
    run = prepare(alone)
    run.record({})
    fit(run, Workers(0, 1))
    assert losses(config) == pytest.approx(losses(alone), abs=1e-3)
    one = weights(folder / f"{method}-alone")
    assert max((one[name] - expected[name]).abs().max() for name in one) < 1e-3


@pytest.mark.timeout(4 * START_LIMIT_S)
def test_killed_driver_goes_on_to_the_same_weights(folder):
    train_explainer(config_of(folder, "driver-undisturbed", "lora"), lambda *_: None)
    config = config_of(folder, "driver-killed", "lora")
    (folder / "killed.yaml").write_text(as_yaml(config))
    command = [sys.executable, str(JOB), "--config", str(folder / "killed.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_LIMIT_S
    checkpoints = folder / "driver-killed" / "checkpoints"
    while not list(checkpoints.glob("step_*/state.json")) and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert list(checkpoints.glob("step_*/state.json"))
    assert not prepare(config).is_complete()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=2 * START_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "goes on from the checkpoint of step" in done.stderr
    expected, found = weights(folder / "driver-undisturbed"), weights(folder / "driver-killed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(losses(config)) == STEPS
