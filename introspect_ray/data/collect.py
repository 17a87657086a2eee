"""Collecting exemplars on Ray: what every latent of some coders responds to.

    driver  plan (no Ray, no weights) -> claim folder, write texts of unfinished shards
    actors  ScanWorker: target and coders, loaded once; per shard of texts: scan_shard
    driver  all shards done
    actors  no GPU; per block of latents or shard: a step of merging (merging.py)
    driver  all blocks done -> latents.parquet, exemplars.json, work/ removed

Both phases are resumed by the same command, see pool.py; where files lie is said in collecting.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import ray

from introspect_ray.config import CollectConfig, resolved
from introspect_ray.data.attempts import counted_loading
from introspect_ray.data.cluster import connect
from introspect_ray.data.collecting import WORK_NAME, Collecting, ScanOrder, StepOrder, plan_collection
from introspect_ray.data.merging import BlockOrder, ChooseOrder, GatherOrder, Merging, StepInfo, stats_bytes
from introspect_ray.data.pool import OrderWorker, Pool, check_resources, run_orders
from introspect_ray.data.scanning import ScanInfo, Scanner, finished_info, scan_shard
from introspect_ray.data.shards import ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.exemplar_store import (
    LATENTS_NAME,
    META_NAME,
    SCHEMA_VERSION,
    ExemplarMeta,
    open_exemplars,
)

Progress = Callable[[str, int, int, str], None]
"""(stage, done, of all, note); what earlier runs did counts as done."""


@dataclass(frozen=True)
class CollectSummary:
    """What a collection left in its output folder."""

    output: str
    metas: Mapping[str, ExemplarMeta]
    """Name of a coder's folder -> what it holds."""
    was_complete: bool

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"{self.output} was already complete" if self.was_complete else f"wrote {self.output}"
        coders = "; ".join(
            f"{name}: {meta.num_live} of {meta.num_latents} latents fire, {meta.num_tokens} tokens"
            + (f" ({meta.num_not_finite} more are not finite)" if meta.num_not_finite else "")
            for name, meta in self.metas.items()
        )
        texts = next(iter(self.metas.values())).texts
        aside = ", ".join(f"{count} {reason}" for reason, count in texts.items() if reason != "used" and count)
        return f"{start}: {texts['used']} texts{f' ({aside} left out)' if aside else ''}; {coders}"


class ScanWorker(OrderWorker):
    """Holds a target and its coders, and scans one shard of texts per order."""

    order_class: ClassVar[type[ShardOrder]] = ScanOrder

    def __init__(self, config: CollectConfig, work: Folder, load: Callable[[CollectConfig], Scanner], run_id: str):
        self.config, self.work, self.run_id = config, work, run_id
        with counted_loading(work, run_id, ray.get_runtime_context().get_actor_id() or ""):
            self.scanner = load(config)

    def make(self, order: ScanOrder) -> str:
        return scan_shard(self.scanner, self.config, self.work, order, self.run_id).model_dump_json()


class MergeWorker(OrderWorker):
    """Makes one order of a step of merging per call."""

    def __init__(self, merging: Merging, run_id: str):  # noqa: ARG002 - merging leaves no notes of attempts
        self.merging = merging

    def make(self, order: StepOrder) -> str:
        return self.merging.make(order).model_dump_json()


class ChooseWorker(MergeWorker):
    order_class: ClassVar[type[ShardOrder]] = ChooseOrder


class GatherWorker(MergeWorker):
    order_class: ClassVar[type[ShardOrder]] = GatherOrder


class BlockWorker(MergeWorker):
    order_class: ClassVar[type[ShardOrder]] = BlockOrder


def collect_exemplars(
    config: CollectConfig, progress: Progress, load: Callable[[CollectConfig], Scanner] = Scanner.load
) -> CollectSummary:
    """Collect what `config` describes, or what is left of it; the same call after any interruption goes on.

    Connects to Ray only if there is something to do. Raises UserError before that for bad input, RunFailed if a shard
    or block cannot be made or too many texts fail. `load` stands in for the target and coders that the config names.
    """
    plan = plan_collection(config)
    there = _finished(plan)
    if there is not None:
        plan.claim.folder.remove_folder(WORK_NAME)
        return CollectSummary(config.output, there, was_complete=True)
    plan.claim.write()
    scans = {order.index: info for order in plan.scans if (info := finished_info(plan.work, order)) is not None}
    with ExitStack() as stack:
        joined_ray = _Joining(stack, config)
        _scan(plan, scans, load, progress, joined_ray)
        failed = _check_failures(plan, scans)
        blocks = _merge(plan, progress, joined_ray)
    metas = {
        coder.name: finish_coder(plan, number, scans, failed, blocks[number])
        for number, coder in enumerate(plan.coders)
    }
    plan.claim.folder.remove_folder(WORK_NAME)
    return CollectSummary(config.output, metas, was_complete=False)


@dataclass
class _Joining:
    """Ray, connected at first need."""

    stack: ExitStack
    config: CollectConfig
    done: bool = field(default=False)

    def __call__(self) -> None:
        if not self.done:
            self.stack.enter_context(connect())
            check_resources(self.config.actors)
            self.done = True


