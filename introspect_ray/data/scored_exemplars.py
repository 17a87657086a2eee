"""What descriptions are scored on: exemplars of a coder's latents, or of vectors that are no latents.

A vector takes a latent's place: its layer, the number of its row, and as activation the projection of a token on it,
zero where negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_files import MANIFEST_FILE, CollectedVector, VectorSet, open_vectors
from introspect_ray.errors import UserError
from introspect_ray.features.exemplar_store import LatentStats, SplitName, open_exemplars
from introspect_ray.features.exemplars import LatentExemplars

Key = tuple[int, int]
"""Layer and number of a latent, or of a vector."""


class About(Protocol):
    """What a source of exemplars says about itself."""

    @property
    def run_key(self) -> str: ...
    @property
    def coder(self) -> str: ...
    @property
    def coder_digest(self) -> str: ...
    @property
    def layer(self) -> int | str: ...


class Exemplars(Protocol):
    """Exemplars by latent, such as `ExemplarStore`."""

    @property
    def url(self) -> str: ...
    @property
    def meta(self) -> About: ...
    def latents(self) -> list[LatentStats]: ...
    def read(self, latent: int, split: SplitName | None = None) -> LatentExemplars: ...


@dataclass(frozen=True)
class VectorMeta:
    """What there is in place of a coder."""

    run_key: str
    coder: str
    coder_digest: str
    layer: str


class VectorStore:
    """Vectors of collect_vectors.py in the place of latents."""

    def __init__(self, url: str, found: VectorSet):
        self.url = url
        self.vectors = found.vectors
        manifest: dict[str, Any] = found.manifest
        config = manifest["config"]
        self.meta = VectorMeta(
            run_key=manifest["run_key"],
            coder=f"vectors of {config['target']['path']}",
            coder_digest=manifest["digest"],
            layer=", ".join(map(str, config["layers"])),
        )

    def latents(self) -> list[LatentStats]:
        """All vectors, by layer and number."""
        found = [one.exemplars for one in self.vectors]
        stats = [LatentStats(one.layer, one.latent, one.density, one.maximum) for one in found]
        return sorted(stats, key=lambda one: (one.layer, one.latent))

    def read(self, latent: int, split: SplitName | None = None) -> LatentExemplars:
        """See `ExemplarStore.read`. Raises UserError for the test split, which the vectors themselves are of."""
        if split == "test":
            raise UserError(f"vectors {self.url} are of test texts and have no exemplars of them: expected validation")
        vector = self._vector(latent)
        return vector.exemplars if split is None else vector.of_split(split)

    def groups(self) -> dict[Key, str]:
        """What vectors come from, a text or a subject; those of one are no independent evidence, on any layer."""
        return {(one.layer, one.exemplars.latent): one.group for one in self.vectors}

    def _vector(self, number: int) -> CollectedVector:
        if not 0 <= number < len(self.vectors):
            raise UserError(f"{self.url} has vectors 0 to {len(self.vectors) - 1}, none is {number}")
        return self.vectors[number]


def open_scored(url: str) -> Exemplars:
    """Exemplars of a coder, see `open_exemplars`, or of vectors. Raises UserError if the folder holds neither."""
    if Folder(url).size(MANIFEST_FILE) is not None:
        return VectorStore(url, open_vectors(url))
    return open_exemplars(url)


def check_windows(store: Exemplars, latent: int, split: SplitName) -> None:
    """Refuse a split without random windows, in which nothing says what silence is like. Raises UserError.

    They are the same for all latents, so one is looked at.
    """
    if not store.read(latent, split).of_kind("random"):
        raise UserError(
            f"exemplars {store.url} have no random windows of {split} texts: expected some, without which the natural"
            " base rate is not known"
        )
