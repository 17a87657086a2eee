"""Is a dataset what its manifest says, and what is in it? Every check here can fail on its own; none stops another.

A *problem* breaks a promise of the generator (a torn shard, a group in two splits). A *note* is worth knowing and may
be intended (a class that is nearly empty, an empty split).
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from introspect_ray.config import GenerateConfig
from introspect_ray.data.dataset import Dataset, load_shard, nonfinite_rows
from introspect_ray.data.manifest import REJECTED_NAME, Manifest, read_manifest
from introspect_ray.data.shards import ShardInfo, canonical_line, content_digest, to_records, vector_matrix
from introspect_ray.data.splits import SPLITS
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.evaluation.evaluate import column_label, column_order
from introspect_ray.tasks.base import OK, Record, Task, stable_id
from introspect_ray.tasks.registry import get_task

Check = Literal[
    "manifest", "shards", "schema", "counts", "sources", "duplicates", "leakage", "selection", "vectors", "balance"
]

RARE_SHARE = 0.05
"""A class, changed or unchanged, that is rarer than this within one cell of the balance is noted."""

_KEYS = ("record_id", "item_id", "split", "group", "status")


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed, in one line."""

    check: Check
    message: str
    is_problem: bool


@dataclass(frozen=True)
class BalanceCell:
    """Selected records of one split that share the values of the task's breakdown columns."""

    split: str
    values: tuple[str, ...]
    records: int
    changed: int | None
    """Those whose output changes; None where the task has no such part."""


@dataclass(frozen=True)
class VectorSummary:
    """L2 norms of the vectors of one column, over all ok records whose vector is finite."""

    column: str
    type: str
    count: int
    norms: tuple[float, float, float]
    """The smallest, the median, the largest."""


@dataclass(frozen=True)
class Inspection:
    """What was found in a dataset."""

    url: str
    manifest: Manifest
    task: Task
    findings: list[Finding]
    columns: list[tuple[str, str]]
    """Name and type of every column, as the task writes them."""
    statuses: dict[str, dict[str, int]]
    """Split -> status -> records, counted here."""
    selected: dict[str, int]
    """Split -> selected records, counted here."""
    groups: dict[str, int]
    """Split -> groups."""
    balance: list[BalanceCell]
    vectors: list[VectorSummary]
    examples: list[Record]

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_problem]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.is_problem]


def inspect_dataset(url: str, num_examples: int, task: Task | None = None) -> Inspection:
    """Read a finished dataset whole, one shard at a time, and check it against its manifest and its task.

    `num_examples` records of every split are kept to show, picked by a hash of their id. `task` stands in for the one
    that the manifest names. Raises UserError if there is no manifest to check against, or none that can be read.
    """
    dataset = Dataset(Folder(url), read_manifest(Folder(url)))
    task = task or get_task(dataset.manifest.task)
    try:
        config = dataset.config
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{url}: the config in its manifest is not of this version: {key}: {first['msg']}") from None
    reading = _read(dataset, task, config, num_examples)
    reading.findings += [
        *_manifest_findings(dataset.manifest),
        *_count_findings(dataset.manifest, reading),
        *_source_findings(dataset),
        *_duplicate_findings(reading),
        *_leakage_findings(reading, task),
    ]
    chosen, found = _selection(dataset, reading)
    balance = _balance(reading, task, chosen)
    reading.findings += [*found, *_balance_findings(balance, dataset.manifest), *_empty_splits(config, reading)]
    split_of = dict(zip(reading.column("record_id"), reading.column("split"), strict=True))
    examples = [record for _, _, record in sorted(reading.examples, key=lambda example: example[:2])]
    return Inspection(
        url=url,
        manifest=dataset.manifest,
        task=task,
        findings=reading.findings,
        columns=[(field.name, _type_name(field.type)) for field in reading.expected],
        statuses=reading.statuses(),
        selected=dict(sorted(Counter(split_of[record_id] for record_id in chosen).items())),
        groups={split: len(names) for split, names in sorted(reading.by_split("group").items())},
        balance=balance,
        vectors=reading.vectors(),
        examples=examples,
    )


