"""metrics.jsonl: one line per `log_every` optimizer steps, as if the run had never been interrupted."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from introspect_ray.data.storage import Folder
from introspect_ray.errors import StorageError
from introspect_ray.explainer.card import is_remote
from introspect_ray.training.run import METRICS_FILE

Metrics = dict[str, Any]
logger = logging.getLogger(__name__)


def read_metrics(folder: Folder) -> list[Metrics]:
    """All whole lines; empty if there is no file yet."""
    try:
        content = folder.read(METRICS_FILE).decode()
    except FileNotFoundError:
        return []
    lines = []
    for line in content.splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # a write that is still going on, or was interrupted
        lines.append(json.loads(line))
    return lines


class MetricsLog:
    """Appends to metrics.jsonl. Lines of steps after the checkpoint that a run goes on from are dropped first.

    Lines that the storage refuses are kept, and written with the next one that it takes.

    Raises:
        StorageError: it cannot be told which lines there are.
    """

    def __init__(self, folder: Folder, step: int):
        self.folder = folder
        self._lines = [json.dumps(metrics) + "\n" for metrics in read_metrics(folder) if metrics["step"] <= step]
        self._is_behind = True
        self._write(None)

    def append(self, metrics: Metrics) -> None:
        line = json.dumps(metrics) + "\n"
        self._lines.append(line)
        self._write(line)

    def _write(self, line: str | None) -> None:
        try:
            if line is None or self._is_behind or is_remote(self.folder.url):
                self._write_all()  # object stores cannot append
            else:
                self._append(line)
            self._is_behind = False
        except (OSError, StorageError) as error:
            self._is_behind = True
            logger.warning("%s/%s cannot be written for now: %s", self.folder.url, METRICS_FILE, error)

    def _append(self, line: str) -> None:
        path = Path(self.folder.url.removeprefix("file://")) / METRICS_FILE
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _write_all(self) -> None:
        self.folder.write(METRICS_FILE, "".join(self._lines).encode())
