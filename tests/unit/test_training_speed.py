"""Operations per token against a count by hand, and the line that people see."""

import pytest
import torch
from explainer_helpers import explainer

from introspect_ray.config import LoraConfig
from introspect_ray.training import speed
from introspect_ray.training.hardware import GPUS, gpu_of
from introspect_ray.training.speed import Speed, operations_per_token, peak_of
from introspect_ray.training.train import _note

# Two layers of width 32 with 4 heads, 2 of them for keys and values, and 64 units in the feed-forward part.
WEIGHTS = 2 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32 + 3 * 32 * 64)


def test_operations_are_counted_from_shapes(tmp_path):
    made = explainer(tmp_path)
    made.model.requires_grad_(False)
    assert operations_per_token(made) == 4 * WEIGHTS
    made.model.requires_grad_(True)
    assert operations_per_token(made) == 6 * WEIGHTS
    made.add_adapter(LoraConfig(rank=3, target_modules=("q_proj",)), seed=0)
    assert operations_per_token(made) == 4 * WEIGHTS + 6 * 2 * (2 * 3 * 32)


def test_share_of_the_peak_is_over_all_workers(tmp_path, monkeypatch):
    made = explainer(tmp_path)
    made.model.requires_grad_(True)
    assert peak_of(torch.device("cpu")) is None

    clock = iter([0.0, 10.0, 14.0, 20.0, 24.0])
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(clock))
    measured = Speed(made, num_workers=2)
    measured.start(100)
    assert measured.metrics(500) == {"tokens_per_second": 100.0}
    monkeypatch.setattr(speed, "peak_of", lambda _: 6 * WEIGHTS * 200.0)
    measured = Speed(made, num_workers=2)
    assert measured.metrics(400) == {"tokens_per_second": 100.0, "share_of_peak": 0.25}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H200", "H200-141"),
        ("NVIDIA L40S", "L40S-48"),
        ("NVIDIA L4", "L4-24"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24"),
    ],
)
def test_gpus_are_known_by_their_devices_names(device, name):
    found = gpu_of(device)
    assert found is not None and found.bf16_flops == GPUS[name].bf16_flops
    assert gpu_of("Some Other Accelerator") is None


def test_the_line_that_people_see():
    line = {"step": 4, "loss": 1.23456, "tokens_per_second": 12345.6}
    assert _note([line], "exact_match") == "loss 1.235, 12,346 tokens/s"
    lines = [
        {**line, "validation": {"exact_match": 0.5}},
        {**line, "validation": {"exact_match": 0.25}},
        {**line, "validation": {"exact_match": None}},
        {**line, "share_of_peak": 0.4321},
    ]
    assert _note(lines, "exact_match") == ("loss 1.235, 12,346 tokens/s, 43% of peak, exact_match 0.250 (best 0.500)")
