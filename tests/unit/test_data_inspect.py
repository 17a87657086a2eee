"""A sound dataset has no problem; each kind of damage is found by its own check, with what it is and how often."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_task import FakeTask, fake_config, make_dataset

from introspect_ray.config import GenerateConfig, InspectConfig, resolved
from introspect_ray.data.inspect import inspect_dataset
from introspect_ray.data.inspection_page import inspection_lines, render_inspection, write_inspection
from introspect_ray.data.manifest import (
    MANIFEST_NAME,
    REJECTED_NAME,
    SCHEMA_VERSION,
    SELECTION_NAME,
    Manifest,
    SourceAccount,
    TargetIdentity,
    read_manifest,
    write_manifest,
)
from introspect_ray.data.shards import ShardOrder, parquet_bytes, to_records, write_records
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.tasks.base import failed, stable_id
from introspect_ray.tasks.registry import get_task

WIDTH = 6
HOSTILE = "</script><script>alert(1)</script>&"
QUESTIONS = ["skip me", "raise 1", "nan 1", HOSTILE, *(f"question {number}" for number in range(20))]


def patching_record(number, split, changed, **changes):
    """A record whose subjects are its own, in a block and kind that follow from its number."""
    text = f"word {number} end"
    return {
        "record_id": stable_id("record", number),
        "item_id": stable_id("item", number),
        "split": split,
        "group": f"group {number}",
        "status": "ok",
        "subject": f"subject {number}",
        "other_subject": f"other {number}",
        "relation_id": "P1",
        "text": text,
        "other_text": "another",
        "block": number % 2,
        "layers": [0, 1],
        "kind": ("relation", "question")[number // 2 % 2],
        "position": 2,
        "token_start": len(text) - 3,
        "token_end": len(text),
        "original": "a",
        "content": "b" if changed else "a",
        "changed": changed,
        "vector": np.full(WIDTH, number + 1, np.float32),
        **changes,
    }


def sound_records():
    """Lopsided on purpose: 3 of 12 changed in training, 2 of 4 in test."""
    train = [patching_record(number, "train", number < 3) for number in range(12)]
    return train + [patching_record(number, "test", number % 4 < 2) for number in range(12, 16)]


def write(folder, records, shards=1, **changes):
    """A patching dataset of these records, with a manifest that fits them except for `changes`."""
    config = GenerateConfig(output=str(folder))
    where = Folder(str(folder))
    schema = get_task("activation_patching").schema(WIDTH, config)
    size = -(-len(records) // shards)
    infos = [
        write_records(where, ShardOrder(index, "key"), records[index * size : (index + 1) * size], schema)
        for index in range(shards)
    ]
    counts = {}
    for record in records:
        found = counts.setdefault(record["split"], {})
        found[record["status"]] = found.get(record["status"], 0) + 1
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        task="activation_patching",
        config=resolved(config),
        run_key="key",
        target=TargetIdentity(path="target", revision=None, width=WIDTH, num_layers=4, digest=""),
        source=SourceAccount(name="made up", format="counterfact", rows=3, used=2, rejected={"no_partner": 1}),
        num_records=len(records),
        counts=counts,
        selected={split: found["ok"] for split, found in counts.items() if "ok" in found},
        has_selection=False,
        shards=tuple(infos),
    )
    where.write(REJECTED_NAME, b'{"row": 2, "reason": "no_partner"}\n')
    write_manifest(where, manifest.model_copy(update=changes))
    return str(folder)


def problems(url, check, task=None):
    """Messages of one check's problems; no other check may have any."""
    found = inspect_dataset(url, 2, task).problems
    assert {finding.check for finding in found} <= {check}, found
    return [finding.message for finding in found]


