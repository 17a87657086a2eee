"""`dataset.json`: what a finished dataset holds. It is written last; a folder without it is no dataset yet."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from introspect_ray.data.shards import ShardInfo
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError

SCHEMA_VERSION = 1
"""Changes whenever a reader of the old layout would misread the new one."""

CONFIG_NAME = "config.json"
MANIFEST_NAME = "dataset.json"
SELECTION_NAME = "selection.parquet"
REJECTED_NAME = "rejected.jsonl"


class TargetIdentity(BaseModel):
    """Which model the records are about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    revision: str | None
    """Commit of a hub model."""
    width: int
    num_layers: int
    digest: str
    """32 hex digits over config, tokenizer and samples of the weights of a local model; empty for a hub model."""


class SourceAccount(BaseModel):
    """What became of the source rows: `used + sum(rejected) == rows`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    format: str
    rows: int
    used: int
    rejected: dict[str, int]
    """Reason -> rows; the rows themselves are in rejected.jsonl."""


class Manifest(BaseModel):
    """The contents of dataset.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    task: str
    config: dict[str, Any]
    """The resolved GenerateConfig."""
    run_key: str
    """Equal for equal config, target and source."""
    target: TargetIdentity
    source: SourceAccount
    num_records: int
    counts: dict[str, dict[str, int]]
    """Split -> status -> records."""
    selected: dict[str, int]
    """Split -> records to train and score on: those of selection.parquet if `has_selection`, else all that are ok."""
    has_selection: bool
    shards: tuple[ShardInfo, ...]

    @property
    def slow_shards(self) -> dict[str, int]:
        """Why a target took a slower way than targets can -> shards that say so."""
        return dict(Counter(shard.slow_because for shard in self.shards if shard.slow_because).most_common())


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    folder.write(MANIFEST_NAME, (manifest.model_dump_json(indent=1) + "\n").encode())


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a finished dataset; a UserError names the folder and what is wrong with it."""
    where = f"{folder.url}/{MANIFEST_NAME}"
    try:
        content = json.loads(folder.read(MANIFEST_NAME))
    except (FileNotFoundError, NotADirectoryError):
        state = "it was not finished" if CONFIG_NAME in folder.names() else "it is not a dataset folder"
        raise UserError(f"{folder.url} has no {MANIFEST_NAME}: {state}; generate_dataset.py writes one") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{where} has schema version {version}, this version reads {SCHEMA_VERSION}; generate it again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key}: {first['msg']}") from None
