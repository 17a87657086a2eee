"""Neuronpedia's bulk files of activations: `activations/batch-N.jsonl.gz`, and `features/batch-N.jsonl.gz` beside them.

A line of activations is one window of one feature: its tokens as text, and a value for each. Windows whose interval of
activations is given (`binMin`, `binMax`) were drawn from it, the others are the strongest ones. How often a feature
fires stands on its line of features. Lines are ordered by the feature's number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import is_text
from introspect_ray.features.neuronpedia import batch_rows

_LAYER = re.compile(r"(\d+)(?:-.*)?")
Batch = tuple[str, bytes]
"""Name and content of a file."""


@dataclass(frozen=True)
class Feature:
    """One latent of a source."""

    source: str
    layer: int
    latent: int
    density: float
    """Share of all tokens seen on which it fires."""


@dataclass(frozen=True)
class Activation:
    """One window and the activations of one latent in it, none of them below zero."""

    latent: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    interval: tuple[float, float] | None
    """What its largest value lies in, if the window was drawn from an interval."""


def read_features(batches: Iterable[Batch]) -> Iterator[Feature]:
    """Every feature. Raises UserError for a damaged file, or a line that lacks a field or has an unusable one."""
    for name, content in batches:
        for where, row in batch_rows(content, name):
            layer = _LAYER.fullmatch(str(_field(row, "layer", where)))
            density = _field(row, "frac_nonzero", where)
            if layer is None or not _is_number(density) or not 0 <= density <= 1:
                raise UserError(
                    f"{where}: expected a source that begins with its layer and a frac_nonzero from 0 to 1, found"
                    f" {row['layer']!r} and {density!r}"
                )
            yield Feature(row["layer"], int(layer[1]), _index(row, where), float(density))


def read_activations(batches: Iterable[Batch]) -> Iterator[Activation | tuple[str, str]]:
    """Every line as an activation, or as (where, reason) where it says nothing usable. Raises UserError as above."""
    for name, content in batches:
        for where, row in batch_rows(content, name):
            tokens, values = _field(row, "tokens", where), _field(row, "values", where)
            reason = _fault(tokens, values)
            if reason:
                yield where, reason
                continue
            positive = tuple(max(0.0, float(value)) for value in values)
            yield Activation(_index(row, where), tuple(tokens), positive, _interval(row))


def _fault(tokens: Any, values: Any) -> str:
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values) or not tokens:
        return "tokens_and_values_differ"
    if not all(isinstance(token, str) for token in tokens) or not is_text("".join(tokens)):
        return "tokens_are_no_text"
    if not all(map(_is_number, values)):
        return "values_are_no_numbers"
    return "" if max(values) > 0 else "never_fires"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = row.get("binMin"), row.get("binMax")
    return (float(low), float(high)) if _is_number(low) and _is_number(high) and 0 <= low < high else None


def _index(row: Mapping[str, Any], where: str) -> int:
    index = str(_field(row, "index", where))
    if not (index.isascii() and index.isdigit()):
        raise UserError(f"{where}: field 'index' is {index!r}, expected a number from 0")
    return int(index)


def _field(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise UserError(f"{where}: no field {key!r}; fields found: {', '.join(row) or 'none'}")
    return row[key]


def intervals_of(found: Sequence[Activation]) -> dict[tuple[float, float], int]:
    """Intervals of one latent's windows -> their number, 0 the lowest."""
    return {interval: n for n, interval in enumerate(sorted({one.interval for one in found if one.interval}))}
