"""The one thread in which a replica's models run, and what becomes of a batch that fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from introspect_ray.interventions.memory import is_device_error
from introspect_ray.serving.api import Failed, failed
from introspect_ray.serving.calls import Lost

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")

logger = logging.getLogger("introspect_ray.serving.models")


class ModelThread:
    """Runs calls one after the other, while the event loop answers health checks and collects the next batch."""

    def __init__(self, end: Callable[[], None]):
        """`end`: ends this process, which is called when its device has failed: nothing runs in it any more then.

        Health checks would take seconds to find that out, and a replica that fails at once draws requests meanwhile.
        """
        self._executor = ThreadPoolExecutor(1)
        self._end = end

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """The call's answer. Raises what it raises; Lost, so that it is made again elsewhere, if the device failed."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        except Exception as error:
            if not is_device_error(error):
                raise
            logger.exception("the device has failed: this process ends")
            self._end()
            raise Lost("the device has failed") from error

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
        except Lost:
            raise
        except Exception:
            if len(requests) == 1:
                raise
            logger.exception("a batch of %s requests failed: each is run by itself", len(requests))
        return [await self._alone(call, request, size(request)) for request in requests]

    async def _alone(self, call: Callable[[list[R]], list[list[A]]], request: R, size: int) -> list[A | Failed]:
        try:
            (answers,) = await self.run(call, [request])
        except Lost:
            raise
        except Exception:
            logger.exception("a request failed by itself, too")
            return [failed("internal", "an error of this service")] * size
        return list(answers)


def by_request(call: Callable[[list[T]], list[A]]) -> Callable[[list[Sequence[T]]], list[list[A]]]:
    """A call on items as one on requests: all their items together, the answers by request."""

    def of_requests(requests: list[Sequence[T]]) -> list[list[A]]:
        found = iter(call([item for items in requests for item in items]))
        return [[next(found) for _ in items] for items in requests]

    return of_requests
