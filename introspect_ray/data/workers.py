"""A pool of Ray actors that answer calls: the one place that says how many there are, how often they are started again,
and what a user hears of those that fail.

    driver  calls -> whichever actor is ready and free -> answers, in the calls' order
    actors  `initial_size` of them, or as many as there are calls; up to `max_size` once one has loaded

An actor that has no place yet is asked nothing, so that it holds nothing up, and an autoscaler sees that it is wanted.
A pool does not shrink; Ray ends its actors when it goes out of scope. For shards in files, which are tried again one by
one, there is pool.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError

from introspect_ray.config import ActorConfig
from introspect_ray.data.cluster import is_verbose, quiet_stderr
from introspect_ray.data.pool import translated
from introspect_ray.errors import RunFailed

MAX_RESTARTS = 2
"""Times that one actor is started again. Restarts bound the tries: a bound on calls would be used up within the seconds
in which a lost node is not known to be lost yet, and every call is refused at once."""


class WorkerPool:
    """Actors of the class `worker`, made with `arguments`. Ray must be connected when it is asked."""

    def __init__(self, worker: type, arguments: Sequence[Any], actors: ActorConfig):
        self._starting: dict[ray.ObjectRef, Any] = {}
        """Word that an actor has loaded -> the actor."""
        self._remote: Any = ray.remote(
            num_cpus=actors.num_cpus, num_gpus=actors.num_gpus, max_restarts=MAX_RESTARTS, max_task_retries=-1
        )(worker)
        self._arguments, self._actors = tuple(arguments), actors
        self._busy: dict[ray.ObjectRef, Any] = {}
        """Answer -> the actor that is at work on it; also answers that nobody waits for any more."""
        self._idle: list[Any] = []
        self._has_loaded = False

    def __del__(self) -> None:
        """Actors that nobody will ask would yet load, and keep their place from others."""
        if ray.is_initialized():
            for actor in self._starting.values():
                ray.kill(actor)

    @property
    def size(self) -> int:
        """Actors that were begun."""
        return len(self._starting) + len(self._busy) + len(self._idle)

    def map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """The answers of `method`, one per call and in the calls' order, each as soon as all before it are there.

        Raises UserError if an actor does, RunFailed if one fails otherwise or its process dies again and again.
        """
        waiting = deque(enumerate(calls))
        numbers: dict[ray.ObjectRef, int] = {}
        found: dict[int, Any] = {}
        for wanted in range(len(calls)):
            while wanted not in found:
                self._grow(len(waiting))
                while waiting and self._idle:
                    number, call = waiting.popleft()
                    actor = self._idle.pop()
                    reference = getattr(actor, method).remote(*call)
                    self._busy[reference], numbers[reference] = actor, number
                for reference, answer in self._finished():
                    if reference in numbers:
                        found[numbers.pop(reference)] = answer
            yield found.pop(wanted)

    def _grow(self, num_waiting: int) -> None:
        """Begin as many actors as there are calls for which none is there, as far as the config goes."""
        most = self._actors.max_size if self._has_loaded else self._actors.initial_size
        for _ in range(min(most - self.size, num_waiting - len(self._idle) - len(self._starting))):
            actor = self._remote.remote(*self._arguments)
            self._starting[actor.__ray_ready__.remote()] = actor

    def _finished(self) -> Iterator[tuple[ray.ObjectRef, Any]]:
        """Wait until an actor has loaded or answered; every one that has is free again."""
        with quiet_stderr():
            done, _ = ray.wait([*self._starting, *self._busy])
        for reference in done:
            try:
                answer = ray.get(reference)
            except RayError as error:
                raise _said(error) from (error if is_verbose() else None)
            actor = self._starting.pop(reference, None) or self._busy.pop(reference)
            self._has_loaded = True
            self._idle.append(actor)
            yield reference, answer


def _said(error: RayError) -> Exception:
    """One line about a call that failed."""
    said = translated(error, "")
    if isinstance(error, RayActorError) and isinstance(said, RunFailed):
        return RunFailed(f"{said}; the same command tries again")
    return said


def use_assigned_threads() -> None:
    """In an actor, before it loads a model: torch takes as many threads as the actor has processors.

    Ray sets OMP_NUM_THREADS to them; torch read it when it was imported, which may be earlier.
    """
    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
