"""A malformed source ends in one clear line before a model loads, or in counted reasons: no traceback, no silent drop.

Whole files are tried through the job that a user starts; rows through the checks that every job runs first.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_task import FakeTask, fake_config, make_dataset, question, write_model_config
from job_driver import check_line, run_jobs
from s3_server import closed_port, reader, s3_environment, s3_server

from introspect_ray.config import GenerateConfig
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.inspect import inspect_dataset
from introspect_ray.data.prepare import prepare
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.tasks.registry import get_task

ROWS = [question(f"q{number}") for number in range(99)]
FACT = {"subject": "Rome", "relation": "{} is in", "relation_id": "P17", "target_true": " Italy"}


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def without(name, rows=ROWS):
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def csv_text(rows, header=("question", "subject", "choices", "answer")):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode()


PARQUET = parquet(pa.Table.from_pylist(ROWS))
TWICE = pa.table(
    [["q"], ["s"], [["a", "b"]], [1], ["r"]], names=["question", "subject", "choices", "answer", "question"]
)
FILES = {
    "UTF-16": ("a.jsonl", jsonl(ROWS).decode().encode("utf-16"), "is not UTF-8 text: byte 0 is 0xff"),
    "Latin-1 in the middle": ("a.jsonl", jsonl(ROWS) + b'{"question": "caf\xe9"}', "is not UTF-8 text: byte"),
    "Parquet called jsonl": ("a.jsonl", PARQUET, "is not"),
    "jsonl called Parquet": ("a.parquet", jsonl(ROWS), "is not a complete Parquet file"),
    "truncated Parquet": ("a.parquet", PARQUET[:-20], "is not a complete Parquet file"),
    "Parquet with a hole": (
        "a.parquet",
        PARQUET[:4] + bytes(len(PARQUET) // 2) + PARQUET[4 + len(PARQUET) // 2 :],
        "is not a complete Parquet file",
    ),
    "Parquet with a column twice": ("a.parquet", parquet(TWICE), "has the column 'question' twice"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], "is truncated or damaged"),
    "gzip with a wrong checksum": ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-8] + bytes(8), "cannot be read: CRC"),
    "no gzip at all": ("a.jsonl.gz", jsonl(ROWS), "cannot be read: Not a gzipped file"),
    "gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), "is empty, expected at least one row"),
    "truncated bzip2": ("a.csv.bz2", bz2.compress(csv_text([]))[:-9], "is truncated or damaged"),
    "truncated xz": ("a.json.xz", lzma.compress(jsonl(ROWS))[:-9], "is truncated or damaged"),
    "empty file": ("a.jsonl", b"", "is empty, expected at least one row"),
    "no rows": ("a.json", b"[]", "holds no rows"),
    "header without rows": ("a.csv", csv_text([]), "holds no rows"),
    "header with a name twice": ("a.csv", b"question,answer,question\na,1,b\n", "has the column 'question' twice"),
    "JSON object": ("a.json", json.dumps(ROWS[0]).encode(), "expected a JSON array of rows, found dict"),
    "rows that are no objects": ("a.jsonl", b'{"question": "q"}\n"q"\n', "row 1: expected an object of fields"),
    "cut JSON": ("a.json", json.dumps(ROWS).encode()[:-7], "is not valid JSON"),
    "cut line": ("a.jsonl", jsonl(ROWS)[:-9], "line 99 is not valid JSON"),
    "a number of 5,000 digits": ("a.jsonl", b'{"answer": ' + b"1" * 5000 + b"}", "line 1 is not valid JSON"),
    "JSON without an end of nesting": ("a.json", b"[" * 100_000, "is not valid JSON"),
    "open quote": ("a.csv", b'question,subject\n"open,x\n', "is not valid CSV"),
    "more cells than names": ("a.csv", b"question,answer\na,1,b\n", "row 0 has 3 columns, the header has 2"),
    "fewer cells than names": (
        "a.csv",
        csv_text([["q", "s", '["a", "b"]', 1], ["q", "s"]]),
        "row 1 (counted from 0) has no field 'choices'",
    ),
    "missing column": ("a.jsonl", jsonl(without("answer")), "no row has 'answer', which format mmlu needs"),
    "missing field of one row": (
        "a.jsonl",
        jsonl(ROWS + without("answer")[:1]),
        "row 99 (counted from 0) has no field 'answer', which format mmlu needs",
    ),
    "misspelt column": (
        "a.jsonl",
        jsonl([{**row, "choises": ["a"]} for row in without("choices")]),
        "no row has 'choices', which format mmlu needs (question, choices, answer, subject); fields found: question,",
    ),
    "column of a wrong type": (
        "a.parquet",
        parquet(pa.Table.from_pylist([{**row, "choices": 4} for row in ROWS])),
        "of 99 rows none is usable (wrong_type: 99)",
    ),
    "bytes for text": (
        "a.parquet",
        parquet(pa.Table.from_pylist([{**row, "question": b"q"} for row in ROWS])),
        "of 99 rows none is usable (wrong_type: 99)",
    ),
    "empty strings": ("a.jsonl", jsonl([question(" ")] * 3), "of 3 rows none is usable (empty_text: 3)"),
    "nulls": ("a.jsonl", jsonl([question(None)] * 3), "of 3 rows none is usable (missing_value: 3)"),
    "halves of characters": ("a.json", b'[{"question": "\\ud800", "subject": "s", "choices": ["a", "b"], "answer": 1}]',
                             "of 1 rows none is usable (no_unicode_text: 1)"),
    "rows of another task": ("a.jsonl", jsonl([FACT]), "has format counterfact, input_ablation needs mmlu"),
    "unknown suffix": ("a.xlsx", b"PK", "the name ends in '.xlsx', expected one of .json,"),
    "no suffix": ("a", jsonl(ROWS), "the name ends in 'no suffix'"),
}  # fmt: skip
PLACES = {
    "no such file": "does not exist",
    "a folder": "is a folder without a file of rows",
    "unknown scheme": "xyz://a.json cannot be read: Protocol not known: xyz",
    "web server that does not answer": "a.jsonl cannot be read: ",
    "bucket that does not answer": "a.jsonl cannot be read: Could not connect to the endpoint URL",
    "no such bucket": "s3://recrods/a.jsonl does not exist",
    "no permission to read": "a.jsonl cannot be read: ",
    "no permission to write": "s3://sources/out/config.json cannot be written: Access Denied",
    "output in a bucket that does not answer": "s3://sources/out cannot be listed: Could not connect to the endpoint",
    "output on a full disk": "full://out/config.json cannot be written: No space left on device",
    "output is a file": "good.jsonl is a file, expected a folder",
    "output inside a file": "good.jsonl/out lies in a file, expected a folder",
    "facts without a partner": "of 1 rows none is usable (no_partner: 1)",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name -> what the job that generates a dataset said."""
    folder = tmp_path_factory.mktemp("sources")
    target = str(write_model_config(folder / "target"))

    def generate(source, output=folder / "out", task="input_ablation"):
        words = ["--task", task, "--target.path", target, "--source.path", str(source), "--output", str(output)]
        return ("generate_dataset", words, {})

    orders = {}
    for number, (name, (file, content, _)) in enumerate(FILES.items()):
        path = folder / f"case-{number}" / file
        path.parent.mkdir()
        path.write_bytes(content)
        orders[name] = generate(path)
    good, alone = folder / "good.jsonl", folder / "alone.jsonl"
    good.write_bytes(jsonl(ROWS))
    alone.write_bytes(jsonl([FACT]))
    (folder / "folder.jsonl").mkdir()
    port = closed_port()
    silent = s3_environment(f"http://127.0.0.1:{port}")
    with s3_server("sources") as server, reader(server) as may_read:
        stranger = s3_environment(server, "nobody", "nothing")
        orders |= {
            "no such file": generate(folder / "nowhere.jsonl"),
            "a folder": generate(folder / "folder.jsonl"),
            "unknown scheme": generate("xyz://a.json"),
            "web server that does not answer": generate(f"http://127.0.0.1:{port}/a.jsonl"),
            "bucket that does not answer": (*generate("s3://sources/a.jsonl")[:2], silent),
            "no such bucket": (*generate("s3://recrods/a.jsonl")[:2], may_read),
            "no permission to read": (*generate("s3://sources/a.jsonl")[:2], stranger),
            "no permission to write": (*generate(good, "s3://sources/out")[:2], may_read),
            "output in a bucket that does not answer": (*generate(good, "s3://sources/out")[:2], silent),
            "output on a full disk": generate(good, "full://out"),
            "output is a file": generate(good, good),
            "output inside a file": generate(good, good / "out"),
            "facts without a partner": generate(alone, task="activation_patching"),
        }
        found = run_jobs(orders)
    assert not (folder / "out").exists(), "nothing was written"
    return found


