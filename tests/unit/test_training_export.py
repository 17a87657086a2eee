"""Exported explainers answer as before, with account and scores beside them; the model card says what they are."""

import json

import pytest
from explainer_helpers import queries, vector
from test_explainer_published import add_keys, base_folder, random_maps
from training_helpers import train_config, write_dataset

from introspect_ray.config import ExportConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.model import Explainer
from introspect_ray.training.export import export_explainer
from introspect_ray.training.loop import fit
from introspect_ray.training.run import prepare
from introspect_ray.training.workers import Workers

SCORES = {
    "activation_patching": {
        "self": {"exact_match": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 9}},
        "B|random": {"exact_match": {"value": None, "low": None, "high": None, "n": 0}},
    },
    "input_ablation": {"explainer": {"exact_match": {"value": 0.125, "low": 0, "high": 1, "n": 9}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`out` is a trained adapter, `evaluation` its scores."""
    made = tmp_path_factory.mktemp("export")
    write_dataset(made / "dataset", count=36, splits=("train", "train", "validation"))
    config = train_config(made, method="lora", lora__rank=2, evaluation__every=4)
    run = prepare(config)
    run.record({})
    fit(run, Workers(0, 1))
    (made / "evaluation").mkdir()
    (made / "evaluation" / "scores.json").write_text(json.dumps(SCORES))
    runs = [{"explainer": str(made / "out"), "name": "self"}, {"explainer": "elsewhere", "name": None}]
    about = {"config": {"runs": runs}, "tasks": ["activation_patching", "input_ablation"]}
    (made / "evaluation" / "config.json").write_text(json.dumps(about))
    return made


def answers(folder):
    return Explainer.load(str(folder), "cpu", "float32").explain(queries(6), 4)


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_answers_as_before(folder, tmp_path, merge):
    source, output = folder / "out", tmp_path / "exported"
    line = export_explainer(
        ExportConfig(explainer=str(source), output=str(output), merge=merge, evaluation=str(folder / "evaluation"))
    )
    assert line == f"wrote {output}: {'full weights' if merge else 'an adapter'}, explains target"
    assert answers(output) == answers(source)
    assert (output / "adapter_config.json").exists() != merge and (output / "model.safetensors").exists() == merge
    for name in ("training.json", "metrics.jsonl"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((output / "scores.json").read_text()) == {"activation_patching": SCORES["activation_patching"]}
    card = (output / "README.md").read_text()
    assert "| self | 0.50 [0.25, 0.75] |" in card and "| B\\|random | n/a [n/a, n/a] |" in card
    assert "This explainer is `self`" in card
    assert "0.13" not in card, "that is another explainer's"
    assert f"library_name: {'transformers' if merge else 'peft'}" in card


def test_a_trained_explainer_has_a_card(folder):
    card = (folder / "out" / "README.md").read_text()
    account = json.loads((folder / "out" / "training.json").read_text())
    head, body = card.split("---\n", 2)[1:]
    assert "base_model" not in head, "a folder is no model of the hub"
    dataset = account["datasets"][0]
    assert f"| {folder / 'dataset'} | activation_patching | 24 | 12 | `{dataset['run_key']}` |" in body
    assert f"step {account['results']['exported_step']}, the best by exact_match" in body
    assert "## Scores on the validation split" in body and "| parse_rate | 0.00 |" in body
    assert f"Run | `{account['run_key']}`" in body and 'Explainer.load("FOLDER"' in body


def test_published_checkpoints_become_explainers(tmp_path):
    source = base_folder(tmp_path / "published")
    add_keys(source, {f"embed_projs.{layer}.weight": weight for layer, weight in enumerate(random_maps(5))})
    target = tmp_path / "target"
    target.mkdir()
    shape = {"model_type": "llama", "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    (target / "config.json").write_text(json.dumps(shape))
    export_explainer(ExportConfig(explainer=str(source), output=str(tmp_path / "out"), target=str(target)))
    explainer = Explainer.load(str(tmp_path / "out"), "cpu", "float32")
    assert (explainer.card.target.path, explainer.card.target.num_layers) == (str(target), 3)
    asked = [query.map_vectors(lambda _: vector(20, 1)) for query in queries(4)]
    assert explainer.explain(asked, 2) == Explainer.load(str(source), "cpu", "float32").explain(asked, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "{}/dataset"}, r"output folder .*/dataset is not empty \(dataset.json, ...\)"),
        ({"explainer": "{}/dataset"}, "is not a finished explainer: it has no explainer.json"),
        ({"evaluation": "{}/dataset"}, "is not finished: it has no scores.json"),
        ({"evaluation": "{}/evaluation", "explainer": "{}/base"}, "is of .*/out, elsewhere, not of .*/base"),
        ({"target": "pocket:target_a"}, "target is 'pocket:target_a', but .* is no published checkpoint"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, changes, message):
    tree = {"explainer": "{}/out", "output": str(tmp_path / "new"), **changes}
    with pytest.raises(UserError, match=message) as error:
        export_explainer(ExportConfig(**{name: value.format(folder) for name, value in tree.items()}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
