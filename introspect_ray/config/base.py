"""What every config tree is made of: closed, immutable nodes, and what two resolved trees disagree about."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """A node of a config tree: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _sections_given_in_part(cls, tree: Any) -> Any:
        """A section of which only some keys are given keeps the others of its own default, not of its class."""
        if not isinstance(tree, dict):
            return tree
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: _over(defaults.get(name), value) for name, value in tree.items()}

    def fingerprint(self) -> str:
        """16 hex digits that are equal for equal resolved trees, on any machine."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _over(default: Any, given: Any) -> Any:
    """`given` with every key that it lacks taken from the default section, at any depth."""
    if not (isinstance(default, Config) and isinstance(given, dict)):
        return given
    own = {name: getattr(default, name) for name in type(default).model_fields}
    return own | {name: _over(own.get(name), value) for name, value in given.items()}


def resolved(config: Config) -> dict[str, Any]:
    """The whole tree as JSON types, every default written out."""
    return config.model_dump(mode="json")


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """What two resolved trees disagree about, one phrase per key."""
    found: list[str] = []
    for name in {**there, **here}:
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name} is {one!r} there, {other!r} here")
    return found
