"""Descriptions of latents: what one encodes, in words, where the words come from and how well they did.

descriptions.jsonl holds one JSON object per line: layer, latent, text, source, scores. Lines are ordered by latent;
the candidates of one latent stand together, the preferred one first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from introspect_ray.errors import UserError

DESCRIPTIONS_FILE = "descriptions.jsonl"


@dataclass(frozen=True)
class Description:
    """One candidate description of one latent; a latent may have several."""

    layer: int
    latent: int
    text: str
    source: str
    """Who says so, such as `lexicon`, `neuronpedia`, `delphi`, `llm:NAME` or `explainer:NAME`."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """Name of a score -> its value, or none where it could not be computed."""


@dataclass(frozen=True)
class Score:
    """One measurement of one description: its value, or why there is none."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.reason is not None), "a score has a value or a reason"


@dataclass
class Imported:
    """What one or several foreign files gave; every row is a description or has a reason."""

    descriptions: list[Description] = field(default_factory=list)
    unused: list[tuple[str, str]] = field(default_factory=list)
    """(where it stands, reason) of all that gave no description."""


def ordered(descriptions: Iterable[Description]) -> list[Description]:
    """By layer and latent; candidates of one latent keep their order."""
    return sorted(descriptions, key=lambda one: (one.layer, one.latent))


def by_latent(descriptions: Iterable[Description]) -> dict[tuple[int, int], list[Description]]:
    """(layer, latent) -> its candidates, in order."""
    groups: dict[tuple[int, int], list[Description]] = {}
    for one in ordered(descriptions):
        groups.setdefault((one.layer, one.latent), []).append(one)
    return groups


def same_words(text: str) -> str:
    """Equal for texts that differ in white space or case alone, and so say the same."""
    return " ".join(text.split()).casefold()


def ranked_by(score: str, candidates: Iterable[Description]) -> list[Description]:
    """Those with the largest such score first, those without it last; equal ones keep their order."""
    values = [(one.scores.get(score), one) for one in candidates]
    return [one for _, one in sorted(values, key=lambda pair: (pair[0] is None, -(pair[0] or 0.0)))]


def description_line(description: Description) -> str:
    """One line of descriptions.jsonl, without its line break."""
    return json.dumps(asdict(description), ensure_ascii=False, allow_nan=False)


def description_lines(descriptions: Iterable[Description]) -> str:
    """The content of a descriptions.jsonl."""
    return "".join(f"{description_line(one)}\n" for one in ordered(descriptions))


def parse_descriptions(content: str, name: str) -> list[Description]:
    """The descriptions of a file, in its order. Raises UserError that names file, line and field for a malformed one.

    Fields that a description does not have are passed over; blank lines as well.
    """
    # Not splitlines: JSON text may hold other line ends as they are, such as U+2028.
    lines = content.split("\n")
    return [parse_description(line, f"{name}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def parse_description(line: str, where: str) -> Description:
    """The description on one line; `where` is what an error calls it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object of fields, found {type(row).__name__}")
    for key in ("layer", "latent"):
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), int) or row[key] < 0:
            raise UserError(f"{where}: field {key!r} is {_shown(row, key)}, expected a number from 0")
    for key in ("text", "source"):
        if not is_text(row.get(key)):
            raise UserError(f"{where}: field {key!r} is {_shown(row, key)}, expected text")
    return Description(row["layer"], row["latent"], row["text"], row["source"], _scores(row, where))


def is_text(value: Any) -> bool:
    """Text with a visible character, which every file and model takes: JSON can also spell half of a character."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= one <= "\udfff" for one in value)


def _scores(row: Mapping[str, Any], where: str) -> dict[str, float | None]:
    scores = row.get("scores", {})
    if not isinstance(scores, dict):
        raise UserError(f"{where}: field 'scores' is {_shown(row, 'scores')}, expected an object of numbers")
    for name, value in scores.items():
        known = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if not known or (value is not None and not math.isfinite(value)):
            raise UserError(f"{where}: field 'scores.{name}' is {_shown(scores, name)}, expected a number or null")
    return {name: None if value is None else float(value) for name, value in scores.items()}


def _shown(row: Mapping[str, Any], key: str) -> str:
    return repr(row[key])[:60] if key in row else "missing"
