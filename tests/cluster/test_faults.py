"""Processes are killed at random, actors and drivers, and the dataset is the one of an undisturbed run."""

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fake_task import fake_config, make_dataset

from introspect_ray.cli import as_yaml
from introspect_ray.data.dataset import canonical_dump, open_dataset

TESTS = Path(__file__).parents[1]
QUESTIONS = [f"question {number}" for number in range(1500)]
ACTORS_PER_DRIVER = (4, 4)
"""Actors killed under each driver before that driver is killed as well."""
START_LIMIT_S = 240
"""For a driver to have a working actor; seconds on an idle machine."""
DRIVER = """
import sys
from fake_task import FakeTask, signing_target
from introspect_ray.cli import run_job
from introspect_ray.config import GenerateConfig
from introspect_ray.data.generate import generate_dataset

def main(config):
    print(generate_dataset(config, lambda now: None, FakeTask(delay=float(sys.argv[1])), signing_target).line)

run_job(GenerateConfig, main, "", sys.argv[2:])
"""

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def config_of(folder):
    actors = {"min_size": 2, "initial_size": 2, "max_size": 2, "num_cpus": 0.5}
    return fake_config(folder, QUESTIONS, items_per_shard=15, actors=actors)


def start(folder, delay):
    """A driver on a cluster of its own that works on the dataset `folder/out`, each question taking `delay` seconds."""
    folder.mkdir(exist_ok=True)
    config = config_of(folder)
    (folder / "config.yaml").write_text(as_yaml(config))
    (folder / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": ""}
    command = [sys.executable, str(folder / "driver.py"), str(delay), "--config", str(folder / "config.yaml")]
    return config, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end(driver):
    """What the driver printed, once it has ended well."""
    output, _ = driver.communicate(timeout=2 * START_LIMIT_S)
    assert driver.returncode == 0, output
    return output


def living_actors(folder):
    """Processes of actors that hold a target and are still there."""
    found = []
    for path in (folder / "actors").glob("*"):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(path.name))
            # A process that is younger than the actor's signature has only its number.
            if process.create_time() <= path.stat().st_mtime and "ray::" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def kill_an_actor(folder, driver, rng):
    """Wait until an actor works, and a moment; then kill one."""
    deadline = time.monotonic() + START_LIMIT_S
    while not living_actors(folder):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "no actor started"
        time.sleep(0.02)
    time.sleep(rng.uniform(0.05, 0.8))
    if there := living_actors(folder):
        with suppress(psutil.NoSuchProcess):
            rng.choice(there).kill()
            return 1
    return 0


def finished_shards(folder):
    return len(list((folder / "out" / "shards").glob("shard-*")))


def wait_for_a_new_shard(folder, driver, seen):
    deadline = time.monotonic() + START_LIMIT_S
    while finished_shards(folder) <= seen:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "no shard was finished"
        time.sleep(0.02)


def test_actors_and_drivers_killed_at_random(tmp_path):
    folder = tmp_path / "disturbed"
    (tmp_path / "undisturbed").mkdir()
    undisturbed = config_of(tmp_path / "undisturbed")
    make_dataset(undisturbed)  # in this process: Ray decides nothing about what is in a dataset
    rng = random.Random(7)
    shards_seen, actors_killed, drivers_killed = [], 0, 0
    for wanted in ACTORS_PER_DRIVER:
        disturbed, driver = start(folder, delay=0.02)
        killed = 0
        while killed < wanted:
            killed += kill_an_actor(folder, driver, rng)
        actors_killed += killed
        wait_for_a_new_shard(folder, driver, shards_seen[-1] if shards_seen else 0)
        time.sleep(rng.uniform(0.0, 0.8))
        assert driver.poll() is None, "the work was done before all kills"
        driver.kill()
        driver.wait()
        drivers_killed += 1
        shards_seen.append(finished_shards(folder))
    disturbed, driver = start(folder, delay=0.02)
    kill_an_actor(folder, driver, rng)
    output = end(driver)
    assert actors_killed + drivers_killed >= 10
    assert 0 < shards_seen[0] < shards_seen[-1] < 100, f"kills came in the middle of the work: {shards_seen}"
    assert "of 100 shards in this run)" in output
    one, other = open_dataset(undisturbed.output), open_dataset(disturbed.output)
    assert one.manifest.num_records == 3000
    assert canonical_dump(other) == canonical_dump(one)
    assert other.manifest.counts == one.manifest.counts
    assert not [path for path in (folder / "out").rglob("*") if ".tmp-" in path.name or "attempts" in path.name]
