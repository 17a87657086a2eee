"""A node that is about to be taken away says so, and Ray places nothing on it any more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import ray

from introspect_ray.config import LeaveConfig
from introspect_ray.data.cluster import ADDRESS_VARIABLE, connect, is_elsewhere
from introspect_ray.errors import RunFailed, UserError


def leave(config: LeaveConfig) -> str:
    """Drain a node; one line about it. What runs there may finish until the deadline.

    Raises UserError if RAY_ADDRESS names no cluster, RunFailed if Ray refuses.
    """
    if not is_elsewhere():
        raise UserError(f"{ADDRESS_VARIABLE} names no cluster that this node could leave")
    with connect():
        here = ray.get_runtime_context()
        node, address = config.node_id or here.get_node_id(), here.gcs_address
    command = shutil.which("ray") or str(Path(sys.executable).with_name("ray"))
    deadline = ["--deadline-remaining-seconds", str(config.deadline_s)]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", config.reason]
    done = subprocess.run(
        [command, "drain-node", "--address", address, "--node-id", node, *deadline, *why],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise RunFailed(f"node {node[:6]} was not let go: {lines[-1]}")
    return f"node {node[:6]} takes no more work, and has {config.deadline_s} s left for what it has"
