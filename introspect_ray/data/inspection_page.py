"""An inspection for people: lines for the terminal, and one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from introspect_ray.data.inspect import BalanceCell, Finding, Inspection
from introspect_ray.data.splits import SPLITS
from introspect_ray.data.storage import Folder
from introspect_ray.evaluation.page import render_page
from introspect_ray.evaluation.report import MAX_GRID_SIDE
from introspect_ray.tasks.base import OK, Record

PAGE_NAME = "inspection.html"
"""The page beside the dataset's files, where no other place is named."""


def inspection_lines(inspection: Inspection) -> Iterator[str]:
    """What a terminal shows: what the dataset holds, then every note and problem on a line of its own."""
    view = _View(inspection)
    yield f"{view.title}: {view.url}"
    for split, (records, ok, selected, groups) in view.splits:
        yield f"  {split}: {records} records, {ok} ok, {selected} selected, {groups} groups"
    yield f"  source {view.source}: " + ", ".join(f"{count} {what}" for what, (count,) in view.rows)
    for column, (count, smallest, median, largest) in view.vectors:
        yield f"  {column}: {count} vectors, norms {smallest} to {largest}, median {median}"
    for word, findings in (("note", inspection.notes), ("problem", inspection.problems)):
        yield from (f"{word} ({finding.check}): {finding.message}" for finding in findings)


def render_inspection(inspection: Inspection) -> str:
    """The page as HTML text; it loads nothing."""
    view = _View(inspection)
    return render_page("inspection.html", view=view, summary=view.summary)


def write_inspection(inspection: Inspection, url: str | None) -> str:
    """Write the page to `url`, or into the dataset folder, and return where it is. Raises UserError if that fails."""
    parent, _, name = (url or f"{inspection.url.rstrip('/')}/{PAGE_NAME}").rpartition("/")
    folder = Folder(parent or ("/" if (url or "").startswith("/") else "."))
    folder.write(name, render_inspection(inspection).encode())
    return f"{folder.url}/{name}"


@dataclass(frozen=True)
class _Table:
    """Counts per value of one column, a column per split."""

    title: str
    phrase: str
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class _Grid:
    """Share of changed over the values of two columns, in one split."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, ...], BalanceCell]


@dataclass(frozen=True)
class _Example:
    split: str
    record_id: str
    pieces: list[tuple[str, bool]]
    details: list[tuple[str, str]]


class _View:
    """What the template and the terminal ask of an inspection."""

    def __init__(self, inspection: Inspection):
        self.inspection = inspection
        self.manifest = inspection.manifest
        self.url = inspection.url
        self.title = f"Dataset of {self.manifest.task.replace('_', ' ')}"
        self.problems: list[Finding] = inspection.problems
        self.notes: list[Finding] = inspection.notes
        there = {*inspection.statuses}
        self.split_names = [*(split for split in SPLITS if split in there), *sorted(there - {*SPLITS})]

    @property
    def verdict(self) -> str:
        count = len(self.problems)
        return "No problem found" if not count else "1 problem found" if count == 1 else f"{count} problems found"

    @property
    def summary(self) -> list[tuple[str, str]]:
        target = self.manifest.target
        size = sum(shard.num_bytes for shard in self.manifest.shards)
        return [
            ("Target", f"{target.path}, {target.num_layers} layers of width {target.width}"),
            ("Records", f"{self.manifest.num_records:,}"),
            ("Shards", f"{len(self.manifest.shards):,} of together {size / 2**20:,.1f} MiB"),
            ("Run key", self.manifest.run_key),
        ]

    @property
    def splits(self) -> list[tuple[str, tuple[int, int, int, int]]]:
        """Split -> records, ok, selected, groups."""
        found = self.inspection
        return [
            (
                split,
                (
                    sum(found.statuses[split].values()),
                    found.statuses[split].get(OK, 0),
                    found.selected.get(split, 0),
                    found.groups.get(split, 0),
                ),
            )
            for split in self.split_names
        ]

    @property
    def failures(self) -> list[tuple[str, list[int]]]:
        """Reason -> records per split."""
        statuses = self.inspection.statuses
        reasons = sorted({status for counts in statuses.values() for status in counts} - {OK})
        return [(reason, [statuses[split].get(reason, 0) for split in self.split_names]) for reason in reasons]

    @property
    def source(self) -> str:
        return f"{self.manifest.source.name} ({self.manifest.source.format})"

    @property
    def rows(self) -> list[tuple[str, tuple[int]]]:
        """What became of source rows -> their number."""
        account = self.manifest.source
        return [("read", (account.rows,)), ("used", (account.used,))] + [
            (f"rejected: {reason}", (count,)) for reason, count in account.rejected.items()
        ]

    @property
    def columns(self) -> list[tuple[str, str]]:
        return self.inspection.columns

    @property
    def vectors(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [
            (f"{found.column} {found.type}", (found.count, *(f"{norm:.3g}" for norm in found.norms)))
            for found in self.inspection.vectors
        ]

    @property
    def balance(self) -> list[_Table]:
        titles = list(self.inspection.task.breakdowns)
        has_change = any(cell.changed is not None for cell in self.inspection.balance)
        phrase = "Changed of selected records" if has_change else "Selected records"
        return [
            _Table(title, phrase, [(label, self._row(place, label)) for label in self._labels(place)])
            for place, title in enumerate(titles)
        ]

    def _row(self, place: int, label: str) -> list[str]:
        """One value of one column: `changed of all` per split, or `all` where nothing changes or stays."""
        shown = []
        for split in self.split_names:
            cells = [cell for cell in self._cells(split) if cell.values[place] == label]
            records = sum(cell.records for cell in cells)
            changes = [cell.changed for cell in cells if cell.changed is not None]
            shown.append(f"{sum(changes):,} of {records:,}" if changes else f"{records:,}")
        return shown

    @property
    def grids(self) -> list[_Grid]:
        titles = list(self.inspection.task.breakdowns)
        if len(titles) < 2 or any(cell.changed is None for cell in self.inspection.balance):
            return []
        rows, columns = self._labels(0), self._labels(1)
        if not all(2 <= len(labels) <= MAX_GRID_SIDE for labels in (rows, columns)):
            return []
        title = f"{titles[0]} by {titles[1].lower()}"
        return [
            _Grid(f"{title}, {split}", rows, columns, {cell.values[:2]: cell for cell in self._cells(split)})
            for split in self.split_names
        ]

    def _cells(self, split: str) -> list[BalanceCell]:
        return [cell for cell in self.inspection.balance if cell.split == split]

    def _labels(self, place: int) -> list[str]:
        """Values of one breakdown column, in the order in which the cells come."""
        return list(dict.fromkeys(cell.values[place] for cell in self.inspection.balance))

    @property
    def examples(self) -> list[_Example]:
        return [self._example(record) for record in self.inspection.examples]

    def _example(self, record: Record) -> _Example:
        task = self.inspection.task
        pieces, details = task.display(record)
        shown = {**details, "answer": task.render(record).answer.strip(), "group": record["group"]}
        return _Example(record["split"], record["record_id"], pieces, list(shown.items()))
