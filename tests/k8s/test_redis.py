"""k8s/components/redis: its command starts a store that wants the password and keeps what it is told."""

import shutil
import socket

import pytest
from control_store import control_store, store_container

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server on PATH")


def say(port, *commands):
    """What the store answers to each line."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, connection.makefile("rwb") as stream:
        answers = []
        for command in commands:
            stream.write(f"{command}\r\n".encode())
            stream.flush()
            answers.append(stream.readline().decode().strip())
        return answers


def test_the_store_wants_its_password_and_outlives_its_process(tmp_path):
    probes = {name: value for name, value in store_container().items() if name.endswith("Probe")}
    assert all(probe["tcpSocket"] == {"port": "redis"} for probe in probes.values()) and len(probes) == 2
    with control_store(tmp_path) as (port, password):
        assert say(port, "PING")[0].startswith("-NOAUTH")
        assert say(port, "AUTH wrong")[0].startswith("-WRONGPASS")
        assert say(port, f"AUTH {password}", "INCR nodes", "INCR nodes") == ["+OK", ":1", ":2"]
    with control_store(tmp_path, password) as (port, _):
        assert say(port, f"AUTH {password}", "INCR nodes") == ["+OK", ":3"]
