"""Vectors and their exemplars from Ray actors: the same after a stop, and a dataset for a scorer to ask about."""

import json
import os
from pathlib import Path

import pytest

import introspect_ray.data.collect_vectors as collecting
from introspect_ray.config import ActorConfig, CollectVectorsConfig, GenerateConfig, SourceConfig
from introspect_ray.data.cluster import connect
from introspect_ray.data.collect_vectors import collect_vectors
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.generate import generate_dataset
from introspect_ray.data.vector_files import open_vectors
from introspect_ray.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        with connect():
            yield


def config(folder, **changes):
    tree = {"output": str(folder), "kinds": {"activations": 6, "differences": 6}, "texts": {"limit": 200}}
    tree |= {"top": 5, "random": 4, "texts_per_block": 20}
    return CollectVectorsConfig.model_validate(tree | changes)


class Stopped(Exception):
    pass


def test_a_stopped_collection_goes_on_and_ends_as_another(tmp_path, monkeypatch):
    one = config(tmp_path / "one", actors=ActorConfig(initial_size=2, max_size=2, num_cpus=0.5))
    summary = collect_vectors(one, lambda *_: None)
    assert "6 activations, 6 differences; exemplars from" in summary.line

    def stop(done, total, note):  # noqa: ARG001 - as a progress bar takes it
        if done == 3:
            raise Stopped

    two = config(tmp_path / "two")
    with pytest.raises(Stopped):
        collect_vectors(two, stop)
    with pytest.raises(UserError, match="holds no finished vectors"):
        open_vectors(two.output)
    shown = []
    assert collect_vectors(two, lambda *now: shown.append(now[:2])).manifest["digest"] == summary.manifest["digest"]
    assert shown[0][0] >= 3 and shown[-1][0] == shown[-1][1]

    monkeypatch.setattr(collecting, "connect", None)
    assert "was already complete" in collect_vectors(one, lambda *_: None).line
    vectors = open_vectors(one.output).vectors
    assert [vector.kind for vector in vectors] == ["activation"] * 6 + ["difference"] * 6
    for vector in vectors:
        assert len(vector.exemplars.of_kind("top")) == 5 and len(vector.exemplars.of_kind("random")) == 4
        largest = [exemplar.activations.max() for exemplar in vector.exemplars.of_kind("top")]
        assert largest == sorted(largest, reverse=True) and largest[0] == vector.exemplars.maximum > 0
        assert all(len(exemplar.window) == len(exemplar.activations) for exemplar in vector.exemplars.exemplars)

    # Records without a description: only a scorer that brings its own truth asks about them.
    source = SourceConfig(path=f"{one.output}/vectors.parquet")
    generate = GenerateConfig(task="feature_description", output=str(tmp_path / "dataset"), source=source)
    manifest = generate_dataset(generate, lambda _: None).manifest
    assert (manifest.counts, manifest.selected) == ({"test": {"ok": 12}}, {})
    records = open_dataset(str(tmp_path / "dataset")).records("test", selected=False)
    assert {record["item_id"] for record in records} == {vector.vector_id for vector in vectors}
    rejected = (tmp_path / "one" / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in rejected} <= {"duplicate_row", "no_partner"}
