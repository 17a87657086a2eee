"""Source rows: which format a file has, and its rows in the one form per format that tasks plan from.

A row whose fields are there but unusable is counted with a reason. A row that lacks a field altogether means that the
file is not what the config says: it is refused with the row and the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import inf, isfinite
from typing import Any

from introspect_ray.config import SourceConfig
from introspect_ray.data.reading import RawRow, iter_rows
from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import is_text

SourceRow = dict[str, Any]
_ABSENT = object()
_ROWS_TO_TELL_LAYOUT = 1000


class Unusable(Exception):
    """Why one row gives no source row, as a short name."""


@dataclass(frozen=True)
class Layout:
    """One way in which a format is written: the fields that must be there (dotted where nested), and their meaning."""

    format: str
    needed: tuple[str, ...]
    normalize: Callable[[Mapping[str, Any]], SourceRow]
    """Needed fields by name -> normalised row without its number; raises Unusable."""
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Usable rows in file order, each with its number in the file under `row`; what became of the others."""

    name: str
    format: str
    rows: list[SourceRow]
    rejected: list[tuple[int, str]]
    num_rows: int
    """Rows looked at: those of the file, or the first `limit` of them."""


def load_source(config: SourceConfig, purpose: str, accepted_formats: Sequence[str]) -> Source:
    """Read, recognise and check the rows for a purpose: a task's name, or "text" for plain texts.

    Raises UserError before any model is touched.
    """
    raw = list(_raw_rows(config, purpose))
    layout = _accepted_layout(config, raw, purpose, accepted_formats)
    if layout.normalize is _description:
        raw = _with_candidates(config.path, raw, config.label_score)
    return normalize_rows(config.path, raw, layout)


def iter_texts(config: SourceConfig) -> Iterator[tuple[str, str]]:
    """(text, "") of every usable row of plain text in file order, ("", reason) of every other one; never all at once.

    Unlike `load_source` it does not know duplicates. Raises UserError as that does, for a row when it comes to it.
    """
    rows = _raw_rows(config, "text")
    first = list(islice(rows, _ROWS_TO_TELL_LAYOUT))
    layout = _accepted_layout(config, first, "text", ("text",))
    for number, raw_row in enumerate(chain(first, rows)):
        try:
            yield _normalized(config.path, number, raw_row, layout)["text"], ""
        except Unusable as reason:
            yield "", str(reason)


def _raw_rows(config: SourceConfig, purpose: str) -> Iterator[RawRow]:
    rows = iter(_pocket_rows(purpose)) if config.path == "pocket" else iter_rows(config.path, config.text_unit)
    return islice(rows, config.limit)


def _accepted_layout(
    config: SourceConfig, raw: Sequence[RawRow], purpose: str, accepted_formats: Sequence[str]
) -> Layout:
    layout = find_layout(config.path, raw, config.format)
    if layout.format not in accepted_formats:
        raise UserError(
            f"source {config.path} has format {layout.format}, {purpose} needs {' or '.join(accepted_formats)}"
        )
    return layout


def _pocket_rows(purpose: str) -> list[RawRow]:
    from introspect_ray.pocket.sources import rows  # the embedded world is built only where it is asked for

    return rows(purpose)


def find_layout(name: str, raw: Sequence[RawRow], wanted: str) -> Layout:
    """The layout whose needed fields all occur; `wanted` is a format's name, or "auto" to read it off the fields."""
    known = [layout for layout in LAYOUTS if wanted in ("auto", layout.format)]
    lacking = {
        layout: [field for field in layout.needed if all(_field(row, field) is _ABSENT for row in raw)]
        for layout in known
    }
    for layout, fields in lacking.items():
        if not fields:
            return layout
    closest = min(known, key=lambda layout: len(lacking[layout]) / len(layout.needed))
    found = ", ".join(dict.fromkeys(str(key) for row in raw[:100] for key in row)) or "none"
    raise UserError(
        f"source {name}: no row has {' or '.join(map(repr, lacking[closest]))}, which format {closest.format} needs"
        f" ({', '.join(closest.needed)}); fields found: {found}"
    )


