"""What became of latents that were asked about, in shards that are written whole.

shards/shard-00000.jsonl    a header (run key, number of the shard, rows), then one JSON object per latent
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from introspect_ray.data.storage import Folder
from introspect_ray.models.chat import Failure


class Candidate(BaseModel):
    """One description that was given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    sample: int = 0
    """Which answer said so first; candidates are in this order."""
    scores: dict[str, float | None] = {}


class FailedAnswer(BaseModel):
    """One answer that was not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample: int
    reason: str
    detail: str = ""
    may_pass: bool = False
    """Whether asking again may help; the same command does so."""


class LatentRow(BaseModel):
    """All that was answered about one latent; without candidates and failures it is still to be asked about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    latent: int
    candidates: tuple[Candidate, ...] = ()
    failures: tuple[FailedAnswer, ...] = ()

    def is_left(self, retry_failed: bool) -> bool:
        """Whether to ask about it: never asked, or an answer failed that may pass, or any that did if those count."""
        if not self.candidates and not self.failures:
            return True
        return any(one.may_pass or retry_failed for one in self.failures)


def failed_answer(sample: int, failure: Failure) -> FailedAnswer:
    return FailedAnswer(sample=sample, reason=failure.reason, detail=failure.detail, may_pass=failure.may_pass)


def shard_name(index: int) -> str:
    return f"shards/shard-{index:05d}.jsonl"


def write_rows(folder: Folder, run_key: str, index: int, rows: Sequence[LatentRow]) -> None:
    """Write one shard in one step."""
    header = json.dumps({"run_key": run_key, "shard": index, "rows": len(rows)})
    lines = [header, *(row.model_dump_json() for row in rows)]
    folder.write(shard_name(index), "".join(f"{line}\n" for line in lines).encode())


def read_latent_rows(folder: Folder, run_key: str, index: int) -> list[LatentRow] | None:
    """The rows of a shard; None if it is absent, torn, or of another run."""
    try:
        header, *lines = folder.read(shard_name(index)).decode().split("\n")[:-1]
        if json.loads(header) != {"run_key": run_key, "shard": index, "rows": len(lines)}:
            return None
        return [LatentRow.model_validate_json(line) for line in lines]
    except (OSError, ValueError, ValidationError):
        return None
