"""Ray Train end to end on the local CPU: two workers equal one, which goes on alone. More kills are in
test_training_sharded.py."""

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from training_helpers import train_config, write_dataset

from introspect_ray.config import TrainConfig
from introspect_ray.data.cluster import connect
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.training import notices
from introspect_ray.training.loop import fit
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.run import prepare
from introspect_ray.training.train import train_explainer
from introspect_ray.training.workers import Workers

CPUS = len(os.sched_getaffinity(0))
"""Of the one node that there is at first."""
START_LIMIT_S = 300
"""A run takes seconds to start on an idle machine, and minutes on one that others use as well."""
# Two workers sum a batch in another order; over the steps of these runs the difference stays at this size.
SAME = {"rtol": 0, "atol": 1e-5}

pytestmark = [pytest.mark.timeout(2 * START_LIMIT_S), pytest.mark.alone]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset, a starting model, and the explainer of an undisturbed run of one worker in `one`."""
    made = tmp_path_factory.mktemp("training")
    train_config(made)
    return made


def config_of(folder: Path, output: str, **changes: object) -> TrainConfig:
    settings = {"optimization__steps": 40, "optimization__learning_rate": 1e-3, "trainer__checkpoint_every": 5}
    return train_config(folder, output=str(folder / output), **{**settings, **changes})


@pytest.fixture(scope="module")
def second_node():
    """A cluster of two nodes, which takes a lost one for lost after seconds.

    The node is there before any run: Ray Train sizes its groups by a view of the cluster up to 20 s old.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_health_check_period_ms", "1000")
        with connect():
            node = Node()
            try:
                yield node
            finally:
                node.die()


@pytest.fixture(scope="module")
def one_worker(folder, second_node):
    """Summary and progress calls of the undisturbed run."""
    assert second_node.is_alive()
    seen = []
    return train_explainer(config_of(folder, "one"), lambda *progress: seen.append(progress)), seen


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_one_worker_trains_and_is_not_trained_again(one_worker, folder):
    summary, seen = one_worker
    assert not summary.was_complete
    assert summary.line == f"wrote {folder / 'one'}: explainer after 40 steps on 24 examples, " + (
        f"loss {summary.results['loss']:.4f} nats per token"
    )
    done, steps, note = seen[-1]
    assert (done, steps) == (40, 40)
    assert re.fullmatch(rf"loss {summary.results['loss']:.3f}, [\d,]+ tokens/s", note)
    assert not (folder / "one" / "ray_train").exists()
    assert not (folder / "one" / "checkpoints").exists()
    before = (folder / "one" / "model.safetensors").stat().st_mtime_ns
    again = train_explainer(config_of(folder, "one", trainer__num_workers=2), lambda *_: None)
    assert again.was_complete
    assert again.results == summary.results
    assert (folder / "one" / "model.safetensors").stat().st_mtime_ns == before


class Node:
    """One more node of this process's cluster, which has room for one worker more."""

    def __init__(self) -> None:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
        command += [f"--num-cpus={CPUS}", f"--object-store-memory={10**8}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_LIMIT_S
        while ray.cluster_resources().get("CPU", 0) < 2 * CPUS:
            assert time.monotonic() < deadline and self.is_alive(), "the node did not join"
            time.sleep(0.1)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def die(self) -> None:
        """At once, with all that runs there; a second time nothing happens."""
        if not self.is_alive():
            return
        there = psutil.Process(self._process.pid)
        for process in [there, *there.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


@pytest.mark.usefixtures("one_worker")
def test_two_workers_equal_one_and_one_goes_on_when_the_other_and_its_node_are_lost(folder, second_node, monkeypatch):
    """They share evaluations and stop alike: patience runs out on a model that never answers in the right form, so the
    first evaluation stays the best."""
    told: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", told.append)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    write_dataset(folder / "held out", count=36, splits=("train", "train", "validation"))
    settings = {"datasets": [str(folder / "held out")], "evaluation__every": 3, "evaluation__patience": 15}
    settings["optimization__steps"] = 60  # enough that the node is lost long before the end
    run = prepare(config_of(folder, "alone", **settings))
    run.record({})
    one = fit(run, Workers(0, 1))
    sizes = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": CPUS}
    config = config_of(folder, "two", **settings, **{f"trainer__{name}": value for name, value in sizes.items()})

    def lose() -> None:
        while not (folder / "two" / "checkpoints" / "step_000005" / "state.json").exists():
            time.sleep(0.01)
        second_node.die()

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    summary = train_explainer(config, lambda *_: None)
    thread.join(1)
    assert not thread.is_alive()
    (resumed,) = (line for line in told if line.startswith("goes on from the checkpoint of step"))
    assert resumed.endswith("with 1 worker(s)")
    two = summary.results
    assert (one["step"], one["exported_step"], one["stopped_early"]) == (48, 3, True)
    assert [two[name] for name in ("step", "exported_step", "best")] == [48, 3, one["best"]]
    assert "stopped early; its weights are of step 3, the best evaluation: exact_match 0.00" in summary.line
    lines = [read_metrics(Folder(str(folder / name))) for name in ("alone", "two")]
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], abs=1e-5)
    first, second = weights(folder / "alone"), weights(folder / "two")
    start = load_file(folder / "base" / "model.safetensors")
    assert max((first[name] - start[name]).abs().max() for name in first) > 1e-3
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, **SAME)


@pytest.mark.usefixtures("second_node")
def test_failures_that_repeat_end_the_run_with_their_line(folder):
    with pytest.raises(UserError, match=r"trainer.num_workers 900 x trainer.cpus_per_worker 1 needs 900 CPUs"):
        train_explainer(config_of(folder, "many", trainer__num_workers=900), lambda *_: None)
    with pytest.raises(RunFailed, match=r"step \d+: loss is .* expected finite numbers"):
        train_explainer(config_of(folder, "wild", optimization__learning_rate=1e30), lambda *_: None)
