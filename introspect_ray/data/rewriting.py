"""The parts of rewriting that run on actors: true codes, simulated levels, and losses under all conditions.

    truth/shard-K.parquet      statistics of the latents on some texts; of fit texts also their true code
    levels/...                 simulated levels, see levels.py
    measured/shard-K.parquet   losses and agreement of some evaluation texts under all conditions

Everything is keyed: a file of another run, config or simulator is not read, and written anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float, Int

from introspect_ray.config import ActorConfig, ModelConfig
from introspect_ray.data.arrays import read_arrays, write_arrays
from introspect_ray.data.attempts import counted_loading
from introspect_ray.data.levels import LevelCache, simulate_block
from introspect_ray.data.pool import OrderWorker, Pool, check_resources, run_orders
from introspect_ray.data.rewrite_texts import TextShard
from introspect_ray.data.shards import ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.data.workers import use_assigned_threads
from introspect_ray.data.writer import DeviceFailed
from introspect_ray.features.coder import ActiveLatents
from introspect_ray.features.sae import load_sae
from introspect_ray.interventions.memory import is_device_error
from introspect_ray.interventions.target import Target
from introspect_ray.models.structure import text_config
from introspect_ray.rewrite.code import joined
from introspect_ray.rewrite.lines import Levels
from introspect_ray.rewrite.measure import FalseAlarm, Measured, MeasurePlan, measure, read_truth, text_batches
from introspect_ray.rewrite.scores import Losses
from introspect_ray.rewrite.site import Site, TextLosses
from introspect_ray.rewrite.statistics import LatentStatistics, pooled
from introspect_ray.simulator.base import Simulator


@dataclass(frozen=True)
class TargetJob:
    """What an actor needs to measure its target: where it is, and where results go."""

    output: str
    key: str
    """Of the target, the coder and the texts; results of another key are not read."""
    target: ModelConfig
    coder: str
    shards: Mapping[str, TextShard]


Work = Callable[[Any], Any]
"""One order -> its result; both go into JSON."""


class StepWorker(OrderWorker):
    """Holds what `load` loads and does one order after the other."""

    def __init__(self, load: Callable[[], Work], orders: Sequence[Any], folder: Folder, run_id: str):
        use_assigned_threads()
        self.orders = orders
        with counted_loading(folder, run_id, ray.get_runtime_context().get_actor_id() or ""):
            self.work = load()

    def make(self, order: ShardOrder) -> str:
        try:
            return json.dumps(self.work(self.orders[order.index]))
        except RuntimeError as error:
            if is_device_error(error):
                raise DeviceFailed(error) from error
            raise


def run_step(load: Callable[[], Work], orders: Sequence[Any], actors: ActorConfig, folder: Folder) -> Iterator[Any]:
    """The result of every order as it is done, in any order. Ray must be connected.

    Raises UserError at once if an actor does, RunFailed if an order is lost.
    """
    if not orders:
        return
    check_resources(actors)
    arguments = {"load": load, "orders": orders, "folder": folder}
    pool: Pool[ShardOrder] = Pool(folder, actors, StepWorker, arguments)
    for _, account in run_orders(pool, [ShardOrder(index, "") for index in range(len(orders))]):
        yield json.loads(account)


# --- truth ------------------------------------------------------------------------------------------------------


def make_truth(job: TargetJob, load_target: Callable[[ModelConfig], Target]) -> Work:
    """Orders `{"shard": name, "keep": whether the code itself is kept}`."""
    target = load_target(job.target)
    coder = load_sae(job.coder).to(target.device)
    site = Site(target, coder)

    def work(order: Any) -> Any:
        shard = job.shards[order["shard"]]
        codes, parts = [], []
        for start, stop in text_batches(shard.texts, text_config(target.model).vocab_size):
            code, statistics = read_truth(site, coder, shard.texts[start:stop])
            codes.append(code)
            parts.append(statistics)
        _write_truth(job, shard.name, pooled(parts), joined(codes) if order["keep"] else None)
        return {"shard": shard.name, "texts": len(shard.texts)}

    return work


def _write_truth(job: TargetJob, name: str, statistics: LatentStatistics, code: ActiveLatents | None) -> None:
    arrays = {label: getattr(statistics, label) for label in _STATISTICS}
    note: dict[str, Any] = {"num_tokens": statistics.num_tokens}
    if code is not None:
        arrays |= {label: getattr(code, label).cpu().numpy() for label in ("vectors", "latents", "values")}
        note |= {"num_vectors": code.num_vectors, "num_latents": code.num_latents}
    write_arrays(Folder(job.output), f"truth/{name}.parquet", job.key, arrays, note)


_STATISTICS = ("firings", "maximum", "total", "contribution", "output_sum")


def read_statistics(job: TargetJob, name: str) -> tuple[LatentStatistics, ActiveLatents | None] | None:
    """What `make_truth` wrote about a shard, or `None` if it is not there."""
    found = read_arrays(Folder(job.output), f"truth/{name}.parquet", job.key)
    if found is None:
        return None
    arrays, note = found
    statistics = LatentStatistics(note["num_tokens"], **{label: arrays[label] for label in _STATISTICS})
    if "num_vectors" not in note:
        return statistics, None
    vectors, latents, values = (torch.tensor(arrays[label]) for label in ("vectors", "latents", "values"))
    return statistics, ActiveLatents(vectors, latents, values, note["num_vectors"], note["num_latents"])


# --- levels -----------------------------------------------------------------------------------------------------


def make_levels(cache: LevelCache, shards: Mapping[str, TextShard], load: Callable[[], Simulator]) -> Work:
    """Orders `{"shard": name, "descriptions": [...]}`."""
    simulator = load()

    def work(order: Any) -> Any:
        windows, descriptions = shards[order["shard"]].windows, order["descriptions"]
        levels, failed = simulate_block(simulator, descriptions, windows)
        cache.write(windows, descriptions, levels, failed)
        return {"pairs": len(descriptions) * len(windows), "failed": failed}

    return work


def assemble(
    shards: Sequence[TextShard], levels: Sequence[Mapping[str, Float[np.ndarray, " N"]]], needed: Sequence[str]
) -> Levels:
    """Levels of all needed descriptions over the windows of several shards, in their order."""
    columns = [np.concatenate([of_shard[text] for of_shard in levels]) for text in needed]
    lengths = [len(window) for shard in shards for window in shard.windows]
    ends = np.cumsum([0, *lengths])
    starts = np.zeros(ends[-1], dtype=bool)
    starts[ends[:-1]] = True
    texts = [text for shard in shards for text in shard.texts]
    measured = [first + place for first, text in zip(ends[:-1].tolist(), texts, strict=True) for place in text.places]
    matrix = np.stack(columns, axis=1) if columns else np.zeros((int(ends[-1]), 0), dtype=np.float32)
    return Levels({text: column for column, text in enumerate(needed)}, matrix, starts, np.array(measured))


# --- losses -----------------------------------------------------------------------------------------------------


def make_measure(
    job: TargetJob,
    plan: MeasurePlan,
    caches: Mapping[str, LevelCache],
    needed: Mapping[str, Sequence[str]],
    load_target: Callable[[ModelConfig], Target],
) -> Work:
    """Orders `{"shard": name}`. `caches` and `needed` descriptions are by name of the simulator."""
    target = load_target(job.target)
    coder = load_sae(job.coder).to(target.device)
    site = Site(target, coder)

    def work(order: Any) -> Any:
        shard = job.shards[order["shard"]]
        levels = {name: cache.read(shard.windows)[0] for name, cache in caches.items()}
        parts = []
        for start, stop in text_batches(shard.texts, text_config(target.model).vocab_size):
            part = TextShard(shard.name, shard.texts[start:stop], shard.windows[start:stop])
            first, last = (sum(map(len, shard.windows[:index])) for index in (start, stop))
            sliced = {
                name: assemble([part], [{text: of[text][first:last] for text in needed[name]}], needed[name])
                for name, of in levels.items()
            }
            parts.append(measure(site, coder, part.texts, sliced, plan))
        _write_measured(job, shard.name, parts)
        return {"shard": shard.name, "texts": len(shard.texts)}

    return work


def _write_measured(job: TargetJob, name: str, parts: Sequence[Measured]) -> None:
    conditions = list(parts[0].losses)
    arrays: dict[str, np.ndarray] = {
        "rows": np.array([row for part in parts for row in part.rows]),
        "tokens": np.array([count for part in parts for count in part.tokens]),
    }
    for label in ("cross_entropy", "divergence"):
        arrays[label] = np.concatenate(
            [np.stack([getattr(part.losses[condition], label) for condition in conditions]) for part in parts], axis=1
        )
    arrays["complete"] = np.concatenate(
        [np.stack([part.complete[condition] for condition in conditions]) for part in parts], axis=1
    )
    lines = [agreement.line for agreement in parts[0].agreement]
    for number in range(len(lines)):
        arrays[f"agreement {number}"] = np.sum([part.agreement[number].sums for part in parts], axis=0)
    harm = [part.harm for part in parts if part.harm is not None]
    arrays["harm"] = np.sum(harm, axis=0) if harm else np.zeros(0)
    alarms = [alarm for part in parts for alarm in part.false_alarms]
    arrays["alarm places"] = np.array([[a.latent, a.row, a.position] for a in alarms], dtype=np.int64).reshape(-1, 3)
    arrays["alarm values"] = np.array([alarm.value for alarm in alarms])
    write_arrays(Folder(job.output), f"measured/{name}.parquet", job.key, arrays, [conditions, lines])


@dataclass
class Collected:
    """What all shards say together."""

    rows: list[int] = field(default_factory=list)
    tokens: list[Int[np.ndarray, " B"]] = field(default_factory=list)
    losses: dict[str, list[TextLosses]] = field(default_factory=dict)
    complete: dict[str, list[np.ndarray]] = field(default_factory=dict)
    agreement: dict[str, Float[np.ndarray, "S 9"]] = field(default_factory=dict)
    harm: Float[np.ndarray, " S"] | None = None
    false_alarms: list[FalseAlarm] = field(default_factory=list)

    def together(self) -> Losses:
        """Losses of the texts of all shards."""
        return Losses(
            tokens=np.concatenate(self.tokens).astype(np.float64),
            cross_entropy={name: np.concatenate([one.cross_entropy for one in x]) for name, x in self.losses.items()},
            divergence={name: np.concatenate([one.divergence for one in x]) for name, x in self.losses.items()},
            complete={name: np.concatenate(parts) for name, parts in self.complete.items()},
        )


def read_measured(job: TargetJob, name: str) -> tuple[dict[str, np.ndarray], Any] | None:
    """What `make_measure` wrote about a shard, or `None` if it is not there."""
    return read_arrays(Folder(job.output), f"measured/{name}.parquet", job.key)


def collect(job: TargetJob, names: Sequence[str]) -> Collected:
    """All shards together, in the order of `names`; each must be there."""
    whole = Collected()
    for name in names:
        found = read_measured(job, name)
        assert found is not None, f"{name} was not measured"
        arrays, (conditions, lines) = found
        whole.rows += arrays["rows"].tolist()
        whole.tokens.append(arrays["tokens"])
        for number, condition in enumerate(conditions):
            losses = TextLosses(arrays["cross_entropy"][number], arrays["divergence"][number])
            whole.losses.setdefault(condition, []).append(losses)
            whole.complete.setdefault(condition, []).append(arrays["complete"][number])
        for number, line in enumerate(lines):
            sums = arrays[f"agreement {number}"]
            whole.agreement[line] = sums + whole.agreement[line] if line in whole.agreement else sums
        whole.harm = arrays["harm"] if whole.harm is None else whole.harm + arrays["harm"]
        places = arrays["alarm places"].tolist()
        values = arrays["alarm values"].tolist()
        whole.false_alarms += [
            FalseAlarm(latent, row, position, value)
            for (latent, row, position), value in zip(places, values, strict=True)
        ]
    return whole