def test_a_generated_dataset_has_no_problem_and_true_numbers(tmp_path):
    config = fake_config(tmp_path, QUESTIONS)
    manifest = make_dataset(config)
    found = inspect_dataset(config.output, 2, FakeTask())
    assert found.problems == []
    assert found.statuses == manifest.counts
    assert found.selected == manifest.selected
    assert sum(summary.count for summary in found.vectors) == sum(
        split.get("ok", 0) for split in found.statuses.values()
    )
    assert all(cell.changed == cell.records * (cell.values == ("yes",)) for cell in found.balance)
    assert {record["split"] for record in found.examples} == set(found.selected)
    failures = [note.message for note in found.notes if note.check == "counts"]
    assert any("have no truth: " in message and "2 vector_not_finite" in message for message in failures)


def test_balance_counts_per_split_block_and_kind(tmp_path):
    found = inspect_dataset(write(tmp_path / "d", sound_records(), shards=3), 2)
    assert found.problems == []
    # Records 0, 1, 2 are the changed ones of training: (0, relation), (1, relation), (0, question).
    cells = {(cell.split, *cell.values): (cell.changed, cell.records) for cell in found.balance}
    assert cells == {
        ("train", "0", "relation"): (1, 3),
        ("train", "1", "relation"): (1, 3),
        ("train", "0", "question"): (1, 3),
        ("train", "1", "question"): (0, 3),
        ("test", "0", "relation"): (1, 1),
        ("test", "1", "relation"): (1, 1),
        ("test", "0", "question"): (0, 1),
        ("test", "1", "question"): (0, 1),
    }
    assert (found.selected, found.groups) == ({"test": 4, "train": 12}, {"test": 4, "train": 12})
    (vectors,) = found.vectors
    assert vectors.norms == pytest.approx([np.sqrt(WIDTH), 8.5 * np.sqrt(WIDTH), 16 * np.sqrt(WIDTH)], rel=1e-6)


def test_rare_classes_and_empty_splits_are_notes(tmp_path):
    records = [patching_record(4 * number, "train", False) for number in range(40)]
    found = inspect_dataset(write(tmp_path / "d", records), 2)
    assert found.problems == []
    notes = "\n".join(note.message for note in found.notes)
    assert "all 40 selected records of split 'train' are unchanged" in notes
    assert "the largest is train, 0, relation: 0 of 40 changed" in notes
    assert "split 'validation' is empty" in notes and "split 'test' is empty" in notes


def change(records, row, **changes):
    return [{**record, **changes} if number == row else record for number, record in enumerate(records)]


def test_every_kind_of_leakage(tmp_path):
    records = sound_records()
    by_group = write(tmp_path / "group", change(records, 13, group="group 4"))
    assert problems(by_group, "leakage") == [
        "1 values of group are in two splits or more, the first is 'group 4' in test and train"
    ]
    # The other subject of a test record is the subject of a training record: different columns, same leak.
    crossed = write(tmp_path / "subject", change(records, 13, other_subject="subject 4"))
    (line,) = problems(crossed, "leakage")
    assert line == "1 values of subject are in two splits or more, the first is 'subject 4' in test and train"


def test_duplicate_ids_and_duplicate_contents(tmp_path):
    records = sound_records()
    more = [*records, {**records[3], "text": "else end", "subject": "third"}]
    twice = write(tmp_path / "ids", more, selected={"train": 12, "test": 4})
    assert problems(twice, "duplicates") == [
        f"1 record ids occur more than once, the first is {records[3]['record_id']}"
    ]
    copies = [{**records[3], "record_id": f"copy {number}"} for number in range(2)]
    (line,) = problems(write(tmp_path / "contents", [*records, *copies]), "duplicates")
    assert line.startswith("1 contents stand under several ids")


def test_failed_records_are_no_duplicates_of_each_other(tmp_path):
    items = [{"item_id": f"i{number}", "split": "train", "group": "group 0"} for number in range(3)]
    records = [*sound_records(), *(failed(item, "no_position_found", "none") for item in items)]
    found = inspect_dataset(write(tmp_path / "d", records), 2)
    assert found.problems == []
    assert found.statuses["train"] == {"no_position_found": 3, "ok": 12}


