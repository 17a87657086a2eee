"""From a config to a finished dataset and back, through the code that actors run; and what a damaged one says."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_task import FakeTask, fake_config
from fake_task import make_dataset as generate

from introspect_ray.config import ActorConfig
from introspect_ray.data.dataset import canonical_dump, holds_its_records, open_dataset
from introspect_ray.data.finish import finish
from introspect_ray.data.manifest import MANIFEST_NAME
from introspect_ray.data.prepare import prepare
from introspect_ray.data.shards import ShardOrder, to_records, write_records
from introspect_ray.data.storage import TEMPORARY
from introspect_ray.errors import RunFailed, UserError

QUESTIONS = [f"question {number}" for number in range(20)]
ODD = ["skip me", "raise 1", "nan 1", "huge 1", "wordless", *QUESTIONS, "question 3"]


@pytest.fixture
def made(tmp_path):
    config = fake_config(tmp_path, ODD)
    return config, generate(config)


def test_every_row_is_accounted_for(made):
    config, manifest = made
    assert manifest.source.rejected == {"duplicate_row": 1, "skipped": 1}
    assert (manifest.source.rows, manifest.source.used) == (26, 24)
    totals = {}
    for found in manifest.counts.values():
        for status, count in found.items():
            totals[status] = totals.get(status, 0) + count
    assert totals == {"ok": 40, "generation_error": 1, "no_word": 1, "vector_not_finite": 4}
    assert manifest.num_records == 46 == sum(shard.num_rows for shard in manifest.shards)
    assert len(manifest.shards) == 6
    lines = (open_dataset(config.output).folder.read("rejected.jsonl")).decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"row": 0, "reason": "skipped"},
        {"row": 25, "reason": "duplicate_row"},
    ]


def test_failed_records_say_why(made):
    records = open_dataset(made[0].output).records(None, selected=False)
    details = {record["status"]: record["detail"] for record in records if record["status"] != "ok"}
    assert details["generation_error"] == "RuntimeError: cannot do raise 1"
    found = {record["detail"] for record in records if record["status"] == "vector_not_finite"}
    assert found == {"vector holds a NaN or infinity", "vector overflows in float16"}
    assert all(record["vector"] is None and record["text"] is None for record in records if record["status"] != "ok")


def test_large_vectors_fit_in_float32(tmp_path):
    config = fake_config(tmp_path, ["huge 1", "a", "b", "c"], vector_dtype="float32")
    assert set().union(*generate(config).counts.values()) == {"ok"}
    record = next(r for r in open_dataset(config.output).records(None, selected=False) if r["text"] == "huge 1")
    assert record["vector"][0] == 1e6


def test_reader_gives_selected_records_of_a_split_with_float32_vectors(made):
    dataset = open_dataset(made[0].output, task="fake")
    everything = dataset.records(None, selected=False)
    expected = [r["record_id"] for r in everything if r["status"] == "ok" and r["changed"] and r["split"] == "train"]
    train = dataset.records("train")
    assert expected and [record["record_id"] for record in train] == expected
    assert dataset.manifest.selected["train"] == len(expected)
    assert all(record["vector"].dtype == np.float32 and record["vector"].shape == (8,) for record in train)
    assert dataset.records("train", ["text"])[0] == {"text": train[0]["text"]}
    assert dataset.config == made[0]
    with pytest.raises(UserError, match="no column 'txet'"):
        dataset.records("train", ["txet"])


def test_without_a_selection_all_ok_records_count(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTask, "select", lambda *_: None)
    config = fake_config(tmp_path, ODD)
    manifest = generate(config)
    assert sum(manifest.selected.values()) == 40 == len(open_dataset(config.output).records(None))
    assert open_dataset(config.output).folder.size("selection.parquet") is None


def test_groups_stay_in_one_split_whatever_the_shards(tmp_path, made):
    other = fake_config(tmp_path, ODD, items_per_shard=7, output=str(tmp_path / "other"))
    generate(other)
    assert canonical_dump(open_dataset(other.output)) == canonical_dump(open_dataset(made[0].output))
    by_group = {}
    for record in open_dataset(other.output).records(None, selected=False):
        by_group.setdefault(record["group"], set()).add(record["split"])
    assert all(len(splits) == 1 for splits in by_group.values())


def test_canonical_dump_sees_one_bit_of_one_vector(made):
    config, manifest = made
    before = canonical_dump(open_dataset(config.output))
    assert before.count("\n") == manifest.num_records
    _rewrite(config, manifest, 2, lambda vector: np.nextafter(vector, np.float16(9)))
    after = canonical_dump(open_dataset(config.output))
    assert before != after and before.count("\n") == after.count("\n")


def _rewrite(config, manifest, index, change):
    """Replace the first vector of a shard in place, with a manifest that agrees."""
    dataset = open_dataset(config.output)
    shard = manifest.shards[index]
    table = pq.read_table(pa.BufferReader(dataset.folder.read(shard.name)))
    records = to_records(table)
    row = next(number for number, record in enumerate(records) if record["vector"] is not None)
    records[row]["vector"][0] = change(records[row]["vector"][0])
    info = write_records(dataset.folder, ShardOrder(index, manifest.run_key), records, table.schema.remove_metadata())
    shards = tuple(info if number == index else other for number, other in enumerate(manifest.shards))
    dataset.folder.write(MANIFEST_NAME, manifest.model_copy(update={"shards": shards}).model_dump_json().encode())
    return row


def test_a_vector_with_a_nan_is_refused_with_its_shard_and_row(made):
    config, manifest = made
    row = _rewrite(config, manifest, 3, lambda _: np.nan)
    with pytest.raises(UserError, match=rf"shard-00003.parquet, row {row}: column 'vector' holds a NaN"):
        open_dataset(config.output).records("train")
    assert open_dataset(config.output).records("train", ["text"])


def test_torn_missing_and_flipped_shards(made, tmp_path):
    config, manifest = made
    path = tmp_path / "out" / manifest.shards[1].name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    line = rf"shard-00001.parquet has {len(whole) - 7} bytes, dataset.json says {len(whole)} bytes \(8 rows\)"
    with pytest.raises(UserError, match=line):
        open_dataset(config.output)
    flipped = bytearray(whole)
    flipped[40] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"shard-00001.parquet is damaged"):
        open_dataset(config.output).records(None)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001.parquet is missing, dataset.json says"):
        open_dataset(config.output)


def test_damage_that_a_reader_names_is_mended_by_the_same_config(made, tmp_path):
    config, manifest = made
    before = canonical_dump(open_dataset(config.output))
    path = tmp_path / "out" / manifest.shards[1].name
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"is damaged: .*; generate the dataset again"):
        open_dataset(config.output).records(None)
    assert generate(config) == manifest
    assert canonical_dump(open_dataset(config.output)) == before


def test_other_records_under_the_same_name_are_noticed(made):
    config, manifest = made
    dataset = open_dataset(config.output)
    _rewrite(config, manifest, 2, lambda vector: np.nextafter(vector, np.float16(9)))
    found = [holds_its_records(dataset.folder, shard) for shard in manifest.shards]
    assert found == [index != 2 for index in range(len(found))]


def test_the_account_sees_a_record_that_is_there_twice(made):
    config, manifest = made
    dataset = open_dataset(config.output)
    table = pq.read_table(pa.BufferReader(dataset.folder.read(manifest.shards[2].name)))
    records = to_records(table)
    twice = [*records, records[0]]
    info = write_records(dataset.folder, ShardOrder(2, manifest.run_key), twice, table.schema.remove_metadata())
    prepared = prepare(config, FakeTask())
    with pytest.raises(AssertionError, match="unique over the whole dataset"):
        finish(prepared, prepared.finished() | {2: info})
    with pytest.raises(AssertionError, match="every planned item has a record"):
        finish(prepared, prepared.finished() | {2: manifest.shards[3]})


def test_folders_that_are_no_finished_dataset(made, tmp_path):
    config, _ = made
    manifest = tmp_path / "out" / MANIFEST_NAME
    content = json.loads(manifest.read_text())
    with pytest.raises(UserError, match="is of task fake, expected input_ablation"):
        open_dataset(config.output, task="input_ablation")
    manifest.write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(UserError, match="has schema version 99, this version reads 1"):
        open_dataset(config.output)
    manifest.write_text(json.dumps({**content, "num_records": "many"}))
    with pytest.raises(UserError, match="num_records: Input should be a valid integer"):
        open_dataset(config.output)
    manifest.write_text('{"schema')
    with pytest.raises(UserError, match="is not valid JSON"):
        open_dataset(config.output)
    manifest.unlink()
    with pytest.raises(UserError, match=r"has no dataset.json: it was not finished"):
        open_dataset(config.output)
    for url in (str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UserError, match=r"has no dataset.json: it is not a dataset folder"):
            open_dataset(url)


def test_resumption_finds_exactly_the_shards_that_are_left(made, tmp_path):
    config, manifest = made
    (tmp_path / "out" / manifest.shards[4].name).unlink()
    (tmp_path / "out" / manifest.shards[2].name).write_bytes(b"PAR1")
    moved = config.model_copy(update={"actors": ActorConfig(max_size=3), "max_failed_share": 0.9})
    prepared = prepare(moved, FakeTask())
    assert sorted(prepared.finished()) == [0, 1, 3, 5]
    assert prepared.finished() == {index: manifest.shards[index] for index in (0, 1, 3, 5)}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 7}, "seed is 0 there, 7 here"),
        ({"split": {"salt": "x"}}, "split.salt is 'introspect_ray' there, 'x' here"),
        ({"items_per_shard": 5, "vector_dtype": "float32"}, "items_per_shard is 4 there, 5 here; vector_dtype is"),
    ],
)
def test_output_folder_of_another_config(made, tmp_path, changes, line):
    with pytest.raises(UserError) as caught:
        prepare(fake_config(tmp_path, ODD, **changes), FakeTask())
    assert f"output folder {made[0].output} belongs to another config" in str(caught.value) and line in str(
        caught.value
    )


def test_output_folder_of_another_source_or_target(made, tmp_path):
    fake_config(tmp_path, [*ODD, "one more"])
    with pytest.raises(UserError, match=r"\(source .*questions.jsonl changed since it was begun\)"):
        prepare(made[0], FakeTask())
    fake_config(tmp_path, ODD)
    prepare(made[0], FakeTask())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"\(target .*model changed since it was begun\)"):
        prepare(made[0], FakeTask())


def test_settings_of_other_tasks_do_not_matter(made, tmp_path):
    assert made[0].task == "activation_patching"
    prepare(fake_config(tmp_path, ODD, input_ablation={"policy": "wrong"}), FakeTask())
    with pytest.raises(UserError, match=r"activation_patching.num_blocks is 4 there, 2 here"):
        prepare(fake_config(tmp_path, ODD, activation_patching={"num_blocks": 2}), FakeTask())


def test_folder_with_other_things_is_left_alone(tmp_path):
    config = fake_config(tmp_path, QUESTIONS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{TEMPORARY}x").write_text("left by a kill")
    prepare(config, FakeTask())
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no dataset \(thesis.txt, ...\)"):
        prepare(config, FakeTask())


def test_bad_input_is_refused_while_planning(tmp_path):
    config = fake_config(tmp_path, ["skip a", "skip b", "  "])
    with pytest.raises(UserError, match=r"of 3 rows none is usable \(skipped: 2, empty_text: 1\)"):
        prepare(config, FakeTask())
    config = fake_config(tmp_path, QUESTIONS, activation_patching={"num_blocks": 5})
    with pytest.raises(UserError, match=r"activation_patching.num_blocks is 5, but .* has 4 layers: expected 1 to 4"):
        prepare(config, FakeTask())
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match=r"model path .* does not exist"):
        prepare(config, FakeTask())


def test_layer_of_a_label_out_of_range(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTask, "source_formats", ("latent_labels",))
    source = tmp_path / "labels.json"
    label = {"layer": 3, "index": 7, "description": "cats", "accepted": [], "score": 1}
    source.write_text(json.dumps([label, {**label, "layer": 4}]))
    config = fake_config(tmp_path, QUESTIONS, source={"path": str(source)})
    with pytest.raises(UserError, match=r"row 1 names layer 4, but .*model has 4 layers: expected 0 to 3"):
        prepare(config, FakeTask())


def test_too_many_failures_fail_the_run_and_keep_the_shards(tmp_path):
    config = fake_config(tmp_path, ["raise 1", "raise 2", "raise 3", "a"], max_failed_share=0.59, max_error_share=1)
    with pytest.raises(RunFailed, match=r"3 of 5 records have no truth \(generation_error: 3\), more than .* 0.59"):
        generate(config)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    larger = fake_config(tmp_path, ["raise 1", "raise 2", "raise 3", "a"], max_failed_share=0.6, max_error_share=0.75)
    prepared = prepare(larger, FakeTask())
    finish(prepared, prepared.finished())
    assert len(open_dataset(config.output).records(None, selected=False)) == 5


def test_errors_have_a_limit_of_their_own_by_items(tmp_path):
    questions = ["raise 1", "raise 2", "wordless", *QUESTIONS[:5]]
    with pytest.raises(RunFailed, match=r"2 of 8 work items ended with an error, .* 0.24 .*: RuntimeError: cannot do"):
        generate(fake_config(tmp_path, questions, max_error_share=0.24))
    generate(fake_config(tmp_path, questions, max_error_share=0.25))


def test_a_refusal_of_every_item_is_the_users_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("no such thing")

    monkeypatch.setattr(FakeTask, "generate", refuse)
    with pytest.raises(UserError, match="no such thing"):
        generate(fake_config(tmp_path, QUESTIONS))


@pytest.mark.parametrize(
    ("records", "promise"),
    [
        (lambda records: records[:-2], "every item a record"),
        (lambda records: [*records, records[0]], "record ids are unique"),
        (lambda records: [{**records[0], "split": "nowhere"}, *records[1:]], "keeps its item's split"),
    ],
)
def test_a_task_that_breaks_its_promise_is_noticed(tmp_path, monkeypatch, records, promise):
    generate_ = FakeTask.generate
    monkeypatch.setattr(FakeTask, "generate", lambda *arguments: records(generate_(*arguments)))
    with pytest.raises(AssertionError, match=promise):
        generate(fake_config(tmp_path, QUESTIONS))


def test_object_stores_work_like_folders(tmp_path):
    config = fake_config(tmp_path, QUESTIONS, output=f"memory://bucket{tmp_path}/out")
    local = fake_config(tmp_path, QUESTIONS)
    generate(config)
    generate(local)
    assert canonical_dump(open_dataset(config.output)) == canonical_dump(open_dataset(f"file://{local.output}"))
    assert len(prepare(config, FakeTask()).finished()) == 5
