"""Lines from workers to whoever watches the driver: the storage may be just what the news is about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from introspect_ray.data.watching import watching

POLL_S = 1.0
logger = logging.getLogger(__name__)


class Notices:
    """Keeps lines until they are fetched."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


@contextmanager
def notices() -> Iterator[Any]:
    """An actor with the methods of `Notices`; while the block runs, what is added to it becomes warnings of the log."""
    # On the driver's own node: the loss of another one must not take the news of it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Notices).options(scheduling_strategy=here).remote()

    def show() -> bool:
        try:
            for line in ray.get(actor.take.remote()):
                logger.warning(line)
        except RayError as error:  # the actor's node is lost, or Ray is shutting down
            logger.debug("notices are lost: %s", error)
            return False
        return True

    try:
        with watching(show, POLL_S, "notices"):
            yield actor
    finally:
        if show():
            ray.kill(actor)
