"""From the path a user wrote to something transformers can load, refused early and in one line where it cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError

POCKET_PREFIX = "pocket:"
POCKET_ARTIFACTS = Path(__file__).resolve().parent.parent / "pocket" / "artifacts"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model_path(path: str) -> str:
    """Folder or hub id behind `path`: `pocket:NAME`, a local folder with a `config.json`, or `owner/name`.

    Raises `UserError` for anything else. A hub id is only recognised by its form; loading shows whether it exists.
    """
    if path.startswith(POCKET_PREFIX):
        return _pocket_folder(path)
    folder = Path(path).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"model path '{path}' is no model folder: expected a config.json in it")
        return str(folder)
    if _HUB_ID.fullmatch(path):
        return path
    raise UserError(
        f"model path '{path}' does not exist: expected a folder with a config.json, a hub id owner/name, "
        f"or {POCKET_PREFIX}NAME"
    )


def absolute(path: str) -> str:
    """A local path made absolute, because workers have a working directory of their own; URLs and `pocket:` stay."""
    return path if "://" in path or path.startswith(POCKET_PREFIX) else str(Path(path).expanduser().absolute())


def with_absolute_path(model: ModelConfig) -> ModelConfig:
    """The same for a model; a hub id stays."""
    is_local = Path(model.path).expanduser().is_dir()
    return model.model_copy(update={"path": absolute(model.path)}) if is_local else model


def _pocket_folder(path: str) -> str:
    name = path.removeprefix(POCKET_PREFIX)
    shipped = sorted(config.parent.name for config in POCKET_ARTIFACTS.glob("*/config.json"))
    if name not in shipped:
        raise UserError(
            f"model path '{path}' does not exist: expected one of "
            f"{', '.join(POCKET_PREFIX + other for other in shipped) or 'the pocket models, of which none is built'}"
        )
    return str(POCKET_ARTIFACTS / name)


def check_model(config: ModelConfig) -> PretrainedConfig:
    """The model's own config, read without its weights, so that bad input is refused before a model loads.

    Raises `UserError` if the path is none, its config cannot be read, it is no causal language model, it lacks the
    attention implementation asked for, or the device has no valid name.
    """
    location = resolve_model_path(config.path)
    if config.device != "auto":
        _parsed_device(config.device)
    try:
        found = AutoConfig.from_pretrained(
            location, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise load_error(config.path, error) from error
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if config.trust_remote_code:
            return found
        raise UserError(
            f"model path '{config.path}' holds a {found.model_type} model: expected a causal language model"
        )
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(found)]
    if config.attention == "sdpa" and not model_class._supports_sdpa:
        raise UserError(
            f"model path '{config.path}' holds a {found.model_type} model, which does not support attention 'sdpa': "
            "set attention to 'eager'"
        )
    return found


def resolve_device(name: str) -> torch.device:
    """The device behind `name`; `auto` is a GPU if this process has one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = _parsed_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}' asked for, but this process has no GPU: use 'cpu' or 'auto'")
    return device


def _parsed_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is unknown: expected auto, cpu, cuda or cuda:N") from error


def load_error(path: str, error: Exception) -> UserError:
    """What transformers said about `path`, its first line, as the user's error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"model path '{path}' could not be loaded: {lines[0]}")
