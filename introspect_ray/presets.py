"""Ready configs for training known models on each task, with the hyperparameters of P1 and its code (arXiv 2511.08579).

model, task, target --preset--> a whole TrainConfig  <-  FILE.yaml  <-  command line
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import model_validator

from introspect_ray.config import HUB_IDS, KnownModel, TaskName, TrainConfig

P1_QWEN_PATCHES = 120_644
"""Training records of P1's activation patching on Qwen3-8B; the other numbers are its tasks' defaults."""


class PresetConfig(TrainConfig):
    """A TrainConfig whose defaults follow from a model, a task and a target; `training` leaves these three out."""

    model: KnownModel = "llama-3.1-8b"
    """What the explainer starts from; its hub id is `explainer.model.path`, which may be a folder instead."""
    task: TaskName = "feature_description"
    """Chooses hyperparameters and the default dataset."""
    target: KnownModel | None = None
    """Model that is explained; none: Qwen3-8B for the causal tasks of a Qwen3-8B explainer, else the Llama 3.1 8B that
    P1 asked: the instruct model for input_ablation, the base model otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _preset_below(cls, tree: Any) -> Any:
        """What is given goes over the preset. Names that are none are left for the fields' own checks."""
        if not isinstance(tree, dict):
            return tree
        model, task, target = (tree.get(name, cls.model_fields[name].default) for name in ("model", "task", "target"))
        known = (*get_args(KnownModel), None)
        if model not in known[:-1] or task not in get_args(TaskName) or target not in known:
            return tree
        defaults = preset(model, task, target, tree.get("method"))
        optimization = tree.get("optimization")
        if isinstance(optimization, dict) and "steps" in optimization:
            defaults["optimization"]["epochs"] = None  # the length that is given is the one that counts
        return _over(defaults, tree)

    def training(self) -> TrainConfig:
        """The config that is trained with."""
        return TrainConfig.model_validate({name: getattr(self, name) for name in TrainConfig.model_fields})


class Train8BConfig(PresetConfig):
    """jobs/train_8b_explainer.py: explainers of 8 B parameters on two GPUs of 80 GB."""

    model: Literal["llama-3.1-8b", "llama-3-8b", "llama-3.1-8b-instruct", "qwen3-8b"] = "llama-3.1-8b"


class Train70BConfig(PresetConfig):
    """jobs/train_70b_explainer.py: a QLoRA explainer of 70 B parameters, sharded over eight GPUs of 80 GB."""

    model: Literal["llama-3.1-70b"] = "llama-3.1-70b"


def preset(model: KnownModel, task: TaskName, target: KnownModel | None, method: str | None = None) -> dict[str, Any]:
    """The tree of a TrainConfig, as far as it is not the class's defaults; none takes the task's usual method."""
    target = target or _usual_target(model, task)
    is_large = model == "llama-3.1-70b"
    method = method or ("qlora" if is_large else _METHODS[task])
    is_full = method == "full"
    return {
        "datasets": [f"runs/datasets/{target}/{task}"],
        "output": f"runs/explainers/{model}/{target}-{task}",
        "method": method,
        "explainer": {
            # Rates of 1e-5 are lost in the rounding of bfloat16 weights, so full fine-tuning keeps float32 masters.
            "model": {"path": HUB_IDS[model], "dtype": "float32" if is_full else "bfloat16"},
            "max_new_tokens": 20 if task == "feature_description" else 50,
        },
        "lora": {"rank": 128, "alpha": 16, "dropout": 0.1},
        "optimization": {
            "epochs": 10 if task == "feature_description" else 20,
            "batch_size": 32 if is_large else _BATCH_SIZES[task],
            "learning_rate": 1e-5 if task == "input_ablation" and is_full else 5e-5,
            "schedule": "constant",
            "warmup_share": 0.0,
            "weight_decay": 0.01,
        },
        "trainer": {
            "num_workers": 8 if is_large else 2,
            "gpus_per_worker": 1,
            "cpus_per_worker": 4,
            "sharding": "fsdp2" if is_large or is_full else "none",
            "activation_checkpointing": is_large or is_full,
            "micro_batch_tokens": 4096,
            "compute_dtype": "bfloat16",
        },
        "plan": {
            "task": task,
            "target": HUB_IDS[target],
            "num_examples": P1_QWEN_PATCHES if (target, task) == ("qwen3-8b", "activation_patching") else None,
        },
    }


_METHODS: dict[TaskName, str] = {
    "feature_description": "full",
    "activation_patching": "lora",
    "input_ablation": "full",
}
_BATCH_SIZES: dict[TaskName, int] = {"feature_description": 64, "activation_patching": 32, "input_ablation": 8}


def _usual_target(model: KnownModel, task: TaskName) -> KnownModel:
    if model == "qwen3-8b" and task != "feature_description":
        return "qwen3-8b"
    return "llama-3.1-8b-instruct" if task == "input_ablation" else "llama-3.1-8b"


def _over(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with what its sections lack taken from the default, at any depth."""
    merged = default | given
    for name, value in default.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            merged[name] = _over(value, given[name])
    return merged
