"""Folders of descriptions in every layout: converted, counted, and converted back exactly."""

import json
from pathlib import Path

import pytest

from introspect_ray.config import ConvertDescriptionsConfig, SourceConfig
from introspect_ray.data.convert_descriptions import best, convert_descriptions
from introspect_ray.data.description_files import lexicon_descriptions, read_descriptions
from introspect_ray.data.identity import folder_digest
from introspect_ray.data.sources import load_source
from introspect_ray.errors import UserError
from introspect_ray.features.delphi import explanation_file, read_simulation
from introspect_ray.features.descriptions import Description, description_lines
from introspect_ray.models.paths import POCKET_ARTIFACTS

DETECTION = [
    {"str_tokens": ["a"], "activations": [2.5], "distance": 1, "activating": True, "prediction": True,
     "probability": 0.75, "correct": True},
    {"str_tokens": ["b"], "activations": [0.0], "distance": -1, "activating": False, "prediction": None,
     "probability": None, "correct": None},
]  # fmt: skip


def convert(source, output, source_format, output_format, **settings):
    config = ConvertDescriptionsConfig(
        source=str(source), output=str(output), source_format=source_format, output_format=output_format, **settings
    )
    line = convert_descriptions(config)
    return line, json.loads((Path(output) / "summary.json").read_text())


