"""A page to look at the latents of one coder, from disk and without network.

    index.html                 the page
    data/list-00000.js         all latents in pieces: number, density, maximum, best description, its score or null
    data/latents-00000.js      exemplars and descriptions of consecutive latents; loaded when one of them is looked at

A page from disk may load scripts but not fetch, so the data are scripts that call a function of the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from introspect_ray.config import BrowseConfig
from introspect_ray.evaluation.page import render_page
from introspect_ray.features.descriptions import Description
from introspect_ray.features.exemplar_store import ExemplarStore
from introspect_ray.features.exemplars import Exemplar, ExemplarKind, LatentExemplars

LATENTS_PER_LIST = 8192
BARS_PER_DECADE = 5
DIGITS = 4
"""Significant digits of activations on the page."""

Descriptions = Mapping[int, Sequence[Description]]
"""Latent -> its descriptions, ranked by `BrowseConfig.score`."""


def page_files(
    store: ExemplarStore, descriptions: Descriptions, config: BrowseConfig, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, str]]:
    """Name and content of every file of the page, the page itself last; `progress` hears (latents, of all)."""
    total = store.meta.num_latents
    for start in range(0, total, LATENTS_PER_LIST):
        numbers = range(start, min(start + LATENTS_PER_LIST, total))
        rows = [_list_row(store, latent, descriptions.get(latent, ()), config.score) for latent in numbers]
        yield f"data/list-{start // LATENTS_PER_LIST:05d}.js", f"listed({_script(rows)});\n"
    for start in range(0, total, config.latents_per_file):
        numbers = range(start, min(start + config.latents_per_file, total))
        number = start // config.latents_per_file
        content = _details([store.read(latent) for latent in numbers], descriptions, config)
        yield f"data/latents-{number:05d}.js", f"loaded({number}, {_script(content)});\n"
        progress(numbers[-1] + 1, total)
    view = _View(store, config)
    yield "index.html", render_page("latents.html", view=view, summary=view.summary)


def _list_row(store: ExemplarStore, latent: int, descriptions: Sequence[Description], score: str) -> list[Any]:
    density = float(store.densities[latent])
    best = descriptions[0] if descriptions else None
    text, value = (best.text, best.scores.get(score)) if best else ("", None)
    return [latent, _rounded(density), _rounded(float(store.maxima[latent])), text, value]


def _details(found: Sequence[LatentExemplars], descriptions: Descriptions, config: BrowseConfig) -> dict[str, Any]:
    """Latents of one file; windows are in it once."""
    windows: dict[tuple[str, ...], int] = {}
    latents = {
        one.latent: {
            "descriptions": [
                {"text": each.text, "source": each.source, "scores": dict(each.scores)}
                for each in descriptions.get(one.latent, ())
            ],
            "groups": [
                (title, [_exemplar(exemplar, windows) for exemplar in exemplars])
                for title, exemplars in _groups(one, config)
                if exemplars
            ],
        }
        for one in found
    }
    return {"windows": list(windows), "latents": latents}


def _groups(found: LatentExemplars, config: BrowseConfig) -> Iterator[tuple[str, list[Exemplar]]]:
    """Title of a group of exemplars, and those that are shown."""
    shown: Mapping[ExemplarKind, int] = {"top": config.top, "random": config.random, "silent": config.silent}
    yield "Top", found.of_kind("top")[: shown["top"]]
    quantiles = sorted(found.of_kind("quantile"), key=lambda exemplar: exemplar.quantile or 0)
    for quantile, members in reversed([(key, list(of)) for key, of in groupby(quantiles, lambda one: one.quantile)]):
        yield f"Quantile {quantile}", members[: config.quantile]
    yield "Random", found.of_kind("random")[: shown["random"]]
    yield "Silent", found.of_kind("silent")[: shown["silent"]]


def _exemplar(exemplar: Exemplar, windows: dict[tuple[str, ...], int]) -> dict[str, Any]:
    number = windows.setdefault(exemplar.window.pieces, len(windows))
    positions = np.flatnonzero(exemplar.activations)
    values = [_rounded(float(value)) for value in exemplar.activations[positions]]
    return {"window": number, "positions": positions.tolist(), "values": values}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _script(content: Any) -> str:
    """JSON that is a JavaScript value as well, and in which no text can end a script."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


@dataclass(frozen=True)
class Bar:
    """Latents of a range of densities; `share` is relative to the highest bar."""

    label: str
    count: int
    share: float


@dataclass(frozen=True)
class Tick:
    label: str
    place: float
    """From 0 at the left to 1."""


class _View:
    """What the template asks of a store."""

    def __init__(self, store: ExemplarStore, config: BrowseConfig):
        self.meta = store.meta
        self.latents_per_file = config.latents_per_file
        self.score = config.score
        self.num_dead = store.meta.num_latents - store.meta.num_live
        self.num_chunks = -(-store.meta.num_latents // LATENTS_PER_LIST)
        self._logs = np.log10(store.densities[store.densities > 0])
        self._low = int(np.floor(self._logs.min())) if len(self._logs) else -1

    @property
    def title(self) -> str:
        return f"Latents of {self.meta.coder}"

    @property
    def subtitle(self) -> str:
        return f"{'Transcoder' if self.meta.kind == 'transcoder' else 'SAE'} of layer {self.meta.layer}"

    @property
    def summary(self) -> list[tuple[str, str]]:
        return [
            ("Target", str(self.meta.target["path"])),
            ("Latents", f"{self.meta.num_latents:,}, {self.meta.num_live:,} of them fire"),
            ("Tokens", f"{self.meta.num_tokens:,} of {self.meta.texts['used']:,} texts"),
            ("Not finite", f"{self.meta.num_not_finite:,} tokens"),
            ("Run key", self.meta.run_key),
        ]

    @property
    def bars(self) -> list[Bar]:
        """Latents that fire by the logarithm of their density, up to a density of 1."""
        edges = np.linspace(self._low, 0, -self._low * BARS_PER_DECADE + 1)
        counts, _ = np.histogram(self._logs, edges)
        return [
            Bar(f"{10**low:.2g} to {10**high:.2g}", int(count), float(count) / max(1, counts.max()))
            for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        ]

    @property
    def ticks(self) -> list[Tick]:
        return [Tick(f"{10.0**power:g}", 1 - power / self._low) for power in range(self._low, 1)]
