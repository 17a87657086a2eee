"""Every row is used or has a reason; every unusable file is one line that says what was expected."""

import gzip
import io
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_task import question

from introspect_ray.config import SourceConfig
from introspect_ray.data.sources import load_source
from introspect_ray.errors import UserError

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
FACT = {
    "relation": "The mother tongue of {} is",
    "relation_prefix": "The mother tongue of",
    "relation_suffix": "is",
    "prompt": "The mother tongue of Danielle Darrieux is",
    "relation_id": "P103",
    "target_false": " English",
    "target_true": " French",
    "subject": "Danielle Darrieux",
}
NORMALIZED_FACT = {
    "subject": "Danielle Darrieux",
    "relation_id": "P103",
    "template": "The mother tongue of {} is",
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_true": "French",
    "row": 0,
}
ROME = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
}
LABEL = {"layer": 1, "index": 7, "description": "cats", "accepted": ["felines"], "score": 0.9}


def load(path, *formats, **config):
    return load_source(SourceConfig(path=str(path), **config), "a_task", formats)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row", [FACT, ROME], ids=["flat", "nested"])
def test_both_layouts_of_counterfact_give_the_same_fact(tmp_path, row):
    source = load(jsonl(tmp_path / "a.jsonl", [row]), "counterfact")
    assert source.rows == [NORMALIZED_FACT]


def test_known_fact_takes_the_template_that_other_rows_share(tmp_path):
    row = {"known_id": 3, "subject": "Rome", "attribute": "Italy", "template": "{} is in", "relation_id": "P17"}
    row |= {"prompt": "Rome is in the heart of", "prediction": " Italy, of course"}
    (fact,) = load(jsonl(tmp_path / "a.jsonl", [row]), "known_facts").rows
    assert (fact["template"], fact["prompt"], fact["target_true"]) == ("{} is in", "Rome is in", "Italy")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.json.gz"])
def test_all_file_kinds_give_the_same_rows(tmp_path, name):
    rows = [question('Is it?\n  Yes, or "no"'), question("And that? é \u2028", answer=0)]
    if "csv" in name:
        lines = [[*rows[0]], *([*map(_cell, row.values())] for row in rows)]
        content = "\r\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines).encode()
    elif "parquet" in name:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        content = buffer.getvalue()
    elif "jsonl" in name:
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n\n"
    else:
        content = json.dumps(rows).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = load(path, "mmlu")
    assert [row["question"] for row in source.rows] == ['Is it?\n  Yes, or "no"', "And that? é"]
    assert [(row["choices"], row["answer"], row["row"]) for row in source.rows] == [
        (["one", "two"], 1, 0),
        (["one", "two"], 0, 1),
    ]


def _cell(value):
    return value if isinstance(value, str) else json.dumps(value)


def test_unusable_rows_are_counted_with_their_reason_and_their_number(tmp_path):
    rows = [
        question("good"),
        question("  "),
        question("answer", answer=2),
        question("answer", answer=-1),
        question("answer", answer=True),
        question("answer", answer="B"),
        question("answer", answer=0.5),
        question("choices", choices=["one"]),
        question("choices", choices=["one", ""]),
        question("choices", choices="one"),
        question("subject", subject=None),
        question(["a", "list"]),
        question("good"),
        question("good", answer=0),
    ]
    source = load(jsonl(tmp_path / "a.jsonl", rows), "mmlu")
    assert source.rejected == [
        (1, "empty_text"),
        (2, "answer_out_of_range"),
        (3, "answer_out_of_range"),
        (4, "wrong_type"),
        (5, "wrong_type"),
        (6, "wrong_type"),
        (7, "number_of_choices_out_of_range"),
        (8, "empty_text"),
        (9, "wrong_type"),
        (10, "missing_value"),
        (11, "wrong_type"),
        (12, "duplicate_row"),
    ]
    assert [row["row"] for row in source.rows] == [0, 13]
    assert len(source.rows) + len(source.rejected) == source.num_rows == 14


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score": 1.5}, "score_out_of_range"),
        ({"score": float("nan")}, "score_out_of_range"),
        ({"layer": -1}, "index_out_of_range"),
        ({"index": 1e300}, None),
        ({"index": 10**400}, None),
        ({"score": 10**400}, "wrong_type"),
        ({"index": float("inf")}, "wrong_type"),
        ({"index": 2.5}, "wrong_type"),
        ({"accepted": [1]}, "wrong_type"),
        ({"vector": 3.5}, "wrong_type"),
        ({"vector": []}, "wrong_type"),
        ({"vector": ["a"]}, "wrong_type"),
        ({"vector": [1, float("nan")]}, "vector_not_finite"),
        ({"vector": "[1, 2]"}, None),
        ({"vector": "1, 2"}, "wrong_type"),
    ],
)
def test_unusable_labels(tmp_path, changes, reason):
    source = load(jsonl(tmp_path / "a.jsonl", [LABEL, {**LABEL, **changes}]), "latent_labels")
    assert source.rejected == ([(1, reason)] if reason else [])


