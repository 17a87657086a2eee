"""An explainer is scored on groups that it was trained on only if somebody says so."""

import json

import pytest
from training_helpers import write_dataset

from introspect_ray.data.dataset import open_dataset
from introspect_ray.training.held_out import seen_in_training
from introspect_ray.training.run import DatasetFacts

SPLIT = {"train": 0.7, "validation": 0.1, "test": 0.2, "salt": "a"}


@pytest.fixture
def dataset(tmp_path):
    """A dataset of another folder than the one that the explainer was trained on."""
    write_dataset(tmp_path / "tested", count=4, splits=("train", "test"))
    found = open_dataset(str(tmp_path / "tested"))
    found.manifest.config["split"] = dict(SPLIT)
    return found


def explainer(folder, dataset, **changes):
    facts = DatasetFacts.of(dataset)
    assert facts.split == SPLIT
    content = {"datasets": [{**vars(facts), "url": "the trained", "split": {**SPLIT, **changes}}]}
    (folder / "training.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("changes", [{}, {"train": 0.5, "test": 0.4}, {"train": 0.6, "validation": 0.2}])
def test_ranges_that_do_not_touch_are_apart(tmp_path, dataset, changes):
    assert seen_in_training(explainer(tmp_path, dataset, **changes), dataset) is None


@pytest.mark.parametrize("changes", [{"salt": "b"}, {"train": 0.8, "test": 0.1}, {"validation": 0.3, "test": 0.0}])
def test_others_are_named(tmp_path, dataset, changes):
    line = seen_in_training(explainer(tmp_path, dataset, **changes), dataset)
    assert line is not None and "was trained on the trained" in line and "salt 'a', test 0.2" in line


def test_nothing_is_said_where_nothing_is_known(tmp_path, dataset):
    assert seen_in_training(str(tmp_path), dataset) is None
    folder = explainer(tmp_path, dataset, salt="b")
    dataset.manifest.config.pop("split")
    assert seen_in_training(folder, dataset) is None
    (tmp_path / "training.json").write_text("[")
    assert seen_in_training(folder, dataset) is None
