"""`explainer.json`: what an explainer's folder says about itself beside its weights, written last."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.encoding import Frame, PlaceholderTokens
from introspect_ray.explainer.projections import ProjectionKind

FORMAT_VERSION = 1
CARD_FILE = "explainer.json"
PROJECTIONS_FILE = "projections.safetensors"

Card = TypeVar("Card", bound=BaseModel)


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetInfo(_Card):
    """The model that is explained: where it comes from, its residual width, and its number of decoder layers."""

    path: str
    width: int
    num_layers: int


class ExplainerCard(_Card):
    """Everything that an explainer needs and that its weights and tokenizer do not say."""

    target: TargetInfo
    base: ModelConfig
    """What training started from; an adapter is loaded on top of it."""
    weights: Literal["full", "lora"]
    placeholders: PlaceholderTokens
    frame: Frame
    projection: ProjectionKind
    vector_norm: float | None
    """Norm that every vector is scaled to after it is projected; none leaves vectors as they are."""
    soft_tokens: float | None = None
    """Sharpness of the mixture of token embeddings that replaces a projected vector; none leaves it as it is."""
    max_new_tokens: int


def write_card(folder: Path, card: ExplainerCard) -> None:
    """Write `explainer.json` in one step: it is there as a whole or not at all."""
    write_versioned(folder / CARD_FILE, FORMAT_VERSION, card)


def read_card(folder: str) -> ExplainerCard:
    """The card of an explainer's folder (path or fsspec URL).

    Raises:
        UserError: the folder has no card, or the card is not one that this version understands.
    """
    return read_versioned(folder, CARD_FILE, FORMAT_VERSION, ExplainerCard, "a finished explainer")


def write_versioned(file: Path, version: int, card: BaseModel) -> None:
    """Write a card with the version of its format, in one step."""
    content = {"format_version": version, **card.model_dump(mode="json")}
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def read_versioned(folder: str, name: str, version: int, kind: type[Card], what: str) -> Card:
    """The card `name` of a folder (path or fsspec URL) that must be `what`.

    Raises:
        UserError: there is none, or none of this version.
    """
    file = f"{folder.rstrip('/')}/{name}"
    try:
        with fsspec.open(file, "rt", encoding="utf-8") as stream:
            content: dict[str, Any] = json.load(stream)
        found = content.pop("format_version", None)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not {what}: it has no {name}") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not valid JSON with an object inside: {error}") from None
    if found != version:
        raise UserError(f"{file}: format_version is {found!r}, expected {version}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def is_remote(folder: str) -> bool:
    return "://" in folder and not folder.startswith("file://")


@contextmanager
def local_copy(folder: str) -> Iterator[Path]:
    """The folder on a local disk; a remote one is downloaded and removed afterwards."""
    if not is_remote(folder):
        yield Path(folder.removeprefix("file://"))
        return
    with tempfile.TemporaryDirectory() as temporary:
        filesystem, path = fsspec.core.url_to_fs(folder)
        filesystem.get(path.rstrip("/") + "/", temporary, recursive=True)
        yield Path(temporary)


@contextmanager
def local_target(folder: str, last: str = CARD_FILE) -> Iterator[Path]:
    """A local folder to write into, uploaded to `folder` at the end if that is remote; file `last` after all others."""
    if not is_remote(folder):
        path = Path(folder.removeprefix("file://"))
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        filesystem, remote = fsspec.core.url_to_fs(folder)
        for file in sorted(Path(temporary).rglob("*"), key=lambda file: file.name == last):
            if file.is_file():
                filesystem.makedirs(remote, exist_ok=True)
                filesystem.put_file(str(file), f"{remote.rstrip('/')}/{file.relative_to(temporary).as_posix()}")