@pytest.mark.parametrize("template", ["no placeholder", "{} and {}"])
def test_a_template_has_one_placeholder(tmp_path, template):
    source = load(jsonl(tmp_path / "a.jsonl", [FACT, {**FACT, "relation": template}]), "counterfact")
    assert source.rejected == [(1, "bad_template")]


def test_plain_texts(tmp_path):
    source = load(jsonl(tmp_path / "a.jsonl", [{"text": " one "}, {"text": ""}, {"text": 3}, {"text": "two"}]), "text")
    assert [row["text"] for row in source.rows] == ["one", "two"]
    assert source.rejected == [(1, "empty_text"), (2, "wrong_type")]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one\ntwo\r\n three \n", ["one", "two", "three"]),
        ("one\nstill one\n\n \ntwo\n", ["one\nstill one", "two"]),
        ("\ufeffonly\u2028this", ["only\u2028this"]),
    ],
)
def test_a_text_file_holds_paragraphs_or_lines(tmp_path, content, texts):
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert [row["text"] for row in load(tmp_path / "a.txt", "text").rows] == texts


@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("paragraph", ["one\nstill one", "two"]),
        ("line", ["one", "still one", "two"]),
        ("file", ["one\nstill one\n\ntwo"]),
    ],
)
def test_what_one_text_of_a_text_file_is_can_be_said(tmp_path, unit, texts):
    (tmp_path / "a.txt").write_text("one\nstill one\n\ntwo\n")
    source = load_source(SourceConfig(path=str(tmp_path / "a.txt"), text_unit=unit), "text", ("text",))
    assert [row["text"] for row in source.rows] == texts


def test_marked_spans_keep_their_text_as_it_is(tmp_path):
    spans = [(" a b c", 2, 4), ("x", 0, 1), ("x y", 2, 9), ("x y", 2, 2), ("x y", 0, 1), ("x y", 0, "wide")]
    rows = [{"text": text, "span_start": start, "span_end": end} for text, start, end in spans]
    source = load(jsonl(tmp_path / "a.jsonl", [*rows, {**rows[4], "subject": "letters"}]), "marked_text")
    assert source.format == "marked_text"
    assert source.rows == [
        {"text": " a b c", "span": [2, 4], "subject": "text", "row": 0},
        {"text": "x y", "span": [0, 1], "subject": "text", "row": 4},
        {"text": "x y", "span": [0, 1], "subject": "letters", "row": 6},
    ]
    reasons = {1: "nothing_left_without_span", 2: "span_out_of_range", 3: "span_out_of_range", 5: "wrong_type"}
    assert dict(source.rejected) == reasons


def test_limit_takes_the_first_rows(tmp_path):
    source = load(jsonl(tmp_path / "a.jsonl", [question(f"q{n}") for n in range(9)]), "mmlu", limit=4)
    assert (source.num_rows, [row["row"] for row in source.rows]) == (4, [0, 1, 2, 3])


def _truncated_parquet():
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([question(f"q{n}") for n in range(99)]), buffer)
    return buffer.getvalue()[:-20]


