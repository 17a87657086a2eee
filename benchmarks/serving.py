"""Load on the service: latency at given rates of requests, and what dynamic batching is worth.

    rates      requests start at fixed times whatever becomes of those before (open loop), so that waiting counts
    update     the service is brought from the one to the other under clients that send nothing again
    kills      every kind of replica is killed (SIGKILL) so many times under clients that send again what was lost
    batching   16 clients that each ask again at once (closed loop), with batches of up to 16 and one by one; both must
               give the library's own answers before anything is timed

Starts the service on this machine with the pocket target and one explainer: `--explainer FOLDER`, or an untrained one
that starts from target A. Prints tables; the last line is one JSON object with `batched`, `unbatched` (requests per
second), `ratio` and `errors`.

    python benchmarks/serving.py --rates 5 20 40 --kills 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import ray
from ray import serve

from introspect_ray.config import (
    POCKET_FEATURES,
    BatchingConfig,
    ExplainerConfig,
    LimitsConfig,
    ModelConfig,
    ServeConfig,
    ServedCoder,
    ServedExplainer,
    ServedTarget,
)
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.sae import load_sae
from introspect_ray.serving.api import Explanation, LatentItem
from introspect_ray.serving.app import application
from introspect_ray.serving.calls import EXPLAINERS, target_deployment
from introspect_ray.serving.client import AsyncClient, Retries, ServiceError
from introspect_ray.serving.run import APPLICATION, Service, serving

NAME = "explainer"
LATENTS = 128
"""Latents that are asked about, one after the other."""


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as place:
        folder = options.explainer or untrained(f"{place}/explainer")
        expected = library_answers(folder)
        found: dict[str, Any] = {"errors": 0}
        batched, unbatched = (config_of(folder, size) for size in (options.clients, 1))
        with serving(batched) as service:
            for kind in ("batched", "unbatched"):
                if kind == "unbatched":
                    found["errors"] += update(service, unbatched, expected, options.clients)
                found["errors"] += asyncio.run(check(service.url, expected))
                rate, errors = asyncio.run(closed_loop(service.url, options.clients, options.seconds))
                found[kind] = round(rate, 1)
                found["errors"] += errors
                print(f"{kind}: {rate:.1f} requests/s with {options.clients} clients, {errors} errors", flush=True)
            found["errors"] += update(service, batched, expected, options.clients)
            for rate in options.rates:
                found["errors"] += asyncio.run(open_loop(service.url, rate, options.seconds))
            if options.kills:
                found["errors"] += kills(service, expected, options)
        found["ratio"] = round(found["batched"] / found["unbatched"], 2)
    print(json.dumps({key: found[key] for key in ("batched", "unbatched", "ratio", "errors")}))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explainer", help="folder of an explainer of pocket:target_a")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--kills", type=int, default=0, help="of each kind of replica")
    parser.add_argument("--rates", type=float, nargs="*", default=[5, 20], help="requests per second")
    return parser.parse_args()


def untrained(folder: str) -> str:
    """An explainer that was never trained; it takes as long to answer as one that was."""
    info = TargetInfo(path="pocket:target_a", width=160, num_layers=4)
    Explainer.create(ExplainerConfig(model=ModelConfig(device="cpu")), info, seed=0).save(folder)
    return folder


def library_answers(folder: str) -> list[str]:
    """What the explainer says about each latent, asked about one by one and without the service."""
    explainer, coder = Explainer.load(folder, "cpu", "float32"), load_sae("pocket:sae")
    before, after = POCKET_FEATURES.question.split("{vector}")
    vectors = [coder.feature_vectors[latent].numpy() for latent in range(LATENTS)]
    return explainer.explain([Query((before, Vector(one, (coder.layer,)), after)) for one in vectors], batch_size=1)


def config_of(folder: str, batch_size: int) -> ServeConfig:
    return ServeConfig(
        port=0,
        quickstart=None,
        targets=(ServedTarget(coders=(ServedCoder(),)),),
        explainers=(ServedExplainer(name=NAME, folder=folder, features=POCKET_FEATURES),),
        simulators=(),
        batching=BatchingConfig(max_size=batch_size),
        limits=LimitsConfig(seconds=30),
    )


async def ask(client: AsyncClient, number: int) -> str:
    (answer,) = await client.explain(NAME, [LatentItem(kind="latent", coder="sae", latent=number % LATENTS)])
    return answer.explanation if isinstance(answer, Explanation) else answer.error.message


async def check(url: str, expected: Sequence[str]) -> int:
    """Answers that differ from the library's, all asked at once; also warms the service up."""
    async with AsyncClient(url) as client:
        texts = await asyncio.gather(*(ask(client, number) for number in range(len(expected))))
    wrong = sum(text != right for text, right in zip(texts, expected, strict=True))
    print(f"{len(expected) - wrong} of {len(expected)} answers equal the library's", flush=True)
    return wrong


