"""The HTTP API: routes, errors, the page. What is answered is in answers.py, who may ask in guard.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.routing import Route

import introspect_ray
from introspect_ray.config import ServeConfig
from introspect_ray.serving import api, calls
from introspect_ray.serving.answers import Answers, RequestFailed
from introspect_ray.serving.api import STATUS, ErrorCode, Failed, failed
from introspect_ray.serving.guard import INTERNAL, METRICS_PATH, Guard
from introspect_ray.serving.metrics import GatewayMetrics

PAGE = Path(__file__).parent / "page"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failed, "description": text}
    for status, text in (
        (400, "The request cannot be answered as it is; `field` says why."),
        (401, "No token, or a wrong one."),
        (404, "No model of this name."),
        (408, "The request's body did not come in time."),
        (413, "The request is larger than the service's limits."),
        (503, "Try again after `Retry-After` seconds."),
    )
}
_CODES: dict[int, ErrorCode] = {404: "not_found", 413: "too_large"}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Events."}
}
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text."}
}


def create_gateway(
    config: ServeConfig, models: api.Models, deployments: calls.Deployments, digest: str | None, name: str = "gateway"
) -> Guard:
    """The ASGI application.

    Args:
        models: what is served, as GET /v1/models lists it.
        digest: of the token that requests need; none asks for none.
        name: of this gateway, in its metrics.
    """
    metrics = GatewayMetrics(name)
    retrying = calls.Retrying(deployments, config.limits.retries, metrics.count_lost)
    answers = Answers(config, models, retrying, metrics.count_item)
    app = FastAPI(
        title="introspect_ray",
        version=introspect_ray.__version__,
        description="Language models that explain their own computations, the models they explain, and simulators.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        responses=ERRORS,
    )
    guard = Guard(app, config.limits, digest, metrics, config.log_texts)
    _add_routes(app, answers, guard)
    _add_pages(app, metrics)
    _add_errors(app)
    guard.routes = frozenset(route.path for route in app.routes if isinstance(route, Route))
    return guard


def _add_routes(app: FastAPI, answers: Answers, guard: Guard) -> None:
    @app.get("/v1/models")
    async def models() -> api.Models:
        return answers.models

    @app.post("/v1/activations")
    async def activations(request: Annotated[api.ActivationsRequest, Body()]) -> api.Activations:
        return await answers.activations(request)

    @app.post("/v1/explain")
    async def explain(request: Annotated[api.ExplainRequest, Body()]) -> api.Explanations:
        return await answers.explain(request)

    @app.post("/v1/explain/stream", response_class=StreamingResponse, responses=_STREAM)
    async def explain_stream(request: Annotated[api.ExplainRequest, Body()]) -> StreamingResponse:
        """Events `token` {"text"}, then `done` {"explanation", "query", "layer"}; or `error` {"error"}."""
        events = _events(answers.explain_stream(request))
        first = await anext(events)  # what is wrong with the request is known by now, and has a status of its own
        return StreamingResponse(_after(first, events), media_type="text/event-stream", headers=_NO_BUFFERS)

    @app.post("/v1/what_if")
    async def what_if(request: Annotated[api.WhatIfRequest, Body()]) -> api.WhatIf:
        return await answers.what_if(request)

    @app.post("/v1/simulate")
    async def simulate(request: Annotated[api.SimulateRequest, Body()]) -> api.Simulations:
        return await answers.simulate(request)

    @app.post("/v1/score")
    async def score(request: Annotated[api.ScoreRequest, Body()]) -> api.Scores:
        return await answers.score(request)

    @app.get("/v1/health")
    async def health() -> api.Health:
        """This gateway is alive."""
        return api.Health(status="draining" if guard.draining else "ok")

    @app.get("/v1/ready")
    async def ready() -> api.Health:
        """Every deployment answers, and this service is not about to stop."""
        if guard.draining or not await answers.ready():
            raise RequestFailed(
                failed("unavailable", "about to stop" if guard.draining else "a deployment is starting")
            )
        return api.Health(status="ok")


def _add_pages(app: FastAPI, metrics: GatewayMetrics) -> None:
    @app.get(METRICS_PATH, response_class=Response, responses=_TEXT)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    document = json.dumps(description(app))  # of the routes so far: the page is no part of the API

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(document, media_type="application/json")

    if PAGE.is_dir():
        app.mount("/static", StaticFiles(directory=PAGE), name="static")

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestFailed)
    async def whole(request: Request, error: RequestFailed) -> Response:
        return _failure(request, error.failure)

    @app.exception_handler(calls.Busy)
    async def busy(request: Request, _error: calls.Busy) -> Response:
        return _failure(request, failed("busy", "too many requests are under way"))

    @app.exception_handler(calls.Unavailable)
    async def unavailable(request: Request, _error: calls.Unavailable) -> Response:
        return _failure(request, failed("unavailable", "a model is not available at the moment"))

    @app.exception_handler(Exception)
    async def defect(request: Request, _error: Exception) -> Response:
        return _failure(request, failed("internal", INTERNAL))  # the guard logs it

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _failure(request, _invalid(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "bad_request")
        return _failure(request, failed(code, str(error.detail)), error.status_code, error.headers)


_KINDS = ("token", "vector", "latent", "patch", "ablate")


def _invalid(error: Any) -> Failed:
    """What pydantic found first, without anything that the request says: not every message of its is without."""
    place: list[str] = []
    before: Any = None
    for part in error["loc"][1:]:
        # Between an item's number and its field stands the alternative that was read.
        is_alternative = part in _KINDS if before is None or isinstance(before, int) else False
        if not is_alternative and not str(part)[:1].isupper():
            place.append(str(part))
        before = part
    messages = {
        "json_invalid": "the body is no JSON",
        "extra_forbidden": "a key that is not known",
        "union_tag_invalid": f"expected one of {error.get('ctx', {}).get('expected_tags')}",
    }
    if error["type"] == "json_invalid":
        place = []
    elif error["type"] == "extra_forbidden":
        place.pop()
    elif error["type"] == "union_tag_invalid":
        place.append("kind")
    return failed("bad_request", messages.get(error["type"], error["msg"]), ".".join(place) or None)


def _failure(request: Request, failure: Failed, status: int | None = None, headers: Any = None) -> Response:
    request.scope["state"]["exchange"].note(failure.error.code)
    return JSONResponse(failure.model_dump(), status or STATUS[failure.error.code], headers)


_NO_BUFFERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def _events(pieces: AsyncIterator[str | api.Explanation]) -> AsyncIterator[bytes]:
    """Server-sent events of a stream. What fails after the first one is an event, too."""
    has_begun = False
    try:
        async for piece in pieces:
            if isinstance(piece, str):
                yield _event("token", {"text": piece})
            else:
                yield _event("done", piece.model_dump())
            has_begun = True
    except (RequestFailed, calls.Busy, calls.Unavailable) as error:
        if not has_begun:
            raise
        failure = error.failure if isinstance(error, RequestFailed) else failed("unavailable", "a model was lost")
        yield _event("error", failure.model_dump())


async def _after(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in events:
        yield event


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with this service's own errors in place of FastAPI's."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    return document
