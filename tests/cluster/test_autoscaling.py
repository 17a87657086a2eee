"""On a cluster that grows and shrinks: no workers at first, some while there is work, none afterwards.

One of them is lost midway, with all that ran on it.

Nodes are processes of this machine, by Ray's fake node provider. It is reached as an external provider, because the
ready-made cluster of Ray's own tests lacks a file in the released package and stops every Ray of the machine.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from fake_task import FakeTask, fake_config, fake_target
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from introspect_ray.data.dataset import canonical_dump, open_dataset
from introspect_ray.data.generate import generate_dataset

TESTS = Path(__file__).parents[1]
QUESTIONS = [f"question {number}" for number in range(60)]
MAX_WORKERS = 2
HEAD_TYPE = "ray.head.default"
"""The provider knows its head by this name alone."""
START_LIMIT_S, END_LIMIT_S = 180, 180

pytestmark = [pytest.mark.timeout(600), pytest.mark.alone]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def autoscaling_config(address):
    """A head without processors for actors, and workers with one each."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    worker = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "min_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": MAX_WORKERS,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": provider,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {**worker, "max_workers": MAX_WORKERS},
        },
        "head_node_type": HEAD_TYPE,
        "auth": {},
        **{f"{part}_commands": [] for part in ("setup", "initialization", "head_setup", "worker_setup")},
        **{f"{part}_start_ray_commands": [] for part in ("head", "worker")},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
    }


@pytest.fixture
def growing_cluster(tmp_path, monkeypatch):
    """RAY_ADDRESS names a cluster of one head, which starts and stops workers."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    (tmp_path / "autoscaling.json").write_text(json.dumps(autoscaling_config(address)))
    folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    command = [str(folder / "ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"]
    command += ["--num-cpus=0", "--include-dashboard=false", "--object-store-memory=200000000"]
    command += [f"--autoscaling-config={tmp_path / 'autoscaling.json'}"]
    log = (tmp_path / "ray.log").open("w")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "ray.log").read_text()
            time.sleep(0.1)
        yield
    finally:
        ray.shutdown()
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        log.close()


def num_workers():
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def kill_a_worker():
    """End one worker node as a machine ends: without a word."""
    sockets = [node["RayletSocketName"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    for process in psutil.process_iter(["cmdline"]):
        if f"--raylet_socket_name={sockets[0]}" in (process.info["cmdline"] or []):
            for part in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    part.kill()
            return
    raise AssertionError("no worker to kill")


def test_workers_come_with_the_work_and_go_with_it(growing_cluster, tmp_path):  # noqa: ARG001
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    seen = [num_workers()]
    stop = threading.Event()

    def watch():
        while not stop.wait(0.5):
            seen.append(num_workers())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    config = fake_config(tmp_path, QUESTIONS, items_per_shard=2, actors={"max_size": MAX_WORKERS})
    killed = []

    def lose_a_node(now):
        if now.shards_done >= 8 and not killed:
            killed.append(num_workers())
            kill_a_worker()

    summary = generate_dataset(config, lose_a_node, FakeTask(delay=0.5), fake_target)
    assert killed
    deadline = time.monotonic() + END_LIMIT_S
    while num_workers() and time.monotonic() < deadline:
        time.sleep(0.5)
    stop.set()
    watcher.join()
    assert (seen[0], max(seen), num_workers()) == (0, MAX_WORKERS, 0), seen
    assert summary.shards_written == 30
    records = open_dataset(config.output).records(None, selected=False)
    assert sorted({record["text"] for record in records}) == sorted(QUESTIONS)
    assert len(records) == 2 * len(QUESTIONS) and canonical_dump(open_dataset(config.output))
