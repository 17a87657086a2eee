"""FSDP2 on two CPU workers: equal to one process, and undisturbed by kills of workers and driver of Ray Train."""

import json
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
from s3_server import s3_server
from safetensors.torch import load
from training_helpers import train_config, write_dataset

from introspect_ray.cli import as_yaml
from introspect_ray.config import TrainConfig
from introspect_ray.data.cluster import connect
from introspect_ray.data.storage import Folder
from introspect_ray.training import notices
from introspect_ray.training.checkpoint import CheckpointStore
from introspect_ray.training.loop import fit
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.run import TrainingRun, prepare
from introspect_ray.training.train import train_explainer
from introspect_ray.training.workers import Workers

JOB = Path(__file__).parents[2] / "jobs" / "train_explainer.py"
START_LIMIT_S = 300
STEPS = 20
METHODS = ("full", "lora", "qlora")
BUCKET = "explainers"
WORKER_TITLE = "RayTrainWorker"
WORKER = """
import json, sys
import torch, torch.distributed as dist
from introspect_ray.training.loop import fit
from introspect_ray.training.run import TrainingRun
from introspect_ray.training.workers import Workers

rank, store, *runs = sys.argv[1:]
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
for run in runs:
    fit(TrainingRun.from_json(json.loads(run)), Workers(int(rank), 2))
dist.destroy_process_group()
"""
"""One of two workers of the same runs without Ray."""

pytestmark = pytest.mark.timeout(3 * START_LIMIT_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharded")
    write_dataset(made / "dataset", count=36, splits=("train", "train", "validation"))
    train_config(made)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Method -> a run that nothing has happened to. Ray has no part in it, and its two processes do all of them."""
    runs = {method: begun(config_of(folder, f"{method}-undisturbed", method)) for method in METHODS}
    orders = [json.dumps(run.to_json()) for run in runs.values()]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(folder / "store"), *orders]) for rank in range(2)
    ]
    assert [worker.wait(START_LIMIT_S) for worker in workers] == [0, 0]
    return runs


def begun(config: TrainConfig) -> TrainingRun:
    run = prepare(config)
    run.record({})
    return run


def config_of(folder: Path, name: str, method: str, **changes: object) -> TrainConfig:
    """Two sharded workers, whose numbers of micro-batches differ in most steps."""
    settings = {
        "output": str(folder / name),
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
        "evaluation__every": 10,  # all workers generate, as long as the slowest of them does
        "logging__tensorboard": False,
    }
    return train_config(folder, **{**settings, **changes})


def weights(run: TrainingRun) -> dict[str, torch.Tensor]:
    (name,) = (name for name in run.folder.names() if name.endswith("model.safetensors"))
    return load(run.folder.read(name)) | load(run.folder.read("projections.safetensors"))


def losses(run: TrainingRun) -> list[float]:
    lines = read_metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def check_equal(run: TrainingRun, undisturbed: TrainingRun) -> None:
    """Bit by bit."""
    expected, found = weights(undisturbed), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(run) == losses(undisturbed)
    scores = [[line.get("validation") for line in read_metrics(one.folder)] for one in (run, undisturbed)]
    assert scores[0] == scores[1] and sum(score is not None for score in scores[0]) == 2


class Killer(threading.Thread):
    """Kills a worker of this process's cluster once a checkpoint is there, and one of the next group at a later one."""

    def __init__(self, run: TrainingRun, after: tuple[int, ...]):
        super().__init__(daemon=True)
        self.checkpoints = CheckpointStore(run.checkpoints, run.run_key, 2)
        self.after = after
        self.killed: list[int] = []
        self.gone: set[int] = set()

    def run(self) -> None:
        for step in self.after:
            # Whom to kill is found out before it is time: the steps that are left may take less than looking.
            while not (workers := self._workers()):
                time.sleep(0.1)
            while self.checkpoints.newest(None) < step:
                time.sleep(0.02)
            self.killed.append(workers[0].pid)
            workers[0].send_signal(signal.SIGKILL)
            self.gone |= {process.pid for process in workers}

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


@pytest.mark.parametrize("method", METHODS)
def test_two_workers_equal_one(folder, undisturbed, method):
    """One process, its weights not sharded, in one micro-batch per step."""
    settings = {"num_workers": 1, "sharding": "none", "micro_batch_tokens": 4096}
    changes = {f"trainer__{name}": value for name, value in settings.items()}
    run = begun(config_of(folder, f"{method}-alone", method, **changes))
    fit(run, Workers(0, 1))
    assert losses(undisturbed[method]) == pytest.approx(losses(run), abs=1e-3)
    one, two = weights(run), weights(undisturbed[method])
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3


def test_killed_workers_leave_no_trace(folder, undisturbed, monkeypatch):
    """Nor does it matter that checkpoints, metrics and the explainer are in a bucket."""
    told: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", told.append)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with s3_server(BUCKET), connect():
        config = config_of(folder, "", "qlora", output=f"s3://{BUCKET}/killed")
        run = begun(config)
        killer = Killer(run, after=(4, 12))
        killer.start()
        train_explainer(config, lambda *_: None)
        assert len(set(killer.killed)) == 2
        resumed = [line for line in told if line.startswith("goes on from the checkpoint of step")]
        assert len(resumed) == 2 and all(line.endswith("with 2 worker(s)") for line in resumed)
        check_equal(run, undisturbed["qlora"])
        assert not {"checkpoints", "ray_train"} & set(Folder(config.output).names())


def test_killed_driver_goes_on_to_the_same_weights(folder, undisturbed):
    config = config_of(folder, "driver-killed", "full")
    run = prepare(config)
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
    assert not run.is_complete()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=2 * START_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "goes on from the checkpoint of step" in done.stderr
    check_equal(run, undisturbed["full"])


@pytest.mark.slow
def test_ctrl_c_is_one_line(folder):
    """In a driver of its own, which may hear of Ctrl-C: what a shell starts in the background does not."""
    config = config_of(folder, "interrupted", "full", optimization__steps=400)
    (folder / "interrupted.yaml").write_text(as_yaml(config))
    started = "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); del sys.argv[0]; "
    started += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", started, str(JOB), "--config", str(folder / "interrupted.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + START_LIMIT_S
    while not list((folder / "interrupted" / "checkpoints").glob("step_*/state.json")):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.01)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=START_LIMIT_S)[1]
    assert driver.returncode == 130 and said.rstrip().endswith("interrupted; the same command continues"), said