ROWS = "".join(json.dumps(question(f"q{n}")) + "\n" for n in range(99)).encode()
BAD_FILES = [
    ("a.jsonl", b"", "is empty, expected at least one row"),
    ("a.jsonl", b" \n\n", "is empty, expected at least one row"),
    ("a.json", b"[]", "holds no rows"),
    ("a.csv", b"question,subject,choices,answer\n", "holds no rows"),
    ("a.json", b'{"question": "q"}', "expected a JSON array of rows, found dict"),
    ("a.json", b"[1, 2]", "row 0: expected an object of fields, found int"),
    ("a.json", b'[{"question": "q"', "is not valid JSON"),
    ("a.json", b"[" * 100_000, "is not valid JSON"),
    ("a.jsonl", ROWS[:-9], "line 99 is not valid JSON"),
    ("a.jsonl", b"\xff\xfe\x00q", "is not UTF-8 text: byte 0 is 0xff"),
    ("a.jsonl.gz", gzip.compress(ROWS)[:-20], "is truncated or damaged"),
    ("a.jsonl.gz", ROWS, "cannot be read: Not a gzipped file"),
    ("a.parquet", _truncated_parquet(), "is not a complete Parquet file"),
    ("a.parquet", b"PAR1", "is not a complete Parquet file"),
    ("a.csv", b'question,subject\n"open quote,x\n', "is not valid CSV"),
    ("a.csv", b"question,subject,choices,answer\na,b,c,d,e\n", "row 0 has 5 columns, the header has 4"),
    ("a.doc", ROWS, "the name ends in '.doc', expected one of .json,"),
    ("a.txt", b"a text", "has format text, a_task needs mmlu"),
    ("a", ROWS, "the name ends in 'no suffix'"),
    (
        "a.jsonl",
        ROWS + b'{"question": "q", "subject": "s", "choices": ["a", "b"]}',
        "row 99 (counted from 0) has no field 'answer'",
    ),
    (
        "a.csv",
        b'question,subject,choices,answer\nq,s,"[""a"", ""b""]",1\nq,s\n',
        "row 1 (counted from 0) has no field 'choices'",
    ),
    ("a.json", b'[{"question": "q", "subject": "s", "choices": []}]', "no row has 'answer', which format mmlu needs"),
    ("a.json", json.dumps([FACT]).encode(), "has format counterfact, a_task needs mmlu"),
]


@pytest.mark.parametrize(
    ("name", "content", "line"), BAD_FILES, ids=[f"{name}-{line[:24]}" for name, _, line in BAD_FILES]
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path, "mmlu")
    message = str(caught.value)
    assert message.startswith(f"source {path}") and line in message and "\n" not in message


