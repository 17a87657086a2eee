"""A pool of Ray actors that hold an explainer and answer queries.

    driver  queries -> chunks of fixed size -> whichever actor is free -> texts in the queries' order
The size of the pool changes speed and nothing else: a chunk is the same whoever answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import ray
import torch
from ray.util import ActorPool

from introspect_ray.config import ActorConfig, ExplainerConfig
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
        # Ray sets OMP_NUM_THREADS to the actor's CPUs; torch read it when it was imported, which may be earlier.
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))

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
    """`config.initial_size` actors for one explainer; leaves them to Ray to end when it goes out of scope."""

    def __init__(self, folder: str, config: ActorConfig, batch_size: int, progress: Callable[[int], None]):
        # Restarts bound the tries. A bound on calls would be used up within the seconds in which a lost node is not
        # known to be lost yet, and every call is refused at once.
        remote = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_restarts=2, max_task_retries=-1)(
            Answerer
        )
        device = "cuda" if config.num_gpus else "cpu"
        self._pool = ActorPool([remote.remote(folder, device) for _ in range(config.initial_size)])
        self._batch_size = batch_size
        self._progress = progress

    def answer(self, version: Version, queries: Sequence[Query]) -> list[str]:
        """One answer per query; `progress` hears the number of queries of every chunk that is done."""
        # Queries of equal length are answered together, so a chunk is as long as its longest query needs.
        order = sorted(range(len(queries)), key=lambda index: len(queries[index].text))
        size = self._batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        texts = [""] * len(queries)
        results = self._pool.map(
            lambda actor, chunk: actor.answer.remote(version, [queries[index] for index in chunk], size), chunks
        )
        for chunk, answers in zip(chunks, results, strict=True):
            for index, text in zip(chunk, answers, strict=True):
                texts[index] = text
            self._progress(len(chunk))
        return texts
