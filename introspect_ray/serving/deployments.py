"""The Ray actors of the service: thin shells around what a test calls without Ray.

    gateway --(texts, latents)--> TargetModel-NAME --(vectors, questions)--> gateway --> Explainer
            --(descriptions, texts)--> Simulator-NAME

Models run in one thread of their own, so that a replica answers health checks and collects the next batch meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve

from introspect_ray.config import BatchingConfig, LimitsConfig, ServeConfig, ServedSimulator, ServedTarget

if TYPE_CHECKING:  # torch loads in the replicas that need it
    from introspect_ray.explainer.query import Query
    from introspect_ray.serving.api import (
        AblateRequest,
        Activations,
        ActivationsRequest,
        Explanation,
        Failed,
        LatentItem,
        PatchRequest,
        Prediction,
        ScoreLatentItem,
        Simulated,
        SimulateItem,
        TokenItem,
    )
    from introspect_ray.serving.values import Question, TrueActivations, VectorAt

DEVICE_FAILED = 70
"""Exit status of a replica whose device failed."""


class _Replica:
    """What the replicas that hold models share."""

    def __init__(self) -> None:
        from introspect_ray.data.workers import use_assigned_threads
        from introspect_ray.serving.model_thread import ModelThread

        use_assigned_threads()
        self._thread = ModelThread(end=partial(os._exit, DEVICE_FAILED))

    async def ping(self) -> int:
        """Process id of this replica."""
        return os.getpid()


class TargetModel(_Replica):
    """A target with its coders."""

    def __init__(self, tree: dict[str, Any], batching: dict[str, Any], limits: dict[str, Any]):
        from introspect_ray.serving.batches import Batches
        from introspect_ray.serving.model_thread import by_request
        from introspect_ray.serving.target_model import TargetService

        super().__init__()
        self._service = TargetService.load(
            ServedTarget.model_validate(tree), limits=LimitsConfig.model_validate(limits)
        )
        self._vectors_by_request = by_request(self._service.vectors)
        self._true_activations_by_request = by_request(self._service.true_activations)
        config = BatchingConfig.model_validate(batching)
        self._vectors = Batches(self._run_vectors, config)
        self._true_activations = Batches(self._run_true_activations, config)

    async def activations(self, request: ActivationsRequest) -> Activations | Failed:
        return await self._thread.run(self._service.activations, request)

    async def vectors(self, items: Sequence[TokenItem | LatentItem]) -> list[VectorAt | Failed]:
        return await self._vectors.ask(items, items=len(items))

    async def _run_vectors(
        self, _: str, requests: list[Sequence[TokenItem | LatentItem]]
    ) -> list[list[VectorAt | Failed]]:
        return await self._thread.run_batch(self._vectors_by_request, requests)

    async def true_activations(self, items: Sequence[ScoreLatentItem]) -> list[TrueActivations | Failed]:
        return await self._true_activations.ask(items, items=len(items))

    async def _run_true_activations(
        self, _: str, requests: list[Sequence[ScoreLatentItem]]
    ) -> list[list[TrueActivations | Failed]]:
        return await self._thread.run_batch(self._true_activations_by_request, requests)

    async def patch(self, request: PatchRequest) -> Question | Failed:
        return await self._thread.run(self._service.patch, request)

    async def ablate(self, request: AblateRequest, layout: Any) -> Question | Failed:
        return await self._thread.run(self._service.ablate, request, layout)


class Explainer(_Replica):
    """All explainers; a replica holds some of them, and Serve sends a request to one that has its explainer."""

    def __init__(self, tree: dict[str, Any]):
        from introspect_ray.serving.batches import Batches
        from introspect_ray.serving.explainers import ExplainerService

        config = ServeConfig.model_validate(tree)
        device = "cuda" if config.explainer_replicas.num_gpus else "cpu"
        most = config.explainers_per_replica
        super().__init__()
        self._service = ExplainerService(config.explainers, device, most, config.batching.max_size)
        for served in config.explainers[:most]:
            self._service.load(served.name)
        self._described = Batches(self._run_described, config.batching)
        self._predicted = Batches(self._run_predicted, config.batching)

        async def load(name: str) -> str:
            await self._thread.run(self._service.load, name)
            return name

        # Tells Serve which explainers this replica holds, so that requests come here; the number is only known here.
        self._load = serve.multiplexed(max_num_models_per_replica=most)(load)

    async def describe(self, vectors: Sequence[VectorAt], max_new_tokens: int | None) -> list[Explanation | Failed]:
        return await self._described.ask((vectors, max_new_tokens), await self._here(), items=len(vectors))

    async def _run_described(
        self, name: str, requests: list[tuple[Sequence[VectorAt], int | None]]
    ) -> list[list[Explanation | Failed]]:
        describe = partial(self._service.describe, name)
        return await self._thread.run_batch(describe, requests, lambda request: len(request[0]))

    async def stream(self, vector: VectorAt, max_new_tokens: int | None) -> AsyncIterator[str | Explanation | Failed]:
        """Pieces of text, then the whole."""
        name, loop = await self._here(), asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        left = False

        def tell(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def run() -> Explanation | Failed:
            try:
                return self._service.stream(name, vector, max_new_tokens, tell, lambda: left)
            finally:
                tell(None)

        running = asyncio.ensure_future(self._thread.run(run))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await running
        finally:
            left = True

    async def predict(self, query: Query) -> Prediction | Failed:
        (found,) = await self._predicted.ask([query], await self._here())
        return found

    async def _run_predicted(self, name: str, requests: list[Sequence[Query]]) -> list[list[Prediction | Failed]]:
        from introspect_ray.serving.model_thread import by_request

        def predict(queries: list[Query]) -> list[Prediction | Failed]:
            return self._service.predict(name, queries)

        return await self._thread.run_batch(by_request(predict), requests)

    async def _here(self) -> str:
        """Name of the explainer that is asked for, after it was loaded."""
        name: str = await self._load(serve.get_multiplexed_model_id())
        return name


class Simulator(_Replica):
    """A simulator."""

    def __init__(self, tree: dict[str, Any], target: dict[str, Any], batching: dict[str, Any], limits: dict[str, Any]):
        from introspect_ray.serving.batches import Batches
        from introspect_ray.serving.model_thread import by_request
        from introspect_ray.serving.simulators import SimulatorService

        super().__init__()
        self._service = SimulatorService.load(
            ServedSimulator.model_validate(tree),
            ServedTarget.model_validate(target).model,
            LimitsConfig.model_validate(limits),
        )
        self._simulate_by_request = by_request(self._service.simulate)
        self._batches = Batches(self._run_simulated, BatchingConfig.model_validate(batching))

    async def simulate(self, items: Sequence[SimulateItem]) -> list[Simulated | Failed]:
        return await self._batches.ask(items, items=len(items))

    async def _run_simulated(self, _: str, requests: list[Sequence[SimulateItem]]) -> list[list[Simulated | Failed]]:
        return await self._thread.run_batch(self._simulate_by_request, requests)


class Gateway:
    """The HTTP API. Serve gives it the handles of the deployments that it was bound to."""

    def __init__(self, tree: dict[str, Any], models: dict[str, Any], digest: str | None, handles: dict[str, Any]):
        from introspect_ray.serving.api import Models
        from introspect_ray.serving.gateway import create_gateway
        from introspect_ray.serving.handles import ServeDeployments

        _log_to_stdout()
        name = serve.get_replica_context().replica_id.unique_id
        self._guard = create_gateway(
            ServeConfig.model_validate(tree), Models.model_validate(models), ServeDeployments(handles), digest, name
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._guard

    def ping(self) -> int:
        """Process id of this replica."""
        return os.getpid()

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._guard.draining = True

    def in_flight(self) -> int:
        """Requests under way."""
        return self._guard.in_flight


def _log_to_stdout() -> None:
    """Lines about requests go to the replica's own log file, which Ray keeps: bare, because each is JSON."""
    for name, form in (("", "%(asctime)s %(levelname)s %(message)s"), (".requests", "%(message)s")):
        logger = logging.getLogger(f"introspect_ray.serving{name}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(form))
        logger.handlers = [handler]
