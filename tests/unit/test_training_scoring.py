"""The scoring job in this process: vectors in the place of latents, failures, the simulator's own split. No Ray."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from explainer_helpers import model_folder

import introspect_ray.training.score_descriptions as job
from introspect_ray.config import DescribeConfig, ScoreDescriptionsConfig
from introspect_ray.data.scored_exemplars import VectorStore, open_scored
from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_files import SCHEMA_VERSION, write_vectors
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.descriptions import Description, description_lines
from introspect_ray.simulator.scores import weighted_pearson
from introspect_ray.training.score_descriptions import score_descriptions
from introspect_ray.training.score_shards import write_shard

WORDS = ("cat", "dog", "town", "rain")
NUM_WINDOWS = 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four vectors, each of which lies in the direction of one word, two of them of one text; shards are done here."""
    rng = np.random.default_rng(0)

    def exemplar(kind, split, word, number):
        pieces = [WORDS[index] for index in rng.integers(0, len(WORDS), 6)]
        active = [float(piece == word) + 0.1 * float(rng.random()) for piece in pieces]
        quantile = number % 2 if kind == "quantile" else None
        ids = [number, *range(5)]
        return {"kind": kind, "quantile": quantile, "split": split, "text": number, "start": 1, "ids": ids} | {
            "pieces": pieces,
            "activations": active,
        }

    rows = []
    for number, word in enumerate(WORDS):
        made = [
            exemplar(kind, split, word, index)
            for split in ("train", "validation")
            for kind in ("top", "quantile", "random")
            for index in range(NUM_WINDOWS)
        ]
        rows.append(
            {"vector_id": f"v{number}", "kind": "activation", "layer": number // 2, "group": f"text {max(1, number)}"}
            | {"origin": "x", "token": word, "vector": [1.0] * 4, "density": 0.9, "maximum": 1.1, "exemplars": made}
        )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "run_key": "key",
        "config": {"target": {"path": "m"}, "layers": [0, 1]},
    }
    manifest["digest"] = write_vectors(Folder(str(tmp_path / "vectors")), rows, 4)
    (tmp_path / "vectors" / "vectors.json").write_text(json.dumps(manifest))
    model_folder(tmp_path / "model", "llama")
    lines = [Description(number // 2, number, word, "explainer:x") for number, word in enumerate(WORDS)]
    (tmp_path / "descriptions.jsonl").write_text(description_lines(lines))

    def here(config, shards, load):
        for shard in shards:
            write_shard(config, open_scored(config.exemplars), load(config.simulator), shard)
            yield shard

    monkeypatch.setattr(job, "_on_actors", here)
    monkeypatch.setattr(job, "connect", nullcontext)
    monkeypatch.setattr(job, "check_resources", lambda _: None)
    return tmp_path


class Reader:
    """Fires on the tokens that a description names; breaks on some descriptions."""

    def __init__(self, breaks=()):
        self.breaks = breaks

    def simulate(self, descriptions, windows):
        if set(self.breaks) & set(descriptions):
            raise ValueError("too long")
        return [
            np.array([10.0 * (piece == text) for piece in one.pieces])
            for text, one in zip(descriptions, windows, strict=True)
        ]


def config(folder, **changes):
    tree = {"exemplars": str(folder / "vectors"), "descriptions": [str(folder / "descriptions.jsonl")]}
    tree |= {"output": str(folder / "scores"), "held_out": "validation", "bootstrap_samples": 200}
    tree |= {"simulator": {"model": {"path": str(folder / "model"), "device": "cpu"}}}
    return ScoreDescriptionsConfig.model_validate(tree | changes)


def run(folder, simulator=None, **changes):
    simulator = simulator or Reader()
    return score_descriptions(config(folder, **changes), lambda *_: None, load=lambda _: simulator)


def test_descriptions_of_vectors_are_scored_by_their_projections(folder):
    run(folder)
    scores = json.loads((folder / "scores" / "scores.json").read_text())
    own, shuffled = (scores[source]["correlation"] for source in ("explainer:x", "shuffled"))
    assert own["low"] > 0.9 > 0.5 > shuffled["high"]
    assert (own["n"], own["groups"]) == (4, 3), "two vectors are of one text"
    # Against the definition: fair validation windows, all of which fire, token by token.
    store = open_scored(str(folder / "vectors"))
    assert isinstance(store, VectorStore)
    fair = [one for one in store.read(2, "validation").exemplars if one.kind != "top"]
    assert len(fair) == 2 * NUM_WINDOWS
    true = np.concatenate([one.activations for one in fair])
    predicted = np.concatenate(Reader().simulate(["town"] * len(fair), [one.window for one in fair]))
    rows = [json.loads(line) for line in (folder / "scores" / "descriptions.jsonl").read_text().splitlines()]
    assert rows[2]["scores"]["correlation"] == pytest.approx(weighted_pearson(predicted, true, np.ones(len(true))))
    assert "vectors of m, layer 0, 1" in (folder / "scores" / "report.html").read_text()


def test_texts_that_vectors_are_of_are_refused_and_so_are_splits_without_random_windows(folder, monkeypatch):
    with pytest.raises(UserError, match=r"are of test texts and have no exemplars of them: expected validation$"):
        run(folder, held_out="test")
    monkeypatch.setattr(VectorStore, "read", lambda self, number, _split: self.vectors[number].of_split("test"))
    with pytest.raises(UserError, match=r"have no random windows of train texts"):
        run(folder)
    assert not (folder / "scores").exists()
    with pytest.raises(ValueError, match="vectors are for method explainer, found lexicon"):
        DescribeConfig(vectors="runs/vectors")


def test_a_simulator_that_fails_on_too_many_descriptions_fails_the_run(folder):
    changes = {"controls": ["empty"], "max_failed_share": 0.1}
    with pytest.raises(RunFailed, match=r"failed on 1 of 8 descriptions, more than the share of 0.1"):
        run(folder, Reader(breaks=["dog"]), **changes)
    scores = json.loads((folder / "scores" / "scores.json").read_text())
    assert scores["explainer:x"]["correlation"]["undefined"] == {"failed": 1}
    run(folder, Reader(breaks=["dog"]), **changes | {"max_failed_share": 0.2})


def test_only_needs_a_simulator_that_says_what_it_was_trained_on(folder):
    with pytest.raises(UserError, match=r"was trained on no latents, found only held_out: expected split_of"):
        run(folder, only="held_out")
    with pytest.raises(UserError, match=r"is not a finished simulator: it has no simulator.json"):
        run(folder, only="held_out", split_of=str(folder / "model"))
