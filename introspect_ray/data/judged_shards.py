"""Scores and judgements of descriptions, in shards of latents that are written whole: shards/shard-00000.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from introspect_ray.data.description_files import judgements_of
from introspect_ray.data.storage import Folder
from introspect_ray.evaluation.description_scores import Scored
from introspect_ray.features.delphi import LatentJudgements
from introspect_ray.features.descriptions import Description, Score


@dataclass
class ShardResult:
    """Scores and judgements of the descriptions of some latents, and what became of the calls."""

    scored: list[Scored]
    judgements: list[LatentJudgements]
    """Of window methods; of several candidates each has its own."""
    answers: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    may_pass: dict[str, int] = field(default_factory=dict)
    """Failures for reasons that may be gone another time."""


def write_result(folder: Folder, run_key: str, index: int, result: ShardResult) -> None:
    """Write one shard in one step."""
    rows = [
        {"description": asdict(one.description), "scores": {name: asdict(score) for name, score in one.scores.items()}}
        for one in result.scored
    ]
    content = {
        "run_key": run_key,
        "shard": index,
        "rows": rows,
        "judgements": [asdict(one) for one in result.judgements],
        "answers": result.answers,
        "failures": result.failures,
        "may_pass": result.may_pass,
    }
    folder.write(_shard_name(index), json.dumps(content, ensure_ascii=False, allow_nan=False).encode())


def read_result(folder: Folder, run_key: str, index: int) -> ShardResult | None:
    """A shard as it lies there; None if it is absent, torn, or of another run."""
    try:
        content = json.loads(folder.read(_shard_name(index)))
        if (content["run_key"], content["shard"]) != (run_key, index):
            return None
        scored = [
            Scored(Description(**row["description"]), {name: Score(**score) for name, score in row["scores"].items()})
            for row in content["rows"]
        ]
        judgements = [judgements_of(row) for row in content["judgements"]]
        return ShardResult(scored, judgements, content["answers"], content["failures"], content["may_pass"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _shard_name(index: int) -> str:
    return f"shards/shard-{index:05d}.json"
