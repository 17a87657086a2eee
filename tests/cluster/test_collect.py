"""Exemplars are the same after a driver and an actor were killed, and for any shards and number of actors."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from collect_helpers import collect_config, collect_here, content, load_once_deadly

from introspect_ray.cli import as_yaml
from introspect_ray.data.cluster import connect
from introspect_ray.data.collect import collect_exemplars
from introspect_ray.data.scanning import Scanner
from introspect_ray.features.exemplar_store import open_exemplars
from introspect_ray.pocket.sources import rows

TESTS = Path(__file__).parents[1]
START_LIMIT_S = 200
CODERS = ["pocket:sae", "pocket:transcoder"]
DRIVER = """
import sys
from collect_helpers import load_slow
from introspect_ray.cli import run_job
from introspect_ray.config import CollectConfig
from introspect_ray.data.collect import collect_exemplars

def main(config):
    print(collect_exemplars(config, lambda *_: None, load_slow).line)

run_job(CollectConfig, main, "", sys.argv[1:])
"""


def killed_driver(config, folder):
    """Start a driver on a cluster of its own, and kill it once it has scanned a shard; how many it had."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "config.yaml").write_text(as_yaml(config))
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    driver = subprocess.Popen(
        [sys.executable, str(folder / "driver.py"), "--config", str(folder / "config.yaml")],
        env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    shards = Path(config.output) / "work" / "shards"
    deadline = time.monotonic() + START_LIMIT_S
    while not list(shards.glob("shard-*.json")):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "no shard was scanned"
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    return len(list(shards.glob("shard-*.json")))


def test_kills_shards_and_actors_change_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    texts = [row["text"] for row in rows("text")[:320]]
    actors = {"min_size": 2, "initial_size": 2, "max_size": 2, "num_cpus": 0.5}
    config = collect_config(tmp_path, texts, coders=CODERS, actors=actors)
    there = killed_driver(config, tmp_path)
    assert 0 < there < 10, "the driver was killed in the middle of the work"
    seen = []
    with connect():
        summary = collect_exemplars(config, lambda *now: seen.append(now), load_once_deadly)
    assert (tmp_path / "killed").exists()
    assert seen[0][:3] == ("scan", there, 10) and seen[-1][:3] == ("merge", 5, 5)
    assert not summary.was_complete and not (tmp_path / "out" / "work").exists()
    other = collect_config(tmp_path / "other", texts, coders=CODERS, texts_per_shard=72, latents_per_block=1000)
    for name, expected in collect_here(other, Scanner.load(other)).items():
        found = open_exemplars(f"{config.output}/{name}")
        assert content(found) == content(expected)
        assert (found.meta.num_tokens, found.meta.num_live) == (expected.meta.num_tokens, expected.meta.num_live)
    monkeypatch.setattr("introspect_ray.data.collect.connect", None)
    again = collect_exemplars(config, lambda *now: pytest.fail(str(now)))
    assert again.was_complete and "was already complete" in again.line
