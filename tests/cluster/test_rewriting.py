"""Rewriting on Ray: shuffled descriptions are worse than matched ones, a killed run goes on, failures are counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from broken_simulator import broken_opener
from job_driver import JOBS, check_line, environment, run_jobs

from introspect_ray.cli import as_yaml
from introspect_ray.config import ActorConfig, RewriteConfig, RewriteLineConfig, RewriteSimulatorConfig
from introspect_ray.data.cluster import connect
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.training.rewriting import rewrite_transformer

pytestmark = pytest.mark.timeout(900)

TESTS = Path(__file__).parents[1]
START_LIMIT_S = 200
EXACT = RewriteSimulatorConfig(name="exact", kind="exact")


def line(name: str, **changes) -> RewriteLineConfig:
    return RewriteLineConfig(name=name, simulator="exact", selection="contribution", **changes)


def config(output: Path, **changes) -> RewriteConfig:
    values = {
        "output": str(output),
        "evaluation_texts": 40,
        "fit_texts": 60,
        "statistics_texts": 500,
        "texts_per_shard": 30,
        "fractions": (0.05, 0.2),
        "simulators": (EXACT,),
        "lines": (
            line("deleted", kind="deleted"),
            line("oracle", kind="oracle"),
            line("matched"),
            line("shuffled", descriptions="shuffled"),
            line("none", source="none", max_fraction=0.05),
        ),
        "headline": "matched",
        "bootstrap_samples": 200,
        "target_actors": ActorConfig(),
    }
    return RewriteConfig(**(values | changes))


def kill_in_the_middle(settings: RewriteConfig, folder: Path) -> None:
    """Start the job on a cluster of its own, and kill it once it has simulated something."""
    (folder / "config.yaml").write_text(as_yaml(settings))
    driver = subprocess.Popen(
        [sys.executable, str(JOBS / "rewrite_transformer.py"), "--config", str(folder / "config.yaml")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + START_LIMIT_S
    while not list(Path(settings.output, "levels").rglob("*.parquet")):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "nothing was simulated"
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not Path(settings.output, "scores.json").exists()


def test_a_killed_run_goes_on_a_whole_run_and_a_run_with_failures(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)  # of the actors, for the simulator that breaks
    killed = config(tmp_path / "killed")
    kill_in_the_middle(killed, tmp_path)
    (tmp_path / "killed" / "truth" / "statistics-00001.parquet").write_bytes(b"torn")
    steps: list[tuple[str, int, int, str]] = []
    with connect():
        first = rewrite_transformer(killed, lambda *step: steps.append(step))
        told = [what for what, done, total, _ in steps if done == total]
        assert list(dict.fromkeys(told)) == ["shards of true latents", "blocks by simulator exact", "shards of losses"]
        begun = {what: (done, total) for what, done, total, _ in reversed(steps)}
        assert begun["shards of true latents"] == (6, 7), "only the torn one is made anew"
        assert begun["blocks by simulator exact"][0] > 0
        scores = json.loads((tmp_path / "killed" / "scores.json").read_text())
        _check_scores(scores)
        assert "Latents that hurt most" in (tmp_path / "killed" / "report.html").read_text()
        assert "matched @ 0.2" in first.text

        whole = rewrite_transformer(config(tmp_path / "whole"), lambda *_: None)
        assert whole.tables == first.tables
        assert json.loads((tmp_path / "whole" / "scores.json").read_text()) == scores

        with pytest.raises(UserError, match="other texts"):
            rewrite_transformer(config(tmp_path / "whole", evaluation_texts=41), lambda *_: None)
        _check_failures(tmp_path, first.results.harms[0].texts[0])


def _check_scores(scores) -> None:
    conditions = scores["conditions"]
    oracle, true = conditions["oracle @ 0.2"], conditions["true latents"]
    assert oracle["increase"] == true["increase"] and oracle["recovered"]["value"] == 1.0
    assert conditions["original"]["increase"]["value"] == 0
    matched, shuffled = conditions["matched @ 0.2"], conditions["shuffled @ 0.2"]
    assert matched["divergence"]["value"] < 0.8 * shuffled["divergence"]["value"]
    assert matched["divergence_below_deleted"]["low"] > 0 > shuffled["divergence_below_deleted"]["high"] - 1e-3
    assert scores["agreement"]["matched"]["precision"] > 10 * scores["agreement"]["shuffled"]["precision"]
    assert scores["agreement"]["matched"]["specificity"] > 0.995
    assert "none @ 0.05" in conditions and "none @ 0.2" not in conditions, "max_fraction ends a line"
    assert all(0 <= row["coverage"] <= 1 for row in conditions.values())
    assert np.isfinite(conditions["zero latents"]["increase"]["low"])


def _check_failures(tmp_path: Path, broken: str) -> None:
    """One description fails: its (description, text) pairs are counted, and no text counts as fully simulated."""
    opener = broken_opener(broken)
    few = config(
        tmp_path / "broken",
        lines=(line("matched", max_fraction=0.2),),
        fractions=(0.2,),
        max_failed_share=0.5,
        statistics_texts=200,
        minimum_firings=5,
    )
    summary = rewrite_transformer(few, lambda *_: None, open_one=opener)
    (condition,) = summary.results.of_line("matched")
    assert condition.scores.coverage == 0 and np.isnan(condition.scores.increase.value)
    assert summary.results.conditions[2].scores.coverage == 1, "zero latents need no simulator"
    with pytest.raises(RunFailed, match=r"max_failed_share 0; first .*cannot read this"):
        rewrite_transformer(few.model_copy(update={"max_failed_share": 0.0}), lambda *_: None, open_one=opener)


def test_bad_input_ends_in_one_line_before_anything_starts(tmp_path):
    text = tmp_path / "few.txt"
    text.write_text("One two three four.\n\nFive six seven eight.\n")
    missing = "[{name: mine, kind: file, path: /no/such/file}]"
    given = "[{name: finetuned, kind: given, given: {kind: prompted, model: {path: 'pocket:target_a'}}}]"
    lines, own = "[{name: 'needed: quantile'}]", "[{name: 'needed: quantile', source: mine}]"
    orders = {
        "few texts": ("rewrite_transformer", ["--source.path", str(text), "--simulators", given, "--lines", lines], {}),
        "no file": ("rewrite_transformer", ["--sources", missing, "--lines", own], {}),
        "no simulator": ("rewrite_transformer", ["--simulator", "/no/such/simulator"], {}),
        "no explainer": ("rewrite_transformer", ["--explainer", "/no/such/explainer"], {}),
        "other coder": ("rewrite_transformer", ["--coder", "/no/such/coder"], {}),
        "own texts": ("rewrite_transformer", ["--source.path", str(text)], {}),
        "cut texts": ("rewrite_transformer", ["--where", "last"], {}),
        "unknown line": ("rewrite_transformer", ["--headline", "nothing"], {}),
    }
    expected = {
        "few texts": ["few.txt", "expected 2000 (statistics_texts)"],
        "no file": ["/no/such/file"],
        "no simulator": ["/no/such/simulator"],
        "no explainer": ["/no/such/explainer"],
        "other coder": ["/no/such/coder"],
        "own texts": ["pocket world only", "set simulators"],
        "cut texts": ["whole texts", "expected where: all"],
        "unknown line": ["headline is 'nothing'"],
    }
    output = ["--output", str(tmp_path / "out")]
    arguments = {name: (job, [*words, *output], variables) for name, (job, words, variables) in orders.items()}
    for name, outcome in run_jobs(arguments).items():
        assert outcome["status"] == 2 and not outcome["started"], (name, outcome)
        check_line(outcome["stderr"], expected[name])
