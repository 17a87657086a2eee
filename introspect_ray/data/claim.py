"""Whose output folder this is: `config.json`, written first, and what another run says when it finds one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from introspect_ray.config import Config, differences, resolved
from introspect_ray.data.manifest import CONFIG_NAME
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Claim(Generic[C]):
    """One run's claim to one output folder."""

    folder: Folder
    what: str
    """What the folder holds, such as `dataset`."""
    config: C
    run_key: str
    """Equal for runs that write the same files."""
    inputs: Mapping[str, str]
    """Digests of what the files follow from beside the config, by what it is."""
    relevant: Callable[[C], dict[str, Any]]
    """The resolved config without what cannot change the files."""

    def write(self) -> None:
        """Claim the folder."""
        content = {"run_key": self.run_key, "inputs": dict(self.inputs), "config": resolved(self.config)}
        self.folder.write(CONFIG_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    def check(self) -> None:
        """Refuse a folder that holds something else than this very run, begun or finished. Raises UserError."""
        url = self.folder.url
        names = [name for name in self.folder.names() if not name.startswith(TEMPORARY)]
        if not names:
            return
        if CONFIG_NAME not in names:
            raise UserError(
                f"output folder {url} is not empty and holds no {self.what} ({names[0]}, ...): choose another folder"
            )
        try:
            found = json.loads(self.folder.read(CONFIG_NAME))
            other = type(self.config).model_validate(found["config"])
            other_inputs, other_key = dict(found["inputs"]), found["run_key"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"output folder {url}: its {CONFIG_NAME} is none of this version's: choose another folder"
            ) from None
        if other_key == self.run_key:
            return
        changes = differences(self.relevant(other), self.relevant(self.config))
        if not changes:
            changed = [name for name, digest in self.inputs.items() if other_inputs.get(name) != digest]
            changes = [f"{', '.join(changed) or 'the layout'} changed since it was begun"]
        raise UserError(
            f"output folder {url} belongs to another config ({'; '.join(changes)}): choose another folder or delete it"
        )