async def closed_loop(url: str, clients: int, seconds: float) -> tuple[float, int]:
    """Answers per second, and errors, of clients that each ask again as soon as they are answered."""
    deadline = time.monotonic() + seconds
    counts = {"answers": 0, "errors": 0}

    async def run(start: int) -> None:
        async with AsyncClient(url, retries=Retries(most=0)) as client:
            number = start
            while time.monotonic() < deadline:
                try:
                    await ask(client, number)
                    counts["answers"] += 1
                except ServiceError:
                    counts["errors"] += 1
                number += clients

    started = time.monotonic()
    await asyncio.gather(*(run(number) for number in range(clients)))
    return counts["answers"] / (time.monotonic() - started), counts["errors"]


class Load:
    """Clients that ask without pause inside the block, and compare every answer with the library's."""

    def __init__(self, url: str, expected: Sequence[str], clients: int, retries: Retries):
        self.answered = 0
        self.wrong = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(url, expected, clients, retries)))

    async def _run(self, url: str, expected: Sequence[str], clients: int, retries: Retries) -> None:
        async def client(number: int) -> None:
            async with AsyncClient(url, retries=retries) as one:
                while not self._stopped.is_set():
                    try:
                        self.wrong += await ask(one, number) != expected[number % LATENTS]
                    except ServiceError:
                        self.wrong += 1
                    self.answered += 1
                    number += clients

        await asyncio.gather(*map(client, range(clients)))

    def wait(self, answers: int) -> None:
        """Until so many more have come."""
        enough = self.answered + answers
        while self.answered < enough:
            time.sleep(0.05)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def update(service: Service, config: ServeConfig, expected: Sequence[str], clients: int) -> int:
    """Bring the service to another config while clients ask that send nothing again; requests lost or wrong."""
    with Load(service.url, expected, clients, Retries(most=0)) as load:
        load.wait(clients)
        started = time.monotonic()
        serve.run(application(config, service.models, digest=None), name=APPLICATION, route_prefix="/")
        took = time.monotonic() - started
        load.wait(2 * clients)
    print(f"update in {took:.0f} s: {load.answered} requests meanwhile, {load.wrong} lost or wrong", flush=True)
    return load.wrong


def kills(service: Service, expected: Sequence[str], options: argparse.Namespace) -> int:
    """Wrong and lost answers while replicas die; prints how long it takes until there is another one."""
    with Load(service.url, expected, options.clients, Retries(most=20)) as load:
        for deployment in (target_deployment("target_a"), EXPLAINERS, "Gateway"):
            took = []
            for _ in range(options.kills):
                process = process_of(deployment)
                os.kill(process, signal.SIGKILL)
                died = time.monotonic()
                while process_of(deployment) == process:
                    time.sleep(0.05)
                took.append(time.monotonic() - died)
                load.wait(4 * options.clients)
            print(f"{deployment}: killed {options.kills} times, another after {max(took):.1f} s at most", flush=True)
    print(f"{load.answered} requests while replicas died, {load.wrong} lost or wrong", flush=True)
    return load.wrong


@lru_cache
def handle_of(deployment: str) -> serve.handle.DeploymentHandle:
    return serve.get_deployment_handle(deployment, APPLICATION)


def process_of(deployment: str) -> int:
    """Process id of the one replica of a deployment, as soon as there is one that answers."""
    while True:
        try:
            found = handle_of(deployment).broadcast("ping").results(timeout_s=5)
        except (TimeoutError, RuntimeError, ray.exceptions.RayError, serve.exceptions.RayServeException):
            found = []
        if len(found) == 1:
            return found[0]
        time.sleep(0.05)


async def open_loop(url: str, rate: float, seconds: float) -> int:
    """Errors at `rate` requests per second; prints latencies from when a request was due."""
    latencies: list[float] = []
    errors: dict[str, int] = {}

    async with AsyncClient(url, retries=Retries(most=0)) as client:
        started = time.monotonic()

        async def run(number: int) -> None:
            due = started + number / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            try:
                await ask(client, number)
                latencies.append(time.monotonic() - due)
            except ServiceError as error:
                errors[error.error.code] = errors.get(error.error.code, 0) + 1

        await asyncio.gather(*(run(number) for number in range(round(rate * seconds))))
        took = time.monotonic() - started
    shares = (
        ", ".join(f"p{share} {np.percentile(latencies, share) * 1000:.0f} ms" for share in (50, 90, 99))
        if latencies
        else "no answer"
    )
    print(f"{rate:g} requests/s asked: {len(latencies) / took:.1f} answered/s, {shares}, errors {errors}", flush=True)
    return sum(errors.values())


if __name__ == "__main__":
    sys.exit(main())
