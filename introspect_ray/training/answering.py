"""A pool of Ray actors that hold an explainer and answer queries.

    driver  queries -> chunks of fixed size -> whichever actor is free -> texts in the queries' order
The size of the pool changes speed and nothing else: a chunk is the same whoever answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from introspect_ray.config import ActorConfig, ExplainerConfig
from introspect_ray.data.workers import WorkerPool, use_assigned_threads
from introspect_ray.explainer.card import read_card
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query

Version = Literal["trained", "untrained"]
"""An explainer as it was saved, or the model that it started from, which reads vectors as they are."""


class Answerer:
    """Holds one version of one explainer at a time."""

    def __init__(self, folder: str, device: str):
        self.folder, self.device = folder, device
        self.loaded: tuple[Version, Explainer] | None = None
        use_assigned_threads()

    def answer(self, version: Version, queries: Sequence[Query], batch_size: int) -> list[str]:
        """One answer per query."""
        if self.loaded is None or self.loaded[0] != version:
            self.loaded = None  # the old one's memory is needed for the new one
            self.loaded = (version, load_version(self.folder, version, self.device))
        return self.loaded[1].explain(queries, batch_size)


def load_version(folder: str, version: Version, device: str) -> Explainer:
    """The saved explainer, or an untrained one of the same kind."""
    card = read_card(folder)
    if version == "trained":
        return Explainer.load(folder, device, card.base.dtype)
    start = ExplainerConfig(
        model=card.base.model_copy(update={"device": device}),
        projection=card.projection,
        vector_scale=None,
        max_new_tokens=card.max_new_tokens,
    )
    return Explainer.create(start, card.target, seed=0).eval()


class AnswerPool:
    """Actors for one explainer."""

    def __init__(self, folder: str, config: ActorConfig, batch_size: int, progress: Callable[[int], None]):
        self._pool = WorkerPool(Answerer, (folder, "cuda" if config.num_gpus else "cpu"), config)
        self._batch_size = batch_size
        self._progress = progress

    def answer(self, version: Version, queries: Sequence[Query]) -> list[str]:
        """One answer per query; `progress` hears the number of queries of every chunk that is done.

        Raises UserError if the explainer cannot be loaded, RunFailed if its process dies again and again.
        """
        return next(self.answer_groups(version, [queries]))

    def answer_groups(self, version: Version, groups: Sequence[Sequence[Query]]) -> Iterator[list[str]]:
        """The answers of every group as soon as they are there; the others are under way meanwhile."""
        size = self._batch_size
        chunks: list[list[list[int]]] = []
        for queries in groups:
            # Queries of equal length are answered together, so a chunk is as long as its longest query needs.
            order = sorted(range(len(queries)), key=lambda index, queries=queries: len(queries[index].text))  # type: ignore[misc]
            chunks.append([order[start : start + size] for start in range(0, len(order), size)])
        calls = [
            (version, [queries[index] for index in chunk], size)
            for queries, of_group in zip(groups, chunks, strict=True)
            for chunk in of_group
        ]
        answers = self._pool.map("answer", calls)
        for queries, of_group in zip(groups, chunks, strict=True):
            texts = [""] * len(queries)
            for chunk in of_group:
                for index, text in zip(chunk, next(answers), strict=True):
                    texts[index] = text
                self._progress(len(chunk))
            yield texts
