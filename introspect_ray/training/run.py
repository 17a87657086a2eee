"""A training run before any model loads: its checks, its identity, and what of it exists already. No Ray here.

Output folder:  training.json (first; again with results)  metrics.jsonl  checkpoints/  ...  explainer.json (last)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from introspect_ray.config import (
    EvaluationDuringConfig,
    ExplainerConfig,
    LoggingConfig,
    LoraConfig,
    PlanConfig,
    TrainConfig,
    TrainerConfig,
    differences,
    resolved,
)
from introspect_ray.data.dataset import Dataset, open_dataset
from introspect_ray.data.identity import identify_target
from introspect_ray.data.manifest import TargetIdentity
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import CARD_FILE, TargetInfo, is_remote
from introspect_ray.explainer.files import check_modules
from introspect_ray.explainer.fitted import read_alignment, read_maps
from introspect_ray.explainer.projections import resolve_kind
from introspect_ray.models.paths import absolute, with_absolute_path
from introspect_ray.models.shapes import model_shape
from introspect_ray.tasks.base import stable_id
from introspect_ray.training.batches import num_steps
from introspect_ray.training.validation import check_evaluation

TRAINING_FILE = "training.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
logger = logging.getLogger(__name__)


class Run(Protocol):
    """What loggers, drivers and loops need of a training run, be it of an explainer or of a simulator."""

    @property
    def config(self) -> Any: ...

    @property
    def run_key(self) -> str: ...

    @property
    def folder(self) -> Folder: ...

    @property
    def checkpoints(self) -> Folder: ...

    def results(self) -> dict[str, Any]: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DatasetFacts:
    """What training.json says of a dataset, so that its name may change and it is still known."""

    url: str
    task: str
    run_key: str
    num_train: int
    num_validation: int
    split: dict[str, Any] | None
    """How its groups were split; None for one that was not generated here."""

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetFacts:
        manifest = dataset.manifest
        train, validation = (manifest.selected.get(split, 0) for split in ("train", "validation"))
        split = manifest.config.get("split")
        return cls(dataset.folder.url, manifest.task, manifest.run_key, train, validation, split)


@dataclass(frozen=True)
class TrainingRun:
    """A run that passed every check. Ships to workers as JSON types (`to_json`), paths made absolute."""

    config: TrainConfig
    target: TargetInfo
    run_key: str
    """Equal for equal datasets, starting weights and every setting that can change the result."""
    datasets: tuple[DatasetFacts, ...]

    @property
    def num_examples(self) -> int:
        return sum(dataset.num_train for dataset in self.datasets)

    @property
    def folder(self) -> Folder:
        return Folder(self.config.output)

    @property
    def checkpoints(self) -> Folder:
        return Folder(f"{self.config.output.rstrip('/')}/{CHECKPOINTS_FOLDER}")

    def is_complete(self) -> bool:
        """Whether the explainer is there; `prepare` has made sure that it is this run's."""
        return self.folder.size(CARD_FILE) is not None

    def record(self, results: dict[str, Any]) -> None:
        """Write training.json: the run's identity, its resolved config, and what came of it so far."""
        self.folder.write(TRAINING_FILE, (json.dumps(self.account(results), indent=2) + "\n").encode())

    def account(self, results: dict[str, Any]) -> dict[str, Any]:
        """The contents of training.json."""
        return {
            "run_key": self.run_key,
            "config": resolved(self.config),
            "datasets": [asdict(dataset) for dataset in self.datasets],
            "results": results,
        }

    def results(self) -> dict[str, Any]:
        """What training.json says came of the run: its last line of metrics, or its `failure`."""
        return json.loads(self.folder.read(TRAINING_FILE))["results"]

    def to_json(self) -> dict[str, Any]:
        return {
            "config": resolved(self.config),
            "target": self.target.model_dump(),
            "run_key": self.run_key,
            "datasets": [asdict(dataset) for dataset in self.datasets],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainingRun:
        return cls(
            config=TrainConfig.model_validate(content["config"]),
            target=TargetInfo.model_validate(content["target"]),
            run_key=content["run_key"],
            datasets=tuple(DatasetFacts(**dataset) for dataset in content["datasets"]),
        )


def prepare(config: TrainConfig) -> TrainingRun:
    """Check a run from end to end. Raises UserError; reads the datasets but no weights, and writes nothing."""
    config = _absolute(config)
    _check_method(config)
    datasets = [open_dataset(url) for url in config.datasets]
    if not datasets:
        raise UserError("datasets is empty, expected at least one dataset folder")
    _check_one_target(datasets)
    target = datasets[0].manifest.target
    base = identify_target(config.explainer.model)
    if config.method != "full":
        check_modules(config.explainer.model, config.lora)
    resolve_kind(config.explainer, target.width, base.width)
    start = _check_fitted(config.explainer, target, base.width)
    for dataset in datasets:
        if not dataset.manifest.selected.get("train", 0):
            raise UserError(f"dataset {dataset.folder.url} has no records in its train split, expected at least one")
        dataset.check_shards()
    check_evaluation(config.evaluation, datasets)
    _check_packages(config.logging)
    config = _with_steps(config, sum(dataset.manifest.selected["train"] for dataset in datasets))
    contents = [[shard.digest for shard in dataset.manifest.shards] for dataset in datasets]
    keys = [dataset.manifest.run_key for dataset in datasets]
    run = TrainingRun(
        config=config,
        target=TargetInfo(path=target.path, width=target.width, num_layers=target.num_layers),
        run_key=stable_id(resolved(relevant(config)), keys, contents, base.model_dump(), start),
        datasets=tuple(DatasetFacts.of(dataset) for dataset in datasets),
    )
    _check_output(run)
    return run


def _with_steps(config: TrainConfig, num_examples: int) -> TrainConfig:
    """Epochs, where they are given, as steps."""
    settings = config.optimization
    if settings.epochs is None:
        return config
    steps = num_steps(settings.epochs, num_examples, settings.batch_size)
    return config.model_copy(update={"optimization": settings.model_copy(update={"steps": steps, "epochs": None})})


def relevant(config: TrainConfig) -> TrainConfig:
    """The config with everything that makes it no other run set to its default.

    Workers, sharding and micro-batches stay out: they change a sum's order of rounding and, with dropout or bfloat16,
    what `changed_draws` says. A run may lose workers while it goes on, so one that is resumed with fewer is none other
    either. Datasets and fitted projections are known by their contents, not by where they lie.
    """
    trainer = TrainerConfig(compute_dtype=config.trainer.compute_dtype)
    reset: dict[str, Any] = {"output": "", "trainer": trainer, "datasets": (), "logging": LoggingConfig()}
    reset["plan"] = PlanConfig()
    if not config.evaluation.every:
        reset["evaluation"] = EvaluationDuringConfig()
    if config.method == "full":
        reset["lora"] = LoraConfig()
    if len(config.datasets) == 1:
        reset["weights"] = None
    model = config.explainer.model.model_copy(update={"device": "auto"})
    reset["explainer"] = config.explainer.model_copy(update={"model": model, "fitted_projection": None})
    return config.model_copy(update=reset)


def changed_draws(before: TrainConfig, now: TrainConfig) -> str:
    """What makes a run that goes on with the settings `now` differ by more than rounding from one that kept to those of
    `before`, in words; "" if nothing does."""
    found = []
    if has_dropout(now):
        settings = ("num_workers", "micro_batch_tokens", "packing", "compile")
        changes = [name for name in settings if getattr(before.trainer, name) != getattr(now.trainer, name)]
        if changes:
            found.append(f"another trainer.{' and trainer.'.join(changes)} draws other dropout")
    if now.trainer.compute_dtype == "bfloat16" and before.trainer.sharding != now.trainer.sharding:
        found.append("trainer.sharding decides which operations are done in bfloat16")
    return "; ".join(found)


def has_dropout(config: TrainConfig) -> bool:
    """Whether training draws at random what to leave out: in adapters, or where the model's own config says so."""
    if config.method != "full" and config.lora.dropout:
        return True
    shape = model_shape(config.explainer.model).to_dict()
    heads_of_others = ("classifier", "summary")  # which no language model has
    return any(
        value
        for name, value in shape.items()
        if name.endswith(("dropout", "_pdrop")) and not name.startswith(heads_of_others)
    )


def _absolute(config: TrainConfig) -> TrainConfig:
    fitted = config.explainer.fitted_projection
    uri = config.logging.mlflow_uri
    return config.model_copy(
        update={
            "logging": config.logging.model_copy(update={"mlflow_uri": uri and absolute(uri)}),
            "datasets": tuple(absolute(url) for url in config.datasets),
            "output": absolute(config.output),
            "explainer": config.explainer.model_copy(
                update={
                    "model": with_absolute_path(config.explainer.model),
                    "fitted_projection": fitted and absolute(fitted),
                }
            ),
        }
    )


def _check_method(config: TrainConfig) -> None:
    """Refuse weights that cannot be trained or loaded the way that is asked for."""
    model, method, sharding = config.explainer.model, config.method, config.trainer.sharding
    if method == "full" and model.quantization != "none":
        raise UserError(f"explainer.model.quantization is {model.quantization}, but method full trains all weights")
    if method == "qlora" or sharding == "fsdp2":
        asked = "method qlora" if method == "qlora" else f"trainer.sharding {sharding}"
        for field, found in (("quantization", model.quantization), ("device_map", model.device_map)):
            if found != "none":
                raise UserError(
                    f"explainer.model.{field} is {found}, but {asked} places weights itself: expected none"
                    " (method qlora quantizes them)"
                )


def _check_packages(config: LoggingConfig) -> None:
    """Refuse loggers whose package is not there, before anything starts."""
    for field, wanted, package in (
        ("logging.tensorboard", config.tensorboard, "tensorboardX"),
        ("logging.wandb_project", config.wandb_project is not None, "wandb"),
        ("logging.mlflow_uri", config.mlflow_uri is not None, "mlflow"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{field} is set, but the package {package} is not installed: pip install {package}")


def _check_one_target(datasets: list[Dataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.target != first.manifest.target:
            one, two = first.manifest.target, other.manifest.target
            raise UserError(
                f"datasets are of different targets: {first.folder.url} of {one.path} (width {one.width}), "
                f"{other.folder.url} of {two.path} (width {two.width}); expected one target"
            )


def _check_fitted(config: ExplainerConfig, target: TargetIdentity, width: int) -> str:
    """Refuse maps that were fitted for something else; a digest of those that fit, "" if none were asked for."""
    folder = config.fitted_projection
    if folder is None:
        return ""
    card = read_alignment(folder)
    for what, found, wanted in (
        ("targets of width", card.target_width, target.width),
        ("explainers of width", card.explainer_width, width),
    ):
        if found != wanted:
            raise UserError(f"fitted projection {folder} is for {what} {found}, expected {wanted}")
    if max(card.layers) >= target.num_layers:
        raise UserError(
            f"fitted projection {folder} has layer {max(card.layers)}, {target.path} has {target.num_layers}"
        )
    return hashlib.blake2b(
        b"".join(weight.numpy().tobytes() for weight in read_maps(folder).values()), digest_size=8
    ).hexdigest()


def _check_output(run: TrainingRun) -> None:
    """Refuse an output folder that holds something else than this very run, begun or finished."""
    folder, url = run.folder, run.folder.url
    names = [name for name in folder.names() if not name.startswith(TEMPORARY)]
    if not names:
        return
    if TRAINING_FILE not in names:
        raise UserError(f"output folder {url} is not empty and holds no training run ({names[0]}, ...): choose another")
    try:
        found = json.loads(folder.read(TRAINING_FILE))
        key, other = found["run_key"], TrainConfig.model_validate(found["config"])
    except (ValueError, KeyError, TypeError, ValidationError):
        raise UserError(f"output folder {url}: its {TRAINING_FILE} is none of this version's: choose another") from None
    if key == run.run_key:
        difference = changed_draws(other, run.config)
        if difference and CARD_FILE not in names:
            logger.warning("%s: it goes on as the same run, but not to the same weights: %s", url, difference)
        return
    found_differences = differences(resolved(relevant(other)), resolved(relevant(run.config)))
    what = "; ".join(found_differences) or "the contents of its datasets or of its starting model have changed since"
    raise UserError(f"output folder {url} belongs to another config ({what}): choose another folder or delete it")


def storage_of(output: str) -> tuple[str, Any]:
    """Path and file system (None for local disks) under which Ray Train may keep its own notes about a run."""
    if not is_remote(output):
        return output.removeprefix("file://"), None
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(output)
    return path, PyFileSystem(FSSpecHandler(filesystem))
