"""The deployments as Ray Serve's handles, and Ray's errors as those of calls.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from introspect_ray.serving.calls import Busy, Lost, Unavailable

_LOST = (
    RayActorError,
    WorkerCrashedError,
    ObjectLostError,
    ReplicaUnavailableError,
    OutOfMemoryError,  # what the calls of an actor raise that Ray's memory monitor has killed
    NodeDiedError,
    LocalRayletDiedError,
    Lost,  # what a replica says of itself
)


class ServeDeployments:
    """See `calls.Deployments`."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]):
        self._handles = dict(handles)
        self._method = lru_cache(maxsize=1024)(self._find_method)

    async def call(self, deployment: str, method: str, *arguments: Any, model: str = "") -> Any:
        with _ray_errors(deployment):
            response = self._method(deployment, method, model, False).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()  # whoever asked has left
                raise

    async def stream(self, deployment: str, method: str, *arguments: Any, model: str = "") -> AsyncIterator[Any]:
        with _ray_errors(deployment):
            pieces = self._method(deployment, method, model, True).remote(*arguments)
            try:
                async for piece in pieces:
                    yield piece
            except (asyncio.CancelledError, GeneratorExit):
                pieces.cancel()  # whoever asked has left
                raise

    def _find_method(self, deployment: str, method: str, model: str, stream: bool) -> Any:
        handle = self._handles[deployment].options(stream=stream)
        return getattr(handle.options(multiplexed_model_id=model) if model else handle, method)


@contextmanager
def _ray_errors(deployment: str) -> Iterator[None]:
    try:
        yield
    except BackPressureError:
        raise Busy(f"{deployment} has as many requests as it takes") from None
    except DeploymentUnavailableError:
        raise Unavailable(f"{deployment} is not available") from None
    except _LOST as error:
        raise Lost(deployment) from error
    except RayTaskError as error:
        if isinstance(error.cause, _LOST):
            raise Lost(deployment) from error
        raise
