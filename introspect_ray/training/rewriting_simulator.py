"""The simulator that a rewriting run on the pocket world trains for itself.

    texts of the training split -> exemplars/ -> with the lexicon's labels -> simulators/NAME

The simulator sees nothing of the texts that scales are fitted on or that are evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable

from introspect_ray.config import (
    CollectConfig,
    ModelConfig,
    OptimizationConfig,
    RewriteConfig,
    SimulatorConfig,
    TrainerConfig,
    TrainSimulatorConfig,
)
from introspect_ray.data.collect import collect_exemplars
from introspect_ray.data.description_files import lexicon_descriptions, write_descriptions
from introspect_ray.data.storage import Folder
from introspect_ray.features.exemplar_store import coder_folders
from introspect_ray.training.train_simulator import train_simulator

Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what they are)."""


def pocket_simulator(config: RewriteConfig, name: str, progress: Progress) -> SimulatorConfig:
    """The trained simulator; each step is skipped if it is done."""
    exemplars, descriptions = f"{config.output}/exemplars", f"{config.output}/descriptions/lexicon"
    collect_exemplars(
        CollectConfig(
            output=exemplars, target=config.target, coders=(config.coder,), source=config.source, split=config.split
        ),
        lambda stage, done, total, _note: progress(done, total, f"exemplars: {stage}"),
    )
    write_descriptions(Folder(descriptions), lexicon_descriptions(config.coder))
    output = f"{config.output}/simulators/{name}"
    train_simulator(
        TrainSimulatorConfig(
            exemplars=f"{exemplars}/{coder_folders(exemplars)[0]}",
            descriptions=(descriptions,),
            output=output,
            model=config.target,
            optimization=OptimizationConfig(steps=config.training_steps),
            trainer=TrainerConfig(packing=False, cpus_per_worker=2),
            held_out_share=config.held_out_share,
            seed=config.seed,
        ),
        lambda done, total, note: progress(done, total, f"simulator {name}: {note}"),
    )
    return SimulatorConfig(model=ModelConfig(path=output))
