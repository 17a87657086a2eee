"""Load on the service: latency at given rates of requests, and what dynamic batching is worth.

    rates      requests start at fixed times whatever becomes of those before (open loop), so that waiting counts
    update     the service is brought from the one to the other under clients that send nothing again
    kills      replicas of target, explainers, simulator and gateway are killed (SIGKILL) so many times under clients
               that send again what was lost, and that ask the simulator too
    batching   16 clients that each ask again at once (closed loop), with batches of up to 16 and one by one; both must
               give the library's own answers before anything is timed

Starts the service on this machine with the pocket target, the lexicon and two explainers: a small one (`--explainer`,
or an untrained one that starts from target A), where HTTP and Serve cost more than the model, and an untrained one of
the size of GPT-2 small (115M parameters), the smallest that people bring. Prints tables; the last line is one JSON
object with `batched`, `unbatched` (requests per second of the larger one), `ratio`, `small_ratio` (of the small one)
and `errors`.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import ray
import torch
from ray import serve
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from introspect_ray.config import (
    POCKET_FEATURES,
    BatchingConfig,
    ExplainerConfig,
    LimitsConfig,
    ModelConfig,
    ServeConfig,
    ServedCoder,
    ServedExplainer,
    ServedSimulator,
    ServedTarget,
)
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.sae import load_sae
from introspect_ray.features.windows import window
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.paths import resolve_model_path
from introspect_ray.models.tokens import encode_with_offsets
from introspect_ray.pocket.reader import ExactReader
from introspect_ray.serving.api import Explanation, LatentItem, Simulated, SimulateItem
from introspect_ray.serving.app import application
from introspect_ray.serving.calls import EXPLAINERS, simulator_deployment, target_deployment
from introspect_ray.serving.client import AsyncClient, Retries, ServiceError
from introspect_ray.serving.run import APPLICATION, Service, serving

LATENTS = {"small": 128, "larger": 32}
"""Latents that each explainer is asked about, one after the other."""
LEXICON = "lexicon"
SIMULATED = SimulateItem(description="the word tower", text="The landmark of Fokan is the tower.")
WIDTH, LAYERS, HEAD_WIDTH = 768, 12, 64
"""Of the larger explainer's model: those of GPT-2 small."""


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as place:
        folders = {
            "small": options.explainer or untrained(f"{place}/small", ModelConfig(device="cpu")),
            "larger": untrained(f"{place}/larger", ModelConfig(path=larger_model(f"{place}/model"), device="cpu")),
        }
        asked = {name: Asked(name, library_answers(folder, LATENTS[name])) for name, folder in folders.items()}
        small = asked["small"]
        rates: dict[str, dict[str, float]] = {name: {} for name in asked}
        errors = 0
        batched, unbatched = (config_of(folders, size) for size in (options.clients, 1))
        with serving(batched) as service:
            for kind in ("batched", "unbatched"):
                if kind == "unbatched":
                    errors += update(service, unbatched, small, options.clients)
                for name, one in asked.items():
                    errors += asyncio.run(check(service.url, one))
                    rates[name][kind], failed = asyncio.run(
                        closed_loop(service.url, one, options.clients, options.seconds)
                    )
                    errors += failed
                    print(
                        f"{name}, {kind}: {rates[name][kind]:.1f} requests/s with {options.clients} clients, ", end=""
                    )
                    print(f"{failed} errors", flush=True)
            errors += update(service, batched, small, options.clients)
            for rate in options.rates:
                errors += asyncio.run(open_loop(service.url, small, rate, options.seconds))
            if options.kills:
                errors += kills(service, replace(small, levels=library_levels()), options)
    ratios = {name: round(found["batched"] / found["unbatched"], 2) for name, found in rates.items()}
    found = {kind: round(rate, 1) for kind, rate in rates["larger"].items()}
    print(json.dumps({**found, "ratio": ratios["larger"], "small_ratio": ratios["small"], "errors": errors}))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explainer", help="folder of a small explainer of pocket:target_a")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--kills", type=int, default=0, help="of each kind of replica")
    parser.add_argument("--rates", type=float, nargs="*", default=[5, 20], help="requests per second")
    return parser.parse_args()


@dataclass(frozen=True)
class Asked:
    """An explainer of the service, and what the library says about the latents that it is asked about."""

    name: str
    expected: Sequence[str]
    levels: Sequence[float] | None = None
    """What the lexicon gives for `SIMULATED`, if it is to be asked as well."""

    async def ask(self, client: AsyncClient, number: int) -> bool:
        """Whether the answer about a latent is the library's; the numbers start again after the last one."""
        latent = number % len(self.expected)
        (answer,) = await client.explain(self.name, [LatentItem(kind="latent", coder="sae", latent=latent)])
        is_right = isinstance(answer, Explanation) and answer.explanation == self.expected[latent]
        if self.levels is None:
            return is_right
        (simulated,) = await client.simulate(LEXICON, [SIMULATED])
        return is_right and isinstance(simulated, Simulated) and simulated.activations == list(self.levels)


