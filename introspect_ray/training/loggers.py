"""Where metrics go: metrics.jsonl always, TensorBoard unless switched off, Weights & Biases and MLflow when asked.

Only metrics.jsonl is part of a run. The others are onlookers: one that fails is dropped with a warning, and training
goes on. A run that is resumed goes on in the same place in each of them.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from introspect_ray.config import resolved
from introspect_ray.data.storage import Folder
from introspect_ray.explainer.card import is_remote
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.metrics import Metrics, MetricsLog
from introspect_ray.training.run import Run

TENSORBOARD_FOLDER = "tensorboard"
EXPERIMENT = "introspect_ray"
"""Name of the MLflow experiment."""
_PARAMETER_LENGTH = 500
logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One onlooker."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class Loggers:
    """All places where the metrics of a run go, from one process. A context manager: leaving it closes them all."""

    def __init__(self, run: Run, step: int):
        """`step` is the one that the run goes on from; what was logged after it is logged again."""
        self._file = MetricsLog(run.folder, step)
        config = run.config.logging
        makers: list[tuple[str, Callable[[], Sink]]] = []
        if config.tensorboard:
            makers.append(("TensorBoard", lambda: _TensorBoard(run.config.output, step)))
        if config.wandb_project is not None:
            project = config.wandb_project
            makers.append(("Weights & Biases", lambda: _WeightsAndBiases(project, run)))
        if config.mlflow_uri is not None:
            uri = config.mlflow_uri
            makers.append(("MLflow", lambda: _MLflow(uri, run)))
        self._sinks: dict[str, Sink] = {}
        for name, make in makers:
            self._guarded(name, lambda name=name, make=make: self._sinks.update({name: make()}))  # type: ignore[misc]

    def append(self, metrics: Metrics) -> None:
        """One line of metrics.jsonl, and its numbers everywhere else."""
        self._file.append(metrics)
        values = flat(metrics)
        for name, sink in list(self._sinks.items()):
            self._guarded(name, lambda sink=sink: sink.log(metrics["step"], values))  # type: ignore[misc]

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, sink in list(self._sinks.items()):
            self._guarded(name, lambda sink=sink: sink.close(failed=kind is not None))  # type: ignore[misc]

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of any package, and of a network besides
            self._sinks.pop(name, None)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("%s is left out from here on, training goes on: %s", name, first)


def flat(metrics: Metrics) -> dict[str, float]:
    """The finite numbers of one line of metrics, names of nested ones joined by slashes, without the step."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, int | float) and math.isfinite(value) and name != "step":
            found[name] = float(value)
    return found


class _TensorBoard:
    """Event files under `tensorboard/`. They are written to a local disk; for a remote folder each line uploads."""

    def __init__(self, output: str, step: int):
        from tensorboardX import SummaryWriter

        self._remote = Folder(f"{output.rstrip('/')}/{TENSORBOARD_FOLDER}") if is_remote(output) else None
        self._temporary = tempfile.TemporaryDirectory() if self._remote else None
        local = self._temporary.name if self._temporary else f"{output.removeprefix('file://')}/{TENSORBOARD_FOLDER}"
        self._folder = Path(local)
        # Of what an earlier process logged, TensorBoard shows nothing from `purge_step` on.
        self._writer = SummaryWriter(logdir=local, purge_step=step + 1, filename_suffix=f".after_step_{step}")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._upload()

    def close(self, failed: bool) -> None:  # noqa: ARG002 - event files say nothing about how a run ended
        self._writer.close()
        self._upload()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _upload(self) -> None:
        if self._remote is not None:
            for file in self._folder.iterdir():
                self._remote.write(file.name, file.read_bytes())


class _WeightsAndBiases:
    """One run of a project; whether it is online is the package's own `WANDB_MODE`."""

    def __init__(self, project: str, run: Run):
        import wandb

        output = run.config.output
        folder = tempfile.gettempdir() if is_remote(output) else output.removeprefix("file://")
        self._run = wandb.init(
            project=project,
            id=_identity(run),
            name=_name(run),
            resume="allow",
            dir=folder,
            config=resolved(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """One run of the experiment `introspect_ray` on a tracking server or in a folder."""

    def __init__(self, uri: str, run: Run):
        if "://" not in uri:
            # Newer versions want to be told that a plain folder is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow

        self._mlflow = mlflow
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        identity = _identity(run)
        found = self._client.search_runs([place], filter_string=f"tags.introspect_ray_run = '{identity}'")
        if found:
            self._run_id = found[0].info.run_id
            self._client.set_terminated(self._run_id, status="RUNNING")
            return
        tags = {"introspect_ray_run": identity}
        self._run_id = self._client.create_run(place, tags=tags, run_name=_name(run)).info.run_id
        for name, value in _leaves(resolved(run.config)).items():
            self._client.log_param(self._run_id, name, str(value)[:_PARAMETER_LENGTH])

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(re.sub(r"[^\w\-./ ]", "_", name), value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


def _identity(run: Run) -> str:
    """Equal when the same run goes on, different for the same config in another folder."""
    return stable_id(run.run_key, run.config.output)


def _name(run: Run) -> str:
    return run.config.output.rstrip("/").rpartition("/")[2]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
