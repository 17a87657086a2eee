"""One model explains another, from chance and from fitted maps; scores and report show both beside self-explanation."""

import json

import pytest
from chat_server import chat_server, said

from introspect_ray.config import (
    EvaluateConfig,
    FitProjectionConfig,
    GenerateConfig,
    SourceConfig,
    TrainConfig,
)
from introspect_ray.data.cluster import connect
from introspect_ray.data.generate import generate_dataset
from introspect_ray.explainer.card import read_card
from introspect_ray.training.evaluate import evaluate_explainer
from introspect_ray.training.loop import fit
from introspect_ray.training.projection import fit_projection
from introspect_ray.training.run import prepare
from introspect_ray.training.workers import Workers

pytestmark = pytest.mark.timeout(900)


def test_scores_and_report_show_self_random_and_fitted(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    dataset, fitted = str(tmp_path / "features"), str(tmp_path / "maps")
    starts = {
        "self": {"model": {"path": "pocket:target_a"}},
        "B random": {"model": {"path": "pocket:target_b"}},
        "B fitted": {"model": {"path": "pocket:target_b"}, "fitted_projection": fitted},
    }
    maps = FitProjectionConfig(output=fitted, explainer={"path": "pocket:target_b"}, source=SourceConfig(limit=40))
    fit_projection(maps, lambda *_: None)
    with connect(), chat_server(lambda *_: said("4")) as (url, asked):
        generate_dataset(GenerateConfig(task="feature_description", output=dataset), lambda _: None)
        for name, start in starts.items():
            tree = {
                "datasets": [dataset],
                "output": str(tmp_path / name),
                "explainer": {**start, "max_new_tokens": 8},
                "optimization": {"steps": 3, "batch_size": 8},
            }
            training = prepare(TrainConfig.model_validate(tree))
            training.record({})
            fit(training, Workers(0, 1))  # what one worker of Ray Train does, whose processes other tests start
        judge = {"kind": "endpoint", "endpoint": {"url": url}}
        evaluation = EvaluateConfig.model_validate(
            {
                "judge": {"chat": judge},
                "runs": [{"dataset": dataset, "explainer": str(tmp_path / name), "name": name} for name in starts],
                "output": str(tmp_path / "scores"),
                "methods": ["explainer", "majority"],
                "max_examples": 10,
                "bootstrap_samples": 100,
            }
        )
        calls = []
        summary = evaluate_explainer(evaluation, lambda *progress: calls.append(progress))
    # Every answer comes and is judged.
    assert calls[-1] == (80, 80, "feature_description")
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert list(scores) == ["feature_description"]
    assert list(scores["feature_description"]) == [*starts, "majority"]
    assert {method["exact_match"]["n"] for method in scores["feature_description"].values()} == {10}
    judged = scores["feature_description"]["majority"]
    assert judged["judge"]["value"] == 0.75 and judged["judge_failure_rate"]["value"] == 0
    assert len(asked) >= 10
    page = (tmp_path / "scores" / "report.html").read_text()
    assert "Judge failures" in page
    assert all(f'<th scope="row">{name}</th>' in page for name in starts)
    assert all(f"\n  {name} " in summary.table for name in starts)
    assert [read_card(str(tmp_path / name)).projection for name in starts] == ["none", "linear", "linear"]
    assert (tmp_path / "scores" / "answers" / "feature_description" / "B fitted.json").is_file()
