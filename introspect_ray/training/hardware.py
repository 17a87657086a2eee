"""What GPUs can do, by their data sheets: dense arithmetic without sparsity, at the top of what they are sold as."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from introspect_ray.config import GpuName


class Gpu(NamedTuple):
    """Memory in GiB, peak in FLOP/s, bandwidths in bytes/s and one direction."""

    memory_gib: float
    bf16_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    """To the other GPUs of its node: NVLink where it has one, else PCIe."""


GPUS: dict[GpuName, Gpu] = {
    "A10G-24": Gpu(22.0, 70e12, 600e9, 32e9),
    "A100-40": Gpu(39.4, 312e12, 1555e9, 300e9),
    "A100-80": Gpu(79.3, 312e12, 2039e9, 300e9),
    "B200-180": Gpu(178.0, 2250e12, 8000e9, 900e9),
    "H100-80": Gpu(79.2, 989e12, 3350e9, 450e9),
    "H200-141": Gpu(139.8, 989e12, 4800e9, 450e9),
    "L4-24": Gpu(22.0, 121e12, 300e9, 32e9),
    "L40S-48": Gpu(44.4, 362e12, 864e9, 32e9),
    "RTX4090-24": Gpu(23.5, 165e12, 1008e9, 32e9),
}
"""Memory is what the driver leaves to programs; PCIe is version 4 with 16 lanes."""


def gpu_named(accelerator_types: Iterable[str]) -> GpuName | None:
    """The GPU with most memory of all that Ray may mean by these types ("A100", "A100-40G"); none if there is no type,
    or one of them is not in the table."""
    found: list[GpuName] = []
    for kind in accelerator_types:
        alike = [name for name in GPUS if name == kind.removesuffix("G")]
        alike = alike or [name for name in GPUS if name.split("-")[0] == kind.split("-")[0]]
        if not alike:
            return None
        found += alike
    return max(found, key=lambda name: GPUS[name].memory_gib, default=None)


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU of a device's own name ("NVIDIA A100-SXM4-80GB"); none if it is not in the table.

    Memory sizes are not told apart, because arithmetic does not depend on them.
    """
    parts = {name.split("-")[0]: gpu for name, gpu in GPUS.items()}
    plain = device_name.replace(" ", "")
    return next((parts[part] for part in sorted(parts, key=len, reverse=True) if part in plain), None)
