"""Dynamic batching: what waits while the models run is the next batch.

Ray Serve has batching of its own, `serve.batch`. It closes a batch so and so long after the batch's first request even
while the one before still runs, so that under load of a slow model many small batches queue up: of 16 clients' requests
to an explainer of 115M parameters on a CPU, 3 ran together on average.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from introspect_ray.config import BatchingConfig

A = TypeVar("A")
R = TypeVar("R")


class Batches(Generic[R, A]):
    """Collects requests and runs them, one batch at a time. For one event loop."""

    def __init__(self, run: Callable[[str, list[R]], Awaitable[list[A]]], config: BatchingConfig):
        """`run`: answers to requests of one key, in their order."""
        self._run = run
        self._config = config
        self._waiting: dict[str, list[tuple[R, asyncio.Future[A]]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def ask(self, request: R, key: str = "") -> A:
        """The answer to a request; only those of equal keys share a batch. Raises what its batch raised."""
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append((request, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_all())
        return await answer

    async def _run_all(self) -> None:
        while self._waiting:
            if all(len(waiting) < self._config.max_size for waiting in self._waiting.values()):
                await asyncio.sleep(self._config.wait_s)
            if batch := self._next():
                await self._run_one(*batch)

    def _next(self) -> tuple[str, list[tuple[R, asyncio.Future[A]]]] | None:
        """The requests of the key that has waited longest, without those that nobody waits for any more."""
        key = next(iter(self._waiting))
        waiting = [one for one in self._waiting.pop(key) if not one[1].cancelled()]
        batch, rest = waiting[: self._config.max_size], waiting[self._config.max_size :]
        if rest:
            self._waiting[key] = rest  # behind the other keys
        return (key, batch) if batch else None

    async def _run_one(self, key: str, batch: list[tuple[R, asyncio.Future[A]]]) -> None:
        try:
            found = await self._run(key, [request for request, _ in batch])
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), one in zip(batch, found, strict=True):
            if not answer.done():
                answer.set_result(one)
