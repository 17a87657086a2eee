"""The same dataset comes out of one run, of two, of a killed and continued one, and of one that loses an actor."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from fake_task import FakeTask, crash, deadly_target, fake_config, fake_target, load_no_such_model

import introspect_ray.data.generate as generate_module
import introspect_ray.data.pool as pool_module
from introspect_ray.data.cluster import connect
from introspect_ray.data.dataset import canonical_dump, open_dataset
from introspect_ray.data.generate import generate_dataset
from introspect_ray.data.prepare import begin, prepare
from introspect_ray.errors import RunFailed, UserError

TESTS = Path(__file__).parents[1]
QUESTIONS = ["skip me", "raise 1", "nan 1", *(f"question {number}" for number in range(21))]
DRIVER = """
import sys
from fake_task import FakeTask, fake_target
from introspect_ray.cli import run_job
from introspect_ray.config import GenerateConfig
from introspect_ray.data.generate import generate_dataset

def main(config):
    show = lambda now: print("DONE", now.shards_done, flush=True)
    print(generate_dataset(config, show, FakeTask(delay=0.1), fake_target).line, flush=True)

run_job(GenerateConfig, main, "", sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch, connect_with_tests(patch):
        yield


@contextmanager
def connect_with_tests(patch):
    """A local cluster whose workers can import this folder's fakes."""
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    with connect():
        yield


def run(config, task=None):
    seen = []
    summary = generate_dataset(config, seen.append, task or FakeTask(), fake_target)
    return summary, seen


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cluster):  # noqa: ARG001
    folder = tmp_path_factory.mktemp("reference")
    config = fake_config(folder, QUESTIONS, actors={"max_size": 2, "initial_size": 2, "num_cpus": 0.5})
    summary, seen = run(config)
    return config, summary, seen


def test_one_run_is_complete_and_a_second_does_nothing(reference, monkeypatch):
    config, summary, seen = reference
    assert summary.shards_written == len(summary.manifest.shards) == 6
    assert [now.shards_done for now in seen] == list(range(7))
    assert (seen[-1].items_done, seen[-1].num_items) == (23, 23)
    assert seen[-1].records_written == summary.manifest.num_records
    monkeypatch.setattr(generate_module, "connect", None)
    again, seen_again = run(config)
    assert (again.shards_written, seen_again) == (0, [])
    assert again.manifest == summary.manifest
    assert "was already complete" in again.line


def test_two_runs_hold_the_same_records(reference, tmp_path):
    config = fake_config(tmp_path, QUESTIONS)
    run(config)
    assert canonical_dump(open_dataset(config.output)) == canonical_dump(open_dataset(reference[0].output))


def test_an_actor_that_dies_costs_nothing(reference, tmp_path):
    questions = [*QUESTIONS[:9], "kill 1", *QUESTIONS[9:]]
    marker = tmp_path / "killed"
    config = fake_config(tmp_path, questions)
    summary, _ = run(config, FakeTask(marker=str(marker)))
    assert marker.exists()
    assert summary.manifest.num_records == reference[1].manifest.num_records + 2
    texts = {record["text"] for record in open_dataset(config.output).records(None, selected=False)}
    assert set(questions) - texts == {"skip me", "raise 1", "nan 1"}


def test_an_item_that_always_kills_its_process_is_a_failed_record(tmp_path, cluster):  # noqa: ARG001
    config = fake_config(tmp_path, ["a", "b", "kill", "c", "d"], items_per_shard=2, max_error_share=0.2)
    summary, _ = run(config)
    records = open_dataset(config.output).records(None, selected=False)
    assert sorted(record["text"] for record in records if record["status"] == "ok") == sorted("aabbccdd")
    assert [record["detail"] for record in records if record["status"] == "process_died"] == [
        "2 processes ended while this item ran alone"
    ]
    assert summary.manifest.num_records == 9