def test_a_folder_and_a_glob_are_the_rows_of_their_files_in_order_of_names(tmp_path):
    folder = tmp_path / "rows.json"
    (folder / "deeper").mkdir(parents=True)
    questions = [question(f"Is it {number}?") for number in range(6)]
    # Written in another order than that of the names.
    jsonl(folder / "b.jsonl", questions[2:4])
    jsonl(folder / "a.jsonl", [*questions[:2], questions[2]])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(questions[4]).encode()))
    for name in ("README.md", "_SUCCESS", ".hidden.csv", "_part.csv"):
        (folder / name).write_text("not rows")
    jsonl(folder / "deeper" / "d.jsonl", questions[5:])
    for path in (folder, f"{folder}/", folder / "*.jsonl*", f"file://{folder}", f"file://{folder}/?.jsonl*"):
        source = load(path, "mmlu")
        asked = [(row["question"], row["row"]) for row in source.rows]
        assert asked == [(f"Is it {number}?", row) for number, row in enumerate((0, 1, 2, 4, 5))]
        assert source.rejected == [(3, "duplicate_row")] and source.num_rows == 6
    assert [row["question"] for row in load(folder / "*.jsonl", "mmlu", limit=2).rows] == ["Is it 0?", "Is it 1?"]
    assert load(folder / "**" / "*.jsonl", "mmlu").rows[-1]["question"] == "Is it 5?"
    (folder / "b.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"source .*/b.jsonl, line 1 is not valid JSON"):
        load(folder, "mmlu")
    (folder / "e.csv").write_text("question\nx\n")
    with pytest.raises(UserError, match=r"holds files of several kinds \(.csv, .jsonl\): name one, such as \*.csv"):
        load(folder, "mmlu")
    # A name may hold what a pattern is made of.
    assert len(load(jsonl(tmp_path / "a[1]*.jsonl", questions), "mmlu").rows) == 6


def test_a_folder_of_an_object_store():
    files = fsspec.filesystem("memory")
    for name in "ab":
        files.pipe_file(f"/bucket/rows/{name}.jsonl", json.dumps(question(f"Is it {name}?")).encode())
    for path in ("memory://bucket/rows", "memory://bucket/rows/", "memory://bucket/*/?.jsonl"):
        assert [row["question"] for row in load(path, "mmlu").rows] == ["Is it a?", "Is it b?"]
    with pytest.raises(UserError, match="the name ends in 'no suffix'"):
        load("memory://bucket/other", "mmlu")


def test_missing_file_folder_and_format(tmp_path):
    for path, line in (
        (tmp_path / "no.json", "does not exist"),
        (tmp_path / "no-suffix", "the name ends in"),
        (tmp_path, "is a folder without a file of rows"),
        (tmp_path / "*.json", "matches no file"),
        ("xyz://a.json", "cannot be read"),
    ):
        with pytest.raises(UserError, match=line):
            load(path, "mmlu")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="is a folder without a file of rows"):
        load(tmp_path / "folder.json", "mmlu")
    with pytest.raises(UserError, match="no row has 'template' or 'attribute', which format known_facts needs"):
        load(jsonl(tmp_path / "a.jsonl", [FACT]), "known_facts", format="known_facts")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real inputs are not here")
@pytest.mark.parametrize(
    ("name", "kind", "total"), [("known_facts.json", "known_facts", 860), ("mmlu_sample.jsonl", "mmlu", 1571)]
)
def test_real_files_are_read_whole(name, kind, total):
    source = load(REAL_DATA / name, kind)
    assert source.num_rows == total == len(source.rows) + len(source.rejected)
    assert len(source.rows) >= 0.99 * total
    assert {reason for _, reason in source.rejected} <= {"duplicate_row"}


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(UserError, match=r"^source hf://datasets/a/b/c.parquet cannot be read: .*offline") as caught:
        load("hf://datasets/a/b/c.parquet", "mmlu")
    assert "\n" not in str(caught.value)


def test_descriptions_give_one_label_per_latent_with_the_other_candidates_as_accepted(tmp_path):
    rows = [
        {"layer": 1, "latent": 4, "text": "cats", "source": "llm:x", "scores": {"simulation": 0.2}},
        {"layer": 1, "latent": 4, "text": "felines", "source": "lexicon", "scores": {"simulation": 0.9}},
        {"layer": 1, "latent": 4, "text": "  ", "source": "lexicon", "scores": {"simulation": 1.0}},
        {"layer": 1, "latent": 5, "text": "dogs", "source": "lexicon", "scores": {"simulation": None}},
    ]
    path = tmp_path / "descriptions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def labels(score):
        source = load_source(SourceConfig(path=str(path), label_score=score), "task", ["latent_labels"])
        assert source.num_rows == len(source.rows) + len(source.rejected) == 4
        shown = [(row["index"], row["description"], row["accepted"], row["score"], row["kind"]) for row in source.rows]
        return shown, source.rejected

    assert labels("simulation") == (
        [(4, "felines", ["cats"], 0.9, "lexicon"), (5, "dogs", [], None, "lexicon")],
        [(0, "another_label_of_the_latent_is_used"), (2, "empty_text")],
    )
    assert labels(None) == (
        [(4, "cats", ["felines"], None, "llm:x"), (5, "dogs", [], None, "lexicon")],
        [(1, "another_label_of_the_latent_is_used"), (2, "empty_text")],
    )
    with pytest.raises(UserError, match=r"no row has a score 'detection'"):
        labels("detection")
