"""What a task is: schema, plan, generate, render, parse. One file per task implements it.

Data flow:  source rows --plan--> work items --generate (on a target)--> records --render--> query and answer
            answer text of an explainer --parse--> Answer, compared with the record's own by evaluation/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import pyarrow as pa

from introspect_ray.config import GenerateConfig
from introspect_ray.explainer.query import Query
from introspect_ray.interventions.target import Target

OK = "ok"
"""Status of a record that holds a truth; any other status is the reason why it does not."""

PROMPT_TOO_LONG = "prompt_too_long"
"""Status of an item whose prompt has more tokens than the target takes."""

Record = dict[str, Any]
Item = dict[str, Any]
SplitOf = Callable[[str], str]
"""Group key -> "train" | "validation" | "test"."""


@dataclass(frozen=True)
class Answer:
    """What an answer says: whether the output changes (`None` where a task has no such part), and the content."""

    changed: bool | None
    content: str


@dataclass(frozen=True)
class Example:
    """One record as the explainer sees it."""

    query: Query
    answer: str


@dataclass
class Plan:
    """Work items, and why the other source rows gave none: (row number, reason), each row at most once."""

    items: list[Item] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    num_source_rows: int = 0


@runtime_checkable
class Task(Protocol):
    """Pure functions of one task; a task object holds nothing but its name and these."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    """Metrics of evaluation/metrics.py that are defined for this task, the main one first."""
    has_vectors: ClassVar[bool]
    breakdowns: ClassVar[Mapping[str, str]]
    """Title -> record column by whose value the report breaks the main metric down."""
    unshared: ClassVar[tuple[str, ...]]
    """Record columns of what no two splits may share beside groups; one value may stand in several of them."""
    selected_by: ClassVar[tuple[str, ...]]
    """Record columns that `select` looks at beside `record_id`, `split` and `status`."""
    source_formats: ClassVar[tuple[str, ...]]
    """Source formats (SourceConfig.format) whose rows this task accepts, the preferred one first."""

    def schema(self, width: int, config: GenerateConfig) -> pa.Schema:
        """Columns of one record: `COMMON_FIELDS` first. `width` is the target's d_M."""

    def plan(self, rows: Sequence[Mapping[str, Any]], config: GenerateConfig, split_of: SplitOf) -> Plan:
        """Work items (JSON types only; each with `item_id`, `split`, `group`) from validated source rows. No model."""

    def generate(self, target: Target, items: Sequence[Item], config: GenerateConfig) -> list[Record]:
        """Run the procedure. Every item gives at least one record; a failed one has a reason as its status."""

    def select(self, records: pa.Table, config: GenerateConfig) -> list[str] | None:
        """Ids of the records to train and score on, by the columns `selected_by`; `None` for all that are ok."""

    def render(self, record: Record) -> Example:
        """Query and reference answer of an ok record."""

    def truth(self, record: Record) -> Answer:
        """The record's own answer."""

    def accepted(self, record: Record) -> tuple[str, ...]:
        """Contents that count as a match beside the truth's own (several labels may describe a latent)."""

    def parse(self, text: str) -> Answer | None:
        """What an explainer's answer says, or `None` if it does not have the form of an answer."""

    def display(self, record: Record) -> tuple[list[tuple[str, bool]], dict[str, str]]:
        """For the report: the text in pieces (piece, marked or not), and labelled details."""


COMMON_FIELDS: tuple[pa.Field, ...] = (
    pa.field("record_id", pa.string(), nullable=False),
    pa.field("item_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("group", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("detail", pa.string()),
)
"""Columns of every record; `group` is the independent unit of bootstrap, `detail` says more about a failed status."""


def stable_id(*content: Any) -> str:
    """16 hex digits from JSON-able content, equal on every machine and run."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def failed(item: Item, status: str, detail: str = "") -> Record:
    """The record of an item that gave no truth; all task columns are null."""
    return {
        "record_id": stable_id("failed", item["item_id"], status),
        "item_id": item["item_id"],
        "split": item["split"],
        "group": item["group"],
        "status": status,
        "detail": detail,
    }


def too_long(target: Target, item: Item, *prompts: Sequence[int]) -> Record | None:
    """The failed record of an item of whose prompts, token ids, one is longer than the target takes; else None."""
    longest = max(map(len, prompts))
    if target.max_tokens is None or longest <= target.max_tokens:
        return None
    return failed(item, PROMPT_TOO_LONG, f"{longest} tokens, the target takes at most {target.max_tokens}")
