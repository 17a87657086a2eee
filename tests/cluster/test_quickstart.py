"""The whole chain on a small part of the pocket world: what it leaves, that it repeats, and that it survives kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from introspect_ray.data.dataset import canonical_dump, open_dataset

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.py"
TASKS = ("feature_description", "activation_patching", "input_ablation")
METHODS = {"explainer", "majority", "nearest_neighbor", "zero_shot"}
CONTROLS = {"no_vector", "zero_vector", "swapped_vector"}
KILLED_TASKS = ("activation_patching",)
"""Of the killed run: one with a fitted projection, so that every stage may be hit."""
KILLS = 2
LIMIT_S = 500
"""Of one run; about a minute on an idle machine, many more on one that others use as well."""

pytestmark = pytest.mark.timeout(1100)
SMALL = [
    "--texts.limit=200",
    "--max_examples=24",
    *(f"--{task}.source.limit={limit}" for task, limit in zip(TASKS, (300, 120, 80), strict=True)),
    *(f"--{task}.optimization.steps=6" for task in TASKS),
    *(f"--{task}.optimization.batch_size=8" for task in TASKS),
    "--trainer.checkpoint_every=2",
    "--trainer.cpus_per_worker=1",
    "--actors.initial_size=1",
    "--actors.max_size=1",
]


def start(output: Path, *more: str) -> subprocess.Popen:
    arguments = [sys.executable, str(JOB), f"--output={output}", *SMALL, *more]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err[-2000:]
    return out


def canonical_dumps(output: Path, tasks: tuple[str, ...]) -> dict[str, str]:
    return {task: canonical_dump(open_dataset(str(output / "datasets" / task))) for task in tasks}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, finish(start(output))


def test_scores_and_report_are_whole(undisturbed):
    output, said = undisturbed
    scores = json.loads((output / "evaluation" / "scores.json").read_text())
    assert set(scores) == set(TASKS)
    for task, methods in scores.items():
        controls = set() if task == "input_ablation" else CONTROLS
        scales = {"self_scales"} if task == "feature_description" else set()
        assert set(methods) == METHODS | controls | scales
        for metrics in methods.values():
            for numbers in metrics.values():
                assert set(numbers) == {"value", "low", "high", "n"}
                assert 0 <= numbers["low"] <= numbers["value"] <= numbers["high"] <= 1 and 0 < numbers["n"] <= 24
    report = (output / "evaluation" / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "") and "https://" not in report
    assert str(output / "evaluation" / "report.html") in said and "exact_match" in said
    assert (output / "projections" / "feature_description" / "alignment.json").exists()


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_records_and_scores(undisturbed, tmp_path):
    expected, _ = undisturbed
    output, draw, some = tmp_path / "run", random.Random(0), f"--tasks={json.dumps(KILLED_TASKS)}"
    for _ in range(KILLS):
        process = start(output, some)
        try:
            process.wait(timeout=draw.uniform(8, 24))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the driver alone: Ray ends its other processes by itself
            time.sleep(2)
        process.communicate()
    finish(start(output, some))
    assert canonical_dumps(output, KILLED_TASKS) == canonical_dumps(expected, KILLED_TASKS)
    found, wanted = (json.loads((run / "evaluation" / "scores.json").read_text()) for run in (output, expected))
    assert found == {task: wanted[task] for task in KILLED_TASKS}