@pytest.mark.parametrize("name", [*FILES, *PLACES])
def test_it_is_one_clear_line_before_a_model_loads(name, outcomes):
    found = outcomes[name]
    assert (found["status"], found["started"]) == (2, []), found
    check_line(found["stderr"], [FILES[name][2] if name in FILES else PLACES[name]])


def fact(**changes):
    return {**FACT, **changes}


LABEL = {"layer": 1, "index": 7, "description": "cats", "accepted": [], "score": 0.9}
UNUSABLE = {
    "input_ablation": (
        [question("good")],
        [
            (question(""), "empty_text"),
            (question("q", subject=None), "missing_value"),
            (question(7), "wrong_type"),
            (question("\ud800"), "no_unicode_text"),
            (question("q", choices=["a", "b\udfff"]), "no_unicode_text"),
            (question("q", choices=["only"]), "number_of_choices_out_of_range"),
            (question("q", choices=[str(number) for number in range(27)]), "number_of_choices_out_of_range"),
            (question("q", choices=["a", ""]), "empty_text"),
            (question("q", choices={"a": "b"}), "wrong_type"),
            (question("q", answer=2), "answer_out_of_range"),
            (question("q", answer="B"), "wrong_type"),
            (question("q", answer=float("nan")), "wrong_type"),
            (question("q", answer=float("inf")), "wrong_type"),
            (question("q", answer=[1]), "wrong_type"),
            (question("good"), "duplicate_row"),
        ],
    ),
    "activation_patching": (
        [fact(), fact(subject="Bonn", target_true="Germany")],
        [
            (fact(subject="  "), "empty_text"),
            (fact(subject=None), "missing_value"),
            (fact(target_true=["Italy"]), "wrong_type"),
            (fact(relation="no placeholder"), "bad_template"),
            (fact(relation="{} and {}"), "bad_template"),
            (fact(relation_id="P99"), "no_partner"),
            (fact(target_true="Italy "), "duplicate_row"),
        ],
    ),
    "feature_description": (
        [LABEL],
        [
            ({**LABEL, "layer": -1}, "index_out_of_range"),
            ({**LABEL, "index": "x"}, "wrong_type"),
            ({**LABEL, "layer": 1.5}, "wrong_type"),
            ({**LABEL, "score": 2}, "score_out_of_range"),
            ({**LABEL, "description": ""}, "empty_text"),
            ({**LABEL, "score": 0.1}, "label_score_too_low"),
            ({**LABEL, "vector": [1, float("inf")]}, "vector_not_finite"),
            ({**LABEL, "vector": ["x"]}, "wrong_type"),
            (LABEL, "duplicate_row"),
        ],
    ),
}