def test_a_vector_that_is_not_finite_or_not_there(tmp_path):
    records = sound_records()
    bad = np.array([1, np.nan, 3, 4, 5, 6], np.float32)
    (line,) = problems(write(tmp_path / "nan", change(records, 5, vector=bad)), "vectors")
    assert "1 of column 'vector' are not finite, the first in row 5" in line
    (line,) = problems(write(tmp_path / "none", change(change(records, 5, vector=None), 9, vector=None)), "vectors")
    assert "2 ok records have no vector, the first in row 5" in line


def test_zero_vectors_are_a_note(tmp_path):
    found = inspect_dataset(write(tmp_path / "d", change(sound_records(), 5, vector=np.zeros(WIDTH, np.float32))), 2)
    assert found.problems == []
    assert "1 vectors of column 'vector' are all zeros" in [note.message for note in found.notes]


@pytest.mark.parametrize(
    ("changes", "check", "line"),
    [
        ({"num_records": 17}, "manifest", "dataset.json says 17 records, its shards add up to 16"),
        (
            {"counts": {"train": {"ok": 11}, "test": {"ok": 5}}},
            "counts",
            "12 records of split 'train' have status 'ok', dataset.json says 11",
        ),
        (
            {"selected": {"train": 12, "test": 3}},
            "selection",
            "selected are 4 test, 12 train, dataset.json says 3 test",
        ),
        ({"has_selection": True}, "selection", "selection.parquet is missing"),
        (
            {"source": SourceAccount(name="x", format="text", rows=4, used=2, rejected={"no_partner": 1})},
            "sources",
            "of 4 source rows 2 are used and 1 rejected",
        ),
        (
            {"source": SourceAccount(name="x", format="text", rows=4, used=2, rejected={"no_partner": 2})},
            "sources",
            "rejected.jsonl lists 1 no_partner, dataset.json says 2 no_partner",
        ),
    ],
)
def test_a_manifest_that_tells_something_else(tmp_path, changes, check, line):
    found = problems(write(tmp_path / "d", sound_records(), **changes), check)
    assert line in " ".join(found)


def test_a_selection_of_the_wrong_records(tmp_path):
    records = [*sound_records(), failed({"item_id": "i", "split": "train", "group": "group 0"}, "why")]
    url = write(tmp_path / "d", records, has_selection=True, selected={"train": 2})
    ids = [
        records[0]["record_id"],
        records[1]["record_id"],
        records[1]["record_id"],
        "nobody",
        records[-1]["record_id"],
    ]
    Folder(url).write(SELECTION_NAME, parquet_bytes(pa.table({"record_id": ids})))
    found = problems(url, "selection")
    assert [line.partition(",")[0] for line in found] == [
        "1 selected ids are listed more than once",
        "1 selected ids are ids of no record",
        "1 selected ids are ids of records without a truth",
    ]


def test_damaged_shards_are_all_listed_and_the_others_still_counted(tmp_path):
    url = write(tmp_path / "d", sound_records(), shards=4)
    shards = sorted((tmp_path / "d" / "shards").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-9])
    found = inspect_dataset(url, 2)
    lines = [finding.message for finding in found.problems if finding.check == "shards"]
    assert re.search(r"shard-00000.parquet is missing", lines[0])
    assert re.search(r"shard-00001.parquet has \d+ bytes, dataset.json says \d+ bytes \(4 rows\)", lines[1])
    assert sum(found.statuses["train"].values()) == 4 and sum(found.statuses["test"].values()) == 4