def _finished(plan: Collecting) -> dict[str, ExemplarMeta] | None:
    """The manifests if every coder is finished by this very run and its files are whole, else None."""
    metas: dict[str, ExemplarMeta] = {}
    for coder in plan.coders:
        folder = plan.coder_folder(coder)
        if folder.size(META_NAME) is None:
            return None
        try:
            meta = open_exemplars(folder.url).meta
        except UserError:
            return None
        if meta.run_key != plan.run_key or any(folder.size(name) != size for name, size in meta.files.items()):
            return None
        metas[coder.name] = meta
    return metas


def _scan(
    plan: Collecting,
    done: dict[int, ScanInfo],
    load: Callable[[CollectConfig], Scanner],
    progress: Progress,
    join: Callable[[], None],
) -> None:
    """Scan every shard that is not in `done`, and add it."""
    todo = [order for order in plan.scans if order.index not in done]
    if not todo:
        return
    plan.write_plan(todo)
    join()
    pool: Pool[ScanOrder] = Pool(
        plan.work, plan.config.actors, ScanWorker, {"config": plan.config, "work": plan.work, "load": load}
    )
    tokens = sum(info.num_tokens[0] for info in done.values())
    progress("scan", len(done), len(plan.scans), f"{tokens} tokens")
    for order, account in run_orders(pool, todo):
        done[order.index] = ScanInfo.model_validate_json(account)
        tokens += done[order.index].num_tokens[0]
        progress("scan", len(done), len(plan.scans), f"{tokens} tokens")


def _check_failures(plan: Collecting, scans: Mapping[int, ScanInfo]) -> Counter[str]:
    """Texts that gave nothing because something went wrong, by reason. Raises RunFailed if they are too many."""
    failed = [failure for index in sorted(scans) for failure in scans[index].failed]
    if len(failed) > plan.config.max_error_share * plan.texts.num_used:
        row, _, detail = failed[0]
        raise RunFailed(
            f"{len(failed)} of {plan.texts.num_used} texts ended with an error, more than max_error_share"
            f" {plan.config.max_error_share:g} allows; the first is row {row}: {detail}; a run with a larger"
            f" max_error_share keeps what is done, and one without the folder {plan.work.url} does it again"
        )
    return Counter(reason for _, reason, _ in failed)


def _merge(plan: Collecting, progress: Progress, join: Callable[[], None]) -> list[list[StepInfo]]:
    """What every block of latents came to, per coder. Raises RunFailed if an order of a step cannot be made."""
    merging = Merging.of(plan)
    blocks = merging.orders(BlockOrder)
    if any(merging.finished(order) is None for order in blocks):
        for worker in (ChooseWorker, GatherWorker, BlockWorker):
            _run_step(plan, merging, worker, progress, join)
    by_coder: list[list[StepInfo]] = [[] for _ in plan.coders]
    for order in blocks:
        info = merging.finished(order)
        if info is None:
            raise RunFailed(f"{order.name} in {plan.work.url} was written and cannot be read back")
        by_coder[merging.place(order)[0]].append(info)
    return by_coder


def _run_step(
    plan: Collecting, merging: Merging, worker: type[MergeWorker], progress: Progress, join: Callable[[], None]
) -> None:
    """Make every order of a step that is not done."""
    step = worker.order_class
    assert issubclass(step, StepOrder)
    orders = merging.orders(step)
    todo = [order for order in orders if merging.finished(order) is None]
    if not todo:
        return
    join()
    done = len(orders) - len(todo)
    progress(step.step, done, len(orders), "")
    actors = plan.config.actors.model_copy(update={"num_gpus": 0})
    for _ in run_orders(Pool(plan.work, actors, worker, {"merging": merging}), todo):
        done += 1
        progress(step.step, done, len(orders), "")


def finish_coder(
    plan: Collecting,
    number: int,
    scans: Mapping[int, ScanInfo],
    failed: Mapping[str, int],
    blocks: Sequence[StepInfo],
) -> ExemplarMeta:
    """Write what stands beside a coder's blocks, the manifest last."""
    coder, config = plan.coders[number], plan.config
    folder = plan.coder_folder(coder)
    counts, maxima = Merging.of(plan).scans[number].counts()
    stats = stats_bytes(counts, maxima)
    folder.write(LATENTS_NAME, stats)
    files = {LATENTS_NAME: len(stats)}
    for block in blocks:
        files |= block.files
    meta = ExemplarMeta(
        schema_version=SCHEMA_VERSION,
        run_key=plan.run_key,
        config=resolved(config),
        target=plan.target.model_dump(mode="json"),
        coder=coder.path,
        coder_digest=coder.digest,
        kind=coder.card.kind,
        layer=coder.card.layer,
        num_latents=coder.card.num_latents,
        num_live=int((counts > 0).sum()),
        num_tokens=sum(info.num_tokens[number] for info in scans.values()),
        num_not_finite=sum(info.num_not_finite[number] for info in scans.values()),
        texts=_account(plan, failed),
        top=config.limits.top,
        latents_per_block=config.latents_per_block,
        files=files,
    )
    folder.write(META_NAME, (meta.model_dump_json(indent=1) + "\n").encode())
    return meta


def _account(plan: Collecting, failed: Mapping[str, int]) -> dict[str, int]:
    """What became of the rows of the source; the numbers add up to all of them."""
    used = plan.texts.num_used - sum(failed.values())
    account = {"used": used, **plan.texts.reasons, **failed}
    assert sum(account.values()) == len(plan.texts.usable), "every row of the source is counted once"
    return account
