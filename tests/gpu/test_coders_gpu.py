"""On a GPU: coders code there as on the CPU, and training there writes a coder that the CPU reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from introspect_ray.features.batch_topk import BatchTopKConfig, TranscoderTraining
from introspect_ray.features.coder import fraction_unexplained
from introspect_ray.features.sae import load_sae
from introspect_ray.features.sae_training import SaeTraining

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

CONFIG = BatchTopKConfig(
    num_latents=64, num_active=4, steps=150, batch_size=128, learning_rate=5e-3, dead_after=30, seed=0
)


def rows(seed: int) -> torch.Tensor:
    fixed, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    present = (torch.rand(2000, 32, generator=generator) < 0.08).float()
    return 5 * present @ torch.randn(32, 24, generator=fixed) + 1


@pytest.mark.parametrize("name", ["pocket:sae", "pocket:transcoder"])
def test_a_coder_on_the_gpu_says_what_it_says_on_the_cpu(name: str) -> None:
    coder = load_sae(name)
    x = 5 * torch.randn(300, coder.encoder.shape[0], generator=torch.Generator().manual_seed(1))
    found, expected = coder.to("cuda").forward(x.cuda()).cpu(), coder.forward(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_transcoder_trained_on_the_gpu_goes_on_from_its_snapshot() -> None:
    x = rows(1)
    y = x.roll(1, dims=1) + x.relu()
    training = TranscoderTraining.begun(x, y, CONFIG, "cuda")
    for step in range(CONFIG.steps):
        if step == 70:
            training = TranscoderTraining.restored(training.snapshot(), CONFIG, "cuda")
        training.step(x[(step * 128) % 1800 :][:128], y[(step * 128) % 1800 :][:128])
    coder = training.coder(0)
    assert coder.encoder.device.type == "cpu" and fraction_unexplained(coder.forward(x), y) < 0.1


def test_sae_trained_on_the_gpu_is_read_on_the_cpu(tmp_path: Path) -> None:
    x = rows(2)
    settings = ({"hook_name": "blocks.1.hook_resid_post"}, "batchtopk", 1.0, "cuda")
    training = SaeTraining.begun(x, CONFIG, *settings)
    for step in range(CONFIG.steps):
        if step == 70:
            training = SaeTraining.restored(training.snapshot(), CONFIG, *settings)
        training.step(x[(step * 128) % 1800 :][:128])
    training.save(tmp_path)
    assert fraction_unexplained(load_sae(str(tmp_path)).forward(x), x) < 0.5
