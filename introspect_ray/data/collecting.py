"""Planning a collection of exemplars: checks, texts, shards of texts, blocks of latents. No Ray, no weights.

OUTPUT/config.json                     first
OUTPUT/work/plan/shard-00000.parquet   texts of a shard; attempts.py's notes
OUTPUT/work/shards/shard-00000.json    what a shard of texts gave, written after its files
OUTPUT/work/scans/...                  those files, see scanning.py
OUTPUT/work/merged/STEP-00000.json     what a step of merging gave, written after its files, see merging.py
OUTPUT/CODER/...                       see features/exemplar_store.py; exemplars.json last, then work/ is removed
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from introspect_ray.config import CollectConfig, resolved
from introspect_ray.data.claim import Claim
from introspect_ray.data.identity import folder_digest, identify_target
from introspect_ray.data.manifest import TargetIdentity
from introspect_ray.data.shards import ShardOrder, write_items
from introspect_ray.data.splits import SPLITS, split_of
from introspect_ray.data.storage import Folder
from introspect_ray.data.texts import Texts, read_texts
from introspect_ray.errors import UserError
from introspect_ray.features.card import CoderCard, coder_folder
from introspect_ray.features.collection import Limits
from introspect_ray.features.exemplar_store import SCHEMA_VERSION
from introspect_ray.features.sae import check_sae
from introspect_ray.tasks.base import stable_id

logger = logging.getLogger(__name__)

WORK_NAME = "work"
"""Folder inside the output for what is there only while a collection runs."""
MERGED_NAME = "merged"
"""Folder in that, for notes of what was merged."""


class ScanOrder(ShardOrder):
    """Which shard of texts."""

    @property
    def name(self) -> str:
        return f"shards/shard-{self.index:05d}.json"


class StepOrder(ShardOrder):
    """One order of a step of merging, see merging.py; counted over all coders."""

    step: ClassVar[str]

    @property
    def attempts_name(self) -> str:
        return f"plan/{self.step}-{self.index:05d}.attempts.json"

    @property
    def name(self) -> str:
        return f"{MERGED_NAME}/{self.step}-{self.index:05d}.json"


@dataclass(frozen=True)
class CoderPlan:
    """One coder of a collection."""

    path: str
    name: str
    """Of its folder in the output."""
    card: CoderCard
    digest: str

    def num_blocks(self, latents_per_block: int) -> int:
        return -(-self.card.num_latents // latents_per_block)


@dataclass(frozen=True)
class Collecting:
    """A collection that passed every check."""

    config: CollectConfig
    target: TargetIdentity
    coders: tuple[CoderPlan, ...]
    texts: Texts

    @property
    def inputs(self) -> dict[str, str]:
        digests = {f"coder {coder.path}": coder.digest for coder in self.coders}
        return {
            f"target {self.target.path}": stable_id(self.target.model_dump()),
            f"source {self.config.source.path}": self.texts.digest,
            **digests,
        }

    @cached_property
    def run_key(self) -> str:
        """16 hex digits, equal for runs that write the same exemplars from the same shards."""
        return stable_id(SCHEMA_VERSION, relevant(self.config), self.inputs)

    @property
    def claim(self) -> Claim[CollectConfig]:
        return Claim(Folder(self.config.output), "exemplars", self.config, self.run_key, self.inputs, relevant)

    @property
    def work(self) -> Folder:
        return Folder(f"{self.config.output.rstrip('/')}/{WORK_NAME}")

    def coder_folder(self, coder: CoderPlan) -> Folder:
        return Folder(f"{self.config.output.rstrip('/')}/{coder.name}")

    @cached_property
    def scans(self) -> list[ScanOrder]:
        count = -(-self.texts.num_used // self.config.texts_per_shard)
        return [ScanOrder(index, self.run_key) for index in range(count)]

    @property
    def num_blocks(self) -> list[int]:
        """Blocks of latents of every coder."""
        return [coder.num_blocks(self.config.latents_per_block) for coder in self.coders]

    def write_plan(self, orders: Collection[ScanOrder]) -> None:
        """Write the texts of these shards."""
        wanted = {order.index for order in orders}
        size = self.config.texts_per_shard
        items: list[dict[str, Any]] = []
        for number, (row, text) in enumerate(self.texts):
            if number // size in wanted:
                split = SPLITS.index(split_of(text, self.config.split))
                items.append({"row": row, "split": split, "text": text})
            if (number + 1) % size == 0 or number + 1 == self.texts.num_used:
                if items:
                    write_items(self.work, self.scans[number // size], items)
                items = []


def limits_of(config: CollectConfig) -> Limits:
    """What the arrays are cut back to."""
    found = config.limits
    return Limits(
        top=found.top,
        sample=found.quantiles * found.per_quantile,
        pool=found.pool,
        seed=config.seed,
        buffer=config.buffer_rows,
    )


def plan_collection(config: CollectConfig) -> Collecting:
    """Check a collection from end to end. Raises UserError; reads no weights and writes nothing."""
    target = identify_target(config.target)
    coders: list[CoderPlan] = []
    for path in config.coders:
        card = check_sae(path, target.width)
        if card.layer >= target.num_layers:
            raise UserError(
                f"SAE path '{path}' is of layer {card.layer}, but {target.path} has {target.num_layers} layers:"
                f" expected 0 to {target.num_layers - 1}"
            )
        if card.width_in != target.width:
            raise UserError(f"SAE path '{path}' reads width {card.width_in}: the target has width {target.width}")
        if note := card.other_model(target.path):
            logger.warning("SAE path '%s': %s", path, note)
        coders.append(
            CoderPlan(path, _name(path, [coder.name for coder in coders]), card, folder_digest(coder_folder(path)))
        )
    found = Collecting(config, target, tuple(coders), read_texts(config.source))
    found.claim.check()
    return found


def _name(path: str, taken: Collection[str]) -> str:
    """What a coder's folder is called: the last part of its path, numbered if another one is called so."""
    last = re.split(r"[/:]", path.rstrip("/"))[-1]
    name = re.sub(r"[^\w.-]+", "-", last).strip(".-") or "coder"
    if name in (*taken, WORK_NAME):
        name = f"{name}-{len(taken)}"
    return name


def relevant(config: CollectConfig) -> dict[str, Any]:
    """The resolved config without what cannot change the files: where and how it runs."""
    aside = {"actors", "output", "max_error_share", "buffer_rows"}
    return {name: value for name, value in resolved(config).items() if name not in aside}