def tree(folder, kept=("explanations", "scores", "v1")):
    """Path -> content of what the foreign layout consists of."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    relative = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: content for name, content in relative.items() if name.split("/")[0] in kept}


def write_delphi(folder):
    files = {
        "explanations/layers.1_latent3.txt": explanation_file("cats"),
        "explanations/layers.1_latent12.txt": explanation_file("dogs"),
        "explanations/layers.1_latent13.txt": b'""',
        "scores/detection/layers.1_latent3.txt": json.dumps(DETECTION, separators=(",", ":")).encode(),
        "scores/simulation/layers.1_latent3.txt": b'[{"distance": 0, "ev_correlation_score": 0.5}]',
        "scores/fuzz/layers.1_latent99.txt": json.dumps(DETECTION).encode(),
        "scores/embedding/layers.1_latent3.txt": b"[]",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def test_delphi_to_ours_and_back_is_exact_and_everything_else_is_counted(tmp_path):
    files = write_delphi(tmp_path / "delphi")
    line, summary = convert(tmp_path / "delphi", tmp_path / "ours", "delphi", "descriptions")
    assert summary["not_used"] == {"no_description": 1, "score_without_explanation": 1, "scorer_not_known": 1}
    assert (summary["descriptions_read"], summary["descriptions_written"], summary["latents"]) == (2, 2, 2)
    assert "2 descriptions of 2 latents" in line and "1 not used: scorer_not_known" in line
    cats, dogs = read_descriptions(str(tmp_path / "ours"))
    assert (cats.text, cats.source, dogs.scores) == ("cats", "delphi", {})
    assert cats.scores["simulation/correlation"] == 0.5 and cats.scores["detection/recall"] == 1
    assert cats.scores["detection/balanced_accuracy"] is None and cats.scores["detection/failure_rate"] == 0.5
    convert(tmp_path / "ours", tmp_path / "back", "descriptions", "delphi")
    kept = [name for name in files if "latent13" not in name and name.split("/")[1] not in ("fuzz", "embedding")]
    back = tree(tmp_path / "back")
    simulated = "scores/simulation/layers.1_latent3.txt"  # only its result is kept
    kept.remove(simulated)
    assert read_simulation("layers.1_latent3.txt", back.pop(simulated)) == ((1, 3), 0.5)
    assert back == {name: files[name] for name in kept}


def test_scores_go_to_delphi_where_its_layout_has_a_place_and_are_counted_where_not(tmp_path):
    scores = {"correlation": 0.25, "f1": 0.5, "detection/auc": 0.75}
    ours = [Description(1, 4, "cats", "a", scores), Description(1, 5, "dogs", "a", {"correlation": None})]
    (tmp_path / "descriptions.jsonl").write_text(description_lines(ours))
    line, summary = convert(tmp_path, tmp_path / "d", "descriptions", "delphi", delphi_simulation="correlation")
    assert summary["not_used"] == {"delphi_holds_no_such_score": 1, "score_without_judgements": 1}
    assert "1 not used: delphi_holds_no_such_score" in line
    convert(tmp_path / "d", tmp_path / "back", "delphi", "descriptions")
    values = [one.scores["simulation/correlation"] for one in read_descriptions(str(tmp_path / "back"))]
    assert values == [0.25, None]


def test_ours_to_neuronpedia_and_back_is_exact(tmp_path):
    ours = [Description(1, n % 700, f"text {n}", "llm:m", {"f1": n / 1000}) for n in range(1400)]
    (tmp_path / "descriptions.jsonl").write_text(description_lines(ours))
    _, summary = convert(tmp_path / "descriptions.jsonl", tmp_path / "np", "descriptions", "neuronpedia")
    assert summary["descriptions_written"] == 1400 and not summary["not_used"]
    convert(tmp_path / "np", tmp_path / "back", "neuronpedia", "descriptions")
    assert (tmp_path / "back/descriptions.jsonl").read_bytes() == (tmp_path / "descriptions.jsonl").read_bytes()
    # The folder of batches itself is a source too, and one of a source.
    source = tmp_path / "np/v1/pocket/1-introspect-ray"
    for number, folder in enumerate((source, source / "explanations")):
        convert(folder, tmp_path / f"again{number}", "neuronpedia", "descriptions")
        again = (tmp_path / f"again{number}/descriptions.jsonl").read_bytes()
        assert again == (tmp_path / "descriptions.jsonl").read_bytes()
    convert(tmp_path / "back", tmp_path / "np2", "descriptions", "neuronpedia")
    assert tree(tmp_path / "np2") == tree(tmp_path / "np")


def test_whose_latents_are_described_is_kept_where_it_is_known(tmp_path):
    _, summary = convert("pocket:sae", tmp_path / "a", "lexicon", "descriptions")
    assert summary["coder_digest"] == folder_digest(POCKET_ARTIFACTS / "sae")
    assert (
        convert(tmp_path / "a", tmp_path / "b", "descriptions", "delphi")[1]["coder_digest"] == summary["coder_digest"]
    )
    (tmp_path / "a/summary.json").unlink()
    assert "coder_digest" not in convert(tmp_path / "a", tmp_path / "c", "descriptions", "descriptions")[1]


def test_folders_may_be_any_url(tmp_path):
    ours = [Description(1, 4, "cats", "a")]
    (tmp_path / "descriptions.jsonl").write_text(description_lines(ours))
    store = f"memory://{tmp_path.name}"
    for source, output, source_format, output_format in (
        (tmp_path, f"{store}/np", "descriptions", "neuronpedia"),
        (f"{store}/np", f"{store}/ours", "neuronpedia", "descriptions"),
        (f"{store}/ours", f"{store}/delphi", "descriptions", "delphi"),
        (f"{store}/delphi", f"{store}/back", "delphi", "descriptions"),
    ):
        settings = {"source_format": source_format, "output_format": output_format}
        convert_descriptions(ConvertDescriptionsConfig(source=str(source), output=output, **settings))
    assert read_descriptions(f"{store}/ours") == ours
    assert read_descriptions(f"{store}/back/descriptions.jsonl") == [Description(1, 4, "cats", "delphi")]


def test_of_several_candidates_delphi_gets_the_best_by_the_score_and_the_others_are_counted(tmp_path):
    ours = [
        Description(1, 4, "cats", "a", {"sim": None}),
        Description(1, 4, "felines", "b", {"sim": -0.2}),
        Description(1, 4, "pets", "c", {"sim": 0.1}),
        Description(1, 4, "tigers", "d", {"sim": 0.1}),
    ]
    assert [best(ours, "sim").text, best(ours, None).text, best(ours, "other").text] == ["pets", "cats", "cats"]
    assert best(ours[:2], "sim").text == "felines"
    (tmp_path / "descriptions.jsonl").write_text(description_lines(ours))
    _, summary = convert(tmp_path, tmp_path / "d", "descriptions", "delphi", delphi_best_by="sim")
    assert summary["not_used"] == {"delphi_holds_no_such_score": 1, "delphi_holds_one_per_latent": 3}
    assert tree(tmp_path / "d") == {"explanations/layers.1_latent4.txt": b'"pets"'}
    reasons = [json.loads(line) for line in (tmp_path / "d/unused.jsonl").read_text().splitlines()]
    assert len(reasons) == 4 and reasons[0]["where"] == "layer 1 latent 4: cats"


def test_the_lexicon_becomes_labels_of_task_1(tmp_path):
    _, summary = convert("pocket:sae", tmp_path / "lexicon", "lexicon", "descriptions")
    found = read_descriptions(str(tmp_path / "lexicon"))
    assert found == lexicon_descriptions("pocket:sae") and len(found) == summary["descriptions_written"]
    path = str(tmp_path / "lexicon/descriptions.jsonl")
    source = load_source(SourceConfig(path=path, label_score="label_f1"), "task 1", ["latent_labels"])
    labels = [json.loads(line) for line in (POCKET_ARTIFACTS / "sae/labels.jsonl").read_text().splitlines()]
    assert len(source.rows) == summary["latents"] == len(labels)
    for ours, label in zip(source.rows, labels, strict=True):
        assert ours["description"] == label["description"] and ours["score"] == label["score"]
        assert set(ours["accepted"]) == set(label["accepted"]) - {label["description"]}


def test_sources_without_descriptions_and_full_outputs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    for source_format, says in (
        ("neuronpedia", "holds no explanations/batch-N"),
        ("delphi", "holds no explanations/LATENT.txt"),
        ("descriptions", r"descriptions\.jsonl does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            convert(tmp_path / "empty", tmp_path / "out", source_format, "descriptions")
    with pytest.raises(UserError, match="is not empty"):
        convert("pocket:sae", tmp_path / "full", "lexicon", "descriptions")
    with pytest.raises(UserError, match=r"labels\.jsonl does not exist"):
        for name in ("cfg.json", "sae_weights.safetensors"):
            (tmp_path / "empty" / name).write_text("{}")
        convert(tmp_path / "empty", tmp_path / "out", "lexicon", "descriptions")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