def test_a_shard_of_other_records_or_of_another_schema(tmp_path):
    url = write(tmp_path / "d", sound_records(), shards=2)
    manifest = read_manifest(Folder(url))
    table = pq.read_table(tmp_path / "d" / manifest.shards[1].name)
    records = to_records(table)
    records[2]["content"] = "something else"
    info = write_records(Folder(url), ShardOrder(1, "key"), records, table.schema.remove_metadata())
    told = info.model_copy(update={"digest": manifest.shards[1].digest})
    write_manifest(Folder(url), manifest.model_copy(update={"shards": (manifest.shards[0], told)}))
    (line,) = problems(url, "shards")
    assert line.endswith("does not hold the records that dataset.json lists: their digests differ")
    odd = table.drop_columns(["kind", "block"]).append_column("kind", pa.array([1] * table.num_rows))
    content = parquet_bytes(odd)
    Folder(url).write(manifest.shards[1].name, content)
    told = told.model_copy(update={"num_bytes": len(content)})
    write_manifest(Folder(url), manifest.model_copy(update={"shards": (manifest.shards[0], told)}))
    lines = [finding.message for finding in inspect_dataset(url, 2).problems if finding.check == "schema"]
    assert [line.split(": ")[1] for line in lines] == [
        "column 'block' is missing",
        "column 'kind' has type int64, expected string",
    ]


def test_files_beside_the_manifest_and_a_shard_listed_twice(tmp_path):
    url = write(tmp_path / "d", sound_records())
    (tmp_path / "d" / "shards" / "shard-00007.parquet").write_bytes(b"old")
    found = inspect_dataset(url, 2)
    assert found.problems == []
    assert "1 files beside the shards that dataset.json lists are ignored" in "".join(n.message for n in found.notes)
    manifest = read_manifest(Folder(url))
    write_manifest(Folder(url), manifest.model_copy(update={"shards": manifest.shards * 2}))
    lines = [finding.message for finding in inspect_dataset(url, 2).problems]
    assert lines[0] == "dataset.json lists shards/shard-00000.parquet 2 times"
    assert "16 record ids occur more than once" in " ".join(lines)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"task": "dreams"}, "unknown task 'dreams'"),
        ({"config": {"sed": 3}}, "the config in its manifest is not of this version: sed: Extra inputs"),
        ({"schema_version": 99}, "has schema version 99"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, changes, line):
    with pytest.raises(UserError, match=re.escape(line)):
        inspect_dataset(write(tmp_path / "d", sound_records(), **changes), 2)


def test_no_dataset_there(tmp_path):
    with pytest.raises(UserError, match=f"has no {MANIFEST_NAME}: it is not a dataset folder"):
        inspect_dataset(str(tmp_path), 2)


def test_the_page_escapes_loads_nothing_and_shows_problems_and_examples(tmp_path):
    records = change(sound_records(), 13, group="group 4", text=f"{HOSTILE} end", token_start=0, token_end=3)
    url = write(tmp_path / "d", records)
    inspection = inspect_dataset(url, 100)
    page = render_inspection(inspection)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"<(link|img|iframe|script)[^>]*(src|href)=", page)
    assert "1 problem found" in page and "the first is &#39;group 4&#39;" in page
    assert page.count("<mark>") == 16
    lines = list(inspection_lines(inspection))
    assert "  train: 12 records, 12 ok, 12 selected, 12 groups" in lines
    assert lines[-1].startswith("problem (leakage): 1 values of group")
    assert write_inspection(inspection, None) == f"{url}/inspection.html"
    assert (tmp_path / "d" / "inspection.html").read_text() == page
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x.html cannot be written"):
        write_inspection(inspection, str(tmp_path / "file" / "x.html"))


@pytest.mark.parametrize("task", ["feature_description", "input_ablation"])
def test_every_task_tells_what_splits_may_not_share(task):
    names = get_task(task).schema(WIDTH, GenerateConfig()).names
    assert {*get_task(task).unshared, *get_task(task).breakdowns.values()} <= {*names}


def test_defaults_name_the_generators_output():
    assert InspectConfig().dataset == GenerateConfig().output
    assert json.loads(InspectConfig().model_dump_json())["page"] is None
