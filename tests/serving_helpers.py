"""The service without Ray: the gateway's ASGI application over services in this process, on the pocket world."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2

from introspect_ray.config import (
    POCKET_FEATURES,
    POCKET_QUESTIONS,
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
from introspect_ray.serving.calls import EXPLAINERS, simulator_deployment, target_deployment
from introspect_ray.serving.explainers import ExplainerService
from introspect_ray.serving.gateway import create_gateway
from introspect_ray.serving.simulators import SimulatorService
from introspect_ray.serving.table import served_models
from introspect_ray.serving.target_model import TargetService

TASKS = ("feature_description", "activation_patching", "input_ablation")
TARGET = ModelConfig(device="cpu")
LIMITS = LimitsConfig(text_characters=2000, text_tokens=200, items=8, body_bytes=100_000, body_s=1)


def untrained_explainer(folder: Path) -> str:
    """An explainer that starts from target A and was never trained: it answers something, always the same."""
    info = TargetInfo(path="pocket:target_a", width=160, num_layers=4)
    Explainer.create(ExplainerConfig(model=TARGET, max_new_tokens=6), info, seed=0).save(str(folder))
    return str(folder)


def serve_config(folder: str, **changes: Any) -> ServeConfig:
    """One target with its SAE, one explainer for all tasks, the lexicon."""
    explainer = ServedExplainer(
        name="all", folder=folder, tasks=TASKS, features=POCKET_FEATURES, questions=POCKET_QUESTIONS
    )
    return ServeConfig(
        quickstart=None,
        targets=(ServedTarget(model=TARGET, coders=(ServedCoder(),)),),
        explainers=(explainer,),
        simulators=(ServedSimulator(name="lexicon", kind="lexicon"),),
        **{
            "limits": LimitsConfig(text_characters=2000, text_tokens=200, items=8, body_bytes=100_000, body_s=1),
            **changes,
        },
    )


class LocalModels:
    """`calls.Deployments` over services in this process. `before` sees every call first, and may raise."""

    def __init__(self, config: ServeConfig):
        (target,), (simulator,) = config.targets, config.simulators
        self.target = TargetService.load(target, config.limits)
        self.explainer = ExplainerService(config.explainers, "cpu", 2, batch_size=8)
        self.simulator = SimulatorService.load(simulator, target.model, config.limits)
        self.services: dict[str, Any] = {
            target_deployment(target.name): self.target,
            simulator_deployment(simulator.name): self.simulator,
        }
        self.before: Callable[[str, str], None] = lambda *_: None

    async def call(self, deployment: str, method: str, *arguments: Any, model: str = "") -> Any:
        self.before(deployment, method)
        if method == "ping":
            return 1
        if deployment != EXPLAINERS:
            return getattr(self.services[deployment], method)(*arguments)
        if method == "describe":
            return self.explainer.describe(model, [arguments])[0]
        assert method == "predict"
        return self.explainer.predict(model, list(arguments))[0]

    async def stream(self, deployment: str, method: str, *arguments: Any, model: str = "") -> AsyncIterator[Any]:
        self.before(deployment, method)
        pieces: list[Any] = []
        whole = self.explainer.stream(model, *arguments, pieces.append, lambda: False)
        for piece in (*pieces, whole):
            self.before(deployment, "piece")
            yield piece


def gateway(config: ServeConfig, models: Any, digest: str | None = None) -> Any:
    return create_gateway(config, served_models(config), models, digest)


def http(app: Any, **options: Any) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://localhost", **options)