@pytest.mark.parametrize("task", UNUSABLE)
def test_every_unusable_row_is_counted_with_its_reason(task, tmp_path, monkeypatch):
    good, bad = UNUSABLE[task]
    monkeypatch.setattr("introspect_ray.data.prepare._check_sae", lambda *_: None)
    monkeypatch.setattr("introspect_ray.data.prepare.coder_folder", lambda _: tmp_path)
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([*good, *(row for row, _ in bad)]))
    config = GenerateConfig.model_validate(
        {
            "task": task,
            "target": {"path": str(write_model_config(tmp_path / "model"))},
            "source": {"path": str(source)},
            "output": str(tmp_path / "out"),
            "split": {"train": 1, "validation": 0, "test": 0},
        }
    )
    prepared = prepare(config, get_task(task))
    assert prepared.rejected == [(len(good) + place, reason) for place, (_, reason) in enumerate(bad)]
    account = prepared.account
    assert account.rejected == Counter(reason for _, reason in bad)
    assert (account.rows, account.used) == (len(good) + len(bad), len(good))


def test_a_disk_that_fills_up_during_a_run_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch):
    config = fake_config(tmp_path, [f"question {number}" for number in range(20)])
    write = Folder.write
    written = []

    def filling(self, name, content):
        if name.startswith("shards/"):
            written.append(name)
            if len(written) > 2:
                monkeypatch.setattr(
                    "fsspec.implementations.local.LocalFileSystem.pipe_file",
                    lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
                )
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", filling)
        with pytest.raises(
            UserError, match=r"/out/shards/shard-00002.parquet cannot be written: No space left on device$"
        ):
            make_dataset(config)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "out" / "shards").iterdir()) == [
        "shard-00000.parquet",
        "shard-00001.parquet",
    ]
    make_dataset(config)
    assert len(open_dataset(config.output).records(None, selected=False)) == 40
    assert inspect_dataset(config.output, 0, FakeTask()).problems == []
