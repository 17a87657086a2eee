"""A run of collect_vectors.py before anything starts, and what its actors do per order. No Ray here.

Vectors: residual vectors of one token of held-out texts, and differences between those of two prompts that differ in
their subject (P1 section 2.2; which token of a pair P1 takes is not known: here the last of the subject, or the last of
the prompt). Their exemplars come from texts of the other splits.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from introspect_ray.config import ActorConfig, CollectVectorsConfig, GenerateConfig, resolved
from introspect_ray.data.claim import Claim
from introspect_ray.data.identity import identify_target
from introspect_ray.data.shards import ShardOrder, write_items
from introspect_ray.data.sources import load_source
from introspect_ray.data.splits import split_of, splitter, unit_interval
from introspect_ray.data.storage import Folder
from introspect_ray.data.texts import Texts, read_texts
from introspect_ray.errors import UserError
from introspect_ray.features.reading import read_places
from introspect_ray.interventions.target import Target
from introspect_ray.models.paths import absolute
from introspect_ray.models.tokens import position_of
from introspect_ray.tasks.activation_patching import ActivationPatching
from introspect_ray.tasks.base import stable_id

ITEMS_PER_BLOCK = 64
MEAN_TEXTS = 256
"""Texts of the corpus whose tokens the mean vector is that of."""

T = TypeVar("T")
Item = dict[str, Any]
Position = tuple[list[int], int]
"""Token ids of a prompt, and the place of one of them."""


class VectorOrder(ShardOrder):
    """Which block of vectors is to be read."""

    @property
    def plan_name(self) -> str:
        return f"plan/vectors-{self.index:05d}.parquet"

    @property
    def attempts_name(self) -> str:
        return f"plan/vectors-{self.index:05d}.attempts.json"

    @property
    def name(self) -> str:
        return f"vectors-{self.index:05d}"


class PartOrder(ShardOrder):
    """Which part of the corpus is to be projected."""

    @property
    def name(self) -> str:
        return f"parts/part-{self.index:05d}.parquet"


@dataclass(frozen=True)
class VectorRun:
    """A run that passed every check."""

    claim: Claim[CollectVectorsConfig]
    items: list[Item]
    """Where vectors are read, layers apart."""
    texts: Texts
    num_corpus: int
    """Texts that exemplars come from: those outside of the test split."""
    mean_texts: list[str]
    """Those of them that the mean vector is of."""
    rejected: list[dict[str, Any]]
    """Source rows that gave neither an item nor a text, each with a reason."""

    @property
    def config(self) -> CollectVectorsConfig:
        return self.claim.config

    @property
    def folder(self) -> Folder:
        return self.claim.folder

    @property
    def work(self) -> Folder:
        """What is there only while the run goes on."""
        return Folder(f"{self.folder.url.rstrip('/')}/work")

    def blocks(self) -> dict[VectorOrder, list[Item]]:
        """Items by order; the first order's are the texts that the mean is taken of."""
        sample: list[Item] = [{"kind": "mean", "text": text} for text in self.mean_texts]
        groups = [sample]
        groups += [self.items[start : start + ITEMS_PER_BLOCK] for start in range(0, len(self.items), ITEMS_PER_BLOCK)]
        return {VectorOrder(index, self.claim.run_key): group for index, group in enumerate(groups)}

    @property
    def corpus(self) -> Iterator[Item]:
        """Row and text of the texts that exemplars come from, read from the source."""
        split = self.config.split
        return ({"row": row, "text": text} for row, text in self.texts if split_of(text, split) != "test")

    def parts(self) -> list[PartOrder]:
        """Which parts the corpus has."""
        return [
            PartOrder(index, self.claim.run_key) for index in range(-(-self.num_corpus // self.config.texts_per_block))
        ]

    def write_parts(self, orders: Sequence[PartOrder]) -> None:
        """Write the texts of these parts, one part in memory at a time."""
        wanted = {order.index: order for order in orders}
        corpus = self.corpus
        for index in range(max(wanted, default=-1) + 1):
            items = list(islice(corpus, self.config.texts_per_block))
            if index in wanted:
                write_items(self.work, wanted[index], items)


def prepare(config: CollectVectorsConfig) -> VectorRun:
    """Check a run from end to end and choose its texts and prompts. Raises UserError; writes nothing."""
    config = config.model_copy(update={"output": absolute(config.output)})
    target = identify_target(config.target)
    for layer in config.layers:
        if layer >= target.num_layers:
            raise UserError(
                f"layers has {layer}, but {target.path} has {target.num_layers} layers:"
                f" expected 0 to {target.num_layers - 1}"
            )
    texts = read_texts(config.texts)
    held_out: _First[Item] = _First(config.kinds.activations)
    mean_texts: _First[str] = _First(MEAN_TEXTS)
    num_corpus = 0
    rejected: list[dict[str, Any]] = []
    for row, text, reason in texts.rows():
        rank = unit_interval(f"{config.seed}/{text}")
        if reason:
            rejected.append({"source": "texts", "row": row, "reason": reason})
        elif split_of(text, config.split) == "test":
            held_out.add(rank, _token_item(text, config))
        else:
            mean_texts.add(rank, text)
            num_corpus += 1
    if not num_corpus:
        raise UserError(f"source {config.texts.path} has no text outside of the test split, expected some")
    items = held_out.found
    if config.kinds.differences:
        pairs, reasons = _pair_items(config)
        items += pairs
        rejected += reasons
    if not items:
        raise UserError(
            f"sources {config.texts.path} and {config.facts.path} have nothing in the test split, expected some"
        )
    inputs = {
        f"target {target.path}": stable_id(target.model_dump()),
        f"sources {config.texts.path} and {config.facts.path}": stable_id(items, texts.digest),
    }
    key = stable_id(_relevant(config), list(inputs.values()))
    claim = Claim(Folder(config.output), "vectors", config, key, inputs, _relevant)
    claim.check()
    return VectorRun(claim, items, texts, num_corpus, mean_texts.found, rejected)


class _First(Generic[T]):
    """The `count` things of smallest rank among all that were added; equal ranks keep their order."""

    def __init__(self, count: int):
        self._count = count
        self._heap: list[tuple[float, int, T]] = []
        self._added = 0

    def add(self, rank: float, thing: T) -> None:
        self._added += 1
        heapq.heappush(self._heap, (-rank, -self._added, thing))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    @property
    def found(self) -> list[T]:
        return [thing for *_, thing in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def _token_item(text: str, config: CollectVectorsConfig) -> Item:
    """A text, and the share of its tokens before the one that is taken."""
    return {
        "kind": "activation",
        "group": stable_id("text", text),
        "text": text,
        "share": unit_interval(f"{config.seed}/token/{text}"),
    }


def _pair_items(config: CollectVectorsConfig) -> tuple[list[Item], list[dict[str, Any]]]:
    """Prompt pairs of the test split, as activation patching forms them; and rows without a partner."""
    task = ActivationPatching()
    facts = load_source(config.facts, task.name, task.source_formats)
    plan = task.plan(facts.rows, GenerateConfig(split=config.split, seed=config.seed), splitter(config.split))
    pairs = [item for item in plan.items if item["split"] == "test"]
    pairs.sort(key=lambda item: unit_interval(f"{config.seed}/{item['item_id']}"))
    items = [
        {
            "kind": "difference",
            "group": item["group"],
            "template": item["template"],
            "subjects": [item["other_subject"], item["subject"]],
        }
        for item in pairs[: config.kinds.differences]
    ]
    rejected = [*facts.rejected, *plan.rejected]
    return items, [{"source": "facts", "row": row, "reason": reason} for row, reason in sorted(rejected)]


# --- what actors do ---------------------------------------------------------------------------------------------


def item_vectors(target: Target, items: Sequence[Item], config: CollectVectorsConfig) -> Iterator[dict[str, Any]]:
    """For every item and layer, a row of vectors.parquet without exemplars, or a row with a `reason`."""
    places: dict[int, list[Position]] = {}
    for number, item in enumerate(items):
        found = _places(target, item, config)
        if isinstance(found, str):
            yield from ({**_about(item), "layer": layer, "reason": found} for layer in config.layers)
        else:
            places[number] = found
    prompts = [ids for found in places.values() for ids, _ in found]
    for layer in config.layers if places else ():
        rows = read_places(target.model, prompts, layer, ["residual"])[0]
        of_prompts = iter(rows.split([len(ids) - 1 for ids in prompts]))
        for number, found in places.items():
            vectors = [next(of_prompts)[position - 1] for _, position in found]
            vector = vectors[0] - vectors[1] if len(vectors) > 1 else vectors[0]
            about = _about(items[number])
            if not vector.isfinite().all():
                yield {**about, "layer": layer, "reason": "vector_not_finite"}
                continue
            ids, position = found[0]
            token = target.tokenizer.decode([ids[position]])
            yield {
                "vector_id": stable_id("vector", items[number], layer),
                **about,
                "layer": layer,
                "token": token,
                "vector": vector.float().cpu().tolist(),
            }


def _about(item: Item) -> dict[str, Any]:
    prompts = [item["template"].replace("{}", subject) for subject in item.get("subjects", ())]
    return {"kind": item["kind"], "group": item["group"], "origin": item.get("text") or " minus ".join(prompts)}


def _places(target: Target, item: Item, config: CollectVectorsConfig) -> list[Position] | str:
    """(token ids, position) of every prompt of an item, or why there is none. First tokens carry no text."""
    longest = min(config.max_tokens, target.max_tokens or config.max_tokens)
    if item["kind"] == "activation":
        ids = target.encode(item["text"])[:longest]
        return [(ids, 1 + int(item["share"] * (len(ids) - 1)))] if len(ids) > 1 else "text_too_short"
    found: list[Position] = []
    for subject in item["subjects"]:
        before, after = item["template"].split("{}")
        ids, offsets = target.encode_with_offsets(f"{before}{subject}{after}".rstrip())
        position = len(ids) - 1
        if config.kinds.position == "subject":
            position = position_of(offsets, len(before), len(before) + len(subject))
        if len(ids) > longest:
            return "prompt_too_long"
        if position == 0:
            return "first_token"
        found.append((ids, position))
    return found


def corpus_mean(target: Target, run_config: CollectVectorsConfig, texts: Sequence[str]) -> dict[int, Tensor]:
    """Mean residual vector per layer over the tokens of `texts` that are finite."""
    longest = min(run_config.max_tokens, target.max_tokens or run_config.max_tokens)
    cut = [ids for ids in (target.encode(text)[:longest] for text in texts) if len(ids) > 1]
    means: dict[int, Tensor] = {}
    for layer in run_config.layers:
        if not run_config.center or not cut:
            means[layer] = torch.zeros(target.width)
            continue
        rows = read_places(target.model, cut, layer, ["residual"])[0]
        means[layer] = rows[rows.isfinite().all(dim=-1)].double().mean(0).float().cpu()
    return means


def window_rank(seed: int, text: int, start: int) -> float:
    """The random number that decides whether a window is among those drawn."""
    return unit_interval(f"{seed}/window/{text}/{start}")


def as_matrix(rows: Sequence[dict[str, Any]]) -> Tensor:
    return torch.from_numpy(np.asarray([row["vector"] for row in rows], dtype=np.float32))


def _relevant(config: CollectVectorsConfig) -> dict[str, Any]:
    """The config without what cannot change the result; texts, facts and target are known by their contents."""
    model = config.target.model_copy(update={"path": "", "device": "auto"})
    tree = resolved(config.model_copy(update={"output": "", "actors": ActorConfig(), "target": model}))
    return {name: value for name, value in tree.items() if name not in ("texts", "facts", "max_lost_share")}