# --- reading ----------------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """What is kept of the shards while they pass: scalars that checks need, digests, norms, and a few records."""

    expected: pa.Schema
    kept: list[str]
    """Columns whose values are kept; null where a shard lacks one."""
    findings: list[Finding] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    """One digest per record over all columns but ids and split, in shard order."""
    norms: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    examples: list[tuple[str, str, Record]] = field(default_factory=list)

    def problem(self, check: Check, message: str) -> None:
        self.findings.append(Finding(check, message, True))

    def column(self, name: str) -> list[Any]:
        """Values of a kept column over all shards that could be read."""
        return [value for table in self.tables for value in table[name].to_pylist()]

    def by_split(self, name: str) -> dict[str, set[Any]]:
        """Split -> the values of a column in it, nulls left out."""
        found: dict[str, set[Any]] = defaultdict(set)
        for split, value in zip(self.column("split"), self.column(name), strict=True):
            if value is not None:
                found[split].add(value)
        return found

    def statuses(self) -> dict[str, dict[str, int]]:
        """Split -> status -> records."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for split, status in zip(self.column("split"), self.column("status"), strict=True):
            found[split][status] += 1
        return {split: dict(sorted(counts.items())) for split, counts in sorted(found.items())}

    def vectors(self) -> list[VectorSummary]:
        summaries = []
        for name, parts in self.norms.items():
            norms = np.concatenate(parts)
            if len(norms):
                kind = _type_name(self.expected.field(name).type)
                found = (float(norms.min()), float(np.median(norms)), float(norms.max()))
                summaries.append(VectorSummary(name, kind, len(norms), found))
        return summaries


def _read(dataset: Dataset, task: Task, config: GenerateConfig, num_examples: int) -> _Reading:
    expected = task.schema(dataset.manifest.target.width, config)
    wanted = dict.fromkeys([*_KEYS, "changed", *task.breakdowns.values(), *task.unshared])
    reading = _Reading(expected, [name for name in wanted if name in expected.names])
    shards = dataset.manifest.shards
    names = [shard.name for shard in shards]
    for name in sorted({name for name in names if names.count(name) > 1}):
        reading.problem("shards", f"dataset.json lists {name} {names.count(name)} times")
    for shard in shards:
        _read_shard(dataset.folder, shard, task, reading, num_examples)
    reading.findings += _unlisted(dataset.folder, names)
    for name, parts in reading.norms.items():
        zeros = sum(int((norms == 0).sum()) for norms in parts)
        if zeros:
            reading.findings.append(Finding("vectors", f"{zeros} vectors of column {name!r} are all zeros", False))
    return reading


def _read_shard(folder: Folder, shard: ShardInfo, task: Task, reading: _Reading, num_examples: int) -> None:
    try:
        table = load_shard(folder, shard, None)
    except UserError as error:
        reading.problem("shards", str(error))
        return
    where = f"{folder.url}/{shard.name}"
    differences = list(_schema_differences(table.schema, reading.expected))
    for difference in differences:
        reading.problem("schema", f"{where}: {difference}")
    if not set(_KEYS) <= set(table.schema.names):
        return
    if content_digest(table) != shard.digest:
        reading.problem("shards", f"{where} does not hold the records that dataset.json lists: their digests differ")
    _check_vectors(where, table, task, reading)
    kept = [table[name] if name in table.schema.names else pa.nulls(table.num_rows) for name in reading.kept]
    reading.tables.append(pa.Table.from_arrays(kept, names=reading.kept))
    records = to_records(table)
    reading.contents += [_content(record) for record in records]
    if not differences:
        reading.examples = _picked([*reading.examples, *_candidates(records)], num_examples)


def _schema_differences(found: pa.Schema, expected: pa.Schema) -> Iterator[str]:
    for name in expected.names:
        if name not in found.names:
            yield f"column {name!r} is missing"
        elif found.field(name).type != expected.field(name).type:
            there, wanted = _type_name(found.field(name).type), _type_name(expected.field(name).type)
            yield f"column {name!r} has type {there}, expected {wanted}"
    for name in found.names:
        if name not in expected.names:
            yield f"column {name!r} is unknown to the task"


def _check_vectors(where: str, table: pa.Table, task: Task, reading: _Reading) -> None:
    for name, rows in nonfinite_rows(table).items():
        reading.problem(
            "vectors", f"{where}: {len(rows)} of column {name!r} are not finite, the first in row {rows[0]}"
        )
    is_ok = np.array([status == OK for status in table["status"].to_pylist()], dtype=bool)
    for schema_field in table.schema:
        if not isinstance(schema_field.type, pa.FixedShapeTensorType):
            continue
        matrix, null = vector_matrix(table[schema_field.name])
        missing = np.flatnonzero(is_ok & null)
        if task.has_vectors and len(missing):
            reading.problem(
                "vectors", f"{where}: {len(missing)} ok records have no vector, the first in row {missing[0]}"
            )
        norms = np.linalg.norm(matrix[is_ok & ~null].astype(np.float32), axis=1)
        if schema_field.name in reading.expected.names:
            reading.norms[schema_field.name].append(norms[np.isfinite(norms)])


def _content(record: Record) -> str:
    """A digest of what a record says, whatever it is called and wherever it was put."""
    return stable_id(
        canonical_line({key: value for key, value in record.items() if key not in ("record_id", "item_id", "split")})
    )


def _candidates(records: Iterable[Record]) -> Iterator[tuple[str, str, Record]]:
    for record in records:
        if record["status"] == OK:
            yield record["split"], stable_id("browse", record["record_id"]), record


def _picked(candidates: Iterable[tuple[str, str, Record]], count: int) -> list[tuple[str, str, Record]]:
    """The `count` candidates of every split that come first by hash."""
    by_split: dict[str, list[tuple[str, str, Record]]] = defaultdict(list)
    for candidate in candidates:
        by_split[candidate[0]].append(candidate)
    return [
        candidate
        for members in by_split.values()
        for candidate in heapq.nsmallest(count, members, key=lambda member: member[1])
    ]


def _unlisted(folder: Folder, listed: Sequence[str]) -> Iterator[Finding]:
    there = [f"shards/{name}" for name in Folder(f"{folder.url.rstrip('/')}/shards").names()]
    extra = [name for name in there if name not in listed and not name.removeprefix("shards/").startswith(TEMPORARY)]
    if extra:
        found = f"{len(extra)} files beside the shards that dataset.json lists are ignored, the first is {extra[0]}"
        yield Finding("shards", found, False)


# --- checks -----------------------------------------------------------------------------------------------------


def _manifest_findings(manifest: Manifest) -> Iterator[Finding]:
    listed = sum(shard.num_rows for shard in manifest.shards)
    counted = sum(count for found in manifest.counts.values() for count in found.values())
    for name, value in (("its shards", listed), ("its counts", counted)):
        if value != manifest.num_records:
            message = f"dataset.json says {manifest.num_records} records, {name} add up to {value}"
            yield Finding("manifest", message, True)
    for reason, count in manifest.slow_shards.items():
        yield Finding("manifest", f"slow in {count} of {len(manifest.shards)} shards: {reason}", False)


def _count_findings(manifest: Manifest, reading: _Reading) -> Iterator[Finding]:
    for split in sorted({*reading.column("split")} - {*SPLITS}):
        yield Finding("counts", f"split {split!r} is none of {', '.join(SPLITS)}", True)
    found = reading.statuses()
    for split in sorted({*found, *manifest.counts}):
        here, there = found.get(split, {}), manifest.counts.get(split, {})
        for status in sorted({*here, *there}):
            if here.get(status, 0) != there.get(status, 0):
                message = (
                    f"{here.get(status, 0)} records of split {split!r} have status {status!r},"
                    f" dataset.json says {there.get(status, 0)}"
                )
                yield Finding("counts", message, True)


def _source_findings(dataset: Dataset) -> Iterator[Finding]:
    """The account of source rows: used and rejected ones add up, and rejected.jsonl says the same."""
    account = dataset.manifest.source
    if account.used + sum(account.rejected.values()) != account.rows:
        message = (
            f"of {account.rows} source rows {account.used} are used and {sum(account.rejected.values())} rejected:"
            " some are in neither or in both"
        )
        yield Finding("sources", message, True)
    try:
        lines = [json.loads(line) for line in dataset.folder.read(REJECTED_NAME).decode().splitlines()]
        reasons = Counter(str(line["reason"]) for line in lines)
        rows = [int(line["row"]) for line in lines]
    except FileNotFoundError:
        yield Finding("sources", f"{REJECTED_NAME} is missing", True)
        return
    except (ValueError, KeyError, TypeError) as error:
        yield Finding("sources", f"{REJECTED_NAME} cannot be read: {type(error).__name__}: {error}", True)
        return
    if reasons != account.rejected:
        message = f"{REJECTED_NAME} lists {_listed(reasons)}, dataset.json says {_listed(account.rejected)}"
        yield Finding("sources", message, True)
    if len(set(rows)) < len(rows):
        yield Finding("sources", f"{REJECTED_NAME} lists a row twice", True)


def _duplicate_findings(reading: _Reading) -> Iterator[Finding]:
    ids = Counter(reading.column("record_id"))
    twice = [record_id for record_id, count in ids.items() if count > 1]
    if twice:
        yield Finding("duplicates", f"{len(twice)} record ids occur more than once, the first is {twice[0]}", True)
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for content, record_id, split, status in zip(
        reading.contents, *(reading.column(name) for name in ("record_id", "split", "status")), strict=True
    ):
        if status == OK:
            places[content].append((record_id, split))
    equal = [found for found in places.values() if len({record_id for record_id, _ in found}) > 1]
    if equal:
        first = " and ".join(record_id for record_id, _ in equal[0][:2])
        yield Finding("duplicates", f"{len(equal)} contents stand under several ids, the first under {first}", True)


def _leakage_findings(reading: _Reading, task: Task) -> Iterator[Finding]:
    """Groups, and everything that the task says no two splits may share."""
    yield from _shared("group", reading.by_split("group"))
    pooled: dict[str, set[Any]] = defaultdict(set)
    for name in task.unshared:
        if name in reading.kept:
            for split, values in reading.by_split(name).items():
                pooled[split] |= values
    if pooled:
        yield from _shared(task.unshared[0], pooled)


def _shared(name: str, by_split: Mapping[str, set[Any]]) -> Iterator[Finding]:
    splits: dict[Any, list[str]] = defaultdict(list)
    for split, values in sorted(by_split.items()):
        for value in values:
            splits[value].append(split)
    leaked = sorted((value, found) for value, found in splits.items() if len(found) > 1)
    if leaked:
        value, found = leaked[0]
        message = f"{len(leaked)} values of {name} are in two splits or more, the first is {value!r} in "
        yield Finding("leakage", message + " and ".join(found), True)


def _selection(dataset: Dataset, reading: _Reading) -> tuple[list[str], list[Finding]]:
    """Ids of the selected records that are there and ok, each once; what is wrong with the selection."""
    rows = zip(*(reading.column(name) for name in ("record_id", "split", "status")), strict=True)
    known = {record_id: (split, status) for record_id, split, status in rows}
    usable = [record_id for record_id, (_, status) in known.items() if status == OK]
    findings: list[Finding] = []
    if not dataset.manifest.has_selection:
        chosen = usable
    else:
        try:
            listed = [str(record_id) for record_id in dataset.selection().to_pylist()]
        except UserError as error:
            return [], [Finding("selection", str(error), True)]
        reasons = {
            "are listed more than once": [name for name, count in Counter(listed).items() if count > 1],
            "are ids of no record": [name for name in listed if name not in known],
            "are ids of records without a truth": [name for name in listed if known.get(name, ("", OK))[1] != OK],
        }
        findings += [
            Finding("selection", f"{len(names)} selected ids {what}, the first is {names[0]}", True)
            for what, names in reasons.items()
            if names
        ]
        chosen = sorted(set(listed) & set(usable))
    counts = Counter(known[record_id][0] for record_id in chosen)
    if counts != dataset.manifest.selected:
        message = f"selected are {_listed(counts)}, dataset.json says {_listed(dataset.manifest.selected)}"
        findings.append(Finding("selection", message, True))
    return chosen, findings


def _balance(reading: _Reading, task: Task, chosen: Iterable[str]) -> list[BalanceCell]:
    """Selected records per split and value of every breakdown column, cells in the order of their values."""
    names = [name for name in task.breakdowns.values() if name in reading.kept]
    has_change = "changed" in reading.kept
    wanted = set(chosen)
    cells: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    columns = [reading.column(name) for name in ("record_id", "split", *names)]
    changed = reading.column("changed") if has_change else [None] * len(columns[0])
    order: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for record_id, split, *values, change in zip(*columns, changed, strict=True):
        if record_id in wanted:
            labels = (split, *map(column_label, values))
            cells[labels].append(change)
            place = SPLITS.index(split) if split in SPLITS else len(SPLITS)
            order[labels] = (place, split, *map(column_order, values))
    return [
        BalanceCell(labels[0], labels[1:], len(cells[labels]), sum(map(bool, cells[labels])) if has_change else None)
        for labels in sorted(cells, key=lambda labels: order[labels])
    ]


def _balance_findings(balance: Sequence[BalanceCell], manifest: Manifest) -> Iterator[Finding]:
    """Splits and cells in which changed or unchanged is rare: scores there say little about the rare class."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    rare = []
    for cell in balance:
        if cell.changed is None:
            continue
        totals[cell.split][0] += cell.changed
        totals[cell.split][1] += cell.records
        if min(cell.changed, cell.records - cell.changed) < RARE_SHARE * cell.records:
            rare.append(cell)
    for split, (changed, records) in totals.items():
        if changed in (0, records):
            word = "changed" if changed else "unchanged"
            yield Finding("balance", f"all {records} selected records of split {split!r} are {word}", False)
    if rare:
        cell = max(rare, key=lambda cell: cell.records)
        where = ", ".join((cell.split, *cell.values))
        message = (
            f"in {len(rare)} of {len(balance)} cells fewer than {RARE_SHARE:.0%} of the records have the rarer class;"
            f" the largest is {where}: {cell.changed} of {cell.records} changed"
        )
        yield Finding("balance", message, False)
    for split, count in manifest.counts.items():
        failed = sum(count.values()) - count.get(OK, 0)
        if failed:
            reasons = {status: number for status, number in count.items() if status != OK}
            yield Finding("counts", f"{failed} records of split {split!r} have no truth: {_listed(reasons)}", False)


def _empty_splits(config: GenerateConfig, reading: _Reading) -> Iterator[Finding]:
    there = {*reading.column("split")}
    for split in SPLITS:
        if getattr(config.split, split) > 0 and split not in there:
            yield Finding("counts", f"split {split!r} is empty", False)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _type_name(kind: pa.DataType) -> str:
    """A type as a reader writes it; a vector as its dtype and width."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return f"{np.dtype(kind.value_type.to_pandas_dtype())}{kind.shape}"
    return str(kind)
