"""Describing latents: candidates for each, from a chat model, an explainer or the lexicon.

    driver  which latents (exemplars, coder, lexicon) -> claim the folder -> shards that are left, one after the other
    describer  endpoint (threads) | chat model or explainer (Ray actors) | lexicon -> rows, answered or with a reason
            | calls/: what an endpoint answered and cost, until it is in a shard
    driver  shards/shard-k.jsonl (renamed) ... -> descriptions.jsonl, failed.jsonl, summary.json (last)

The same command goes on after any stop, and asks again about what failed for reasons that may pass.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from introspect_ray.config import DescribeConfig, resolved
from introspect_ray.data.chat_pool import check_chat, relevant_chat
from introspect_ray.data.claim import Claim
from introspect_ray.data.description_files import (
    CODER_DIGEST,
    LEXICON,
    SUMMARY_FILE,
    lexicon_descriptions,
    write_descriptions,
)
from introspect_ray.data.identity import folder_digest
from introspect_ray.data.journal import open_journal
from introspect_ray.data.latent_rows import LatentRow, read_latent_rows, write_rows
from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_files import open_vectors
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.explainer.card import ExplainerCard, local_copy, read_card
from introspect_ray.features.card import coder_folder
from introspect_ray.features.descriptions import Description, by_latent
from introspect_ray.features.exemplar_store import SplitName, open_exemplars
from introspect_ray.features.sae import check_sae
from introspect_ray.models.chat import COST_CAP
from introspect_ray.models.journal import Journal
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.describers import (
    NO_WINDOW,
    Describe,
    chat_describer,
    explainer_describer,
    lexicon_describer,
)

FAILED_FILE = "failed.jsonl"
EXEMPLAR_SPLIT: SplitName = "train"
"""Descriptions are written from these texts, so that the others are left to score them on."""

Progress = Callable[[int, int, str], None]
"""(latents asked about, latents in all, what failed so far)"""


@dataclass(frozen=True)
class _Prepared:
    """A run that passed every check."""

    source: str
    """What descriptions say about where they come from."""
    latents: list[tuple[int, int]]
    """(layer, latent), in order."""
    inputs: dict[str, str]
    coder_digest: str
    """Whose latents they are, see `check_coder`; empty where nothing says."""
    open: Callable[[Journal], AbstractContextManager[Describe]]
    """The describer, given the calls of earlier runs."""


@dataclass(frozen=True)
class DescribeSummary:
    """What a run left in its output folder."""

    output: str
    num_latents: int
    num_described: int
    num_descriptions: int
    failures: dict[str, int]
    """Reason -> answers that failed by it."""
    cost: float
    asked: int
    """Latents that this run asked about."""

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"wrote {self.output}" if self.asked else f"{self.output} was already complete"
        failed = "".join(f"; {count} answers failed: {reason}" for reason, count in self.failures.items())
        cost = f"; cost {self.cost:.4f}" if self.cost else ""
        described = f"{self.num_described} of {self.num_latents} latents"
        return f"{start}: {self.num_descriptions} descriptions of {described}{failed}{cost}"


def describe_latents(config: DescribeConfig, progress: Progress) -> DescribeSummary:
    """Write what is left of the descriptions that `config` describes.

    Raises UserError for bad input before any model loads; RunFailed if a cost cap was reached, an endpoint answers
    nothing, or too many latents are without a description.
    """
    prepared = _PREPARE[config.method](config)
    run_key = stable_id(_relevant(config), prepared.inputs, prepared.latents)
    folder = Folder(config.output)
    claim = Claim(folder, "descriptions", config, run_key, prepared.inputs, _relevant)
    claim.check()
    claim.write()
    shards = _shards(config, prepared, folder, run_key)
    left = [index for index, rows in enumerate(shards) if any(row.is_left(config.retry_failed) for row in rows)]
    journal = open_journal(folder)
    asked = 0
    if left:
        done, failed = map(list, zip(*map(_tally, shards), strict=True))
        open_rows = [[row for row in shards[index] if row.is_left(config.retry_failed)] for index in left]
        with prepared.open(journal) as describe:
            for index, answered in zip(left, describe(open_rows), strict=True):
                asked += len(answered)
                shards[index] = _with_answered(shards[index], answered)
                write_rows(folder, run_key, index, shards[index])
                journal.settle()
                done[index], failed[index] = _tally(shards[index])
                progress(sum(done), len(prepared.latents), f"{sum(failed)} failed" if any(failed) else "")
                _check_shard(shards[index])
    return _finish(config, prepared, folder, [row for rows in shards for row in rows], asked, journal.spent)


def _shards(config: DescribeConfig, prepared: _Prepared, folder: Folder, run_key: str) -> list[list[LatentRow]]:
    """All rows by shard: those of earlier runs, and empty ones."""
    size = config.latents_per_shard
    shards = []
    for index, start in enumerate(range(0, len(prepared.latents), size)):
        latents = prepared.latents[start : start + size]
        rows = read_latent_rows(folder, run_key, index)
        if rows is None or [(row.layer, row.latent) for row in rows] != latents:
            rows = [LatentRow(layer=layer, latent=latent) for layer, latent in latents]
        shards.append(rows)
    return shards


def _with_answered(rows: Sequence[LatentRow], answered: Sequence[LatentRow]) -> list[LatentRow]:
    """The rows of a shard, with those that were asked about in their places."""
    found = {(row.layer, row.latent): row for row in answered}
    assert all(row.candidates or row.failures for row in answered), "a latent has a description or a reason"
    return [found.pop((row.layer, row.latent), row) for row in rows]


def _check_shard(rows: Sequence[LatentRow]) -> None:
    """Stop where going on would fail alike: all calls are refused, or none came through."""
    failures = [one for row in rows for one in row.failures if one.reason != NO_WINDOW]
    if any(row.candidates for row in rows) or not failures or not all(one.may_pass for one in failures):
        return
    reasons = Counter(one.reason for one in failures)
    if COST_CAP in reasons:
        return
    reason = reasons.most_common(1)[0][0]
    detail = next(one.detail for one in failures if one.reason == reason)
    raise RunFailed(
        f"the endpoint answered nothing about {len(rows)} latents, mostly {reason} ({detail});"
        " the same command asks again"
    )


def _tally(rows: Sequence[LatentRow]) -> tuple[int, int]:
    """Latents that need not be asked about again, and answers that failed."""
    return sum(not row.is_left(False) for row in rows), sum(len(row.failures) for row in rows)


def _finish(
    config: DescribeConfig, prepared: _Prepared, folder: Folder, rows: Sequence[LatentRow], asked: int, cost: float
) -> DescribeSummary:
    """Write the files that readers use, the summary last. Raises RunFailed as the config says."""
    descriptions = [
        Description(row.layer, row.latent, one.text, prepared.source, one.scores)
        for row in rows
        for one in row.candidates
    ]
    failures = [(row, one) for row in rows for one in row.failures]
    reasons = dict(Counter(one.reason for _, one in failures).most_common())
    described = sum(bool(row.candidates) for row in rows)
    summary = DescribeSummary(config.output, len(rows), described, len(descriptions), reasons, cost, asked)
    failed = [
        {"layer": row.layer, "latent": row.latent, "described": bool(row.candidates), **one.model_dump()}
        for row, one in failures
    ]
    folder.write(FAILED_FILE, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in failed).encode())
    write_descriptions(folder, descriptions)
    content = {
        "source": prepared.source,
        CODER_DIGEST: prepared.coder_digest,
        "latents": len(rows),
        "described": described,
        "descriptions": len(descriptions),
        "failed_answers": reasons,
        "cost": summary.cost,
        "config": resolved(config),
    }
    folder.write(SUMMARY_FILE, (json.dumps(content, indent=1) + "\n").encode())
    capped = sum(any(one.reason == COST_CAP for one in row.failures) for row in rows)
    if capped:
        raise RunFailed(
            f"chat.endpoint.max_cost was reached, {summary.cost:.4f} spent: {capped} of {len(rows)} latents were not"
            f" asked about, or not often enough; what there is lies in {config.output}; raise it to go on"
        )
    if len(rows) - described > config.max_failed_share * len(rows):
        raise RunFailed(
            f"{len(rows) - described} of {len(rows)} latents have no description, more than the share of"
            f" {config.max_failed_share:g} (max_failed_share); reasons are in {config.output}/{FAILED_FILE}"
        )
    return summary


# --- checks -----------------------------------------------------------------------------------------------------


def _prepare_chat(config: DescribeConfig) -> _Prepared:
    inputs = check_chat(config.chat)
    store = open_exemplars(config.exemplars)
    latents = _chosen(config, [(one.layer, one.latent) for one in store.latents()], f"exemplars {config.exemplars}")
    return _Prepared(
        f"llm:{_last_part(config.chat.name)}",
        latents,
        inputs | {f"exemplars {config.exemplars}": store.meta.run_key},
        store.meta.coder_digest,
        lambda journal: chat_describer(config, lambda latent: store.read(latent, EXEMPLAR_SPLIT), journal),
    )


def _prepare_explainer(config: DescribeConfig) -> _Prepared:
    card = read_card(config.explainer)
    known, inputs, where = _asked_about(config, card)
    (digest,) = inputs.values()
    if layers := sorted({layer for layer, _ in known if layer >= card.target.num_layers}):
        raise UserError(
            f"{where} is of layer {layers[0]}, but explainer {config.explainer} explains"
            f" {card.target.num_layers} layers"
        )
    with local_copy(config.explainer) as path:
        inputs[f"explainer {config.explainer}"] = folder_digest(path)
    return _Prepared(
        f"explainer:{_last_part(config.explainer)}",
        _chosen(config, known, where),
        inputs,
        digest,
        lambda _journal: explainer_describer(config),
    )


def _asked_about(config: DescribeConfig, card: ExplainerCard) -> tuple[list[tuple[int, int]], dict[str, str], str]:
    """Latents of the coder, or the vectors in their place; digests of them; and what errors call them."""
    if config.vectors is None:
        sae = config.features.sae
        coder = check_sae(sae, card.target.width)
        latents = [(coder.layer, latent) for latent in range(coder.num_latents)]
        return latents, {f"SAE {sae}": folder_digest(coder_folder(sae))}, f"SAE path '{sae}'"
    found = open_vectors(config.vectors)
    if (width := len(found.vectors[0].vector)) != card.target.width:
        raise UserError(
            f"vectors {config.vectors} have width {width}, but explainer {config.explainer} explains a target of width"
            f" {card.target.width}"
        )
    numbers = [(one.layer, number) for number, one in enumerate(found.vectors)]
    return sorted(numbers), {f"vectors {config.vectors}": found.manifest["digest"]}, f"vectors {config.vectors}"


def _prepare_lexicon(config: DescribeConfig) -> _Prepared:
    labels = by_latent(lexicon_descriptions(config.features.sae))
    latents = _chosen(config, list(labels), f"the lexicon of {config.features.sae}")
    digest = stable_id([[layer, latent, one.text] for (layer, latent), found in labels.items() for one in found])
    return _Prepared(
        LEXICON,
        latents,
        {f"lexicon of {config.features.sae}": digest},
        folder_digest(coder_folder(config.features.sae)),
        lambda _journal: lexicon_describer(labels),
    )


_PREPARE: dict[str, Callable[[DescribeConfig], _Prepared]] = {
    "chat": _prepare_chat,
    "explainer": _prepare_explainer,
    "lexicon": _prepare_lexicon,
}


def _chosen(config: DescribeConfig, there: Sequence[tuple[int, int]], where: str) -> list[tuple[int, int]]:
    """The latents to describe, in order. Raises UserError for one that is not there, or if there is none."""
    chosen = list(there)
    if config.latents is not None:
        wanted = set(config.latents)
        if missing := sorted(wanted - {latent for _, latent in there}):
            raise UserError(f"latents: {where} has nothing about latent {missing[0]}")
        chosen = [one for one in there if one[1] in wanted]
    if not chosen:
        raise UserError(f"{where} has no latent to describe")
    return chosen[: config.limit]


def _relevant(config: DescribeConfig) -> dict[str, Any]:
    """The resolved config without what cannot change descriptions: where, how and how far it runs, other methods."""
    aside = {"output", "actors", "batch_size", "retry_failed", "max_failed_share"}
    aside |= {"chat": {"features", "explainer"}, "explainer": {"exemplars", "chat", "prompt", "num_candidates"}}.get(
        config.method, {"exemplars", "explainer", "chat", "prompt", "num_candidates"}
    )
    tree = {name: value for name, value in resolved(config).items() if name not in aside}
    if config.method == "chat":
        tree["chat"] = relevant_chat(config.chat)
    return tree


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