def test_a_shard_that_is_out_of_attempts_fails_the_run_alone(tmp_path, cluster, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(pool_module, "RETRIES_PER_SHARD", 1)
    # The deadly one comes last, because an order that waits behind it at the same actor loses an attempt with it.
    config = fake_config(tmp_path, ["a", "b", "c", "kill"], items_per_shard=1)
    line = r"1 shards were not written, the first is shards/shard-00003.parquet \(its processes died\)"
    with pytest.raises(RunFailed, match=line):
        run(config)
    assert len(list((tmp_path / "out" / "shards").glob("shard-*"))) == 3


@pytest.mark.parametrize("shards", [2, 9])
def test_storage_that_refuses_a_write_is_the_users_error(tmp_path, cluster, shards):  # noqa: ARG001
    config = fake_config(tmp_path, QUESTIONS[-shards:], items_per_shard=1)
    prepared = prepare(config, FakeTask())
    begin(prepared, prepared.orders)
    (tmp_path / "out" / "shards").write_text("in the way")
    with pytest.raises(UserError, match=r"shards/shard-0000\d.parquet cannot be written: .*[Ee]xists"):
        run(config)


def test_a_defect_in_a_few_shards_is_said_and_the_others_are_kept(tmp_path, cluster):  # noqa: ARG001
    config = fake_config(tmp_path, ["raise 1", "raise 2", "a", "b", "c", "d"], items_per_shard=2)
    line = r"1 shards were not written, the first is shards/shard-00000.parquet \(RuntimeError: cannot do raise 1\)"
    with pytest.raises(RunFailed, match=line):
        run(config)
    assert len(list((tmp_path / "out" / "shards").glob("shard-*"))) == 2


def test_a_defect_in_every_shard_ends_the_run(tmp_path, cluster):  # noqa: ARG001
    config = fake_config(tmp_path, [f"raise {number}" for number in range(24)], items_per_shard=2)
    with pytest.raises(RunFailed, match=r"12 shards were not written, .* \(RuntimeError: cannot do raise \d+\)"):
        run(config)


def test_a_device_that_fails_costs_one_more_try_elsewhere(tmp_path, cluster):  # noqa: ARG001
    marker = tmp_path / "failed"
    config = fake_config(tmp_path, ["device", *QUESTIONS[3:12]])
    summary, _ = run(config, FakeTask(marker=str(marker)))
    assert marker.exists() and summary.manifest.num_records == 20
    assert set().union(*summary.manifest.counts.values()) == {"ok"}


def test_a_device_that_is_broken_is_named(tmp_path, cluster, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(pool_module, "RETRIES_PER_SHARD", 1)
    config = fake_config(tmp_path, ["a", "b", "device"], items_per_shard=1)
    with pytest.raises(RunFailed, match=r"1 shards .*\(RuntimeError: CUDA error: unspecified launch failure\)"):
        run(config)


def test_a_target_that_kills_its_process_fails_the_run(tmp_path, cluster):  # noqa: ARG001
    config = fake_config(tmp_path, QUESTIONS)
    with pytest.raises(RunFailed, match="3 processes ended while they loaded the target"):
        generate_dataset(config, lambda _: None, FakeTask(), deadly_target)


@pytest.mark.parametrize(
    ("load", "kind", "line"),
    [(load_no_such_model, UserError, "^model .* has no weights$"), (crash, RunFailed, "ZeroDivisionError: a defect")],
)
def test_what_an_actor_cannot_load_is_one_line(tmp_path, cluster, load, kind, line):  # noqa: ARG001
    config = fake_config(tmp_path, QUESTIONS)
    with pytest.raises(kind, match=line) as caught:
        generate_dataset(config, lambda _: None, FakeTask(), load)
    assert "\n" not in str(caught.value)


def test_actors_that_this_machine_cannot_hold(tmp_path, cluster):  # noqa: ARG001
    config = fake_config(tmp_path, QUESTIONS, actors={"num_gpus": 64})
    with pytest.raises(UserError, match=r"actors.num_gpus is 64, but this machine has \d+ GPUs"):
        run(config)


def test_waiting_for_room_is_said(tmp_path, cluster, monkeypatch, capfd):  # noqa: ARG001
    monkeypatch.setattr(pool_module, "NOTE_AFTER_S", 1)
    room = ray.cluster_resources()["CPU"]
    holder = ray.remote(num_cpus=room)(threading.Event).remote()
    ray.get(holder.is_set.remote())
    release = threading.Timer(4, ray.kill, (holder,))
    release.start()
    summary, _ = run(fake_config(tmp_path, QUESTIONS[-4:], actors={"num_cpus": 1}))
    assert summary.manifest.num_records == 8
    line = f"no actor has started yet: one needs 1 CPUs and 0 GPUs, the cluster has {room:g} CPUs (0 free)"
    assert capfd.readouterr().err.count(line) == 1


def test_killed_driver_continues_to_the_same_dataset(reference, tmp_path):
    config = fake_config(tmp_path, QUESTIONS)
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), "--config", str(tmp_path / "config.yaml")]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": ""}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in first.stdout:
        if line.startswith("DONE 2"):
            break
    else:
        pytest.fail(first.communicate()[1])
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(1)  # actors of the dead driver may still rename a file
    shards = tmp_path / "out" / "shards"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards.glob("shard-*.parquet")}
    assert 2 <= len(before) < 6
    with pytest.raises(UserError, match="it was not finished"):
        open_dataset(config.output)
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert second.returncode == 0, second.stderr
    assert f"({6 - len(before)} of 6 shards in this run)" in second.stdout.splitlines()[-1]
    assert second.stderr == "", "Ray stays quiet"
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards.glob("shard-*.parquet")}
    assert {name: after[name] for name in before} == before
    assert canonical_dump(open_dataset(config.output)) == canonical_dump(open_dataset(reference[0].output))
    assert not list((tmp_path / "out").rglob(".tmp-*"))
