"""What a running cluster offers, and what would stop each job on it.

driver   nodes -> one task per node (`data/probe.py`), one after the other for what would disturb each other
         -> facts -> `verdicts`: for each job the reasons why it cannot run; pure, so that tests need no cluster

Tasks reserve nothing, so that a cluster that is at work can be checked as well.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import numpy as np
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from introspect_ray.config import CheckConfig, CheckedJob, KnownModel, PlanConfig
from introspect_ray.data import probe
from introspect_ray.data.cluster import connect
from introspect_ray.data.probe import NodeFacts
from introspect_ray.presets import preset
from introspect_ray.training.hardware import GPUS

MEMORY_TOLERANCE = 0.97
"""Share of a GPU's nominal memory that drivers have left of it at least."""
POLL_S = 2.0


@dataclass(frozen=True)
class Node:
    """One living node: what Ray schedules on it, and what it said about itself."""

    name: str
    is_head: bool
    cpus: float
    gpus: float
    facts: NodeFacts | None = None
    """None if it did not answer; `problem` says why."""
    problem: str = ""


class Transfer(NamedTuple):
    """One object fetched from a node to another."""

    source: str
    destination: str
    mb_per_s: float


@dataclass(frozen=True)
class Findings:
    """All that was found out."""

    nodes: tuple[Node, ...]
    transfers: tuple[Transfer, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    """Storage or model -> why it cannot be used, "" if it can."""


class Need(NamedTuple):
    """So many processes of one job, each with so much, all at once."""

    processes: int
    cpus: float
    gpus: float
    gpu_memory_gib: float = 0.0


def needs(config: CheckConfig) -> dict[CheckedJob, Need]:
    """What each job has to have at the same time."""
    actors, trainer = config.actors, config.trainer
    found: dict[CheckedJob, Need] = {}
    for job in get_args(CheckedJob):
        if job in ("generate_dataset", "evaluate_explainer"):
            found[job] = Need(actors.min_size, actors.num_cpus, actors.num_gpus)
        elif job == "train_explainer":
            least = trainer.num_workers if trainer.min_workers is None else trainer.min_workers
            found[job] = Need(least, trainer.cpus_per_worker, trainer.gpus_per_worker)
        else:
            model: KnownModel = "llama-3.1-70b" if job == "train_70b_explainer" else "llama-3.1-8b"
            usual = preset(model, "feature_description", None)["trainer"]
            memory = GPUS[PlanConfig().gpu].memory_gib * MEMORY_TOLERANCE
            found[job] = Need(usual["num_workers"], usual["cpus_per_worker"], usual["gpus_per_worker"], memory)
    return found


def room(need: Need, nodes: Sequence[Node]) -> int:
    """How many of the processes that a job needs could run at once, were the cluster idle."""

    def on(node: Node) -> int:
        if need.gpu_memory_gib and (node.facts is None or node.facts.gpu_memory_gib < need.gpu_memory_gib):
            return 0
        offers = [have / want for have, want in ((node.cpus, need.cpus), (node.gpus, need.gpus)) if want > 0]
        return int(min(offers, default=need.processes) + 1e-9)

    return sum(on(node) for node in nodes)


def verdicts(config: CheckConfig, findings: Findings) -> dict[CheckedJob, list[str]]:
    """For each job the reasons why it would not run; none if it would."""
    shared = [f"node {node.name}: {node.problem}" for node in findings.nodes if node.problem]
    shared += [f"{place}: {problem}" for place, problem in findings.places.items() if problem]
    shared += _disagreements(findings.nodes)
    found = {}
    for job, need in needs(config).items():
        reasons = list(shared)
        places = room(need, findings.nodes)
        if places < need.processes:
            each = f"{need.cpus:g} CPUs and {need.gpus:g} GPUs"
            if need.gpu_memory_gib:
                each += f" of {need.gpu_memory_gib:.0f} GiB"
            reasons.append(
                f"needs {need.processes} processes with {each} each, the nodes that are there have room for {places}"
            )
        if need.gpus:
            reasons += [
                f"node {node.name}: {node.facts.cuda_problem or 'Ray has GPUs to give, but there is no NVIDIA driver'}"
                for node in findings.nodes
                if node.gpus and node.facts and (node.facts.cuda_problem or not node.facts.gpus)
            ]
        found[job] = reasons
    return found


def _disagreements(nodes: Sequence[Node]) -> list[str]:
    """Versions that are not the same everywhere, and packages that are missing."""
    facts = {node.name: node.facts for node in nodes if node.facts is not None}
    found = []
    for what in ("python", *probe.PACKAGES):
        versions = {name: one.python if what == "python" else one.packages[what] for name, one in facts.items()}
        if len(set(versions.values())) > 1 or "missing" in versions.values():
            found.append(f"{what} is " + ", ".join(f"{version} on {name}" for name, version in versions.items()))
    return found


def check_cluster(config: CheckConfig, say: Callable[[str], None]) -> dict[CheckedJob, list[str]]:
    """Look at the cluster that this process can join; `say` line by line what was found; returns the verdicts."""
    with connect():
        if config.scale_up_s:
            _scale_up(config, say)
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


def _scale_up(config: CheckConfig, say: Callable[[str], None]) -> None:
    """Let the autoscaler bring what the largest of the jobs needs, for as long as this check lasts."""
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
    """Each node fetches from the next one, one after the other; nothing with a single node."""
    found = []
    for source, destination in zip(identities, [*identities[1:], *identities[:1]], strict=True):
        if source == destination:
            continue
        try:
            thing = start(_make, source, config.transfer_mb)
            ray.wait([thing], timeout=config.timeout_s, fetch_local=False)
            seconds = ray.get(start(_fetch, destination, [thing]), timeout=config.timeout_s)
        except (RayError, TimeoutError):
            seconds = float("inf")
        found.append(Transfer(names[source], names[destination], config.transfer_mb / seconds))
    return tuple(found)


def _make(megabytes: int) -> np.ndarray:
    return np.ones(megabytes * 10**6, np.uint8)


def _fetch(thing: list[Any]) -> float:
    """Seconds until the object in the list is here; a list, because Ray would fetch an argument before the call."""
    began = time.monotonic()
    ray.get(thing[0])
    return time.monotonic() - began


def report(findings: Findings) -> list[str]:
    """Nodes, bandwidths, storage and models, as lines."""
    lines = [f"nodes: {len(findings.nodes)}"]
    for node in findings.nodes:
        lines.append(f"  {node.name}{' head' if node.is_head else ''}: {node.cpus:g} CPUs, {node.gpus:g} GPUs")
        lines += [f"         {line}" for line in _about(node)]
    if findings.transfers:
        lines.append("bandwidth through the object store")
        lines += [f"  {one.source} -> {one.destination}: {one.mb_per_s:,.0f} MB/s" for one in findings.transfers]
    if findings.places:
        lines.append("storage and models")
        lines += [f"  {'STOP' if problem else 'ok  '} {place}" for place, problem in findings.places.items()]
    return lines


def _about(node: Node) -> list[str]:
    facts = node.facts
    if facts is None:
        return [node.problem]
    versions = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    kind = f"{', '.join(sorted(set(facts.gpus)))} with {facts.gpu_memory_gib:.0f} GiB at least, driver {facts.driver}"
    return [
        *([f"{len(facts.gpus)} x {kind}"] if facts.gpus else []),
        f"python {facts.python}, {versions}",
        f"{facts.disk_free_gib:.0f} GiB free for temporary files, /dev/shm {facts.shm_gib:.0f} GiB",
    ]
