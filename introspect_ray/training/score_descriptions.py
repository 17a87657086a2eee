"""Scoring descriptions on Ray: actors hold the simulator, shards of latents go through them, files are written once.

    driver  checks (no Ray, no model) -> claim folder -> shards that are not there -> WorkerPool
    actors  ScoreWorker: simulator loaded once; per shard: exemplars read, all candidates scored -> shards/shard-k.json
    driver  all shards -> descriptions.jsonl, controls.jsonl, best.jsonl, scores.json, report.html

A shard is written whole or not at all, by whoever is asked: a dead actor and a repeated order end in the same file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from introspect_ray.config import ActorConfig, ScoreDescriptionsConfig, SimulatorConfig, resolved
from introspect_ray.data.claim import Claim
from introspect_ray.data.cluster import connect
from introspect_ray.data.description_files import keep_coder_digest, write_descriptions
from introspect_ray.data.identity import identify_target
from introspect_ray.data.pool import check_resources
from introspect_ray.data.scored_exemplars import Exemplars, VectorStore, check_windows, open_scored
from introspect_ray.data.storage import Folder
from introspect_ray.data.workers import WorkerPool, use_assigned_threads
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.evaluation.description_scores import (
    FAILED,
    Scored,
    best_of,
    check_sources,
    control_descriptions,
)
from introspect_ray.evaluation.description_summary import render_scores, summarise, summary_json, summary_table
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.explainer.card import is_remote
from introspect_ray.features.descriptions import Description, by_latent, description_lines
from introspect_ray.models.paths import absolute, with_absolute_path
from introspect_ray.simulator.base import Simulator
from introspect_ray.simulator.finetuned import LatentSplit
from introspect_ray.simulator.loading import check_simulator, load_simulator
from introspect_ray.simulator.scores import NOT_FINITE
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.score_shards import Shard, read_shard, write_shard
from introspect_ray.training.simulator_run import candidates_of, drawn
from introspect_ray.training.simulator_split import part_of, split_of_simulator

SCORES_NAME, REPORT_NAME, BEST_NAME, CONTROLS_NAME = "scores.json", "report.html", "best.jsonl", "controls.jsonl"
logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""(descriptions scored, descriptions in all, note)"""
LoadSimulator = Callable[[SimulatorConfig], Simulator]


@dataclass(frozen=True)
class ScoresSummary:
    """What a run wrote."""

    output: str
    table: str
    num_failed: int

    @property
    def text(self) -> str:
        failed = f"; {self.num_failed} descriptions could not be scored" if self.num_failed else ""
        return f"{self.table}\n\nwrote {self.output}/{SCORES_NAME} and {self.output}/{REPORT_NAME}{failed}"


class ScoreWorker:
    """Holds the simulator; scores one shard per call."""

    def __init__(self, config: ScoreDescriptionsConfig, load: LoadSimulator):
        use_assigned_threads()
        self.config = config
        self.store = open_scored(config.exemplars)
        # What a batch holds decides about last bits: a memory that outlives a shard would let them depend on history.
        self.simulator = load(config.simulator.model_copy(update={"cache_tokens": 0}))

    def score(self, shard: Shard) -> None:
        """Write one shard. Raises UserError, or RunFailed that names it."""
        try:
            write_shard(self.config, self.store, self.simulator, shard)
        except UserError:
            raise
        except Exception as error:
            logger.exception("%s cannot be written", shard.name)
            raise RunFailed(f"{shard.name}: {type(error).__name__}: {error}") from None


def score_descriptions(
    config: ScoreDescriptionsConfig, progress: Progress, load: LoadSimulator = load_simulator
) -> ScoresSummary:
    """Score what `config` describes, or what is left of it; the same call after any interruption goes on.

    Raises UserError for bad input before Ray starts or a model loads, RunFailed if a shard cannot be written.
    """
    config = _absolute(config)
    check_simulator(config.simulator)
    store = open_scored(config.exemplars)
    split = _split(config, store)
    descriptions = _chosen(config, store, split)
    for part in ("train", config.held_out):
        check_windows(store, descriptions[0].latent, part)
    everything = [*descriptions, *control_descriptions(descriptions, config.controls, config.seed)]
    claim = _claim(config, store, everything)
    claim.check()
    shards = _shards(everything, config.latents_per_shard, claim.run_key)
    claim.write()
    found = {shard.index: rows for shard in shards if (rows := read_shard(claim.folder, shard)) is not None}
    todo = [shard for shard in shards if shard.index not in found]
    total = len(everything)
    progress(sum(map(len, found.values())), total, "")
    if todo:
        with connect():
            check_resources(config.actors)
            for shard in _on_actors(config, todo, load):
                rows = read_shard(claim.folder, shard)
                if rows is None:
                    raise RunFailed(f"{config.output}/{shard.name} was written and cannot be read back")
                found[shard.index] = rows
                progress(sum(map(len, found.values())), total, "")
    return _finish(config, store, split, [row for shard in shards for row in found[shard.index]])


def _chosen(config: ScoreDescriptionsConfig, store: Exemplars, split: LatentSplit | None) -> list[Description]:
    """The descriptions to score. Raises UserError if there is none."""
    groups = candidates_of(config.descriptions, store)
    if split is not None and config.only != "all":
        groups = part_of(groups, split, config.only)
    check_sources(one for candidates in groups.values() for one in candidates)
    if split is not None and not groups:
        raise UserError(f"no description is of a {config.only} latent at held_out_share {split.held_out_share:g}")
    return [one for key in drawn(sorted(groups), config.max_latents, config.seed) for one in groups[key]]


