"""Simulators: which one, how it is trained, and the jobs that train them and score descriptions with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from introspect_ray.config.base import Config
from introspect_ray.config.resources import ModelConfig


class SimulatorConfig(Config):
    """A simulator: a folder of jobs/train_simulator.py, P1's published checkpoint, or any model with a prompt."""

    model: ModelConfig = ModelConfig(path="runs/simulator")
    kind: Literal["auto", "finetuned", "published", "prompted"] = "auto"
    """`auto`: finetuned for a folder with simulator.json, published for a name that ends in _simulator, else
    prompted."""
    cache_tokens: Annotated[int, Field(ge=0)] = 10_000_000
    """Simulated levels that are remembered, so that equal pairs are simulated once; 0 remembers none."""
