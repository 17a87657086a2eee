"""On a GPU: simulators give the levels that they give on the CPU, shared prefixes or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from introspect_ray.config import ModelConfig
from introspect_ray.features.windows import Window, window
from introspect_ray.simulator.finetuned import FinetunedSimulator
from introspect_ray.simulator.prompted import PromptedSimulator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

TEXTS = ("She packed the coat.", "The farm has a horse, a barn and a cow.", "In the barn")


@pytest.mark.parametrize("kind", [FinetunedSimulator.create, PromptedSimulator.load])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.25)])
def test_levels_are_those_of_the_cpu(kind, dtype, tolerance, monkeypatch) -> None:
    monkeypatch.setattr("introspect_ray.simulator.passes.SHARED_FROM", 8)
    cpu = kind(ModelConfig(device="cpu"))
    gpu = kind(ModelConfig(device="cuda", dtype=dtype))
    windows: list[Window] = [
        window(cpu.tokenizer(text, add_special_tokens=False).input_ids, cpu.tokenizer) for text in TEXTS * 3
    ]
    descriptions = ["the word barn"] * 7 + ["names of people"] * 2
    for one, other in zip(cpu.simulate(descriptions, windows), gpu.simulate(descriptions, windows), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)
