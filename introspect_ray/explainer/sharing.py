"""Several explainers in one process: adapters of one base share its weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from introspect_ray.explainer import published
from introspect_ray.explainer.card import read_card
from introspect_ray.explainer.files import load_parts
from introspect_ray.explainer.model import Explainer


class ExplainerPool:
    """Explainers by name, loaded when they are first used; the one unused for longest makes room.

    Not for several threads at once.
    """

    def __init__(self, folders: Mapping[str, str], device: str, most: int):
        """`folders`: of the explainers by name. `most`: explainers held at a time."""
        assert most >= 1
        self._folders = dict(folders)
        self._device = device
        self._most = most
        self._loaded: OrderedDict[str, Explainer] = OrderedDict()
        self._adapted: dict[str, str] = {}
        """Name -> base, of those held that are adapters."""

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of those held, the one unused for longest first."""
        return tuple(self._loaded)

    def use(self, name: str) -> Explainer:
        """The explainer of this name, its adapter switched on; right until the next call.

        Raises UserError if it cannot be loaded.
        """
        if name not in self._loaded:
            while len(self._loaded) >= self._most:
                self._drop(next(iter(self._loaded)))
            self._loaded[name] = self._load(name)
        self._loaded.move_to_end(name)
        explainer = self._loaded[name]
        if name in self._adapted:
            cast(Any, explainer.model).set_adapter(_key(name))
        return explainer

    def _load(self, name: str) -> Explainer:
        folder = self._folders[name]
        if published.is_published(folder):
            return Explainer.load(folder, self._device, "auto")
        card = read_card(folder)
        if card.weights != "lora":
            return Explainer.load(folder, self._device, card.base.dtype)
        base = card.base.model_dump_json()
        explainer = Explainer(*load_parts(folder, self._device, card.base.dtype, _key(name), self._holder(base)))
        self._adapted[name] = base
        return explainer

    def _holder(self, base: str) -> nn.Module | None:
        """The model that holds adapters of this base, if one is here."""
        return next((self._loaded[name].model for name, other in self._adapted.items() if other == base), None)

    def _drop(self, name: str) -> None:
        explainer, base = self._loaded.pop(name), self._adapted.pop(name, None)
        if base is not None and self._holder(base) is not None:
            cast(Any, explainer.model).delete_adapter(_key(name))


def _key(name: str) -> str:
    """PEFT's name of an explainer's adapter, which must not have dots."""
    return f"explainer_{name.encode().hex()}"
