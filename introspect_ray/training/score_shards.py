"""Shards of a scoring run: the descriptions of some latents, scored together and written in one step. No Ray here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from introspect_ray.config import ScoreDescriptionsConfig
from introspect_ray.data.scored_exemplars import Exemplars
from introspect_ray.data.storage import Folder
from introspect_ray.evaluation.description_scores import (
    Scored,
    Scores,
    SimulationScorer,
    score_candidates,
)
from introspect_ray.features.descriptions import Description, Score
from introspect_ray.simulator.base import Simulator
from introspect_ray.simulator.cache import CachedSimulator


@dataclass(frozen=True)
class Shard:
    """The descriptions of some latents, all that an actor is told beside the config."""

    index: int
    run_key: str
    descriptions: tuple[Description, ...]

    @property
    def name(self) -> str:
        return f"shards/shard-{self.index:05d}.json"


def write_shard(
    config: ScoreDescriptionsConfig,
    store: Exemplars,
    simulator: Simulator,
    shard: Shard,
) -> None:
    """Score the descriptions of a shard and write them in one step."""
    latents = {(one.layer, one.latent) for one in shard.descriptions}
    held_out = {key: store.read(key[1], config.held_out) for key in latents}
    train = {key: store.read(key[1], "train") for key in latents}
    if config.simulator.cache_tokens:
        simulator = CachedSimulator(simulator, config.simulator.cache_tokens)
    share = config.first_stage_share if config.first_stage == "tokens" else None
    scorers = [SimulationScorer(simulator, train, share)]
    rows = [asdict(one) for one in score_candidates(scorers, shard.descriptions, held_out)]
    content = {"run_key": shard.run_key, "shard": shard.index, "rows": rows}
    Folder(config.output).write(shard.name, json.dumps(content, ensure_ascii=False, allow_nan=False).encode())


def read_shard(folder: Folder, shard: Shard) -> list[Scored] | None:
    """A shard as it lies there; None if it is absent, torn, or of another run."""
    try:
        content = json.loads(folder.read(shard.name))
        if (content["run_key"], content["shard"]) != (shard.run_key, shard.index):
            return None
        rows = [_read(row) for row in content["rows"]]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return rows if [row.description for row in rows] == list(shard.descriptions) else None


def _read(row: dict[str, Any]) -> Scored:
    """What `asdict` made of it."""

    def scores(part: dict[str, Any]) -> Scores:
        return {name: Score(**score) for name, score in part.items()}

    halves = {name: None if row[name] is None else scores(row[name]) for name in ("selection", "report")}
    return Scored(Description(**row["description"]), scores(row["scores"]), **halves)
