"""The simulator that a rewriting run on the pocket world trains for itself.

    texts of the training split -> exemplars/ -> with the lexicon's labels -> simulators/NAME

The simulator sees nothing of the texts that scales are fitted on or that are evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable

from introspect_ray.config import (
    CollectConfig,
    ModelConfig,
    RewriteConfig,
    RewriteSimulatorConfig,
    SimulatorConfig,
)
from introspect_ray.data.collect import collect_exemplars
from introspect_ray.data.description_files import lexicon_descriptions, write_coder_digest, write_descriptions
from introspect_ray.data.identity import folder_digest
from introspect_ray.data.storage import Folder
from introspect_ray.features.card import coder_folder
from introspect_ray.features.exemplar_store import coder_folders
from introspect_ray.training.train_simulator import train_simulator

Progress = Callable[[str, int, int, str], None]
"""(stage, steps done, steps in all, how it goes)."""


def pocket_simulator(config: RewriteConfig, simulator: RewriteSimulatorConfig, progress: Progress) -> SimulatorConfig:
    """The trained simulator; each step is skipped if it is done."""
    exemplars, descriptions = f"{config.output}/exemplars", f"{config.output}/descriptions/lexicon"
    collection = CollectConfig(
        output=exemplars, target=config.target, coders=(config.coder,), source=config.source, split=config.split
    )
    collect_exemplars(collection, lambda stage, *how: progress(f"exemplars: {stage}", *how))
    write_descriptions(Folder(descriptions), lexicon_descriptions(config.coder))
    write_coder_digest(Folder(descriptions), folder_digest(coder_folder(config.coder)))
    output = f"{config.output}/simulators/{simulator.name}"
    own = {
        "exemplars": f"{exemplars}/{coder_folders(exemplars)[0]}",
        "descriptions": (descriptions,),
        "output": output,
        "model": config.target,
        "seed": config.seed,
    }
    train_simulator(
        simulator.training.model_copy(update=own),
        lambda *how: progress(f"train simulator {simulator.name}", *how),
    )
    return SimulatorConfig(model=ModelConfig(path=output))
