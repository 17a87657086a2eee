"""A simulator's training run before any model loads: its checks, its identity, and what of it exists. No Ray here.

Output folder:  training.json (first; again with results)  metrics.jsonl  checkpoints/  ...  simulator.json (last)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from introspect_ray.config import LoggingConfig, TrainerConfig, TrainSimulatorConfig, differences, resolved
from introspect_ray.data.description_files import check_coder, read_descriptions
from introspect_ray.data.identity import identify_target
from introspect_ray.data.scored_exemplars import Exemplars, check_windows
from introspect_ray.data.splits import unit_interval
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import Description, by_latent, description_lines
from introspect_ray.features.exemplar_store import ExemplarStore, open_exemplars
from introspect_ray.models.paths import absolute, with_absolute_path
from introspect_ray.simulator.examples import LatentKey
from introspect_ray.simulator.finetuned import SIMULATOR_FILE, LatentSplit
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.run import CHECKPOINTS_FOLDER, TRAINING_FILE
from introspect_ray.training.simulator_split import part_of


@dataclass(frozen=True)
class SimulatorRun:
    """A run that passed every check. Ships to workers as JSON types (`to_json`), paths made absolute."""

    config: TrainSimulatorConfig
    run_key: str
    """Equal for equal exemplars, descriptions, starting weights and settings that can change the result."""
    num_latents: int

    @property
    def folder(self) -> Folder:
        return Folder(self.config.output)

    @property
    def checkpoints(self) -> Folder:
        return Folder(f"{self.config.output.rstrip('/')}/{CHECKPOINTS_FOLDER}")

    def is_complete(self) -> bool:
        """Whether the simulator is there; `prepare` has made sure that it is this run's."""
        return self.folder.size(SIMULATOR_FILE) is not None

    def record(self, results: dict[str, Any]) -> None:
        """Write training.json: the run's identity, its resolved config, and what came of it so far."""
        content = {**self.to_json(), "results": results}
        self.folder.write(TRAINING_FILE, (json.dumps(content, indent=2) + "\n").encode())

    def results(self) -> dict[str, Any]:
        """What training.json says came of the run: its last line of metrics, or its `failure`."""
        return json.loads(self.folder.read(TRAINING_FILE))["results"]

    def to_json(self) -> dict[str, Any]:
        return {"run_key": self.run_key, "config": resolved(self.config), "num_latents": self.num_latents}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SimulatorRun:
        config = TrainSimulatorConfig.model_validate(content["config"])
        return cls(config, content["run_key"], content["num_latents"])


def prepare(config: TrainSimulatorConfig) -> SimulatorRun:
    """Check a run from end to end. Raises UserError; reads descriptions but no weights, and writes nothing."""
    config = _absolute(config)
    base = identify_target(config.model)
    store = open_exemplars(config.exemplars)
    chosen = chosen_descriptions(config, store)
    check_windows(store, next(iter(chosen))[1], "train")
    text = description_lines(one for candidates in chosen.values() for one in candidates)
    key = stable_id(resolved(relevant(config)), base.model_dump(), store.meta.run_key, text)
    run = SimulatorRun(config, key, len(chosen))
    _check_output(run)
    return run


def latent_split(config: TrainSimulatorConfig, store: ExemplarStore) -> LatentSplit:
    """Which latents the run leaves out."""
    return LatentSplit(
        held_out_share=config.held_out_share,
        seed=config.seed,
        coder=store.meta.coder,
        coder_digest=store.meta.coder_digest,
    )


def chosen_descriptions(config: TrainSimulatorConfig, store: ExemplarStore) -> dict[LatentKey, list[Description]]:
    """Candidates of every latent that is trained on, by latent. Raises UserError if there is none."""
    found = part_of(candidates_of(config.descriptions, store), latent_split(config, store), "trained")
    good = {key: [one for one in candidates if _is_good(one, config)] for key, candidates in found.items()}
    kept = drawn([key for key, candidates in good.items() if candidates], config.max_latents, config.seed)
    if not kept:
        wanted = f", or lack a {config.label_score} of {config.minimum_score:g}" if config.label_score else ""
        raise UserError(f"no latent of {config.exemplars} is left to train on: all are held out{wanted}")
    return {key: good[key] for key in kept}


def candidates_of(sources: Sequence[str], store: Exemplars) -> dict[LatentKey, list[Description]]:
    """Descriptions of the latents that fire in the exemplars.

    Raises UserError if there are none, or they are of another coder.
    """
    check_coder(sources, store.meta.coder, store.meta.coder_digest)
    live = {(stats.layer, stats.latent) for stats in store.latents()}
    everything = by_latent(one for source in sources for one in read_descriptions(source))
    found = {key: candidates for key, candidates in everything.items() if key in live}
    if not found:
        raise UserError(
            f"none of the {len(everything)} latents described in {', '.join(sources)} fires in {store.url}"
            f" (layer {store.meta.layer}): expected descriptions of its latents"
        )
    return found


def _is_good(description: Description, config: TrainSimulatorConfig) -> bool:
    if config.label_score is None:
        return True
    score = description.scores.get(config.label_score)
    return score is not None and score >= config.minimum_score


def drawn(keys: Sequence[LatentKey], most: int | None, seed: int) -> list[LatentKey]:
    """At most `most` latents by a hash, in their order."""
    if most is None or len(keys) <= most:
        return list(keys)
    first = sorted(keys, key=lambda key: unit_interval(f"{seed}\x1f{key[0]}/{key[1]}"))[:most]
    return sorted(first)


def relevant(config: TrainSimulatorConfig) -> TrainSimulatorConfig:
    """The config with everything that cannot change the result, or is known by its contents, set to its default."""
    trainer = TrainerConfig(packing=False, compute_dtype=config.trainer.compute_dtype)
    model = config.model.model_copy(update={"device": "auto"})
    reset: Mapping[str, Any] = {
        "output": "",
        "exemplars": "",
        "descriptions": (),
        "trainer": trainer,
        "logging": LoggingConfig(),
        "model": model,
    }
    return config.model_copy(update=reset)


def _absolute(config: TrainSimulatorConfig) -> TrainSimulatorConfig:
    return config.model_copy(
        update={
            "model": with_absolute_path(config.model),
            "exemplars": absolute(config.exemplars),
            "descriptions": tuple(map(absolute, config.descriptions)),
            "output": absolute(config.output),
        }
    )


def _check_output(run: SimulatorRun) -> None:
    """Refuse an output folder that holds something else than this very run, begun or finished."""
    folder, url = run.folder, run.folder.url
    names = [name for name in folder.names() if not name.startswith(TEMPORARY)]
    if not names:
        return
    if TRAINING_FILE not in names:
        raise UserError(f"output folder {url} is not empty and holds no training run ({names[0]}, ...): choose another")
    try:
        found = SimulatorRun.from_json(json.loads(folder.read(TRAINING_FILE)))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"output folder {url} holds no simulator's training run: choose another") from None
    if found.run_key != run.run_key:
        what = "; ".join(differences(resolved(relevant(found.config)), resolved(relevant(run.config))))
        what = what or "exemplars, descriptions or starting model have changed since"
        raise UserError(f"output folder {url} belongs to another config ({what}): choose another folder or delete it")
