"""The tasks by name. Adding one is adding a file and a line here."""

from __future__ import annotations

from introspect_ray.errors import UserError
from introspect_ray.tasks.activation_patching import ActivationPatching
from introspect_ray.tasks.base import Task
from introspect_ray.tasks.feature_description import FeatureDescription
from introspect_ray.tasks.input_ablation import InputAblation

TASKS: dict[str, Task] = {task.name: task for task in (FeatureDescription(), ActivationPatching(), InputAblation())}


def get_task(name: str) -> Task:
    """The task called `name`; a UserError lists the known ones."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]
