"""Where a rewriting run gets its words and its simulators from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from introspect_ray.config import (
    DescriptionSourceConfig,
    ModelConfig,
    RewriteConfig,
    RewriteSimulatorConfig,
    resolved,
)
from introspect_ray.data.description_files import lexicon_descriptions, read_descriptions
from introspect_ray.data.identity import folder_digest
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import local_copy, read_card
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.descriptions import Description
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.pocket.reader import ExactReader
from introspect_ray.simulator.base import Simulator
from introspect_ray.simulator.loading import check_simulator, load_simulator
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.answering import AnswerPool
from introspect_ray.training.rewriting_simulator import Progress, pocket_simulator

QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class LoadSimulator:
    """How actors load a simulator, and a digest of all that its levels depend on."""

    load: Callable[[], Simulator]
    digest: str


def check_sources(config: RewriteConfig) -> None:
    """Refuse descriptions, explainers and simulators that are not there. Raises UserError."""
    for source in config.sources:
        if source.kind == "lexicon":
            lexicon_descriptions(config.coder)
        elif source.kind == "file":
            read_descriptions(source.path)
        elif source.kind == "explainer":
            read_card(source.path)
    used = {line.simulator for line in config.lines if line.kind == "simulated"}
    for simulator in (one for one in config.simulators if one.name in used):
        if simulator.given is not None:
            check_simulator(simulator.given)
        elif simulator.kind == "exact" and config.where != "all":
            raise UserError(
                f"simulator {simulator.name} of kind exact needs whole texts: expected where: all, found {config.where}"
            )
        elif config.source.path != "pocket":
            raise UserError(
                f"simulator {simulator.name} of kind {simulator.kind} reads texts of the pocket world only, source is"
                f" {config.source.path}: set simulators, and lines, without it"
            )


def all_descriptions(
    config: RewriteConfig,
    layer: int,
    coder: SparseCoder,
    live: Sequence[int],
    progress: Progress,
) -> dict[str, list[Description]]:
    """Descriptions of the coder's latents by name of their source; an explainer is asked about the live ones."""
    found = {}
    for source in config.sources:
        if source.kind == "lexicon":
            descriptions = lexicon_descriptions(config.coder)
        elif source.kind == "file":
            descriptions = read_descriptions(source.path)
        elif source.kind == "none":
            descriptions = [Description(layer, latent, "", "none") for latent in live]
        else:
            descriptions = _explained(config, source, layer, coder, live, progress)
        of_coder = [one for one in descriptions if one.layer == layer and one.latent < coder.num_latents]
        if not of_coder:
            raise UserError(f"description source {source.name} has no description of a latent of layer {layer}")
        found[source.name] = of_coder
    return found


def _explained(
    config: RewriteConfig,
    source: DescriptionSourceConfig,
    layer: int,
    coder: SparseCoder,
    live: Sequence[int],
    progress: Progress,
) -> list[Description]:
    """What the explainer says about the decoder row of each live latent, nothing included; kept in `descriptions/`."""
    with local_copy(source.path) as path:
        key = stable_id(folder_digest(path), config.coder, config.question, list(live))
    folder, name = Folder(config.output), f"descriptions/{source.name}-{key}.json"
    texts = _kept(folder, name)
    if texts is None:
        texts = _answers(config, source, layer, coder.feature_vectors[list(live)].float().numpy(), progress)
        folder.write(name, json.dumps(texts, ensure_ascii=False, indent=0).encode())
    return [
        Description(layer, latent, text.strip(), f"explainer:{source.name}")
        for latent, text in zip(live, texts, strict=True)
    ]


def _answers(
    config: RewriteConfig,
    source: DescriptionSourceConfig,
    layer: int,
    rows: Float[np.ndarray, "L D"],
    progress: Progress,
) -> list[str]:
    before, after = config.question.replace("{layer}", str(layer)).split("{vector}")
    done = 0

    def answered(count: int) -> None:
        nonlocal done
        done += count
        progress(f"descriptions by {source.name}", done, len(rows), "")

    pool = AnswerPool(source.path, config.target_actors, QUERIES_AT_ONCE, answered)
    return pool.answer("trained", [Query((before, Vector(row, (layer,)), after)) for row in rows])


def _kept(folder: Folder, name: str) -> list[str] | None:
    try:
        texts: list[str] = json.loads(folder.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return texts


def open_simulator(config: RewriteConfig, simulator: RewriteSimulatorConfig, progress: Progress) -> LoadSimulator:
    """The simulator of a config; one of kind `pocket` is trained first, unless it was."""
    if simulator.kind == "exact":
        return LoadSimulator(partial(_load_exact, config.target), stable_id("exact, causal", resolved(config.target)))
    given = simulator.given if simulator.given is not None else pocket_simulator(config, simulator, progress)
    given = given.model_copy(update={"cache_tokens": 0})
    content = _digest(given.model.path)
    named = given.model_copy(update={"model": given.model.model_copy(update={"path": ""})}) if content else given
    return LoadSimulator(partial(load_simulator, given), stable_id(resolved(named), content))


def _load_exact(target: ModelConfig) -> Simulator:
    return ExactReader(load_tokenizer(target))


def _digest(path: str) -> str:
    """Of a folder, wherever it is; empty for a hub id, which names its content well enough."""
    try:
        with local_copy(path) as folder:
            return folder_digest(folder)
    except OSError:
        return ""
