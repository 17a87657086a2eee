"""Simulated levels on disk, so that no description is simulated twice on the same windows.

    SIMULATOR/WINDOWS/BLOCK.parquet    levels of some descriptions over the windows of one shard of texts

SIMULATOR and WINDOWS are digests of what they stand for, so runs of any config may share the folder; a file is written
whole or not at all, and two that hold the same description agree. U descriptions, N tokens of all windows of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from introspect_ray.data.arrays import read_arrays, write_arrays
from introspect_ray.data.storage import Folder
from introspect_ray.features.windows import Window
from introspect_ray.simulator.base import Simulator
from introspect_ray.tasks.base import stable_id


@dataclass(frozen=True)
class LevelCache:
    """Levels of one simulator."""

    url: str
    simulator: str
    """Digest of all that its levels depend on."""

    def read(self, windows: Sequence[Window]) -> tuple[dict[str, Float[np.ndarray, " N"]], dict[str, str]]:
        """Description -> levels (`nan` throughout where the simulator failed), and description -> why it failed."""
        key = windows_key(windows)
        folder = Folder(f"{self.url.rstrip('/')}/{self.simulator}/{key}")
        levels: dict[str, Float[np.ndarray, " N"]] = {}
        failed: dict[str, str] = {}
        for name in folder.names():
            found = read_arrays(folder, name, key) if name.endswith(".parquet") else None
            if found is None:
                continue
            arrays, note = found
            for number, description in enumerate(note["descriptions"]):
                if description not in note["failed"]:
                    levels[description] = arrays["levels"][number]
                elif description not in levels:
                    failed[description] = note["failed"][description]
        failed = {description: reason for description, reason in failed.items() if description not in levels}
        nothing = np.full(sum(map(len, windows)), np.nan, dtype=np.float32)
        return levels | dict.fromkeys(failed, nothing), failed

    def write(
        self,
        windows: Sequence[Window],
        descriptions: Sequence[str],
        levels: Float[np.ndarray, "U N"],
        failed: dict[str, str],
    ) -> None:
        """Keep the levels of some descriptions over all windows of a shard."""
        key = windows_key(windows)
        folder = Folder(f"{self.url.rstrip('/')}/{self.simulator}/{key}")
        note = {"descriptions": list(descriptions), "failed": failed}
        write_arrays(folder, f"{stable_id(list(descriptions))}.parquet", key, {"levels": levels}, note)


def windows_key(windows: Sequence[Window]) -> str:
    """Equal for equal windows in the same order."""
    return stable_id([[list(window.ids), list(window.pieces)] for window in windows])


def simulate_block(
    simulator: Simulator, descriptions: Sequence[str], windows: Sequence[Window]
) -> tuple[Float[np.ndarray, "U N"], dict[str, str]]:
    """Levels of every description over all windows side by side; where the simulator raises, `nan` and the reason.

    If the whole block fails, each description is tried alone, so that one does not take the others with it.
    """
    try:
        return _simulated(simulator, descriptions, windows), {}
    except Exception:
        rows, failed = [], {}
        for description in descriptions:
            try:
                rows.append(_simulated(simulator, [description], windows)[0])
            except Exception as error:
                rows.append(np.full(sum(map(len, windows)), np.nan, dtype=np.float32))
                failed[description] = f"{type(error).__name__}: {error}"
        return np.stack(rows), failed


def _simulated(
    simulator: Simulator, descriptions: Sequence[str], windows: Sequence[Window]
) -> Float[np.ndarray, "U N"]:
    told = [description for description in descriptions for _ in windows]
    levels = simulator.simulate(told, list(windows) * len(descriptions))
    return np.concatenate(levels).astype(np.float32).reshape(len(descriptions), -1)
