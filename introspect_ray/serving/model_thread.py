"""The one thread in which a replica's models run, and what becomes of a batch that fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from introspect_ray.serving.api import Failed, failed

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")

logger = logging.getLogger("introspect_ray.serving.models")

BROKEN = "CUDA error"
"""What torch says when a GPU's context is lost: nothing runs in that process any more. Lack of memory is no such."""


class ModelThread:
    """Runs calls one after the other, while the event loop answers health checks and collects the next batch."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._is_broken = False

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        except RuntimeError as error:
            self._is_broken = self._is_broken or BROKEN in str(error)
            raise

    async def run_batch(
        self,
        call: Callable[[list[R]], list[list[A]]],
        requests: list[R],
        size: Callable[[R], int] = len,  # type: ignore
    ) -> list[list[A | Failed]]:
        """Several requests in one call; if that fails (for lack of memory, say), each by itself.

        `size`: answers to a request.
        """
        try:
            return [list(answers) for answers in await self.run(call, requests)]
        except Exception:
            if len(requests) == 1:
                raise
            logger.exception("a batch of %s requests failed: each is run by itself", len(requests))
        return [await self._alone(call, request, size(request)) for request in requests]

    async def _alone(self, call: Callable[[list[R]], list[list[A]]], request: R, size: int) -> list[A | Failed]:
        try:
            (answers,) = await self.run(call, [request])
        except Exception:
            logger.exception("a request failed by itself, too")
            return [failed("internal", "an error of this service")] * size
        return list(answers)

    def check(self) -> None:
        """Raises RuntimeError if no call can succeed any more, so that Serve replaces this process."""
        if self._is_broken:
            raise RuntimeError("the GPU's context is lost")


def by_request(call: Callable[[list[T]], list[A]]) -> Callable[[list[Sequence[T]]], list[list[A]]]:
    """A call on items as one on requests: all their items together, the answers by request."""

    def of_requests(requests: list[Sequence[T]]) -> list[list[A]]:
        found = iter(call([item for items in requests for item in items]))
        return [[next(found) for _ in items] for items in requests]

    return of_requests
