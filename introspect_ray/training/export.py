"""An explainer as others take it: merged or as an adapter, with a model card and the scores of an evaluation. No Ray.

Ours, or one that P1 published, which becomes one of ours.
"""

from __future__ import annotations

import json
from typing import Any

from introspect_ray.config import ExportConfig, ModelConfig
from introspect_ray.data.identity import identify_target
from introspect_ray.data.manifest import CONFIG_NAME
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import TargetInfo, read_card
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.published import is_published, load_published
from introspect_ray.models.paths import absolute
from introspect_ray.training.model_card import readme
from introspect_ray.training.run import METRICS_FILE, TRAINING_FILE

SCORES_NAME = "scores.json"


def export_explainer(config: ExportConfig) -> str:
    """Write what `config` describes; one line about it.

    Raises:
        UserError: bad input, before any model loads; or weights that cannot be read.
    """
    source, output = Folder(config.explainer), Folder(config.output)
    names = [name for name in output.names() if not name.startswith(TEMPORARY)]
    if names:
        raise UserError(f"output folder {config.output} is not empty ({names[0]}, ...): choose another")
    scores, own = _scores(config) if config.evaluation is not None else (None, None)
    if is_published(config.explainer):
        explainer = Explainer(
            *load_published(
                config.explainer, config.device, config.dtype, _target(config), config.base, config.alignment
            )
        )
    else:
        _refuse_hints(config)
        read_card(config.explainer)
        explainer = Explainer.load(config.explainer, config.device, config.dtype)
    if config.merge:
        explainer.merge_adapter()
    copied = {name: _read(source, name) for name in (TRAINING_FILE, METRICS_FILE)}
    if scores is not None:
        copied[SCORES_NAME] = (json.dumps(scores, indent=2) + "\n").encode()
    for name, content in copied.items():
        if content is not None:
            output.write(name, content)
    account = copied[TRAINING_FILE]
    explainer.save(config.output, readme=readme(explainer.card, json.loads(account) if account else None, scores, own))
    kind = "an adapter" if explainer.card.weights == "lora" else "full weights"
    return f"wrote {config.output}: {kind}, explains {explainer.card.target.path}"


def _read(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _target(config: ExportConfig) -> TargetInfo | None:
    if config.target is None:
        return None
    found = identify_target(ModelConfig(path=config.target))
    return TargetInfo(path=found.path, width=found.width, num_layers=found.num_layers)


def _refuse_hints(config: ExportConfig) -> None:
    """An explainer of ours says itself what the others have to be told."""
    for name in ("target", "base", "alignment"):
        value = getattr(config, name)
        if value is not None:
            raise UserError(f"{name} is {value!r}, but {config.explainer} is no published checkpoint: leave it out")


def _scores(config: ExportConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The scores of the tasks that an evaluation asked this very explainer about, and its name in each."""
    assert config.evaluation is not None
    folder = Folder(config.evaluation)
    about, scores = _read(folder, CONFIG_NAME), _read(folder, SCORES_NAME)
    if about is None or scores is None:
        raise UserError(f"evaluation {config.evaluation} is not finished: it has no {SCORES_NAME}")
    try:
        evaluation, found = json.loads(about), json.loads(scores)
        runs = zip(evaluation["config"]["runs"], evaluation["tasks"], strict=True)
        own = {task: run["name"] or "explainer" for run, task in runs if _same(run["explainer"], config.explainer)}
        if own:
            return {task: found[task] for task in own}, own
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"evaluation {config.evaluation} cannot be read: {error}") from None
    asked = ", ".join(run["explainer"] for run in evaluation["config"]["runs"])
    raise UserError(f"evaluation {config.evaluation} is of {asked}, not of {config.explainer}")


def _same(one: str, other: str) -> bool:
    def plain(url: str) -> str:
        return absolute(url.removeprefix("file://").rstrip("/"))

    return plain(one) == plain(other)
