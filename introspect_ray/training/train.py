"""Training an explainer on Ray Train, from a driver that only watches.

driver   prepare (no Ray, no model) -> claim folder -> TorchTrainer(train_loop) -> summary
         a thread reads metrics.jsonl for progress, another what workers have to tell

When a worker is lost, Ray stops the others and starts a new group, of fewer workers if there is no room for all and the
config allows it, which goes on from the newest checkpoint. After a lost driver the same command goes on.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import fsspec
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from introspect_ray.config import TrainConfig, TrainerConfig
from introspect_ray.data.cluster import ADDRESS_VARIABLE, connect, is_verbose
from introspect_ray.data.watching import watching
from introspect_ray.errors import RunFailed, StorageError, UserError
from introspect_ray.evaluation.scores import format_value
from introspect_ray.training.checkpoint import CheckpointStore
from introspect_ray.training.hardware import gpu_named
from introspect_ray.training.loop import train_loop
from introspect_ray.training.metrics import Metrics, read_metrics
from introspect_ray.training.notices import notices
from introspect_ray.training.plan import check_plan, plan_run
from introspect_ray.training.run import Run, prepare, storage_of

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and how it goes (loss, speed, newest evaluation)."""
NOTES_FOLDER = "ray_train"
ACCELERATOR_PREFIX = "accelerator_type:"
POLL_S = 0.5
START_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Summary:
    """What a run left in its output folder."""

    output: str
    num_examples: int
    results: dict[str, Any]
    """The last line of metrics.jsonl."""
    was_complete: bool

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"{self.output} was already complete" if self.was_complete else f"wrote {self.output}"
        steps, loss = self.results["step"], self.results["loss"]
        line = f"{start}: explainer after {steps} steps on {self.num_examples} examples, loss {loss:.4f} nats per token"
        if "exported_step" in self.results:
            exported, best = self.results["exported_step"], self.results["best_step"]
            stopped = ", stopped early" if self.results["stopped_early"] else ""
            scores = ", ".join(
                f"{name} {'n/a' if value is None else format_value(value)}"
                for name, value in self.results["exported_scores"].items()
            )
            which = "the best evaluation" if exported == best else f"because those of the best, step {best}, were lost"
            line += f"{stopped}; its weights are of step {exported}, {which}: {scores}"
        return line


def train_explainer(config: TrainConfig, progress: Progress) -> Summary:
    """Train the explainer that `config` describes, or what is left of it; the same call after any interruption goes on.

    Raises:
        UserError: bad input, before any model loads.
        RunFailed: the run broke in a way that starting over would only repeat, or workers failed too often.
    """
    run = prepare(config)
    if run.is_complete():
        return Summary(config.output, run.num_examples, run.results(), was_complete=True)
    run.record({})
    with connect(), _watched(run, progress), notices() as actor:
        _check_resources(config.trainer)
        check_memory(run.config, ray.cluster_resources())
        try:
            results = _fit_while_it_gets_on(run, actor)
        except StorageError as error:  # met by the driver itself
            raise RunFailed(str(error)) from error
    return Summary(config.output, run.num_examples, results, was_complete=False)


def run_workers(
    run: Run, loop: Callable[[dict[str, Any]], None], progress: Progress, note: Callable[[Sequence[Metrics]], str]
) -> dict[str, Any]:
    """Run another loop than an explainer's on Ray Train, in attempts until one ends; returns what came of it.

    `loop` is called on every worker with `run.to_json()` and `notices`, an actor that takes what users should hear;
    `note` says of the lines of metrics how it goes.
    """
    with connect(), _watched(run, progress, note), notices() as actor:
        _check_resources(run.config.trainer)
        try:
            return _fit_while_it_gets_on(run, actor, loop)
        except StorageError as error:  # met by the driver itself
            raise RunFailed(str(error)) from error


class _Trainer(TorchTrainer):
    """Ctrl-C stays KeyboardInterrupt: Ray's handler takes its time, and ends with status 1 and without a word."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray calls this before it waits for the run."""


class _WorkersLost(RunFailed):
    """Workers failed more often than one attempt allows."""


def _fit_while_it_gets_on(
    run: Run, notices: Any, loop: Callable[[dict[str, Any]], None] = train_loop
) -> dict[str, Any]:
    """Attempts until one ends or leaves no newer checkpoint than the one before."""
    store = CheckpointStore(run.checkpoints, run.run_key, run.config.trainer.keep_checkpoints)
    while True:
        newest = store.newest(None)
        try:
            return _fit(run, notices, loop)
        except _WorkersLost:
            if store.newest(None) <= newest:
                raise


