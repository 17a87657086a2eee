"""What was found out about a cluster, what each job needs, and so what would stop it. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

from introspect_ray.config import CheckConfig, CheckedJob, KnownModel, PlanConfig
from introspect_ray.data.probe import PACKAGES, NodeFacts
from introspect_ray.presets import preset
from introspect_ray.training.hardware import GPUS

MEMORY_TOLERANCE = 0.97
"""Share of a GPU's nominal memory that drivers have left of it at least."""


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
    """One object fetched from a node to another; 0 MB/s if it never came."""

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
        if job in ("generate_dataset", "evaluate_explainer", "rewrite_transformer"):
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
    shared += [f"{one.destination} cannot fetch from {one.source}" for one in findings.transfers if not one.mb_per_s]
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
    for what in ("python", *PACKAGES):
        versions = {name: one.python if what == "python" else one.packages[what] for name, one in facts.items()}
        if len(set(versions.values())) > 1 or "missing" in versions.values():
            found.append(f"{what} is " + ", ".join(f"{version} on {name}" for name, version in versions.items()))
    return found


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
