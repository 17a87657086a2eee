"""From a config to a simulator."""

from __future__ import annotations

from typing import Literal

import fsspec

from introspect_ray.config import ModelConfig, SimulatorConfig
from introspect_ray.explainer.card import is_remote
from introspect_ray.models.paths import check_model
from introspect_ray.simulator.base import Simulator
from introspect_ray.simulator.cache import CachedSimulator
from introspect_ray.simulator.finetuned import SIMULATOR_FILE, FinetunedSimulator, read_simulator_card
from introspect_ray.simulator.prompted import PromptedSimulator

Kind = Literal["finetuned", "published", "prompted"]


def check_simulator(config: SimulatorConfig) -> Kind:
    """Which kind it is, told without reading its weights. Raises UserError for what cannot be one."""
    kind = config.kind if config.kind != "auto" else _kind(config.model)
    if kind == "finetuned":
        read_simulator_card(config.model.path)
    if not is_remote(config.model.path):
        check_model(config.model)
    return kind


def load_simulator(config: SimulatorConfig | str) -> Simulator:
    """The simulator of a config, or of a folder or model path; with its memory, if the config gives it one.

    Raises UserError if it cannot be loaded.
    """
    if isinstance(config, str):
        config = SimulatorConfig(model=ModelConfig(path=config))
    kind, model = check_simulator(config), config.model
    simulator: Simulator
    if kind == "finetuned":
        simulator = FinetunedSimulator.load(model)
    elif kind == "published":
        simulator = FinetunedSimulator.load_published(model)
    else:
        simulator = PromptedSimulator.load(model)
    return CachedSimulator(simulator, config.cache_tokens) if config.cache_tokens else simulator


def _kind(model: ModelConfig) -> Kind:
    path = model.path.rstrip("/")
    filesystem, place = fsspec.core.url_to_fs(path)
    if not path.startswith("pocket:") and filesystem.exists(f"{place}/{SIMULATOR_FILE}"):
        return "finetuned"
    return "published" if path.endswith("_simulator") else "prompted"
