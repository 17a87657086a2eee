"""Whether an explainer can have been trained on what it is scored on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from introspect_ray.data.dataset import Dataset
from introspect_ray.data.storage import Folder
from introspect_ray.training.run import TRAINING_FILE


def seen_in_training(explainer: str, dataset: Dataset) -> str | None:
    """Why an explainer may know groups of a dataset's test split; None if it cannot, or if nobody knows its training.

    Splits are ranges of a hash of the group's key, so only equal salts and ranges that do not touch keep them apart.
    """
    mine = dataset.manifest.config.get("split")
    try:
        account = json.loads(Folder(explainer).read(TRAINING_FILE))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # it was trained elsewhere
    trained_on = account.get("datasets", []) if isinstance(account, dict) else []
    for facts in trained_on:
        theirs = facts.get("split")
        if facts.get("task") == dataset.manifest.task and theirs and mine and not _are_apart(theirs, mine):
            return (
                f"explainer {explainer} was trained on {facts['url']} ({_said(theirs)}), which may hold groups of the"
                f" test split of {dataset.folder.url} ({_said(mine)})"
            )
    return None


def _are_apart(trained: Mapping[str, Any], tested: Mapping[str, Any]) -> bool:
    """Whether no group of the training and validation splits of one is in the test split of the other."""
    return trained["salt"] == tested["salt"] and trained["test"] >= tested["test"] - 1e-9


def _said(split: Mapping[str, Any]) -> str:
    return f"salt {split['salt']!r}, test {split['test']:g}"
