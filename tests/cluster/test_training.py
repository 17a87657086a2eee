"""Ray Train end to end on the local CPU: two workers equal one. Kills are in test_training_sharded.py."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import train_config, write_dataset

from introspect_ray.config import TrainConfig
from introspect_ray.data.cluster import connect
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.training.train import train_explainer

JOB = Path(__file__).parents[2] / "jobs" / "train_explainer.py"
START_LIMIT_S = 300
"""A run takes seconds to start on an idle machine, and minutes on one that others use as well."""
# Two workers sum a batch in another order; over the steps of these runs the difference stays at this size.
SAME = {"rtol": 0, "atol": 1e-5}

pytestmark = pytest.mark.timeout(2 * START_LIMIT_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset, a starting model, and the explainer of an undisturbed run of one worker in `one`."""
    made = tmp_path_factory.mktemp("training")
    train_config(made)
    return made


def config_of(folder: Path, output: str, **changes: object) -> TrainConfig:
    settings = {"optimization__steps": 40, "optimization__learning_rate": 1e-3, "trainer__checkpoint_every": 5}
    return train_config(folder, output=str(folder / output), **{**settings, **changes})


@pytest.fixture(scope="module")
def one_worker(folder):
    """Summary and progress calls of the undisturbed run; Ray stays connected for the tests that follow."""
    seen = []
    with connect():
        yield train_explainer(config_of(folder, "one"), lambda *progress: seen.append(progress)), seen


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_one_worker_trains_and_is_not_trained_again(one_worker, folder):
    summary, seen = one_worker
    assert not summary.was_complete
    assert summary.line == f"wrote {folder / 'one'}: explainer after 40 steps on 24 examples, " + (
        f"loss {summary.results['loss']:.4f} nats per token"
    )
    done, steps, note = seen[-1]
    assert (done, steps) == (40, 40)
    assert re.fullmatch(rf"loss {summary.results['loss']:.3f}, [\d,]+ tokens/s", note)
    assert not (folder / "one" / "ray_train").exists()
    assert not (folder / "one" / "checkpoints").exists()
    before = (folder / "one" / "model.safetensors").stat().st_mtime_ns
    again = train_explainer(config_of(folder, "one", trainer__num_workers=2), lambda *_: None)
    assert again.was_complete
    assert again.results == summary.results
    assert (folder / "one" / "model.safetensors").stat().st_mtime_ns == before


def test_two_workers_equal_one(one_worker, folder):
    summary = train_explainer(config_of(folder, "two", trainer__num_workers=2), lambda *_: None)
    assert summary.results["loss"] == pytest.approx(one_worker[0].results["loss"], abs=1e-5)
    one, two = weights(folder / "one"), weights(folder / "two")
    start = load_file(folder / "base" / "model.safetensors")
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-2
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, **SAME)


@pytest.mark.usefixtures("one_worker")
def test_two_workers_share_evaluations_and_stop_alike(folder):
    """Patience runs out on a model that never answers in the right form, so the first evaluation stays the best."""
    write_dataset(folder / "held out", count=36, splits=("train", "train", "validation"))
    summaries = []
    for size in (1, 2):
        settings = {"trainer__num_workers": size, "evaluation__every": 3, "evaluation__patience": 2}
        config = config_of(folder, f"evaluated by {size}", datasets=[str(folder / "held out")], **settings)
        summaries.append(train_explainer(config, lambda *_: None))
    one, two = (summary.results for summary in summaries)
    assert (one["step"], one["exported_step"], one["stopped_early"]) == (9, 3, True)
    assert [two[name] for name in ("step", "exported_step", "best")] == [9, 3, one["best"]]
    assert "stopped early; its weights are of step 3, the best evaluation: exact_match 0.00" in summaries[1].line
    first, second = weights(folder / "evaluated by 1"), weights(folder / "evaluated by 2")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, **SAME)


@pytest.mark.usefixtures("one_worker")
def test_failures_that_repeat_end_the_run_with_their_line(folder):
    with pytest.raises(UserError, match=r"trainer.num_workers 900 x trainer.cpus_per_worker 1 needs 900 CPUs"):
        train_explainer(config_of(folder, "many", trainer__num_workers=900), lambda *_: None)
    with pytest.raises(RunFailed, match=r"step \d+: loss is .* expected finite numbers"):
        train_explainer(config_of(folder, "wild", optimization__learning_rate=1e30), lambda *_: None)