def normalize_rows(name: str, raw: Sequence[RawRow], layout: Layout) -> Source:
    """Every raw row either as a source row or as (row number, reason). Raises UserError if a row lacks a field."""
    rows: list[SourceRow] = []
    rejected: list[tuple[int, str]] = []
    seen: set[str] = set()
    for number, raw_row in enumerate(raw):
        try:
            row = _normalized(name, number, raw_row, layout)
        except Unusable as reason:
            rejected.append((number, str(reason)))
            continue
        content = json.dumps(row, sort_keys=True)
        if content in seen:
            rejected.append((number, "duplicate_row"))
            continue
        seen.add(content)
        rows.append({**row, "row": number})
    assert len(rows) + len(rejected) == len(raw), "every row is used or has a reason"
    return Source(name, layout.format, rows, rejected, len(raw))


def _normalized(name: str, number: int, raw_row: RawRow, layout: Layout) -> SourceRow:
    """The source row of one raw row. Raises Unusable, or UserError if it lacks a field."""
    values = {field: _field(raw_row, field) for field in (*layout.needed, *layout.optional)}
    for field in layout.needed:
        if values[field] is _ABSENT:
            raise UserError(
                f"source {name}, row {number} (counted from 0) has no field {field!r},"
                f" which format {layout.format} needs"
            )
    return layout.normalize({field: value for field, value in values.items() if value is not _ABSENT})


# --- fields -----------------------------------------------------------------------------------------------------