def larger_model(folder: str) -> str:
    """A model of target A's kind in the size of GPT-2 small, with random weights."""
    pocket = resolve_model_path("pocket:target_a")
    config = AutoConfig.from_pretrained(pocket)
    config.hidden_size, config.num_hidden_layers, config.head_dim = WIDTH, LAYERS, HEAD_WIDTH
    config.num_attention_heads = config.num_key_value_heads = WIDTH // HEAD_WIDTH
    config.intermediate_size = 4 * WIDTH
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pocket).save_pretrained(folder)
    return folder


def untrained(folder: str, model: ModelConfig) -> str:
    """An explainer that was never trained; it takes as long to answer as one that was."""
    info = TargetInfo(path="pocket:target_a", width=160, num_layers=4)
    Explainer.create(ExplainerConfig(model=model), info, seed=0).save(folder)
    return folder


def library_answers(folder: str, latents: int) -> list[str]:
    """What the explainer says about each latent, asked about one by one and without the service."""
    explainer, coder = Explainer.load(folder, "cpu", "float32"), load_sae("pocket:sae")
    before, after = POCKET_FEATURES.question.split("{vector}")
    vectors = [coder.feature_vectors[latent].numpy() for latent in range(latents)]
    return explainer.explain([Query((before, Vector(one, (coder.layer,)), after)) for one in vectors], batch_size=1)


def library_levels() -> list[float]:
    """What the lexicon says without the service."""
    tokenizer = load_tokenizer(ModelConfig())
    ids = encode_with_offsets(tokenizer, SIMULATED.text)[0][1:]
    (levels,) = ExactReader(tokenizer).simulate([SIMULATED.description], [window(ids, tokenizer)])
    return list(levels.tolist())


def config_of(folders: Mapping[str, str], batch_size: int) -> ServeConfig:
    return ServeConfig(
        port=0,
        quickstart=None,
        targets=(ServedTarget(coders=(ServedCoder(),)),),
        explainers=tuple(
            ServedExplainer(name=name, folder=folder, features=POCKET_FEATURES) for name, folder in folders.items()
        ),
        simulators=(ServedSimulator(name=LEXICON, kind="lexicon"),),
        batching=BatchingConfig(max_size=batch_size),
        limits=LimitsConfig(seconds=60),
    )


async def check(url: str, asked: Asked) -> int:
    """Answers that differ from the library's, all asked at once; also warms the service up."""
    async with AsyncClient(url) as client:
        right = await asyncio.gather(*(asked.ask(client, number) for number in range(len(asked.expected))))
    print(f"{asked.name}: {sum(right)} of {len(right)} answers equal the library's", flush=True)
    return len(right) - sum(right)


async def closed_loop(url: str, asked: Asked, clients: int, seconds: float) -> tuple[float, int]:
    """Answers per second, and errors, of clients that each ask again as soon as they are answered."""
    deadline = time.monotonic() + seconds
    counts = {"answers": 0, "errors": 0}

    async def run(start: int) -> None:
        async with AsyncClient(url, retries=Retries(most=0)) as client:
            number = start
            while time.monotonic() < deadline:
                try:
                    counts["answers" if await asked.ask(client, number) else "errors"] += 1
                except ServiceError:
                    counts["errors"] += 1
                number += clients

    started = time.monotonic()
    await asyncio.gather(*(run(number) for number in range(clients)))
    return counts["answers"] / (time.monotonic() - started), counts["errors"]


class Load:
    """Clients that ask without pause inside the block, and compare every answer with the library's."""

    def __init__(self, url: str, asked: Asked, clients: int, retries: Retries):
        self.answered = 0
        self.wrong = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(url, asked, clients, retries)))

    async def _run(self, url: str, asked: Asked, clients: int, retries: Retries) -> None:
        async def client(number: int) -> None:
            async with AsyncClient(url, retries=retries) as one:
                while not self._stopped.is_set():
                    try:
                        self.wrong += not await asked.ask(one, number)
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


def update(service: Service, config: ServeConfig, asked: Asked, clients: int) -> int:
    """Bring the service to another config while clients ask that send nothing again; requests lost or wrong."""
    with Load(service.url, asked, clients, Retries(most=0)) as load:
        load.wait(clients)
        started = time.monotonic()
        serve.run(application(config, service.models, digest=None), name=APPLICATION, route_prefix="/")
        took = time.monotonic() - started
        load.wait(2 * clients)
    print(f"update in {took:.0f} s: {load.answered} requests meanwhile, {load.wrong} lost or wrong", flush=True)
    return load.wrong


def kills(service: Service, asked: Asked, options: argparse.Namespace) -> int:
    """Wrong and lost answers while replicas die; prints how long it takes until there is another one."""
    with Load(service.url, asked, options.clients, Retries(most=20)) as load:
        for deployment in (target_deployment("target_a"), EXPLAINERS, simulator_deployment(LEXICON), "Gateway"):
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


async def open_loop(url: str, asked: Asked, rate: float, seconds: float) -> int:
    """Errors at `rate` requests per second; prints latencies from when a request was due."""
    latencies: list[float] = []
    errors: dict[str, int] = {}

    async with AsyncClient(url, retries=Retries(most=0)) as client:
        started = time.monotonic()

        async def run(number: int) -> None:
            due = started + number / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            try:
                if await asked.ask(client, number):
                    latencies.append(time.monotonic() - due)
                else:
                    errors["wrong"] = errors.get("wrong", 0) + 1
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
