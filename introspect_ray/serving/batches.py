"""Dynamic batching: what waits while the models run is the next batch.

Ray Serve has batching of its own, `serve.batch`. It closes a batch so and so long after the batch's first request even
while the one before still runs, so that under load of a slow model many small batches queue up: of 16 clients' requests
to an explainer of 115M parameters on a CPU, 3 ran together on average.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from introspect_ray.config import BatchingConfig
from introspect_ray.serving.calls import Lost

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[R, A]):
    request: R
    items: int
    answer: asyncio.Future[A]


class Batches(Generic[R, A]):
    """Collects requests and runs them, one batch at a time. For one event loop."""

    def __init__(self, run: Callable[[str, list[R]], Awaitable[list[A]]], config: BatchingConfig):
        """`run`: answers to requests of one key, in their order."""
        self._run = run
        self._config = config
        self._waiting: dict[str, list[_Waiting[R, A]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def ask(self, request: R, key: str = "", items: int = 1) -> A:
        """The answer to a request of so many items; only those of equal keys share a batch.

        Raises what its batch raised; Lost if the batch was cancelled.
        """
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(_Waiting(request, items, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_all())
        return await answer

    async def _run_all(self) -> None:
        try:
            while self._waiting:
                if all(_items(waiting) < self._config.max_size for waiting in self._waiting.values()):
                    await asyncio.sleep(self._config.wait_s)
                if batch := self._next():
                    await self._run_one(*batch)
        except BaseException as error:
            for waiting in self._waiting.values():
                _fail(waiting, error)
            self._waiting.clear()
            raise

    def _next(self) -> tuple[str, list[_Waiting[R, A]]] | None:
        """Requests of the key that has waited longest, without those that nobody waits for any more.

        As many as fit into a batch, in their order; one that is larger than a batch is one by itself.
        """
        key = next(iter(self._waiting))
        waiting = [one for one in self._waiting.pop(key) if not one.answer.cancelled()]
        count = 0
        while count < len(waiting) and (count == 0 or _items(waiting[: count + 1]) <= self._config.max_size):
            count += 1
        if waiting[count:]:
            self._waiting[key] = waiting[count:]  # behind the other keys
        return (key, waiting[:count]) if count else None

    async def _run_one(self, key: str, batch: list[_Waiting[R, A]]) -> None:
        try:
            found = await self._run(key, [one.request for one in batch])
            for one, answer in zip(batch, found, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)
        except BaseException as error:
            _fail(batch, error)
            if not isinstance(error, Exception):
                raise


def _items(waiting: Iterable[_Waiting[R, A]]) -> int:
    return sum(one.items for one in waiting)


def _fail(waiting: Iterable[_Waiting[R, A]], error: BaseException) -> None:
    """Who waits for an answer that does not come hears why; a cancelled batch may be asked for again."""
    for one in waiting:
        if not one.answer.done():
            one.answer.set_exception(error if isinstance(error, Exception) else Lost("the batch was cancelled"))
