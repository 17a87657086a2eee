"""Nodes that come and go while a job runs, said in one line each: what ran on a lost node runs again elsewhere.

Ray tells it only in logs that jobs keep quiet, and a job that goes on after a loss should say why it took longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from introspect_ray.data.watching import watching

POLL_S = 1.0
_IDLE = 4
"""Ray's number for the reason "the autoscaler had no use for it" (NodeDeathInfo.Reason of its gcs.proto)."""

Nodes = Mapping[str, Mapping[str, Any]]
"""What `ray.nodes()` says of each node, by its id."""


def changes(before: Nodes, now: Nodes) -> list[str]:
    """A line for each node that has joined or gone.

    Ray forgets what a dead node offered, so that is taken from `before`.
    """
    lines = []
    for identity, node in now.items():
        was_alive = identity in before and before[identity]["Alive"]
        if node["Alive"] and not was_alive:
            lines.append(f"node {describe(node)} has joined")
        elif was_alive and not node["Alive"]:
            name = describe(before[identity])
            if node["DeathReason"] == _IDLE:
                lines.append(f"node {name} has left: it was idle")
            else:
                reason = " ".join(node["DeathReasonMessage"].split()) or "no reason given"
                lines.append(f"node {name} is lost ({reason}); what ran there is tried again")
    return lines


def describe(node: Mapping[str, Any]) -> str:
    """Address, first digits of the id, and what the node offers."""
    offers = [f"{node['Resources'][kind]:g} {kind}s" for kind in ("CPU", "GPU") if node["Resources"].get(kind)]
    return f"{node['NodeManagerAddress']} {node['NodeID'][:6]} ({', '.join(offers) or 'no CPUs'})"


@contextmanager
def watched_nodes(tell: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, a thread tells of nodes of the connected cluster that come and go."""
    before = _nodes()

    def look() -> bool:
        nonlocal before
        try:
            now = _nodes()
        except (RayError, RuntimeError, ConnectionError):  # the head is gone; whoever waits for it is told so
            return False
        for line in changes(before, now):
            tell(line)
        before = now
        return True

    with watching(look, POLL_S, "nodes"):
        yield


def _nodes() -> Nodes:
    return {node["NodeID"]: node for node in ray.nodes()}