def _split(config: ScoreDescriptionsConfig, store: Exemplars) -> LatentSplit | None:
    """What `only` is about; none if it is about nothing. Raises UserError where nothing says so."""
    if config.only == "all":
        return None
    folder = config.split_of or config.simulator.model.path
    if config.split_of is None and check_simulator(config.simulator) != "finetuned":
        raise UserError(
            f"simulator {folder} was trained on no latents, found only {config.only}: expected split_of, the folder of"
            " one that was"
        )
    return split_of_simulator(folder, store.meta.coder, store.meta.coder_digest)


def _claim(
    config: ScoreDescriptionsConfig, store: Exemplars, everything: Sequence[Description]
) -> Claim[ScoreDescriptionsConfig]:
    model = config.simulator.model
    digest = stable_id(model.path if is_remote(model.path) else identify_target(model).model_dump())
    inputs = {
        "exemplars": store.meta.run_key,
        "descriptions": stable_id(description_lines(everything)),
        "simulator": digest,
    }
    key = stable_id(_relevant(config), inputs)
    return Claim(Folder(config.output), "scores", config, key, inputs, _relevant)


def _relevant(config: ScoreDescriptionsConfig) -> dict[str, Any]:
    """What can change the shards."""
    plain = ScoreDescriptionsConfig()
    reset: dict[str, Any] = {
        name: getattr(plain, name)
        for name in ("bootstrap_samples", "confidence", "best_by", "max_failed_share", "exemplars", "output")
    }
    reset |= {"actors": ActorConfig(), "descriptions": (), "split_of": None}
    model = config.simulator.model.model_copy(update={"device": "auto", "path": ""})
    reset["simulator"] = config.simulator.model_copy(update={"model": model, "cache_tokens": 0})
    return resolved(config.model_copy(update=reset))


def _shards(everything: Sequence[Description], latents_per_shard: int, run_key: str) -> list[Shard]:
    """Latents in order, so that exemplars are read block by block; a latent's candidates and controls together."""
    groups = list(by_latent(everything).values())
    parts = [groups[start : start + latents_per_shard] for start in range(0, len(groups), latents_per_shard)]
    return [
        Shard(index, run_key, tuple(one for candidates in part for one in candidates))
        for index, part in enumerate(parts)
    ]


def _on_actors(config: ScoreDescriptionsConfig, shards: Sequence[Shard], load: LoadSimulator) -> Iterator[Shard]:
    """Every shard when it is done, in order. Raises the first error."""
    model = config.simulator.model
    if model.device == "auto" and not config.actors.num_gpus:
        placed = config.simulator.model_copy(update={"model": model.model_copy(update={"device": "cpu"})})
        config = config.model_copy(update={"simulator": placed})
    pool = WorkerPool(ScoreWorker, (config, load), config.actors)
    for shard, _ in zip(shards, pool.map("score", [(shard,) for shard in shards]), strict=True):
        yield shard


def _finish(
    config: ScoreDescriptionsConfig, store: Exemplars, split: LatentSplit | None, scored: Sequence[Scored]
) -> ScoresSummary:
    """Write what the shards come to."""
    folder = Folder(config.output)
    own = [one for one in scored if one.description.source not in config.controls]
    controls = [one for one in scored if one.description.source in config.controls]
    best = best_of(own, config.best_by)
    options = Bootstrap(samples=config.bootstrap_samples, confidence=config.confidence, seed=config.seed)
    summary = summarise(scored, best, options, store.groups() if isinstance(store, VectorStore) else None)
    write_descriptions(folder, [one.filled for one in own])
    keep_coder_digest(folder, config.descriptions)
    folder.write(CONTROLS_NAME, description_lines(one.filled for one in controls).encode())
    folder.write(BEST_NAME, description_lines(one.filled for one in best).encode())
    facts = [
        ("Exemplars", f"{store.meta.coder}, layer {store.meta.layer}"),
        ("Simulator", config.simulator.model.path),
        ("Latents", f"{len(best):,}"),
        ("Of", _which(config, split)),
        ("Descriptions", f"{len(own):,}"),
        ("Scored on", f"{config.held_out} texts"),
    ]
    if len(best) < len(own):
        facts.append(("Best candidate", f"by {config.best_by} on half of these windows, scored on the others"))
    folder.write(REPORT_NAME, render_scores(summary, facts, config.confidence, config.best_by).encode())
    folder.write(SCORES_NAME, summary_json(summary).encode())
    failed = sum(any(score.reason in (FAILED, NOT_FINITE) for score in one.scores.values()) for one in scored)
    if failed > config.max_failed_share * len(scored):
        raise RunFailed(
            f"the simulator failed on {failed} of {len(scored)} descriptions, more than the share of"
            f" {config.max_failed_share:g} (max_failed_share); what there is lies in {config.output}"
        )
    return ScoresSummary(config.output, summary_table(summary), failed)


def _which(config: ScoreDescriptionsConfig, split: LatentSplit | None) -> str:
    """Which latents are scored, for the report."""
    if split is None:
        return "all, whatever the simulator was trained on"
    whose = config.split_of or "the simulator"
    said = {"held_out": f"those that {whose} was trained without", "trained": f"those that {whose} was trained on"}
    return f"{said[config.only]} (share held out {split.held_out_share:g}, seed {split.seed})"


def _absolute(config: ScoreDescriptionsConfig) -> ScoreDescriptionsConfig:
    local = config.simulator.model_copy(update={"model": with_absolute_path(config.simulator.model)})
    return config.model_copy(
        update={
            "simulator": local,
            "exemplars": absolute(config.exemplars),
            "descriptions": tuple(map(absolute, config.descriptions)),
            "output": absolute(config.output),
            "split_of": config.split_of and absolute(config.split_of),
        }
    )
