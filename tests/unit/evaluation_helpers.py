"""Hand-made rows and a tiny task for the evaluation tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from introspect_ray.evaluation.metrics import Scored
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.tasks.base import Answer, Example, Record, Task


def row(
    truth: tuple[bool | None, str],
    predicted: tuple[bool | None, str] | None,
    group: str = "g",
    record_id: str = "r",
    accepted: tuple[str, ...] = (),
    text: str = "",
    reference: str = "",
) -> Scored:
    answer = None if predicted is None else Answer(*predicted)
    return Scored(record_id, group, Answer(*truth), accepted, answer, text, reference)


def rows(*cases: tuple[tuple[bool | None, str], tuple[bool | None, str] | None, int]) -> list[Scored]:
    """`count` rows of each (truth, predicted, count), with ids and groups of their own."""
    flat = [(truth, predicted) for truth, predicted, count in cases for _ in range(count)]
    return [row(*case, group=f"g{index}", record_id=f"r{index}") for index, case in enumerate(flat)]


def hits(outcomes: Sequence[Sequence[int]]) -> list[Scored]:
    """One group per list; 1 is a right row, 0 a wrong one."""
    return [
        row((True, "x"), (True, "x" if outcome else "y"), group=f"g{group:03d}", record_id=f"r{group}.{place}")
        for group, members in enumerate(outcomes)
        for place, outcome in enumerate(members)
    ]


class ColourTask(Task):
    """Records hold a vector and the colour it stands for; answers read `It is COLOUR`."""

    name: ClassVar[str] = "feature_description"
    metrics: ClassVar[tuple[str, ...]] = ("description_match", "exact_match", "parse_rate")
    has_vectors: ClassVar[bool] = True
    breakdowns: ClassVar[Mapping[str, str]] = {"Layers": "layers", "Kind": "kind"}
    source_formats: ClassVar[tuple[str, ...]] = ()

    def render(self, record: Record) -> Example:
        vector = Vector(np.asarray(record["vector"], dtype=np.float32), tuple(record["layers"]))
        return Example(Query(("Vector ", vector, " encodes what?")), f"It is {record['colour']}")

    def truth(self, record: Record) -> Answer:
        return Answer(None, record["colour"])

    def accepted(self, record: Record) -> tuple[str, ...]:
        return tuple(record["accepted"])

    def parse(self, text: str) -> Answer | None:
        return Answer(None, text.removeprefix("It is ")) if text.startswith("It is ") else None

    def display(self, record: Record) -> tuple[list[tuple[str, bool]], dict[str, str]]:
        return [("the ", False), (record["colour"], True), (" one", False)], {"note": record["note"]}


class TextTask(ColourTask):
    """The same without vectors."""

    name: ClassVar[str] = "input_ablation"
    has_vectors: ClassVar[bool] = False

    def render(self, record: Record) -> Example:
        return Example(Query((f"Which colour? {record['note']}",)), f"It is {record['colour']}")


def record(index: int, colour: str, vector: Sequence[float], **changes: Any) -> Record:
    return {
        "record_id": f"id{index}",
        "item_id": f"item{index}",
        "split": "test",
        "group": f"group{index // 2}",
        "status": "ok",
        "detail": None,
        "colour": colour,
        "accepted": [],
        "vector": np.array(vector, dtype=np.float32),
        "layers": [0, 1],
        "kind": "plain",
        "note": f"note {index}",
        **changes,
    }
