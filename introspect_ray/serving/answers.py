"""What each route answers, put together from calls to the deployments. No HTTP and no Ray here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from introspect_ray.config import ServeConfig, ServedExplainer, ServedSimulator, TaskName
from introspect_ray.serving.api import (
    AblateRequest,
    Activations,
    ActivationsRequest,
    ErrorCode,
    ExplainRequest,
    Explanation,
    Explanations,
    Failed,
    LatentItem,
    Models,
    PatchRequest,
    Prediction,
    ScoreActivationsItem,
    Scored,
    ScoreLatentItem,
    ScoreRequest,
    Scores,
    Simulated,
    SimulateItem,
    SimulateRequest,
    Simulations,
    TokenItem,
    VectorItem,
    WhatIf,
    failed,
    within,
)
from introspect_ray.serving.calls import (
    EXPLAINERS,
    Busy,
    Retrying,
    Unavailable,
    simulator_deployment,
    target_deployment,
    together,
)
from introspect_ray.serving.scoring import pearson
from introspect_ray.serving.values import Question, TrueActivations, VectorAt

T = TypeVar("T")

ITEMS_PER_CALL = 16
"""Items of one request that one replica explains."""
READY_S = 5.0
"""Time in which every deployment must answer to be ready."""
READY_FOR_S = 1.0
"""Time for which the answer stands."""


class RequestFailed(Exception):
    """A whole request that is answered with an error."""

    def __init__(self, failure: Failed):
        super().__init__(failure.error.message)
        self.failure = failure


class Answers:
    """Answers requests about the models of a config. `count_item` hears `ok` or the error code of each item."""

    def __init__(
        self, config: ServeConfig, models: Models, calls: Retrying, count_item: Callable[[str], None] = lambda _: None
    ):
        self.models = models
        self._config = config
        self._calls = calls
        self._count_item = count_item
        self._targets = {one.name: one for one in models.targets}
        self._explainers = {one.name: one for one in config.explainers}
        self._simulators = {one.name: one for one in config.simulators}
        self._is_ready = False
        self._ready_until = 0.0
        self._asking_all = asyncio.Lock()
        self._deployments = [
            *map(target_deployment, self._targets),
            *map(simulator_deployment, self._simulators),
            *([EXPLAINERS] if self._explainers else []),
        ]

    async def activations(self, request: ActivationsRequest) -> Activations:
        self._check(request)
        self._known(request.target, self._targets, "target")
        answer: Activations | Failed = await self._calls.call(target_deployment(request.target), "activations", request)
        return _whole(answer)

    async def explain(self, request: ExplainRequest) -> Explanations:
        """Every item in its order, explained or failed."""
        served = self._explainer(request.explainer, "feature_description")
        self._check(request)
        found = await self._vectors(served, request.items)
        good = [number for number, one in enumerate(found) if isinstance(one, VectorAt)]
        chunks = [good[start : start + ITEMS_PER_CALL] for start in range(0, len(good), ITEMS_PER_CALL)]
        texts = await together(
            self._calls.call(
                EXPLAINERS, "describe", [found[n] for n in chunk], request.max_new_tokens, model=served.name
            )
            for chunk in chunks
        )
        said = dict(zip(good, (text for chunk in texts for text in chunk), strict=True))
        return Explanations(items=self._items([said.get(number, one) for number, one in enumerate(found)]))

    async def explain_stream(self, request: ExplainRequest) -> AsyncIterator[str | Explanation]:
        """Pieces of the explanation of the one item, then the whole. Raises RequestFailed, usually before the first."""
        served = self._explainer(request.explainer, "feature_description")
        self._check(request)
        if len(request.items) != 1:
            raise _failed("bad_request", f"expected one item to stream, found {len(request.items)}", "items")
        with self._one_item():
            (vector,) = await self._vectors(served, request.items)
            if isinstance(vector, Failed):
                raise RequestFailed(within(vector, "items.0"))
            arguments = vector, request.max_new_tokens
            async for piece in self._calls.stream(EXPLAINERS, "stream", *arguments, model=served.name):
                if isinstance(piece, Failed):
                    raise RequestFailed(within(piece, "items.0"))
                yield piece

    async def what_if(self, request: PatchRequest | AblateRequest) -> WhatIf:
        """What the explainer says of an intervention, beside what the target does."""
        is_patch = isinstance(request, PatchRequest)
        served = self._explainer(request.explainer, "activation_patching" if is_patch else "input_ablation")
        self._check(request)
        arguments = (request,) if is_patch else (request, served.questions)
        with self._one_item():
            question: Question = _whole(
                await self._calls.call(target_deployment(served.target), request.kind, *arguments)
            )
            prediction: Prediction = _whole(
                await self._calls.call(EXPLAINERS, "predict", question.query, model=served.name)
            )
        truth = question.truth
        agrees = (prediction.changed, prediction.content) == (truth.changed, truth.content)
        return WhatIf(clean=question.clean, truth=truth, prediction=prediction, agrees=agrees)

    async def simulate(self, request: SimulateRequest) -> Simulations:
        served = self._simulator(request.simulator)
        self._check(request)
        return Simulations(items=self._items(await self._simulated(served, request.items)))

    async def score(self, request: ScoreRequest) -> Scores:
        """Simulated and true activations of every item, and how well the one follows the other."""
        served = self._simulator(request.simulator)
        self._check(request)
        asked = [SimulateItem(description=one.description, text=one.text) for one in request.items]
        both: list[list[Any]] = await together(
            (self._simulated(served, asked), self._true_activations(served, request.items))
        )
        simulated, truths = both
        return Scores(items=self._items([_scored(*pair) for pair in zip(simulated, truths, strict=True)]))

    async def ready(self) -> bool:
        """Whether every deployment answers, as of at most a moment ago: anybody may ask, as often as they like."""
        async with self._asking_all:
            if time.monotonic() >= self._ready_until:
                self._is_ready = await self._all_answer()
                self._ready_until = time.monotonic() + READY_FOR_S
            return self._is_ready

    async def _all_answer(self) -> bool:
        pings = (self._calls.call(deployment, "ping") for deployment in self._deployments)
        try:
            async with asyncio.timeout(READY_S):
                found = await asyncio.gather(*pings, return_exceptions=True)
        except TimeoutError:
            return False
        return all(isinstance(one, int | Busy) for one in found)

    async def _simulated(self, served: ServedSimulator, items: Sequence[SimulateItem]) -> list[Simulated | Failed]:
        found: list[Simulated | Failed] = await self._calls.call(
            simulator_deployment(served.name), "simulate", list(items)
        )
        return found

    async def _true_activations(
        self, served: ServedSimulator, items: Sequence[ScoreLatentItem | ScoreActivationsItem]
    ) -> list[TrueActivations | Failed | list[float]]:
        """Those that items bring along, and those of latents, which are asked of the target in one call."""
        asked = [item for item in items if isinstance(item, ScoreLatentItem)]
        given: Iterator[TrueActivations | Failed] = iter(())
        if asked:
            given = iter(await self._calls.call(target_deployment(served.target), "true_activations", asked))
        return [next(given) if isinstance(item, ScoreLatentItem) else list(item.activations) for item in items]

    async def _vectors(self, served: ServedExplainer, items: Sequence[Any]) -> list[VectorAt | Failed]:
        """The vectors that the items stand for; texts and latents are asked of the target in one call."""
        asked = [item for item in items if isinstance(item, TokenItem | LatentItem)]
        given: Iterator[VectorAt | Failed] = iter(())
        if asked:
            given = iter(await self._calls.call(target_deployment(served.target), "vectors", asked))
        return [self._vector(served, item) if isinstance(item, VectorItem) else next(given) for item in items]

    def _vector(self, served: ServedExplainer, item: VectorItem) -> VectorAt | Failed:
        target = self._targets[served.target]
        if len(item.vector) != target.width:
            return failed("bad_request", f"{len(item.vector)} numbers found, expected {target.width}", "vector")
        if item.layer >= target.num_layers:
            message = f"layer {item.layer} is out of range: the model has layers 0 to {target.num_layers - 1}"
            return failed("bad_request", message, "layer")
        with np.errstate(over="ignore"):
            values = np.array(item.vector, dtype=np.float32)
        if not np.isfinite(values).all():
            return failed("bad_request", "a number is too large for float32", "vector")
        return VectorAt(values, item.layer)

    def _explainer(self, name: str, task: TaskName) -> ServedExplainer:
        served: ServedExplainer = self._known(name, self._explainers, "explainer")
        if task not in served.tasks:
            fitting = [one.name for one in self._explainers.values() if task in one.tasks]
            raise _failed(
                "bad_request",
                f"this explainer was not trained for {task}: {' or '.join(fitting) or 'none that is served'} was",
                "explainer",
            )
        return served

    def _simulator(self, name: str) -> ServedSimulator:
        served: ServedSimulator = self._known(name, self._simulators, "simulator")
        return served

    def _known(self, name: str, table: dict[str, T], kind: str) -> T:
        if name not in table:
            raise _failed("not_found", f"no {kind} of this name is served; GET /v1/models lists those that are", kind)
        return table[name]

    def _check(self, request: Any) -> None:
        """Limits that depend on the config."""
        limits = self._config.limits
        for field, text in request.texts():
            if len(text) > limits.text_characters:
                message = f"{len(text)} characters found, at most {limits.text_characters} are taken"
                raise _failed("too_large", message, field)
        count = len(getattr(request, "items", ()))
        if count > limits.items:
            raise _failed("too_large", f"{count} items found, at most {limits.items} are taken", "items")
        wanted = getattr(request, "max_new_tokens", None) or 0
        if wanted > limits.max_new_tokens:
            raise _failed(
                "bad_request", f"{wanted} asked for, at most {limits.max_new_tokens} are written", "max_new_tokens"
            )

    @contextmanager
    def _one_item(self) -> Iterator[None]:
        """Counts the one item of a request, which the block answers."""
        try:
            yield
        except RequestFailed as error:
            self._count_item(error.failure.error.code)
            raise
        except (Busy, Unavailable) as error:
            self._count_item("busy" if isinstance(error, Busy) else "unavailable")
            raise
        self._count_item("ok")

    def _items(self, items: Sequence[Any]) -> list[Any]:
        """The items, counted, each failure's field seen from the request."""
        found = [
            within(item, f"items.{number}") if isinstance(item, Failed) else item for number, item in enumerate(items)
        ]
        for item in found:
            self._count_item(item.error.code if isinstance(item, Failed) else "ok")
        return found


def _scored(simulated: Simulated | Failed, true: TrueActivations | Failed | list[float]) -> Scored | Failed:
    if isinstance(true, Failed):
        return true
    if isinstance(simulated, Failed):
        return simulated
    values = true if isinstance(true, list) else true.activations.tolist()
    if len(values) != len(simulated.activations):
        message = f"{len(values)} activations found, the text has {len(simulated.activations)} tokens"
        return failed("bad_request", message, "activations")
    score = pearson(np.array(simulated.activations), np.array(values, dtype=np.float64))
    return Scored(
        correlation=score.value,
        reason=score.reason,
        simulated=simulated.activations,
        true=values,
        tokens=simulated.tokens,
    )


def _whole(answer: T | Failed) -> T:
    if isinstance(answer, Failed):
        raise RequestFailed(answer)
    return answer


def _failed(code: ErrorCode, message: str, field: str) -> RequestFailed:
    return RequestFailed(failed(code, message, field))
