"""Scores of descriptions by language models: detection, fuzzing, LM judge, embedding similarity, beside controls.

    driver  checks (no model) -> claim folder -> shards of latents that are left, one after the other
            -> all questions of a shard to the chat model (endpoint, or Ray actors) -> shards/shard-k.json (renamed)
    driver  all shards -> descriptions.jsonl, controls.jsonl, judgements.jsonl, scores.json, report.html

A call that failed is counted and never a score. A shard in which calls failed that may succeed another time is done
again by the same command, which asks an endpoint only what it did not answer (data/journal.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from introspect_ray.config import JudgeDescriptionsConfig, resolved
from introspect_ray.data.chat_pool import chat_model, check_chat, relevant_chat
from introspect_ray.data.claim import Claim
from introspect_ray.data.description_files import (
    JUDGEMENTS_FILE,
    keep_coder_digest,
    read_descriptions,
    write_descriptions,
)
from introspect_ray.data.journal import open_journal
from introspect_ray.data.judged_shards import ShardResult, read_result, write_result
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.evaluation.description_scores import Scored, check_sources, control_descriptions
from introspect_ray.evaluation.description_summary import render_scores, summarise, summary_json, summary_table
from introspect_ray.evaluation.embedding import Embedder
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.evaluation.judge import Judge
from introspect_ray.evaluation.window_scores import Kind, WindowScorer
from introspect_ray.features.delphi import LatentJudgements
from introspect_ray.features.descriptions import Description, Score, by_latent, description_lines
from introspect_ray.features.exemplar_store import ExemplarStore, open_exemplars
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.judgements import classification_scores
from introspect_ray.models.chat import COST_CAP, ChatModel, Metered
from introspect_ray.models.journal import Journal
from introspect_ray.models.paths import resolve_model_path
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.simulator_run import candidates_of, drawn

SCORES_NAME, REPORT_NAME, CONTROLS_NAME = "scores.json", "report.html", "controls.jsonl"
WINDOW_METHODS: tuple[Kind, ...] = ("detection", "fuzz")
FEATURED = {"detection": "detection/auc", "fuzz": "fuzz/auc", "judge": "judge", "embedding": "embedding"}

Key = tuple[int, int]
Progress = Callable[[int, int, str], None]
"""(descriptions scored, descriptions in all, note)"""


@dataclass(frozen=True)
class JudgeSummary:
    """What a run wrote."""

    output: str
    table: str
    failures: Mapping[str, int]
    cost: float

    @property
    def text(self) -> str:
        failed = "".join(f"; {count} calls failed: {reason}" for reason, count in self.failures.items())
        cost = f"; cost {self.cost:.4f}" if self.cost else ""
        return f"{self.table}\n\nwrote {self.output}/{SCORES_NAME} and {self.output}/{REPORT_NAME}{failed}{cost}"


def judge_descriptions(config: JudgeDescriptionsConfig, progress: Progress) -> JudgeSummary:
    """Score what `config` describes, or what is left of it; the same call after any interruption goes on.

    Raises UserError for bad input before a model loads; RunFailed if a cost cap was reached, nothing was answered, or
    too many calls failed.
    """
    run = _prepare(config)
    run.claim.check()
    run.claim.write()
    found = [read_result(run.folder, run.claim.run_key, index) for index in range(len(run.shards))]
    left = [index for index, one in enumerate(found) if one is None or any(one.may_pass.values())]
    sizes = [len(descriptions) for descriptions in run.shards]
    done = sum(size for index, size in enumerate(sizes) if index not in left)
    progress(done, sum(sizes), "")
    journal = open_journal(run.folder)
    if left:
        with ExitStack() as stack:
            tools = _Tools(config, stack, journal)
            for index in left:
                found[index] = result = run.judge(run.shards[index], tools)
                write_result(run.folder, run.claim.run_key, index, result)
                done += sizes[index]
                progress(done, sum(sizes), "")
                _check(result, config)
    if not any(one.may_pass for one in found if one is not None):
        journal.settle()
    return _finish(run, [one for one in found if one is not None], journal.spent)


class _Tools:
    """The models that the methods need, loaded when the first shard needs them."""

    def __init__(self, config: JudgeDescriptionsConfig, stack: ExitStack, journal: Journal):
        self._config, self._stack, self._journal = config, stack, journal

    @cached_property
    def model(self) -> ChatModel:
        config = self._config
        return self._stack.enter_context(chat_model(config.chat, config.actors, config.seed, self._journal))

    @cached_property
    def embedder(self) -> Embedder:
        return Embedder.load(self._config.embedder)


@dataclass(frozen=True)
class _Run:
    """A run that passed every check."""

    config: JudgeDescriptionsConfig
    folder: Folder
    claim: Claim[JudgeDescriptionsConfig]
    store: ExemplarStore
    shards: list[list[Description]]
    labels: Mapping[Key, list[str]]

    def judge(self, descriptions: Sequence[Description], tools: _Tools) -> ShardResult:
        """All methods on the descriptions of one shard."""
        scores: list[dict[str, Score]] = [{} for _ in descriptions]
        judgements: list[LatentJudgements] = []
        model = Metered(tools.model) if set(self.config.methods) - {"embedding"} else None
        for kind in WINDOW_METHODS:
            if kind in self.config.methods:
                assert model is not None
                judgements += self._windows(kind, descriptions, scores, model)
        pairs = [(one.text, self.labels.get((one.layer, one.latent), [])) for one in descriptions]
        if "judge" in self.config.methods:
            assert model is not None
            for known, score in zip(scores, Judge(model).score(pairs), strict=True):
                known["judge"] = score
        if "embedding" in self.config.methods:
            for known, score in zip(scores, tools.embedder.similarity(pairs), strict=True):
                known["embedding"] = score
        scored = [Scored(one, known) for one, known in zip(descriptions, scores, strict=True)]
        if model is None:
            return ShardResult(scored, judgements)
        failures, may_pass = dict(model.failures), {name: count for name, count in model.may_pass.items() if count}
        return ShardResult(scored, judgements, model.num_answers, failures, may_pass)

    def _windows(
        self, kind: Kind, descriptions: Sequence[Description], scores: list[dict[str, Score]], model: ChatModel
    ) -> Iterator[LatentJudgements]:
        config = self.config
        scorer = WindowScorer(model, kind, config.max_window_tokens, config.mark_share, config.seed)
        keys = dict.fromkeys((one.layer, one.latent) for one in descriptions)
        latents = {key: self._judged_windows(self.store.read(key[1], config.held_out)) for key in keys}
        judged = scorer.judge([(one.text, latents[one.layer, one.latent]) for one in descriptions])
        for one, known, rows in zip(descriptions, scores, judged, strict=True):
            known |= {f"{kind}/{name}": score for name, score in classification_scores(rows).items()}
            yield LatentJudgements(one.layer, one.latent, kind, tuple(rows), one.text)

    def _judged_windows(self, latent: LatentExemplars) -> LatentExemplars:
        """As many windows in which it fires as in which it does not, drawn for the latent; fair draws come first.

        The scarcer kind decides how many: without silent windows there are none at all.
        """
        draw = random.Random(f"windows {self.config.seed} {latent.layer} {latent.latent}")

        def drawn_from(*kinds: str, active: bool, most: int) -> list[Exemplar]:
            chosen: list[Exemplar] = []
            for kind in kinds:
                taken = {one.window for one in chosen}  # a window may be of several kinds
                of_kind = [one for one in latent.exemplars if one.kind == kind and one.window not in taken]
                there = [one for one in of_kind if one.activations.any() == active]
                chosen += draw.sample(there, min(len(there), most - len(chosen)))
            return chosen

        fires = drawn_from("quantile", "top", active=True, most=self.config.windows)
        silent = drawn_from("random", "silent", active=False, most=len(fires))
        windows = (*fires[: len(silent)], *silent)
        return LatentExemplars(latent.layer, latent.latent, latent.density, latent.maximum, windows)


def _prepare(config: JudgeDescriptionsConfig) -> _Run:
    """Every check that needs no model. Raises UserError."""
    inputs = check_chat(config.chat) if set(config.methods) - {"embedding"} else {}
    if "embedding" in config.methods:
        resolve_model_path(config.embedder.path)
    store = open_exemplars(config.exemplars)
    groups = candidates_of(config.descriptions, store)
    check_sources(one for candidates in groups.values() for one in candidates)
    chosen = drawn(sorted(groups), config.max_latents, config.seed)
    own = [one for key in chosen for one in groups[key]]
    everything = list(by_latent([*own, *control_descriptions(own, config.controls, config.seed)]).values())
    size = config.latents_per_shard
    shards = [
        [one for candidates in everything[start : start + size] for one in candidates]
        for start in range(0, len(everything), size)
    ]
    labels = by_latent(one for path in config.labels for one in read_descriptions(path))
    texts = {key: list(dict.fromkeys(one.text for one in found))[: config.max_labels] for key, found in labels.items()}
    if config.labels and not texts.keys() & set(chosen):
        raise UserError(f"labels {', '.join(config.labels)} name none of the {len(chosen)} latents that are described")
    inputs |= {
        "exemplars": store.meta.run_key,
        "descriptions": stable_id(description_lines(own)),
        "labels": stable_id([[*key, *found] for key, found in texts.items()]),
    }
    folder = Folder(config.output)
    run_key = stable_id(_relevant(config), inputs)
    claim = Claim(folder, "judgements", config, run_key, inputs, _relevant)
    return _Run(config, folder, claim, store, shards, texts)


def _relevant(config: JudgeDescriptionsConfig) -> dict[str, Any]:
    """What can change a shard."""
    aside = {"output", "exemplars", "descriptions", "labels", "actors", "bootstrap_samples", "confidence"}
    aside |= {"max_failed_share"} if "embedding" in config.methods else {"max_failed_share", "embedder"}
    tree = {name: value for name, value in resolved(config).items() if name not in aside}
    tree["chat"] = relevant_chat(config.chat)
    return tree


def _check(result: ShardResult, config: JudgeDescriptionsConfig) -> None:
    """Stop where going on would fail alike."""
    if COST_CAP in result.may_pass:
        raise RunFailed(
            f"chat.endpoint.max_cost was reached; the shards that are done are in {config.output}, raise it to go on"
        )
    if result.failures and not result.answers and result.may_pass:
        reason = max(result.may_pass, key=lambda name: result.may_pass[name])
        raise RunFailed(f"the endpoint answered nothing, mostly {reason}; the same command asks again")


def _finish(run: _Run, results: Sequence[ShardResult], cost: float) -> JudgeSummary:
    """Write what the shards come to, at this cost in all. Raises RunFailed if too many calls failed."""
    config, folder = run.config, run.folder
    scored = [one for result in results for one in result.scored]
    own = [one for one in scored if one.description.source not in config.controls]
    controls = [one for one in scored if one.description.source in config.controls]
    options = Bootstrap(samples=config.bootstrap_samples, confidence=config.confidence, seed=config.seed)
    summary = summarise(scored, own, options)
    failures: dict[str, int] = {}
    for result in results:
        for reason, count in result.failures.items():
            failures[reason] = failures.get(reason, 0) + count
    num_failed, num_calls = sum(failures.values()), sum(failures.values()) + sum(one.answers for one in results)
    write_descriptions(folder, [one.filled for one in own])
    keep_coder_digest(folder, config.descriptions)
    folder.write(CONTROLS_NAME, description_lines(one.filled for one in controls).encode())
    texts = {(one.description.layer, one.description.latent, one.description.text) for one in own}
    lines = [
        json.dumps(asdict(one), ensure_ascii=False)
        for result in results
        for one in result.judgements
        if (one.layer, one.latent, one.text) in texts
    ]
    folder.write(JUDGEMENTS_FILE, "".join(f"{line}\n" for line in dict.fromkeys(lines)).encode())
    facts = [
        ("Exemplars", f"{run.store.meta.coder}, layer {run.store.meta.layer}"),
        ("Model", config.chat.name),
        ("Descriptions", f"{len(own):,}"),
        ("Calls", f"{num_calls:,}, of which {num_failed:,} failed"),
        ("Windows", f"of {config.held_out} texts"),
    ]
    featured = FEATURED[config.methods[0]]
    folder.write(REPORT_NAME, render_scores(summary, facts, config.confidence, featured).encode())
    folder.write(SCORES_NAME, summary_json(summary).encode())
    if num_failed > config.max_failed_share * num_calls:
        raise RunFailed(
            f"{num_failed} of {num_calls} calls gave no usable answer, more than the share of"
            f" {config.max_failed_share:g} (max_failed_share); what there is lies in {config.output}"
        )
    return JudgeSummary(config.output, summary_table(summary), failures, cost)
