"""Rewriting a transformer with descriptions: the whole run.

    driver   texts, descriptions                      -> truth/ (actors with the target): what latents do, and when
             live latents, rankings, lines            -> levels/ (actors with a simulator): (descriptions x text shard)
             scales fitted on the fit texts           -> measured/ (actors with the target): all conditions, per shard
             intervals over texts                     -> scores.json, report.html

Each step skips what it finds done, so the same command goes on after any interruption.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from introspect_ray.config import ActorConfig, ModelConfig, RewriteConfig, RewriteSimulatorConfig, resolved
from introspect_ray.data.cluster import connect
from introspect_ray.data.identity import folder_digest, identify_target
from introspect_ray.data.levels import LevelCache
from introspect_ray.data.manifest import CONFIG_NAME, TargetIdentity
from introspect_ray.data.rewrite_texts import TextShard, text_shards
from introspect_ray.data.rewriting import (
    Collected,
    TargetJob,
    Work,
    assemble,
    collect,
    make_levels,
    make_measure,
    make_truth,
    read_measured,
    read_statistics,
    run_step,
)
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.features.card import coder_folder
from introspect_ray.features.coder import ActiveLatents, SparseCoder
from introspect_ray.features.sae import check_sae, load_sae
from introspect_ray.features.windows import window
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.tokens import encode_text
from introspect_ray.rewrite.code import columns_of, joined
from introspect_ray.rewrite.lines import Line, fit_line, plan_lines
from introspect_ray.rewrite.measure import MeasurePlan
from introspect_ray.rewrite.page import rewriting_page
from introspect_ray.rewrite.results import Results, results, scores_json, simulation_costs, tables, verdict
from introspect_ray.rewrite.settings import effective
from introspect_ray.rewrite.statistics import LatentStatistics, pooled
from introspect_ray.simulator.base import Simulator
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.rewriting_sources import (
    LoadSimulator,
    Progress,
    all_descriptions,
    check_sources,
    open_simulator,
)

SCORES_NAME = "scores.json"
REPORT_NAME = "report.html"

OpenSimulator = Callable[[RewriteConfig, RewriteSimulatorConfig, Progress], LoadSimulator]


@dataclass(frozen=True)
class RewriteSummary:
    """What a run wrote: the tables for the terminal, a sentence about the headline, and where scores and report are."""

    tables: str
    verdict: str
    results: Results
    output: str

    @property
    def text(self) -> str:
        return f"{self.tables}\n\n{self.verdict}\n\nwrote {self.output}/{SCORES_NAME} and {self.output}/{REPORT_NAME}"


def _load_target(config: ModelConfig) -> Target:
    return Target.load(config)


def rewrite_transformer(
    config: RewriteConfig,
    progress: Progress,
    load_target: Callable[[ModelConfig], Target] = _load_target,
    open_one: OpenSimulator = open_simulator,
) -> RewriteSummary:
    """Measure all conditions of the config, score and report them.

    Raises UserError for bad input before any model loads, RunFailed if shards are lost or too much is not simulated.
    `load_target` and `open_one` stand in for what the config names.
    """
    run = _Run(effective(config), progress, load_target)
    run.claim(config)
    with connect():
        statistics, code = run.truth()
        lines, live = run.plan(statistics)
        caches = run.simulate(lines, open_one)
        plan = run.fit(lines, live, statistics, code, caches)
        collected = run.measure(plan, caches)
    return run.report(plan, collected)


def run_key(config: RewriteConfig, identity: TargetIdentity, texts: Any) -> str:
    """What all results of an output folder share: the target as it is loaded, the coder and the texts."""
    loaded = [identity.model_dump(), config.target.dtype, config.target.quantization]
    return stable_id(loaded, folder_digest(coder_folder(config.coder)), texts)


class _Run:
    """One run's texts and folders, and its steps in order."""

    def __init__(self, config: RewriteConfig, progress: Progress, load_target: Callable[[ModelConfig], Target]):
        self.config = config
        self.progress = progress
        self.load_target = load_target
        identity = identify_target(config.target)
        self.card = check_sae(config.coder, identity.width)
        self.tokenizer = load_tokenizer(config.target)
        check_sources(config)
        self.shards = text_shards(config, self.tokenizer)
        texts = [[part.name, [text.ids for text in part.texts]] for of_use in self.shards.values() for part in of_use]
        self.key = run_key(config, identity, texts)
        self.folder = Folder(config.output)
        self.coder: SparseCoder = load_sae(config.coder)

    @property
    def simulated(self) -> list[TextShard]:
        return [*self.shards["fit"], *self.shards["evaluation"]]

    def job(self, key: str, shards: Sequence[TextShard]) -> TargetJob:
        return TargetJob(
            self.config.output, key, self.config.target, self.config.coder, {shard.name: shard for shard in shards}
        )

    def claim(self, asked: RewriteConfig) -> None:
        """Write config.json into a new output folder; refuse one of other texts, another target or another coder.

        All else may change between runs in one folder: what was measured stays as long as it says the same.
        """
        names = [name for name in self.folder.names() if not name.startswith(TEMPORARY)]
        try:
            found = json.loads(self.folder.read(CONFIG_NAME)) if names else {"key": self.key}
        except (FileNotFoundError, ValueError):
            found = {}
        if not isinstance(found, dict) or found.get("key") != self.key:
            raise UserError(
                f"output folder {self.config.output} holds something else, or a run on other texts, another target or"
                " another coder: choose another folder or delete it"
            )
        content = {"key": self.key, "config": resolved(asked)}
        self.folder.write(CONFIG_NAME, (json.dumps(content, indent=1) + "\n").encode())

    # --- truth ---

    def truth(self) -> tuple[LatentStatistics, ActiveLatents]:
        """Statistics of all statistics texts, and the true code of the fit texts."""
        shards = [*self.shards["fit"], *self.shards["statistics"]]
        job = self.job(self.key, shards)
        orders = [
            {"shard": shard.name, "keep": bool(shard.windows)}
            for shard in shards
            if read_statistics(job, shard.name) is None
        ]
        load = partial(make_truth, job, self.load_target)
        self._step(load, orders, len(shards), self.config.target_actors, "shards of true latents")
        found = [part for shard in shards if (part := read_statistics(job, shard.name)) is not None]
        assert len(found) == len(shards)
        return pooled([statistics for statistics, _ in found]), joined([code for _, code in found if code is not None])

    def _step(
        self, load: Callable[[], Work], orders: Sequence[Any], total: int, actors: ActorConfig, what: str
    ) -> None:
        done = total - len(orders)
        self.progress(what, done, total, "")
        for _ in run_step(load, orders, actors, self.folder):
            done += 1
            self.progress(what, done, total, "")

    # --- lines ---

    def plan(self, statistics: LatentStatistics) -> tuple[list[Line], np.ndarray]:
        """Lines without scales, and the live latents."""
        live = np.flatnonzero(statistics.firings >= self.config.minimum_firings)
        said = all_descriptions(self.config, self.card.layer, self.coder, live.tolist(), self.progress)
        return plan_lines(self.config, live, said, statistics), live

    # --- simulation ---

    def simulate(self, lines: Sequence[Line], open_one: OpenSimulator) -> dict[str, LevelCache]:
        """All levels that the lines need, on disk."""
        caches: dict[str, LevelCache] = {}
        for simulator in self.config.simulators:
            needed = self.needed(lines, simulator.name)
            if not needed:
                continue
            opened = open_one(self.config, simulator, self.progress)
            cache = LevelCache(self.config.cache or f"{self.config.output}/levels", opened.digest)
            caches[simulator.name] = cache
            self._simulate(cache, opened.load, needed, simulator.name)
        return caches

    @staticmethod
    def needed(lines: Sequence[Line], simulator: str) -> list[str]:
        """Descriptions whose levels the lines of a simulator need, in text order."""
        of_simulator = [
            line for line in lines if line.config.kind == "simulated" and line.config.simulator == simulator
        ]
        return sorted({text for line in of_simulator for text in line.needed})

    def _simulate(self, cache: LevelCache, load: Callable[[], Simulator], needed: Sequence[str], name: str) -> None:
        size = self.config.descriptions_per_block
        orders = []
        for shard in self.simulated:
            levels, failed = cache.read(shard.windows)
            missing = [text for text in needed if text not in levels or text in failed]
            for start in range(0, len(missing), size):
                orders.append({"shard": shard.name, "descriptions": missing[start : start + size]})
        blocks = math.ceil(len(needed) / size) * len(self.simulated)
        step = partial(make_levels, cache, {shard.name: shard for shard in self.simulated}, load)
        total = max(blocks, len(orders))
        self._step(step, orders, total, self.config.simulator_actors, f"blocks by simulator {name}")
        failures = self._failures(cache, needed)
        pairs = len(needed) * len(self.simulated)
        if len(failures) > self.config.max_failed_share * pairs:
            (text, _), reason = next(iter(failures.items()))
            raise RunFailed(
                f"simulator {name} failed on {len(failures)} of {pairs} pairs of a description and a text shard, more"
                f" than max_failed_share {self.config.max_failed_share:g}; first {text!r}: {reason}"
            )

    def _failures(self, cache: LevelCache, needed: Sequence[str]) -> dict[tuple[str, str], str]:
        """(Description, shard) that could not be simulated, and why."""
        wanted = set(needed)
        return {
            (text, shard.name): reason
            for shard in self.simulated
            for text, reason in cache.read(shard.windows)[1].items()
            if text in wanted
        }

    # --- measurement ---

    def fit(
        self,
        lines: Sequence[Line],
        live: np.ndarray,
        statistics: LatentStatistics,
        code: ActiveLatents,
        caches: Mapping[str, LevelCache],
    ) -> MeasurePlan:
        """Lines with scales that were fitted on the fit texts."""
        norms = self.coder.decoder.norm(dim=-1).numpy()
        fitted: dict[str, Line] = {}
        for name, cache in caches.items():
            levels = assemble(
                self.shards["fit"],
                [cache.read(shard.windows)[0] for shard in self.shards["fit"]],
                self.needed(lines, name),
            )
            for line in lines:
                if line.config.kind == "simulated" and line.config.simulator == name:
                    truth = columns_of(code, torch.as_tensor(line.latents)).numpy()
                    fitted[line.config.name] = fit_line(
                        line, levels, truth, statistics, norms, self.config.paper_compat
                    )
        return MeasurePlan(
            lines=[fitted.get(line.config.name, line) for line in lines],
            fractions=sorted(self.config.fractions),
            live=live,
            mean_output=statistics.mean_output,
            top_k=self.config.top_k,
            headline=self.config.headline,
            headline_fraction=self.config.headline_fraction,
            paper_compat=self.config.paper_compat,
            seed=self.config.seed,
        )

    def measure(self, plan: MeasurePlan, caches: Mapping[str, LevelCache]) -> Collected:
        """Losses of all evaluation texts under all conditions."""
        shards = self.shards["evaluation"]
        needed = {name: self.needed(plan.lines, name) for name in caches}
        told = [[line.latents.tolist(), line.texts, line.config.model_dump()] for line in plan.lines]
        levels = {
            name: [cache.simulator, sorted(self._failures(cache, needed[name]))] for name, cache in caches.items()
        }
        same = ("fractions", "top_k", "headline", "headline_fraction", "paper_compat", "seed")
        settings = {name: getattr(plan, name) for name in same}
        key = stable_id(self.key, told, levels, settings, plan.live.tolist())
        job = self.job(key, shards)
        orders = [{"shard": shard.name} for shard in shards if read_measured(job, shard.name) is None]
        load = partial(make_measure, job, plan, caches, needed, self.load_target)
        self._step(load, orders, len(shards), self.config.target_actors, "shards of losses")
        return collect(job, [shard.name for shard in shards])

    # --- report ---

    def report(self, plan: MeasurePlan, collected: Collected) -> RewriteSummary:
        """Write scores and page."""
        config = self.config
        losses = collected.together()
        texts = [text for shard in self.shards["evaluation"] for text in shard.texts]
        told = {text for line in plan.lines for texts_of in line.texts for text in texts_of}
        costs = simulation_costs(
            plan.lines,
            plan,
            {text: len(encode_text(self.tokenizer, text, add_bos=False)) for text in told},
            [len(text.window) for text in texts],
        )
        options = Bootstrap(config.bootstrap_samples, config.confidence, config.seed)
        harm = collected.harm if collected.harm is not None else np.zeros(0)
        exact = frozenset(one.name for one in config.simulators if one.kind == "exact")
        found = results(plan, losses, collected.agreement, harm, collected.false_alarms, costs, exact, options)
        facts = {
            "target": config.target.path,
            "coder": config.coder,
            "layer": self.card.layer,
            "live_latents": len(plan.live),
            "loss": float(losses.cross_entropy["original"].sum() / losses.tokens.sum()),
        }
        self.folder.write(SCORES_NAME, scores_json(found, facts).encode())
        pieces = {text.row: window(text.ids, self.tokenizer).pieces for text in texts}
        page = rewriting_page(config, found, facts, verdict(found), pieces)
        self.folder.write(REPORT_NAME, page.encode())
        return RewriteSummary(tables(found, config.headline_fraction), verdict(found), found, config.output)
