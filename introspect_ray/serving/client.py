"""Clients of the service, plain and async: the API's own types, and repetition where it is safe.

    with Client("http://127.0.0.1:8000") as client:
        answer = client.explain("feature_description", [TokenItem(kind="token", text="...", layer=1, position=3)])

Every request only reads, so one whose connection was lost, or whose answer says "later", is sent again after a pause
that doubles, or as long as `Retry-After` says. A stream is not, once a piece has come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx2

from introspect_ray.serving import api
from introspect_ray.serving.asking import (
    A,
    Ask,
    Attempts,
    Events,
    Retries,
    ServiceError,
    ask_activations,
    ask_explain,
    ask_models,
    ask_score,
    ask_simulate,
    ask_what_if,
    check,
    headers,
)

__all__ = ["AsyncClient", "Client", "Retries", "ServiceError"]

_STREAM = "/v1/explain/stream"
_ERRORS = (ServiceError, httpx2.TransportError)


class Client:
    """Waits for answers; all calls raise ServiceError. For one thread, or with a pool of connections for several."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 120,
        retries: Retries = Retries(),  # noqa: B008 - immutable
        **options: Any,
    ):
        """`token`: bearer token; none takes that of the environment variable. `options`: of httpx2.Client."""
        self._retries = retries
        self._http = httpx2.Client(base_url=url, headers=headers(token), timeout=timeout_s, **options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> api.Models:
        return self._ask(ask_models())

    def activations(
        self,
        target: str,
        text: str,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        vectors: bool = False,
    ) -> api.Activations:
        return self._ask(ask_activations(target, text, layers, positions, vectors))

    def explain(
        self, explainer: str, items: Sequence[api.ExplainItem], max_new_tokens: int | None = None
    ) -> list[api.Explanation | api.Failed]:
        return self._ask(ask_explain(explainer, items, max_new_tokens)).items

    def explain_stream(
        self, explainer: str, item: api.ExplainItem, max_new_tokens: int | None = None
    ) -> Iterator[str | api.Explanation]:
        """Pieces of text, then the whole."""
        body = ask_explain(explainer, [item], max_new_tokens).body
        attempts = Attempts(self._retries)
        while True:
            response, events, begun = None, Events(), False
            try:
                with self._http.stream("POST", _STREAM, json=body) as response:
                    if not response.is_success:
                        response.read()
                    check(response)
                    for line in response.iter_lines():
                        for piece in events.feed(line):
                            begun = True
                            yield piece
                events.check_done()
                return
            except _ERRORS as error:
                pause = attempts.pause_s(error, response, begun)
            time.sleep(pause)

    def what_if(self, request: api.PatchRequest | api.AblateRequest) -> api.WhatIf:
        return self._ask(ask_what_if(request))

    def simulate(self, simulator: str, items: Sequence[api.SimulateItem]) -> list[api.Simulated | api.Failed]:
        return self._ask(ask_simulate(simulator, items)).items

    def score(
        self, simulator: str, items: Sequence[api.ScoreLatentItem | api.ScoreActivationsItem]
    ) -> list[api.Scored | api.Failed]:
        return self._ask(ask_score(simulator, items)).items

    def _ask(self, ask: Ask[A]) -> A:
        attempts = Attempts(self._retries)
        while True:
            response = None
            try:
                response = self._http.request(ask.method, ask.path, json=ask.body)
                return ask.answer(response)
            except _ERRORS as error:
                pause = attempts.pause_s(error, response)
            time.sleep(pause)


class AsyncClient:
    """The same, for asyncio."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 120,
        retries: Retries = Retries(),  # noqa: B008 - immutable
        **options: Any,
    ):
        """See Client; `options`: of httpx2.AsyncClient."""
        self._retries = retries
        self._http = httpx2.AsyncClient(base_url=url, headers=headers(token), timeout=timeout_s, **options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self) -> api.Models:
        return await self._ask(ask_models())

    async def activations(
        self,
        target: str,
        text: str,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        vectors: bool = False,
    ) -> api.Activations:
        return await self._ask(ask_activations(target, text, layers, positions, vectors))

    async def explain(
        self, explainer: str, items: Sequence[api.ExplainItem], max_new_tokens: int | None = None
    ) -> list[api.Explanation | api.Failed]:
        return (await self._ask(ask_explain(explainer, items, max_new_tokens))).items

    async def explain_stream(
        self, explainer: str, item: api.ExplainItem, max_new_tokens: int | None = None
    ) -> AsyncIterator[str | api.Explanation]:
        """Pieces of text, then the whole."""
        body = ask_explain(explainer, [item], max_new_tokens).body
        attempts = Attempts(self._retries)
        while True:
            response, events, begun = None, Events(), False
            try:
                async with self._http.stream("POST", _STREAM, json=body) as response:
                    if not response.is_success:
                        await response.aread()
                    check(response)
                    async for line in response.aiter_lines():
                        for piece in events.feed(line):
                            begun = True
                            yield piece
                events.check_done()
                return
            except _ERRORS as error:
                pause = attempts.pause_s(error, response, begun)
            await asyncio.sleep(pause)

    async def what_if(self, request: api.PatchRequest | api.AblateRequest) -> api.WhatIf:
        return await self._ask(ask_what_if(request))

    async def simulate(self, simulator: str, items: Sequence[api.SimulateItem]) -> list[api.Simulated | api.Failed]:
        return (await self._ask(ask_simulate(simulator, items))).items

    async def score(
        self, simulator: str, items: Sequence[api.ScoreLatentItem | api.ScoreActivationsItem]
    ) -> list[api.Scored | api.Failed]:
        return (await self._ask(ask_score(simulator, items))).items

    async def _ask(self, ask: Ask[A]) -> A:
        attempts = Attempts(self._retries)
        while True:
            response = None
            try:
                response = await self._http.request(ask.method, ask.path, json=ask.body)
                return ask.answer(response)
            except _ERRORS as error:
                pause = attempts.pause_s(error, response)
            await asyncio.sleep(pause)