def _fit(run: Run, notices: Any, loop: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    trainer = run.config.trainer
    path, filesystem = storage_of(run.config.output)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if trainer.min_workers is None:
        # Nodes that are still to come take minutes; only a group that may shrink gains from giving up on them.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    # A new name each time: Ray would take a known one for a run of its own to be resumed or handed back.
    name = uuid.uuid4().hex
    least, most = _least_workers(trainer), trainer.num_workers
    size = most if least == most else (least, most)
    torch_trainer = _Trainer(
        loop,
        train_loop_config={**run.to_json(), "notices": notices},
        scaling_config=ScalingConfig(
            num_workers=cast(Any, size),
            use_gpu=trainer.gpus_per_worker > 0,
            resources_per_worker={"CPU": trainer.cpus_per_worker, "GPU": trainer.gpus_per_worker},
        ),
        torch_config=TorchConfig(backend="nccl" if trainer.gpus_per_worker > 0 else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=f"{path.rstrip('/')}/{NOTES_FOLDER}",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=trainer.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    try:
        torch_trainer.fit()
    except Exception as error:
        cause = next(iter(getattr(error, "worker_failures", {}).values()), error)
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise _WorkersLost(f"training failed after {trainer.max_failures} retries: {lines[-1]}") from (
            error if is_verbose() else None
        )
    finally:
        _remove_notes(run)
    results = run.results()
    if "failure" in results:
        raise (UserError if results["by_user"] else RunFailed)(results["failure"])
    return results


def _remove_notes(run: Run) -> None:
    filesystem, path = fsspec.core.url_to_fs(f"{run.config.output.rstrip('/')}/{NOTES_FOLDER}")
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def _check_resources(trainer: TrainerConfig) -> None:
    """Refuse workers that this machine can never place; a cluster elsewhere may grow, so nothing is said about it."""
    if os.environ.get(ADDRESS_VARIABLE):
        return
    there = ray.cluster_resources()
    for key, each, resource in (
        ("cpus_per_worker", trainer.cpus_per_worker, "CPU"),
        ("gpus_per_worker", trainer.gpus_per_worker, "GPU"),
    ):
        least = _least_workers(trainer)
        wanted, found = least * each, there.get(resource, 0)
        if wanted > found:
            field = "num_workers" if trainer.min_workers is None else "min_workers"
            raise UserError(
                f"trainer.{field} {least} x trainer.{key} {each:g} needs {wanted:g} {resource}s, "
                f"but this machine has {found:g}"
            )


def check_memory(config: TrainConfig, resources: Mapping[str, float]) -> None:
    """Refuse a run whose plan does not fit the largest GPU that the cluster has.

    Nothing is said where workers have no GPU, or the cluster has GPUs whose memory is not known.

    Args:
        resources: what Ray says of the cluster; `accelerator_type:NAME` is among it for every kind of GPU.
    """
    types = [name.partition(":")[2] for name in resources if name.startswith(ACCELERATOR_PREFIX)]
    gpu = gpu_named(types)
    if config.trainer.gpus_per_worker == 0 or gpu is None:
        return
    check_plan(plan_run(config.model_copy(update={"plan": config.plan.model_copy(update={"gpu": gpu})})))


def _least_workers(trainer: TrainerConfig) -> int:
    return trainer.num_workers if trainer.min_workers is None else trainer.min_workers


def _note(lines: Sequence[Metrics], metric: str) -> str:
    """The newest line of metrics for people: loss, speed, and the last evaluation beside the best."""
    newest = lines[-1]
    parts = [f"loss {newest['loss']:.3f}", f"{newest['tokens_per_second']:,.0f} tokens/s"]
    if "share_of_peak" in newest:
        parts.append(f"{newest['share_of_peak']:.0%} of peak")
    evaluated = [line["validation"][metric] for line in lines if "validation" in line]
    found = [value for value in evaluated if value is not None]
    if found:
        parts.append(f"{metric} {found[-1]:.3f} (best {max(found):.3f})")
    return ", ".join(parts)


@contextmanager
def _watched(run: Run, progress: Progress, note: Callable[[Sequence[Metrics]], str] | None = None) -> Iterator[None]:
    """Calls `progress` from a thread whenever metrics.jsonl has grown, and once more at the end."""
    shown = 0

    def look() -> bool:
        nonlocal shown
        try:
            metrics = read_metrics(run.folder)
        except UserError:
            return True  # storage that is away for a while is the workers' to tell
        if metrics and metrics[-1]["step"] != shown:
            shown = metrics[-1]["step"]
            said = _note(metrics, run.config.evaluation.metric) if note is None else note(metrics)
            progress(shown, run.config.optimization.steps, said)
        return True

    try:
        with watching(look, POLL_S, "training-progress"):
            yield
    finally:
        look()
