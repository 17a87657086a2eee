"""What a running cluster offers, and what would stop each job on it.

driver   nodes -> one task per node (`data/probe.py`), one after the other for what would disturb each other
         -> Findings -> `verdicts` (cluster_verdicts.py): for each job the reasons why it cannot run

Tasks reserve nothing, so that a cluster that is at work can be checked as well.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from introspect_ray.config import CheckConfig, CheckedJob
from introspect_ray.data import probe
from introspect_ray.data.cluster import connect
from introspect_ray.data.probe import NodeFacts
from introspect_ray.training.cluster_verdicts import Findings, Node, Transfer, needs, report, room, verdicts

POLL_S = 2.0


def check_cluster(config: CheckConfig, say: Callable[[str], None]) -> dict[CheckedJob, list[str]]:
    """Look at the cluster that this process can join; `say` line by line what was found; returns the verdicts."""
    with connect(), _scaled_up(config, say):
        findings = _look(config)
    for line in report(findings):
        say(line)
    found = verdicts(config, findings)
    say("jobs")
    for job, reasons in found.items():
        say(f"  {'ok  ' if not reasons else 'STOP'} {job}{'' if job in config.jobs else ' (not asked for)'}")
        for reason in reasons:
            say(f"         {reason}")
    return found


@contextmanager
def _scaled_up(config: CheckConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Where asked for, the autoscaler brings what the largest of the jobs needs, and keeps it for the block."""
    if not (config.scale_up_s and config.jobs):
        yield
        return
    wanted = [need for job, need in needs(config).items() if job in config.jobs]
    largest = max(wanted, key=lambda need: (need.processes * need.gpus, need.processes * need.cpus))
    bundle = {kind: each for kind, each in (("CPU", largest.cpus), ("GPU", largest.gpus)) if each}
    request_resources(bundles=[bundle] * largest.processes)
    try:
        deadline = time.monotonic() + config.scale_up_s
        plain = largest._replace(gpu_memory_gib=0.0)  # nobody has asked the nodes yet
        while (there := room(plain, _alive_nodes())) < largest.processes and time.monotonic() < deadline:
            time.sleep(POLL_S)
        say(f"asked the autoscaler for {largest.processes} x {bundle}: room for {there}")
        yield
    finally:
        request_resources(bundles=[])


def _look(config: CheckConfig) -> Findings:
    described = _raw_nodes()
    on_each = _Tasks(list(described), config.timeout_s)
    facts = on_each.run(probe.probe)
    nodes = tuple(
        _node(
            raw,
            facts[identity] if isinstance(facts[identity], NodeFacts) else None,
            facts[identity] if isinstance(facts[identity], str) else "",
        )
        for identity, raw in described.items()
    )
    names = {identity: node.name for identity, node in zip(described, nodes, strict=True)}
    answering = [identity for identity in described if not isinstance(facts[identity], str)]
    on_each = _Tasks(answering, config.timeout_s)
    places = {url: _storage_problem(on_each, url, names) for url in config.storage}
    for path in config.models:
        places[path] = _first_problem(on_each.run(probe.open_model, path), names)
    transfers = _transfers(answering, names, config) if config.transfer_mb else ()
    return Findings(nodes, transfers, places)


def _raw_nodes() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _alive_nodes() -> list[Node]:
    return [_node(raw) for raw in _raw_nodes().values()]


def _node(raw: Mapping[str, Any], facts: NodeFacts | None = None, problem: str = "") -> Node:
    return Node(
        name=f"{raw['NodeManagerAddress']} {raw['NodeID'][:6]}",
        is_head="node:__internal_head__" in raw["Resources"],
        cpus=raw["Resources"].get("CPU", 0.0),
        gpus=raw["Resources"].get("GPU", 0.0),
        facts=facts,
        problem=problem,
    )


class _Tasks:
    """Runs functions on nodes, without reserving anything there."""

    def __init__(self, identities: Sequence[str], timeout_s: float):
        self.identities = identities
        self.timeout_s = timeout_s

    def run(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """What the function returns on each node; a text of one line where it fails or takes too long."""
        started = {identity: start(function, identity, *arguments) for identity in self.identities}
        deadline = time.monotonic() + self.timeout_s
        return {identity: self._result(task, deadline) for identity, task in started.items()}

    def _result(self, task: Any, deadline: float) -> Any:
        try:
            return ray.get(task, timeout=max(0.1, deadline - time.monotonic()))
        except TimeoutError:  # ray.exceptions.GetTimeoutError is one
            ray.cancel(task, force=True)
            return f"no answer within {self.timeout_s:g} s"
        except Exception as error:  # whatever the node's own Python raises, a missing package for one
            return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def start(function: Callable[..., Any], identity: str, *arguments: Any) -> Any:
    """The function as a task on one node."""
    where = NodeAffinitySchedulingStrategy(node_id=identity, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=where).remote(*arguments)


def _storage_problem(on_each: _Tasks, url: str, names: Mapping[str, str]) -> str:
    """Every node must see what this process wrote, and this process what every node wrote."""
    run = uuid.uuid4().hex[:8]
    try:
        probe.mark(url, run, "driver")
    except Exception as error:  # also what a file system raises for a URL that it cannot make sense of
        return str(error)
    problem = _first_problem(on_each.run(_see_and_mark, url, run), names)
    for who in on_each.identities if not problem else ():
        problem = problem or probe.see_mark(url, run, who)
    for who in ("driver", *on_each.identities):
        try:
            probe.remove_mark(url, run, who)
        except Exception as error:
            problem = problem or str(error)
    return problem


def _see_and_mark(url: str, run: str) -> str:
    problem = probe.see_mark(url, run, "driver")
    if not problem:
        probe.mark(url, run, ray.get_runtime_context().get_node_id())
    return problem


def _first_problem(found: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return next((f"on node {names[identity]}: {problem}" for identity, problem in found.items() if problem), "")


def _transfers(identities: Sequence[str], names: Mapping[str, str], config: CheckConfig) -> tuple[Transfer, ...]:
    """What one node made, the next one fetches, pair after pair; nothing with a single node."""
    found = []
    for source, destination in zip(identities, [*identities[1:], *identities[:1]], strict=True):
        if source == destination:
            continue
        try:
            thing = start(_make, source, config.transfer_mb)
            ray.wait([thing], timeout=config.timeout_s, fetch_local=False)
            seconds = ray.get(start(_fetch, destination, [thing]), timeout=config.timeout_s)
        except (RayError, TimeoutError):
            seconds = float("inf")  # 0 MB/s
        found.append(Transfer(names[source], names[destination], config.transfer_mb / seconds))
    return tuple(found)


def _make(megabytes: int) -> np.ndarray:
    return np.ones(megabytes * 10**6, np.uint8)


def _fetch(thing: list[Any]) -> float:
    """Seconds until the object in the list is here; a list, because Ray would fetch an argument before the call."""
    began = time.monotonic()
    ray.get(thing[0])
    return time.monotonic() - began
