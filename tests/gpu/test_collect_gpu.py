"""On a GPU the scan of texts finds what it finds on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from introspect_ray.config import CollectConfig
from introspect_ray.data.scanning import Scanner, scan_texts
from introspect_ray.features.contexts import Text
from introspect_ray.pocket.sources import rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def test_a_scan_on_a_gpu_is_that_on_the_cpu() -> None:
    texts = [Text(number, number % 3, row["text"]) for number, row in enumerate(rows("text")[:200])]
    found = []
    for device in ("cpu", "cuda"):
        config = CollectConfig.model_validate(
            {"target": {"device": device}, "coders": ["pocket:sae", "pocket:transcoder"]}
        )
        found.append([scan.collector for scan in scan_texts(Scanner.load(config), config, texts)])
    for cpu, gpu in zip(*found, strict=True):
        assert (cpu.num_tokens, cpu.num_not_finite) == (gpu.num_tokens, gpu.num_not_finite)
        # A latent at its threshold may fire on one side alone.
        assert np.abs(cpu.counts - gpu.counts).sum() <= 1e-3 * cpu.counts.sum()
        np.testing.assert_allclose(gpu.maxima[cpu.counts > 2], cpu.maxima[cpu.counts > 2], rtol=1e-2)
