"""Starting and joining Ray: what is dead is said so in time, and a local cluster needs no writable home."""

import os
import socket
import subprocess
import sys

import pytest

from introspect_ray.data import cluster
from introspect_ray.data.cluster import check_address, quiet_stderr, tell
from introspect_ray.errors import UserError


def test_an_address_where_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(UserError, match=f"^RAY_ADDRESS is {address}, where no Ray cluster answers: .*refused"):
            check_address(address)


def test_an_address_where_something_else_listens(monkeypatch):
    monkeypatch.setattr(cluster, "_PROBE_TIMEOUT_S", 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            UserError, match=f"^RAY_ADDRESS is {address}, where something listens that is no Ray cluster"
        ):
            check_address(address)


@pytest.mark.parametrize("address", ["somewhere", "host:", ":", "host:port"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match=f"RAY_ADDRESS is {address}, expected HOST:PORT"):
        check_address(address)


def test_quiet_stderr_gives_the_terminal_back_after_an_error(capfd):
    with pytest.raises(ZeroDivisionError), quiet_stderr():
        os.write(2, b"noise")
        raise ZeroDivisionError
    os.write(2, b"voice")
    assert capfd.readouterr().err == "voice"


def test_lines_are_told_where_standard_error_is_quiet(capfd):
    with quiet_stderr():
        os.write(2, b"noise")
        tell("news")
    tell("more")
    assert capfd.readouterr().err == "news\nmore\n"


def test_a_local_cluster_starts_quietly_without_a_writable_home():
    script = (
        "import ray; from introspect_ray.data.cluster import connect\n"
        "with connect(), connect(): print(ray.get(ray.remote(lambda: 'worked').remote()))\n"
        "print(ray.is_initialized())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "HOME": "/proc/no-home"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("worked\nFalse\n", "")
