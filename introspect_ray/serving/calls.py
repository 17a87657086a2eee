"""How the gateway reaches the processes that hold models, and what becomes of a call whose process dies.

Every call is safe to repeat: models only read. So one that was under way on a replica that died is made again, on
another replica or on the one that takes its place. Serve itself does not do that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
"""Before the first repetition; doubles with each."""


class Lost(Exception):
    """The replica of a call died under it: the call may be made again."""


class Busy(Exception):
    """All replicas have as many requests as they take: refuse now rather than pile up."""


class Unavailable(Exception):
    """The deployment cannot answer at the moment."""


class Deployments(Protocol):
    """The deployments, by name: `TargetModel-NAME`, `Explainer`, `Simulator-NAME`."""

    async def call(self, deployment: str, method: str, *arguments: Any, model: str = "") -> Any:
        """One call; `model` says which of several models the deployment shall have ready. Raises as above."""

    def stream(self, deployment: str, method: str, *arguments: Any, model: str = "") -> AsyncIterator[Any]:
        """A call that answers in pieces. Raises as above."""


def target_deployment(name: str) -> str:
    return f"TargetModel-{name}"


def simulator_deployment(name: str) -> str:
    return f"Simulator-{name}"


EXPLAINERS = "Explainer"


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The answers in their order; if one call fails, or whoever asked leaves, the others end before this does.

    Raises what the call raised that failed first.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class Retrying:
    """Deployments whose calls are made again when their replica died."""

    def __init__(self, deployments: Deployments, retries: int, lost: Callable[[str], None] = lambda _: None):
        """`retries`: repetitions of one call. `lost`: hears the deployment of each call that was lost."""
        self._deployments = deployments
        self._retries = retries
        self._lost = lost

    async def call(self, deployment: str, method: str, *arguments: Any, model: str = "") -> Any:
        """See `Deployments.call`; Unavailable if the replica died at the last repetition, too."""
        return await self._again(
            deployment, lambda: self._deployments.call(deployment, method, *arguments, model=model)
        )

    async def stream(self, deployment: str, method: str, *arguments: Any, model: str = "") -> AsyncIterator[Any]:
        """See `Deployments.stream`; pieces that were given already are not given twice, because answers are greedy."""
        given = 0
        for attempt in range(self._retries + 1):
            seen = 0
            try:
                async for piece in self._deployments.stream(deployment, method, *arguments, model=model):
                    seen += 1
                    if seen > given:
                        given = seen
                        yield piece
                return
            except Lost:
                await self._pause(deployment, attempt)

    async def _again(self, deployment: str, attempt_call: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(self._retries + 1):
            try:
                return await attempt_call()
            except Lost:
                await self._pause(deployment, attempt)
        raise AssertionError("the last pause raises")

    async def _pause(self, deployment: str, attempt: int) -> None:
        self._lost(deployment)
        if attempt == self._retries:
            raise Unavailable(f"{deployment}: its replica died {attempt + 1} times under this request") from None
        await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
