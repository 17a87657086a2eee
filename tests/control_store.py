"""The store of k8s/components/redis as a process of this machine, started by the manifest's command."""

import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from manifests import K8S, Document
from node_processes import free_port

START_LIMIT_S = 60


def store_container() -> Document:
    documents = yaml.safe_load_all((K8S / "components" / "redis" / "redis.yaml").read_text())
    (pod,) = [one["spec"]["template"]["spec"] for one in documents if one["kind"] == "StatefulSet"]
    return pod["containers"][0]


@contextmanager
def control_store(folder: Path, password: str = "") -> Iterator[tuple[int, str]]:
    """Port and password, while it runs; the readiness probe, a connection, has succeeded. Data in `folder`."""
    port, password = free_port(), password or secrets.token_hex(16)
    here = {"$(REDIS_PASSWORD)": password, "/data": str(folder)}
    command = [here.get(word, word) for word in store_container()["command"]]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < deadline, "redis does not start"
            time.sleep(0.1)
        yield port, password
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False
