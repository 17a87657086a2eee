"""Vectors that are no latents: what they are, and that their exemplars are those of a brute-force pass. No Ray."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from introspect_ray.config import CollectVectorsConfig, GenerateConfig, SourceConfig
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.finish import finish
from introspect_ray.data.prepare import begin
from introspect_ray.data.prepare import prepare as prepare_dataset
from introspect_ray.data.shards import read_items
from introspect_ray.data.sources import load_source
from introspect_ray.data.splits import split_of
from introspect_ray.data.storage import Folder
from introspect_ray.data.vector_files import SCHEMA_VERSION, open_vectors, vector_schema, write_vectors
from introspect_ray.data.vector_parts import finished_row, is_finished, merge_parts, unit_vectors, write_part
from introspect_ray.data.vector_run import PartOrder, VectorRun, as_matrix, corpus_mean, item_vectors, prepare
from introspect_ray.data.writer import write_shard
from introspect_ray.errors import UserError
from introspect_ray.features.projection import activations, best, cut, drawn, largest_hits, sound_spans
from introspect_ray.features.windows import Window
from introspect_ray.interventions.target import Target
from introspect_ray.models.tokens import position_of
from introspect_ray.pocket.sources import fact_rows
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.world import World
from introspect_ray.tasks.base import Answer
from introspect_ray.tasks.feature_description import FeatureDescription

LAYERS = (0, 2)


def config(folder: Path, **changes: Any) -> CollectVectorsConfig:
    tree: dict[str, Any] = {"output": str(folder), "layers": LAYERS, "kinds": {"activations": 3, "differences": 3}}
    tree |= {"window": 5, "top": 4, "random": 3, "texts_per_block": 7, "max_tokens": 12}
    tree |= {"quantiles": 2, "per_quantile": 3, "split": {"train": 0.5, "validation": 0.25, "test": 0.25}}
    texts, facts = _sources()
    return CollectVectorsConfig.model_validate(tree | {"texts": {"path": texts}, "facts": {"path": facts}} | changes)


@lru_cache
def _sources() -> tuple[str, str]:
    """Files of a few rows of the pocket world, because making all of its texts takes a second each time."""
    folder, world = Path(tempfile.mkdtemp()), World(0)
    corpus = Corpus(world, 7)
    files = {"texts": [{"text": corpus.document().text} for _ in range(60)], "facts": fact_rows(world)[:300]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "texts.jsonl"), str(folder / "facts.jsonl")


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load(CollectVectorsConfig().target)


def test_vectors_are_of_held_out_texts_and_of_pairs_of_the_test_split(target: Target, tmp_path: Path) -> None:
    run = prepare(config(tmp_path))
    assert [item["kind"] for item in run.items] == ["activation"] * 3 + ["difference"] * 3
    corpus = {item["text"] for item in run.corpus}
    assert run.num_corpus == len(corpus) == len(run.mean_texts) and set(run.mean_texts) == corpus
    assert 30 < len(corpus) < 60 and not corpus & {item["text"] for item in run.items[:3]}
    rows = list(item_vectors(target, run.items, run.config))
    assert len(rows) == 12 and len({row["vector_id"] for row in rows}) == 12
    for row in rows:
        item = next(item for item in run.items if item["group"] == row["group"] and item["kind"] == row["kind"])
        if row["kind"] == "activation":
            ids = target.encode(item["text"])[:12]
            place = 1 + int(item["share"] * (len(ids) - 1))
            expected = residual(target, ids, place, row["layer"])
            assert row["token"] == target.tokenizer.decode([ids[place]])
        else:
            prompts = [item["template"].replace("{}", subject) for subject in item["subjects"]]
            assert row["origin"] == " minus ".join(prompts)
            ends = [subject_end(target, item, subject) for subject in item["subjects"]]
            one, other = (residual(target, ids, place, row["layer"]) for ids, place in ends)
            expected = one - other
        torch.testing.assert_close(torch.tensor(row["vector"]), expected, rtol=1e-4, atol=1e-4)
    keys = [prepare(config(tmp_path, **changes)).claim.run_key for changes in ({}, {}, {"seed": 1})]
    assert keys[0] == keys[1] == run.claim.run_key != keys[2]


def all_states(target: Target, ids: list[int]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return target.model(torch.tensor([ids]), output_hidden_states=True).hidden_states


def residual(target: Target, ids: list[int], place: int, layer: int) -> torch.Tensor:
    return all_states(target, ids)[layer + 1][0, place]


def subject_end(target: Target, item: dict[str, Any], subject: str) -> tuple[list[int], int]:
    ids, offsets = target.encode_with_offsets(item["template"].replace("{}", subject).rstrip())
    start = item["template"].index("{}")
    return ids, position_of(offsets, start, start + len(subject))


def test_items_that_give_no_vector_have_a_reason(target: Target, tmp_path: Path) -> None:
    items = [
        {"kind": "activation", "group": "a", "text": "", "share": 0.5},
        {"kind": "difference", "group": "b", "template": "{} " * 1 + "is far " * 20, "subjects": ["Ann", "Bob"]},
    ]
    rows = list(item_vectors(target, items, config(tmp_path)))
    assert [(row["kind"], row["layer"], row["reason"]) for row in rows] == [
        (kind, layer, reason)
        for kind, reason in (("activation", "text_too_short"), ("difference", "prompt_too_long"))
        for layer in LAYERS
    ]


def test_windows_leave_first_tokens_out_and_count_tokens_of_the_text() -> None:
    spans = cut([(4, 0, [1, 10, 11, 12]), (4, 3, [1, 13]), (9, 0, [1, 20, 21])], 2)
    assert [(span.text, span.start, span.ids, span.first) for span in spans] == [
        (4, 1, (10, 11), 0),
        (4, 3, (12,), 2),
        (4, 4, (13,), 3),
        (9, 1, (20, 21), 4),
    ]


def test_best_windows_are_one_per_text_and_ties_go_to_the_earlier_text() -> None:
    spans = cut([(text, 0, [1, 2, 3, 4, 5]) for text in range(4)], 2)
    found = np.zeros((16, 1), dtype=np.float32)
    found[:, 0] = [1, 0, 7, 0, 5, 6, 7, 0, 9, 8, 0, 0, 7, 0, 0, 0]
    hits = best(spans, found, 3)
    assert [(hit.text, hit.start, hit.activations.tolist()) for hit in hits] == [
        (2, 1, [9, 8]),
        (0, 3, [7, 0]),
        (1, 3, [7, 0]),
    ]
    assert [hit.text for hit in largest_hits(best(spans, found, 4)[::-1], 3)] == [2, 0, 1]
    found[4] = np.nan
    sound = sound_spans(spans, found)
    assert len(sound) == 7 and all((span.text, span.start) != (1, 1) for span in sound)
    ranks = [0.5, 0.1, 0.9, 0.3, 0.7, 0.8, 0.2]
    assert [rank for rank, _ in drawn(sound, found, ranks, 3)] == [0.1, 0.2, 0.3]


def test_activations_are_projections_on_the_unit_vector_from_the_mean() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0], [torch.nan, 1.0]])
    found = activations(x, torch.tensor([[0.0, 1.0], [0.6, 0.8]]), torch.tensor([1.0, 2.0]))
    np.testing.assert_allclose(found[:2], [[2, 2.8], [0, 0]], rtol=1e-6)
    assert np.isnan(found[2]).any()


def parts_of(run: VectorRun, target: Target, folder: Folder, again: Sequence[int] = ()) -> list[PartOrder]:
    """Writes all parts, after some that are written twice, as after a lost actor."""
    rows = list(item_vectors(target, run.items, run.config))
    means = corpus_mean(target, run.config, run.mean_texts[:10])
    vectors = unit_vectors(rows, as_matrix(rows), means)
    parts = run.parts()
    run.write_parts(parts)
    for order in [*(parts[index] for index in again), *parts]:
        write_part(folder, order, target, read_items(run.work, order), vectors, run.config)
    return parts


def test_merged_parts_are_those_of_one_brute_force_pass(target: Target, tmp_path: Path) -> None:
    run = prepare(config(tmp_path))
    one, many = Folder(str(tmp_path / "one")), Folder(str(tmp_path / "many"))
    single = prepare(config(tmp_path, texts_per_block=1000))
    whole = merge_parts(one, parts_of(single, target, one), run.config)
    parts = parts_of(run, target, many, [3, 1])
    assert len(parts) > 5
    found = merge_parts(many, reversed(parts), run.config)
    places = [
        {vector: [(hit.text, hit.start, hit.ids) for hit in hits] for vector, hits in kind.items()}
        for merged in (whole, found)
        for kind in merged[:2]
    ]
    assert places[0] == places[2] and places[1] == places[3]
    assert whole[2].firing == found[2].firing and whole[2].tokens == found[2].tokens
    contents = {item["row"]: item["text"] for item in run.corpus}
    # Brute force: every token of every text, one piece of a text at a time.
    rows = list(item_vectors(target, run.items, run.config))
    means = corpus_mean(target, run.config, run.mean_texts[:10])
    states = {
        (text, offset): all_states(target, [full[0], *full[1 + offset : 12 + offset]])
        for text, full in ((item["row"], target.encode(item["text"])) for item in run.corpus)
        for offset in range(0, max(1, len(full) - 1), 11)
    }
    for number in (0, 5, 11):
        layer = rows[number]["layer"]
        vector = torch.tensor(rows[number]["vector"])
        vector = vector - means[layer] if rows[number]["kind"] == "activation" else vector
        expected: dict[int, tuple[float, int]] = {}
        for (text, offset), of_layers in states.items():
            for place, hidden in enumerate(of_layers[layer + 1][0][1:]):
                value = max(0.0, float((hidden - means[layer]) @ vector / vector.norm()))
                if value > expected.get(text, (-1.0, 0))[0] + 1e-4:
                    expected[text] = value, offset + 1 + 5 * (place // 5)
        for split in ("train", "validation"):
            of_split = [text for text in expected if split_of(contents[text], run.config.split) == split]
            best_texts = sorted(of_split, key=lambda text: -expected[text][0])[:4]
            hits = whole[0][number, split]
            assert [hit.text for hit in hits] == best_texts
            assert [hit.start for hit in hits] == [expected[text][1] for text in best_texts]
            largest = [expected[text][0] for text in best_texts]
            assert [hit.activations.max() for hit in hits] == pytest.approx(largest, rel=1e-3)
            assert len(whole[1][number, split]) == 3 + 2 * 3
    # The windows drawn of a split are the same for all vectors.
    assert len({tuple((hit.text, hit.start) for hit in hits) for hits in whole[1].values()}) == 2
    row = finished_row(rows[5], 5, *whole, run.config, lambda ids: Window(ids, tuple("x" for _ in ids)))
    assert [one["kind"] for one in row["exemplars"][:8]] == ["top"] * 8
    peaks = [max(one["activations"]) for one in row["exemplars"][:8]]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] == pytest.approx(row["maximum"])
    for one in row["exemplars"]:
        assert one["split"] == split_of(contents[one["text"]], run.config.split) != "test"
        assert (one["quantile"] is not None) == (one["kind"] == "quantile")
    for split in ("train", "validation"):
        of_split = [one for one in row["exemplars"] if one["split"] == split]
        assert sum(one["kind"] == "random" for one in of_split) == 3
        quantile = [(one["quantile"], max(one["activations"])) for one in of_split if one["kind"] == "quantile"]
        assert quantile == sorted(quantile) and 0 < len(quantile) <= 6
        windows = [(one["text"], one["start"]) for one in of_split if one["kind"] != "top"]
        assert len(set(windows)) == len(windows)
    many.write(parts[2].name, b"torn")
    assert [is_finished(many, order) for order in parts[:4]] == [True, True, False, True]
    assert not is_finished(many, PartOrder(0, "of another run"))


def vectors_folder(folder: Path, width: int = 160) -> str:
    folder.mkdir(exist_ok=True)
    exemplar = {"kind": "top", "text": 3, "start": 1, "ids": [5, 6], "pieces": ["a", " b"], "activations": [0.0, 2.5]}
    exemplar |= {"quantile": None, "split": "train"}
    rows = [
        {"vector_id": f"v{number}", "kind": "difference", "layer": number, "group": "g", "origin": "x", "token": "t"}
        | {"vector": [float(number)] * width, "density": 0.5, "maximum": 2.5, "exemplars": [exemplar]}
        for number in range(3)
    ]
    assert set(rows[0]) == set(vector_schema(width).names)
    digest = write_vectors(Folder(str(folder)), rows, width)
    (folder / "vectors.json").write_text(json.dumps({"digest": digest, "schema_version": SCHEMA_VERSION}))
    return str(folder)


def test_folder_is_read_as_latents_with_exemplars(tmp_path: Path) -> None:
    found = open_vectors(vectors_folder(tmp_path)).vectors
    assert [one.vector_id for one in found] == ["v0", "v1", "v2"]
    one = found[2]
    assert (one.exemplars.layer, one.exemplars.latent, one.exemplars.maximum) == (2, 2, 2.5)
    (exemplar,) = one.exemplars.of_kind("top")
    assert exemplar.window.text == "a b" and exemplar.activations.tolist() == [0.0, 2.5]
    assert one.of_split("train").exemplars == one.exemplars.exemplars and one.of_split("validation").exemplars == ()
    file = tmp_path / "vectors.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"vectors\.parquet is not what vectors\.json says"):
        open_vectors(str(tmp_path))
    (tmp_path / "vectors.json").write_text("{}")
    with pytest.raises(UserError, match="has schema version None, this version reads 2: collect again"):
        open_vectors(str(tmp_path))
    with pytest.raises(UserError, match="holds no finished vectors"):
        open_vectors(str(tmp_path / "nowhere"))


def test_such_vectors_only_evaluate_and_need_no_sae(target: Target, tmp_path: Path) -> None:
    task = FeatureDescription()
    source = load_source(
        SourceConfig(path=f"{vectors_folder(tmp_path)}/vectors.parquet"), task.name, task.source_formats
    )
    assert source.format == "vectors" and len(source.rows) == 3
    generate = GenerateConfig(task="feature_description", feature_description={"sae": "nowhere"})
    rows = [*source.rows, {**source.rows[0], "row": 3}]
    plan = task.plan(rows, generate, lambda _: "train")
    assert plan.rejected == [(3, "duplicate_vector_id")]
    records = task.generate(target, plan.items, generate)
    assert [record["item_id"] for record in records] == ["v0", "v1", "v2"]
    for record in records:
        assert (record["status"], record["split"], record["label_kind"]) == ("ok", "test", "difference")
        assert record["description"] is None and record["label_score"] is None and record["latent"] is None
        assert task.truth(record) == Answer(None, "") and task.render(record).answer == ""
        assert task.display(record)[0][0] == ("difference", True)
        assert set(record) == set(task.schema(160, generate).names)


def test_a_dataset_of_them_is_whole_and_selects_none(target: Target, tmp_path: Path) -> None:
    source = {"path": f"{vectors_folder(tmp_path / 'vectors')}/vectors.parquet"}
    tree = {"task": "feature_description", "output": str(tmp_path / "dataset"), "source": source}
    tree["feature_description"] = {"sae": "nowhere"}
    planned = prepare_dataset(GenerateConfig.model_validate(tree), FeatureDescription())
    begin(planned, planned.orders)
    (order,) = planned.orders
    manifest = finish(planned, {0: write_shard(planned.task, target, planned.config, order, "run")})
    assert (manifest.counts, manifest.selected, manifest.has_selection) == ({"test": {"ok": 3}}, {}, True)
    dataset = open_dataset(str(tmp_path / "dataset"))
    assert dataset.records("test") == []
    assert [record["item_id"] for record in dataset.records("test", selected=False)] == ["v0", "v1", "v2"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layers": (4,)}, "layers has 4, but pocket:target_a has 4 layers"),
        ({"split": {"train": 0, "validation": 0, "test": 1}}, "has no text outside of the test split"),
        ({"split": {"train": 1, "validation": 0, "test": 0}}, "have nothing in the test split"),
        ({"texts": {"path": "nowhere.txt"}}, "source nowhere.txt does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "out", **changes))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_settings_that_ask_for_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kinds asks for no vectors"):
        config(tmp_path, kinds={"activations": 0, "differences": 0})
    with pytest.raises(ValueError, match="layers has one twice"):
        config(tmp_path, layers=(1, 1))
