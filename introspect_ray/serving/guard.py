"""What every request passes before a route sees it, and what is said of it afterwards.

    host, token -> room -> body (size, time) -> route (time) -> one line in the log, metrics
    host ---------------------------------------> route (time) -> the same, for what is open to all

An ASGI application around another one, so that refusals cost no parsing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from introspect_ray.config import LimitsConfig
from introspect_ray.serving.api import STATUS, ErrorCode, failed
from introspect_ray.serving.auth import is_loopback, matches
from introspect_ray.serving.metrics import GatewayMetrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

logger = logging.getLogger("introspect_ray.serving.requests")
"""One JSON object per request, and nothing else."""
_defects = logging.getLogger("introspect_ray.serving.defects")

OPEN_PATHS = ("/", "/v1/health", "/v1/ready", "/openapi.json")
OPEN_FOLDER = "/static/"
"""What needs no token: the page, which asks for one, the API's description, and probes."""
METRICS_PATH = "/metrics"
"""Needs a token, but neither room nor a service that goes on: a full service is to be seen as well."""
RETRY_AFTER_S = 1
LOGGED_CHARACTERS = 2000
INTERNAL = "an error of this service; its log says more under the answer's X-Request-ID"
SAFETY_HEADERS: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Refused(Exception):
    """A request that ends here, with the answer that says why."""

    def __init__(self, code: ErrorCode, message: str, status: int | None = None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = STATUS[code] if status is None else status


@dataclass
class Guard:
    """The gateway's outer layer. `digest`: of the token; none lets everybody in who comes by a loopback name."""

    app: App
    limits: LimitsConfig
    digest: str | None
    metrics: GatewayMetrics
    log_texts: bool = False
    draining: bool = False
    routes: frozenset[str] = frozenset()
    """Paths that metrics and log tell apart."""
    in_flight: int = field(default=0, init=False)
    """Requests under way that hold a place."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: MutableMapping[str, Any], receive: Receive, send: Send):
        self._guard = guard
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = {name.lower(): value for name, value in scope["headers"]}
        self._id = uuid.uuid4().hex
        self._body = b""
        self._status = 0
        self._sent = 0
        self._has_ended = False
        self._code: str | None = None
        scope.setdefault("state", {})["exchange"] = self

    async def run(self) -> None:
        started = time.monotonic()
        try:
            if self._takes_place():
                with self._place():
                    await self._read_and_answer()
            else:
                await self._read_and_answer(with_body=False)
        except Refused as refusal:
            await self._refuse(refusal)
        finally:
            self._report(time.monotonic() - started)

    async def _read_and_answer(self, with_body: bool = True) -> None:
        """To the end of the answer, whatever it is, so that a request holds its place until it has been told."""
        try:
            if with_body:
                await self._read_body()
            await self._answer()
        except Refused as refusal:
            await self._refuse(refusal)

    def note(self, code: str) -> None:
        """The error code of the answer, for the log."""
        self._code = code

    def _takes_place(self) -> bool:
        """Whether this request is one of those whose number is bounded. Raises Refused for one that may not be made."""
        path = self._scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if self._guard.digest is None:
            # A page of another site may make a browser call a loopback address, but under its own name only.
            if not is_loopback(_without_port(self._header(b"host"))):
                raise Refused("bad_request", "expected a Host header that names this machine's loopback address")
        elif not is_open and not matches(self._header(b"authorization"), self._guard.digest):
            raise Refused("unauthorized", "expected a header 'Authorization: Bearer TOKEN' with this service's token")
        return not is_open and path != METRICS_PATH

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Among the requests under way. Raises Refused if there is none."""
        guard = self._guard
        if guard.draining:
            raise Refused("unavailable", "this service is about to stop")
        if guard.in_flight >= guard.limits.in_flight:
            raise Refused("busy", "too many requests are under way")
        guard.in_flight += 1
        guard.metrics.in_flight.inc()
        try:
            yield
        finally:
            guard.in_flight -= 1
            guard.metrics.in_flight.dec()

    def _header(self, name: bytes) -> str:
        value: bytes = self._headers.get(name, b"")
        return value.decode("latin-1")

    async def _read_body(self) -> None:
        most = self._guard.limits.body_bytes
        too_large = Refused("too_large", f"the request's body is longer than {most} bytes")
        said = self._headers.get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > most:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._guard.limits.body_s):
                more = True
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Refused("bad_request", "the connection ended before the request did")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refused("timeout", "the request's body did not come in time", status=408) from None
        self._body = b"".join(chunks)

    async def _answer(self) -> None:
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": self._body, "more_body": False}
            return await self._receive()  # tells when the client has left

        try:
            async with asyncio.timeout(self._guard.limits.seconds):
                await self._guard.app(self._scope, receive, self._forward)
        except TimeoutError:
            raise Refused("timeout", f"no answer within {self._guard.limits.seconds:g} s") from None
        except Exception:
            _defects.exception("request %s", self._id)
            raise Refused("internal", INTERNAL) from None

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            extra = {**SAFETY_HEADERS, "x-request-id": self._id}
            if self._status == 503:
                extra["retry-after"] = str(RETRY_AFTER_S)
            headers = [*message.get("headers", []), *((k.encode(), v.encode()) for k, v in extra.items())]
            message = {**message, "headers": headers}
        else:
            self._sent += len(message.get("body", b""))
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def _refuse(self, refusal: Refused) -> None:
        self._code = refusal.code
        if self._status:  # the answer has begun: all that is left is to end it
            if not self._has_ended:
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        body = failed(refusal.code, refusal.message).model_dump_json().encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refusal.status in (408, 413):
            headers.append((b"connection", b"close"))  # what is left of the body is not read
        await self._forward({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self._forward({"type": "http.response.body", "body": body, "more_body": False})

    def _route(self) -> str:
        path = self._scope["path"]
        if path.startswith(OPEN_FOLDER):
            return OPEN_FOLDER
        return path if path in self._guard.routes else "unmatched"

    def _report(self, seconds: float) -> None:
        route = self._route()
        self._guard.metrics.count_request(route, self._status, seconds)
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self._id,
            "method": self._scope["method"] if len(self._scope["method"]) < 10 else "unknown",
            "route": route,
            "status": self._status,
            "error": self._code,
            "seconds": round(seconds, 4),
            "received": len(self._body),
            "sent": self._sent,
        }
        if self._guard.log_texts:
            line["body"] = self._body.decode("utf-8", "replace")[:LOGGED_CHARACTERS]
        logger.info(json.dumps(line))


def _without_port(host: str) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `[::1]`."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
