"""Vectors and their exemplars from Ray actors: the same after a stop, and without Ray."""

import json
import os
from pathlib import Path

import pytest

import introspect_ray.data.collect_vectors as collecting
from introspect_ray.config import ActorConfig, CollectVectorsConfig
from introspect_ray.data.cluster import connect
from introspect_ray.data.collect_vectors import collect_vectors
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
    tree |= {"top": 5, "random": 4, "texts_per_block": 20, "split": {"train": 0.6, "validation": 0.15, "test": 0.25}}
    return CollectVectorsConfig.model_validate(tree | changes)


class Stopped(Exception):
    pass


def in_this_process(pool, orders):
    worker = pool.worker(**pool.arguments, run_id="here")
    for order in orders:
        yield order, worker.make(order)


def test_a_stopped_collection_goes_on_and_ends_as_one_without_ray(tmp_path, monkeypatch):
    def stop(done, total, note):  # noqa: ARG001 - as a progress bar takes it
        if done == 3:
            raise Stopped

    on_ray = config(tmp_path / "ray", actors=ActorConfig(num_cpus=0.5, initial_size=2, max_size=2))
    with pytest.raises(Stopped):
        collect_vectors(on_ray, stop)
    with pytest.raises(UserError, match="holds no finished vectors"):
        open_vectors(on_ray.output)
    shown = []
    summary = collect_vectors(on_ray, lambda *now: shown.append(now[:2]))
    assert shown[0][0] >= 3 and shown[-1][0] == shown[-1][1]
    assert "6 activations, 6 differences; exemplars from" in summary.line

    monkeypatch.setattr(collecting, "run_orders", in_this_process)
    here = collect_vectors(config(tmp_path / "here"), lambda *_: None)
    assert here.manifest["digest"] == summary.manifest["digest"]
    monkeypatch.setattr(collecting, "connect", None)
    assert "was already complete" in collect_vectors(on_ray, lambda *_: None).line
    vectors = open_vectors(on_ray.output).vectors
    assert [vector.kind for vector in vectors] == ["activation"] * 6 + ["difference"] * 6
    for vector in vectors:
        for split in ("train", "validation"):
            found = vector.of_split(split)
            assert (len(found.of_kind("top")), len(found.of_kind("random"))) == (5, 4)
            assert 0 < len(found.of_kind("quantile")) <= 4 * 5
        largest = [exemplar.activations.max() for exemplar in vector.exemplars.of_kind("top")]
        assert largest == sorted(largest, reverse=True) and largest[0] == vector.exemplars.maximum > 0
        assert all(len(exemplar.window) == len(exemplar.activations) for exemplar in vector.exemplars.exemplars)
    rejected = (tmp_path / "ray" / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in rejected} <= {"duplicate_row", "no_partner"}
