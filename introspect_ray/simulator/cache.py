"""Pairs that were simulated before are not simulated again: descriptions collide, and windows are shared by latents."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from introspect_ray.features.windows import Window
from introspect_ray.simulator.base import Simulator

Key = bytes


def pair_key(description: str, window: Window) -> Key:
    """16 bytes that are equal for equal descriptions and windows."""
    digest = hashlib.blake2b(description.encode(), digest_size=16)
    digest.update(
        b"\x1f" + np.asarray(window.ids, dtype="<i8").tobytes() + b"\x1f" + "\x1f".join(window.pieces).encode()
    )
    return digest.digest()


class CachedSimulator:
    """The levels of another simulator, each pair asked for once as long as it is remembered."""

    def __init__(self, simulator: Simulator, max_tokens: int = 10_000_000):
        """`max_tokens`: levels kept, 4 bytes each; the pairs unused for longest are forgotten first."""
        self.simulator = simulator
        self.max_tokens = max_tokens
        self._kept: OrderedDict[Key, Float[np.ndarray, " T"]] = OrderedDict()
        self._tokens = 0

    def simulate(self, descriptions: Sequence[str], windows: Sequence[Window]) -> list[Float[np.ndarray, " T"]]:
        """See `Simulator.simulate`."""
        keys = [pair_key(*pair) for pair in zip(descriptions, windows, strict=True)]
        fresh = list({key: index for index, key in enumerate(keys) if key not in self._kept}.values())
        levels = self.simulator.simulate([descriptions[index] for index in fresh], [windows[index] for index in fresh])
        found = {keys[index]: row.astype(np.float32) for index, row in zip(fresh, levels, strict=True)}
        answers = [found[key] if key in found else self._kept[key] for key in keys]
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
        for key, row in found.items():
            self._kept[key] = row
            self._tokens += len(row)
        while self._tokens > self.max_tokens:
            self._tokens -= len(self._kept.popitem(last=False)[1])
        return [row.astype(np.float64) for row in answers]
