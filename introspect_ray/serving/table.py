"""What is served, worked out from a config without loading weights, and refused where it does not fit together."""

from __future__ import annotations

from pathlib import Path

from introspect_ray.config import ServeConfig, ServedExplainer, ServedTarget, TaskName
from introspect_ray.config.tasks import POCKET_FEATURES, POCKET_QUESTIONS
from introspect_ray.errors import UserError
from introspect_ray.explainer import published
from introspect_ray.explainer.card import CARD_FILE, read_card
from introspect_ray.features.sae import check_sae
from introspect_ray.models.paths import POCKET_PREFIX, check_model
from introspect_ray.serving.api import CoderInfo, ExplainerInfo, Models, SimulatorInfo, TargetInfo
from introspect_ray.serving.examples import pocket_examples
from introspect_ray.simulator.loading import check_simulator

QUICKSTART_TASKS: tuple[TaskName, ...] = ("feature_description", "activation_patching", "input_ablation")


def with_quickstart(config: ServeConfig) -> ServeConfig:
    """The config with the explainers that jobs/quickstart.py has finished, named by their tasks."""
    if config.quickstart is None:
        return config
    found = [
        ServedExplainer(
            name=task,
            folder=folder,
            target=target.name,
            tasks=(task,),
            features=POCKET_FEATURES,
            questions=POCKET_QUESTIONS,
        )
        for task in QUICKSTART_TASKS
        if Path(folder := f"{config.quickstart}/explainers/{task}", CARD_FILE).is_file()
        for target in config.targets
        if target.model.path == read_card(folder).target.path
    ]
    names = {one.name for one in config.explainers}
    new = tuple(one for one in found if one.name not in names)
    return config.model_copy(update={"explainers": (*config.explainers, *new), "quickstart": None})


def served_models(config: ServeConfig) -> Models:
    """What GET /v1/models lists. Raises UserError for a model that cannot be served, before any weights load."""
    targets = {target.name: _target(target) for target in config.targets}
    simulators = []
    for simulator in config.simulators:
        if simulator.kind == "model":
            check_simulator(simulator.simulator)
        simulators.append(SimulatorInfo(name=simulator.name, target=simulator.target))
    pocket = next((one for one in config.targets if one.model.path.startswith(POCKET_PREFIX)), None)
    return Models(
        targets=list(targets.values()),
        explainers=[_explainer(one, targets[one.target]) for one in config.explainers],
        simulators=simulators,
        **({"examples": pocket_examples(pocket.model)} if pocket is not None else {}),
    )


def _target(served: ServedTarget) -> TargetInfo:
    shape = check_model(served.model).get_text_config(decoder=True)
    cards = {coder.name: check_sae(coder.path, shape.hidden_size) for coder in served.coders}
    for coder in served.coders:
        if cards[coder.name].layer >= shape.num_hidden_layers:
            raise UserError(
                f"coder {coder.name} reads layer {cards[coder.name].layer}, target {served.name} has layers 0 to"
                f" {shape.num_hidden_layers - 1}"
            )
    return TargetInfo(
        name=served.name,
        num_layers=shape.num_hidden_layers,
        width=shape.hidden_size,
        coders=[CoderInfo(name=name, layer=card.layer, num_latents=card.num_latents) for name, card in cards.items()],
    )


def _explainer(served: ServedExplainer, target: TargetInfo) -> ExplainerInfo:
    if not published.is_published(served.folder):
        card = read_card(served.folder)
        if (card.target.width, card.target.num_layers) != (target.width, target.num_layers):
            raise UserError(
                f"explainer {served.name} explains a target with {card.target.num_layers} layers of width"
                f" {card.target.width}; its target {target.name} has {target.num_layers} of width {target.width}"
            )
    return ExplainerInfo(
        name=served.name, target=served.target, layers=list(range(target.num_layers)), tasks=list(served.tasks)
    )