def _field(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or `_ABSENT`."""
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def _text(value: Any) -> str:
    """Text with a visible character, outer blanks removed."""
    if value is None:
        raise Unusable("missing_value")
    if not isinstance(value, str):
        raise Unusable("wrong_type")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Unusable("no_unicode_text")  # JSON can spell half of a character, which no file or model takes
    if not value.strip():
        raise Unusable("empty_text")
    return value.strip()


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    """A number; text that spells one is accepted, because csv has nothing else."""
    if value is None:
        raise Unusable("missing_value")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unusable("wrong_type")
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise Unusable("wrong_type") from None
    if kind is int and isinstance(value, float) and number != value:
        raise Unusable("wrong_type")
    return number


def _texts(value: Any) -> list[str]:
    """A list of texts; JSON text that spells one is accepted, because csv has nothing else."""
    if value is None:
        raise Unusable("missing_value")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise Unusable("wrong_type") from None
    if not isinstance(value, list):
        raise Unusable("wrong_type")
    return [_text(item) for item in value]


def _vector(value: Any) -> list[float]:
    """Finite numbers; JSON text that spells a list of them is accepted, because csv has nothing else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise Unusable("wrong_type") from None
    if not isinstance(value, list) or not value:
        raise Unusable("wrong_type")
    numbers = [_number(item, float) for item in value]
    if not all(map(isfinite, numbers)):
        raise Unusable("vector_not_finite")
    return numbers


# --- formats ----------------------------------------------------------------------------------------------------


def _fact(subject: Any, relation_id: Any, template: Any, target_true: Any) -> SourceRow:
    row = {"subject": _text(subject), "relation_id": _text(relation_id), "template": _text(template)}
    if row["template"].count("{}") != 1:
        raise Unusable("bad_template")
    prompt = row["template"].replace("{}", row["subject"])
    return {**row, "prompt": prompt, "target_true": _text(target_true)}


def _counterfact(row: Mapping[str, Any]) -> SourceRow:
    return _fact(row["subject"], row["relation_id"], row["relation"], row["target_true"])


def _rome(row: Mapping[str, Any]) -> SourceRow:
    inner = {name.removeprefix("requested_rewrite."): value for name, value in row.items()}
    return _fact(inner["subject"], inner["relation_id"], inner["prompt"], inner["target_true.str"])


def _known_fact(row: Mapping[str, Any]) -> SourceRow:
    """The file's own longer prompts are left aside: rows can be paired only where they share a template."""
    return _fact(row["subject"], row["relation_id"], row["template"], row["attribute"])


def _mmlu(row: Mapping[str, Any]) -> SourceRow:
    choices = _texts(row["choices"])
    if not 2 <= len(choices) <= 26:
        raise Unusable("number_of_choices_out_of_range")
    answer = _number(row["answer"], int)
    if not 0 <= answer < len(choices):
        raise Unusable("answer_out_of_range")
    return {"question": _text(row["question"]), "choices": choices, "answer": answer, "subject": _text(row["subject"])}


def _marked_text(row: Mapping[str, Any]) -> SourceRow:
    """The text stays as it is, outer blanks and all, because the span counts its characters."""
    _text(row["text"])
    text, start, end = row["text"], _number(row["span_start"], int), _number(row["span_end"], int)
    if not 0 <= start < end <= len(text):
        raise Unusable("span_out_of_range")
    if not (text[:start] + text[end:]).strip():
        raise Unusable("nothing_left_without_span")
    return {"text": text, "span": [start, end], "subject": _text(row.get("subject", "text"))}


def _latent_label(row: Mapping[str, Any]) -> SourceRow:
    layer, index, score = _number(row["layer"], int), _number(row["index"], int), _number(row["score"], float)
    if layer < 0 or index < 0:
        raise Unusable("index_out_of_range")
    if not 0 <= score <= 1:
        raise Unusable("score_out_of_range")
    vector = row.get("vector")
    return {
        "layer": layer,
        "index": index,
        "description": _text(row["description"]),
        "accepted": _texts(row["accepted"]),
        "score": score,
        "kind": _text(row.get("kind", "label")),
        "vector": None if vector is None else _vector(vector),
    }


def _evaluation_vector(row: Mapping[str, Any]) -> SourceRow:
    layer = _number(row["layer"], int)
    if layer < 0:
        raise Unusable("index_out_of_range")
    kept = {"vector_id": _text(row["vector_id"]), "kind": _text(row["kind"]), "group": _text(row["group"])}
    return {**kept, "layer": layer, "vector": _vector(row["vector"])}


def _description(row: Mapping[str, Any]) -> SourceRow:
    """The preferred candidate of a latent; the others are acceptable too, and are no rows of their own."""
    layer, index, text = _number(row["layer"], int), _number(row["latent"], int), _text(row["text"])
    if layer < 0 or index < 0:
        raise Unusable("index_out_of_range")
    if not row["preferred"]:
        raise Unusable("another_label_of_the_latent_is_used")
    return {
        "layer": layer,
        "index": index,
        "description": text,
        "accepted": [other for other in row["candidates"] if other != text],
        "score": row["label_score"],
        "kind": _text(row["source"]),
        "vector": None,
    }


def _with_candidates(name: str, raw: Sequence[RawRow], label_score: str | None) -> list[RawRow]:
    """Rows of a descriptions.jsonl that know the other candidates of their latent, and whether they are preferred.

    Raises UserError if no row has the score that the config names.
    """
    scores = [_label_score(row, label_score) for row in raw]
    if label_score is not None and all(score is None for score in scores):
        raise UserError(f"source {name}: no row has a score {label_score!r} (source.label_score)")
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(raw):
        if is_text(row.get("text")):
            groups.setdefault(_latent_key(row), []).append(number)
    found: list[RawRow] = []
    for number, row in enumerate(raw):
        group = groups.get(_latent_key(row), [number])
        first = max(group, key=lambda one: (-inf if (score := scores[one]) is None else score, -one))
        texts = list(dict.fromkeys(raw[one]["text"].strip() for one in group if is_text(raw[one].get("text"))))
        found.append({**row, "preferred": number == first, "candidates": texts, "label_score": scores[number]})
    return found


def _latent_key(row: RawRow) -> str:
    return json.dumps([row.get("layer"), row.get("latent")])


def _label_score(row: RawRow, name: str | None) -> float | None:
    score = _field(row, "scores").get(name) if name and isinstance(row.get("scores"), Mapping) else None
    number = isinstance(score, int | float) and not isinstance(score, bool) and isfinite(score)
    return float(score) if number and score is not None else None


LAYOUTS = (
    Layout("counterfact", ("subject", "relation", "relation_id", "target_true"), _counterfact),
    Layout(
        "counterfact",
        tuple(f"requested_rewrite.{name}" for name in ("subject", "prompt", "relation_id", "target_true.str")),
        _rome,
    ),
    Layout("known_facts", ("subject", "template", "attribute", "relation_id"), _known_fact),
    Layout("mmlu", ("question", "choices", "answer", "subject"), _mmlu),
    Layout("marked_text", ("text", "span_start", "span_end"), _marked_text, ("subject",)),
    Layout(
        "latent_labels",
        ("layer", "latent", "text", "source", "scores"),
        _description,
        ("preferred", "candidates", "label_score"),
    ),
    Layout("text", ("text",), lambda row: {"text": _text(row["text"])}),
    Layout("latent_labels", ("layer", "index", "description", "accepted", "score"), _latent_label, ("kind", "vector")),
    Layout("vectors", ("vector_id", "kind", "layer", "group", "vector"), _evaluation_vector),
)
"""All known layouts: NeelNanda/counterfact-tracing, ROME's nested counterfact, ROME's known facts, cais/mmlu, ours, and
descriptions.jsonl. `vectors` are those of collect_vectors.py."""
