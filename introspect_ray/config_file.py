"""Config trees from YAML, and what is wrong with them in words."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from introspect_ray.errors import UserError


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that says the same key twice, where YAML would keep the last in silence."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(
            problem=f"key {twice[0]!r} is given twice", problem_mark=node.start_mark
        )
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_UniqueKeys)


def read_yaml(name: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {name} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {name} cannot be read: {error}") from None
    try:
        tree = _load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config file {name} is not valid YAML: {_yaml_problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config file {name} must hold a mapping of keys, found {type(tree).__name__}")
    return tree


def yaml_value(word: str, name: str) -> Any:
    try:
        return _load(word)
    except yaml.YAMLError as error:
        raise UserError(f"config key {name!r}: {word!r} cannot be read: {_yaml_problem(error)}") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or error}{where}"


def problems(
    error: ValidationError, config_class: type[BaseModel], file: str | None, overridden: Collection[str]
) -> str:
    """Every problem of a config tree, in one line: key, where it was set, what was found, what was expected."""
    return "; ".join(_problem(item, config_class, file, overridden) for item in error.errors())


def _problem(item: Any, config_class: type[BaseModel], file: str | None, overridden: Collection[str]) -> str:
    location = [part for part in item["loc"] if not (isinstance(part, str) and "[" in part)]
    name = ".".join(map(str, location))
    origin = "" if file is None or name in overridden else f" in {file}"
    if item["type"] == "extra_forbidden":
        siblings = _siblings(config_class, location)
        return f"config key {name!r}{origin} is not known{hint(name, siblings)}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not location:
        return f"config{origin}: {message}"
    found = "" if isinstance(item["input"], dict | BaseModel) else f", found {item['input']!r}"
    return f"config key {name!r}{origin}: {message}{found}"


def _siblings(config_class: type[BaseModel], location: Sequence[str | int]) -> tuple[str, ...]:
    """Full names of the keys that are known beside the last one of `location`."""
    model: type[BaseModel] = config_class
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = bare(model.model_fields[part].annotation)
        if typing.get_origin(annotation) in (tuple, list):
            annotation = bare(typing.get_args(annotation)[0])
        model = annotation
    prefix = ".".join(map(str, location[:-1]))
    return tuple(f"{prefix}.{name}" if prefix else name for name in model.model_fields)


def hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        last = {candidate.rpartition(".")[2]: candidate for candidate in known}
        close = [last[match] for match in difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1)]
    sections = dict.fromkeys(candidate.split(".")[0] for candidate in known)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sections)}"


def bare(annotation: Any) -> Any:
    """A type without `Optional` and `Annotated`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return bare(rest[0]) if len(rest) == 1 else annotation
    return annotation
