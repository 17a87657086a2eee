"""delphi's output folders: `explanations/NAME.txt` and `scores/SCORER/NAME.txt`, read and written.

NAME is `MODULE_latentN`, such as `layers.5.mlp_latent12`, with "/" written as "--". An explanation is one JSON string;
`detection` and `fuzz` scores are lists of judged windows, `simulation` is a list of correlations by range of
activations, the first of all of them. A latent has one explanation, without a source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import Description, Imported, is_text
from introspect_ray.features.judgements import Judgement, classification_scores

SOURCE = "delphi"
CLASSIFIERS = ("detection", "fuzz")
SIMULATION = "simulation"
CORRELATION = "simulation/correlation"
"""What the correlation over all windows is called as a score."""
_NAME = re.compile(r"(?P<module>.+)_latent(?P<latent>\d+)\.txt", re.DOTALL)
_SEPARATORS = re.compile(r"[./]|--")
_JUDGED = ("str_tokens", "activations", "distance", "activating", "prediction", "probability")

Key = tuple[int, int]
"""(layer, latent)"""


@dataclass(frozen=True)
class LatentJudgements:
    """All judgements of one latent's description by one scorer."""

    layer: int
    latent: int
    scorer: str
    judgements: tuple[Judgement, ...]
    text: str = ""
    """The description that was judged; delphi's file does not say it."""


def file_name(module: str, latent: int) -> str:
    """Name of a latent's file, explanation or score."""
    return f"{module}_latent{latent}.txt".replace("/", "--")


def parse_name(name: str) -> tuple[str, Key] | None:
    """The module as it is written and (layer, latent); None where no latent, or no layer, can be read off the name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    layer = next((part for part in _SEPARATORS.split(found["module"]) if part.isascii() and part.isdigit()), None)
    return None if layer is None else (found["module"], (int(layer), int(found["latent"])))


def read_explanations(files: Iterable[tuple[str, bytes]]) -> Imported:
    """Descriptions from files (name, content) of `explanations/`, without scores.

    Raises UserError for a file that is no JSON, or two modules of one layer, whose latents could not be told apart.
    """
    found = Imported()
    modules: dict[int, str] = {}
    for name, content in files:
        parsed = parse_name(name)
        if parsed is None:
            found.unused.append((name, "name_of_no_latent"))
            continue
        module, (layer, latent) = parsed
        if modules.setdefault(layer, module) != module:
            raise UserError(
                f"{name}: module {module} beside {modules[layer]}, both of layer {layer}: convert one at a time"
            )
        text = _json(content, name)
        if is_text(text):
            found.descriptions.append(Description(layer, latent, text, SOURCE))
        else:
            found.unused.append((name, "no_description"))
    return found


def explanation_file(text: str) -> bytes:
    """Content of one explanation's file."""
    return json.dumps(text, ensure_ascii=False).encode()


def read_judgements(scorer: str, name: str, content: bytes) -> LatentJudgements | None:
    """One file of `scores/detection` or `scores/fuzz`; None if it is named after no latent."""
    parsed = parse_name(name)
    if parsed is None:
        return None
    _, (layer, latent) = parsed
    judgements = [_judgement(row, f"{scorer}/{name}, entry {n}") for n, row in enumerate(_entries(content, name))]
    return LatentJudgements(layer, latent, scorer, tuple(judgements))


def _judgement(row: Any, where: str) -> Judgement:
    if not isinstance(row, dict) or (lacking := [key for key in _JUDGED if key not in row]):
        raise UserError(f"{where}: expected {', '.join(_JUDGED)}; missing: {', '.join(lacking) if row else 'all'}")
    for key, allowed in (("activating", (bool,)), ("prediction", (bool, type(None)))):
        if not isinstance(row[key], allowed):
            raise UserError(f"{where}: field {key!r} is {row[key]!r}, expected true or false")
    try:
        return Judgement(
            tokens=tuple(str(token) for token in row["str_tokens"]),
            activations=tuple(float(value) for value in row["activations"]),
            distance=row["distance"],
            activating=row["activating"],
            prediction=row["prediction"],
            probability=None if row["probability"] is None else float(row["probability"]),
            reason="no_answer" if row["prediction"] is None else None,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def judgements_file(judgements: Sequence[Judgement]) -> bytes:
    """Content of one file of `scores/detection` or `scores/fuzz`."""
    rows = [
        {
            "str_tokens": list(one.tokens),
            "activations": list(one.activations),
            "distance": one.distance,
            "activating": one.activating,
            "prediction": one.prediction,
            "probability": one.probability,
            "correct": one.correct,
        }
        for one in judgements
    ]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()


def judged_scores(found: LatentJudgements) -> dict[str, float | None]:
    """`SCORER/NAME` -> value, for a description's scores."""
    scores = classification_scores(found.judgements)
    return {f"{found.scorer}/{name}": score.value for name, score in scores.items()}


def read_simulation(name: str, content: bytes) -> tuple[Key, float | None] | None:
    """(layer, latent) and the correlation over all windows, none where it is undefined; None if of no latent."""
    parsed = parse_name(name)
    if parsed is None:
        return None
    for number, row in enumerate(_entries(content, name)):
        if not isinstance(row, dict) or "distance" not in row or "ev_correlation_score" not in row:
            raise UserError(f"simulation/{name}, entry {number}: expected distance and ev_correlation_score")
        if row["distance"] == 0:
            return parsed[1], _correlation(row["ev_correlation_score"], f"simulation/{name}, entry {number}")
    return parsed[1], None


def simulation_file(correlation: float | None) -> bytes:
    """Content of one file of `scores/simulation` that says the correlation over all windows.

    delphi's own has more entries, one per range of activations, and in each what was simulated.
    """
    row = {
        "distance": 0,
        "scored_sequence_simulations": [],
        "ev_correlation_score": "nan" if correlation is None else correlation,
        "rsquared_score": None,
        "absolute_dev_explained_score": None,
    }
    return json.dumps([row], separators=(",", ":")).encode()


def _correlation(value: Any, where: str) -> float | None:
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: field 'ev_correlation_score' is {value!r}, expected a number") from None
    return number if math.isfinite(number) else None


def _entries(content: bytes, name: str) -> list[Any]:
    found = _json(content, name)
    if not isinstance(found, list):
        raise UserError(f"{name}: expected a list of judged windows, found {type(found).__name__}")
    return found


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{name}: no JSON ({error})") from None
