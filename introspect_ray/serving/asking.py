"""What a client sends, and what it makes of what comes back: shared by the plain and the async client."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from introspect_ray.config.serving import TOKEN_VARIABLE
from introspect_ray.serving import api

A = TypeVar("A", bound=BaseModel)

RETRYABLE = frozenset({0, 408, 429, 502, 503, 504})
"""Statuses after which a request is sent again; 0 stands for no answer."""

MOST_TIMEOUTS = 1
"""Times that a request is sent again after it took longer than it may."""


class ServiceError(Exception):
    """An answer that is an error, or none at all; `status` is 0 where no answer came."""

    def __init__(self, status: int, error: api.ApiError):
        super().__init__(f"{error.code}: {error.message}" + (f" ({error.field})" if error.field else ""))
        self.status = status
        self.error = error


@dataclass(frozen=True)
class Retries:
    """How often and how long a request is tried."""

    most: int = 8
    first_pause_s: float = 0.2
    longest_pause_s: float = 5.0

    def pause_s(self, attempt: int, error: Exception, response: httpx2.Response | None) -> float:
        """Seconds to wait before repetition `attempt` (from 0); at least what `Retry-After` says.

        Raises the error, as a ServiceError, if the request is not to be sent again.
        """
        if isinstance(error, httpx2.TransportError):
            error = ServiceError(0, api.failed("unavailable", f"no answer: {type(error).__name__}").error)
        if not isinstance(error, ServiceError) or error.status not in RETRYABLE or attempt >= self.most:
            raise error
        # A random part keeps clients from coming back together.
        pause = min(self.longest_pause_s, self.first_pause_s * 2**attempt) * random.uniform(0.5, 1)
        said = "" if response is None else response.headers.get("retry-after", "")
        return max(pause, float(said)) if said.isdigit() else pause


class Attempts:
    """Those of one request."""

    def __init__(self, retries: Retries):
        self._retries = retries
        self._made = 0
        self._timeouts = 0

    def pause_s(self, error: Exception, response: httpx2.Response | None, begun: bool = False) -> float:
        """See `Retries.pause_s`; one whose answer has `begun` is not sent again.

        One that takes too long is sent again once: models work on it for as long each time.
        """
        late = isinstance(error, httpx2.ReadTimeout) or (
            isinstance(error, ServiceError) and error.error.code == "timeout"
        )
        self._timeouts += late
        is_last = begun or self._timeouts > MOST_TIMEOUTS
        pause = self._retries.pause_s(self._retries.most if is_last else self._made, error, response)
        self._made += 1
        return pause


@dataclass(frozen=True)
class Ask(Generic[A]):
    """One request, and the type of its answer."""

    method: Literal["GET", "POST"]
    path: str
    kind: type[A]
    body: dict[str, Any] | None = None

    def answer(self, response: httpx2.Response) -> A:
        """Raises ServiceError for an answer that is an error."""
        check(response)
        return self.kind.model_validate_json(response.content)


def check(response: httpx2.Response) -> None:
    """Raises ServiceError for an answer that is an error; its content must have been read."""
    if response.is_success:
        return
    try:
        error = api.Failed.model_validate_json(response.content).error
        raise ServiceError(response.status_code, error)
    except ValidationError:
        # Not ours: so Serve says that the gateway died under a request.
        status = 503 if response.status_code >= 500 else response.status_code
        raise ServiceError(status, api.failed("unavailable", f"status {response.status_code}").error) from None


def headers(token: str | None) -> dict[str, str]:
    """`token`: none takes that of the environment variable, if there is one."""
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    return {"authorization": f"Bearer {token}"} if token else {}


class Events:
    """Server-sent events of a stream, line by line."""

    def __init__(self) -> None:
        self._name = ""
        self.done = False

    def feed(self, line: str) -> list[str | api.Explanation]:
        """What a line adds: a piece of text, the whole explanation, or nothing. Raises ServiceError for an error."""
        if line.startswith("event: "):
            self._name = line.removeprefix("event: ")
        if not line.startswith("data: "):
            return []
        data = json.loads(line.removeprefix("data: "))
        if self._name == "error":
            raise ServiceError(200, api.Failed.model_validate(data).error)
        if self._name == "done":
            self.done = True
            return [api.Explanation.model_validate(data)]
        return [str(data["text"])]

    def check_done(self) -> None:
        """Raises ServiceError for a stream that ended before its last event."""
        if not self.done:
            raise ServiceError(0, api.failed("unavailable", "the stream ended early").error)


def ask_models() -> Ask[api.Models]:
    return Ask("GET", "/v1/models", api.Models)


def ask_activations(
    target: str, text: str, layers: Sequence[int] | None, positions: Sequence[int] | None, vectors: bool
) -> Ask[api.Activations]:
    body = {
        "target": target,
        "text": text,
        "layers": None if layers is None else list(layers),
        "positions": None if positions is None else list(positions),
        "vectors": vectors,
    }
    return Ask("POST", "/v1/activations", api.Activations, body)


def ask_explain(explainer: str, items: Sequence[api.ExplainItem], max_new_tokens: int | None) -> Ask[api.Explanations]:
    body = {"explainer": explainer, "items": dumped(items), "max_new_tokens": max_new_tokens}
    return Ask("POST", "/v1/explain", api.Explanations, body)


def ask_what_if(request: api.PatchRequest | api.AblateRequest) -> Ask[api.WhatIf]:
    return Ask("POST", "/v1/what_if", api.WhatIf, request.model_dump())


def ask_simulate(simulator: str, items: Sequence[api.SimulateItem]) -> Ask[api.Simulations]:
    return Ask("POST", "/v1/simulate", api.Simulations, {"simulator": simulator, "items": dumped(items)})


def ask_score(simulator: str, items: Sequence[api.ScoreLatentItem | api.ScoreActivationsItem]) -> Ask[api.Scores]:
    return Ask("POST", "/v1/score", api.Scores, {"simulator": simulator, "items": dumped(items)})


def dumped(items: Sequence[BaseModel]) -> list[dict[str, Any]]:
    return [item.model_dump() for item in items]
