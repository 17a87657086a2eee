"""Descriptions go into every layout and come out again as they were; what cannot be used has a reason."""

import gzip
import json

import pytest

from introspect_ray.errors import UserError
from introspect_ray.features import delphi, neuronpedia
from introspect_ray.features.descriptions import Description, by_latent, description_lines, parse_descriptions
from introspect_ray.features.judgements import Judgement, classification_scores

OURS = [
    Description(0, 2, "cats", "llm:gpt:4", {"simulation": 0.25, "detection": None}),
    Description(0, 2, "felines\u2028of «any» kind\n", "lexicon"),
    Description(0, 10, 'says "hi" \\ \x07', "neuronpedia:oai_token-act-pair:gpt-4o-mini"),
    Description(3, 1, "Städte", "neuronpedia::some:model", {"f1": 1.0}),
    Description(3, 5, "dogs", "explainer:runs/x"),
]


def test_our_lines_come_back_as_they_were_in_order_of_latents():
    text = description_lines([OURS[3], OURS[0], OURS[4], OURS[1], OURS[2]])
    assert parse_descriptions(text, "f") == OURS
    assert list(by_latent(OURS)) == [(0, 2), (0, 10), (3, 1), (3, 5)]
    assert json.loads(text.split("\n")[0]) == {
        "layer": 0,
        "latent": 2,
        "text": "cats",
        "source": "llm:gpt:4",
        "scores": {"simulation": 0.25, "detection": None},
    }


GOOD = {"layer": 1, "latent": 2, "text": "cats", "source": "lexicon", "scores": {}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": -1}, "field 'layer' is -1, expected a number from 0"),
        ({"latent": "2"}, "field 'latent' is '2'"),
        ({"latent": True}, "field 'latent' is True"),
        ({"text": " "}, "field 'text' is ' ', expected text"),
        ({"text": "\ud800"}, "field 'text'"),
        ({"source": None}, "field 'source' is None"),
        ({"scores": [1]}, "field 'scores' is [1]"),
        ({"scores": {"f1": "high"}}, "field 'scores.f1' is 'high', expected a number or null"),
        ({"scores": {"f1": float("nan")}}, "field 'scores.f1' is nan"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number_and_field(change, says):
    content = json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n"
    with pytest.raises(UserError) as error:
        parse_descriptions(content, "d.jsonl")
    assert str(error.value).startswith("d.jsonl, line 3: ") and says in str(error.value)


def test_a_line_that_lacks_a_field_or_is_none_is_refused():
    with pytest.raises(UserError, match="line 1: field 'source' is missing"):
        parse_descriptions(json.dumps({key: GOOD[key] for key in ("layer", "latent", "text")}), "d")
    with pytest.raises(UserError, match="line 1: no JSON"):
        parse_descriptions("{", "d")
    with pytest.raises(UserError, match="line 1: expected an object of fields, found list"):
        parse_descriptions("[]", "d")


# --- Neuronpedia ------------------------------------------------------------------------------------------------


def batches(descriptions, **names):
    known = {"model_id": "llama", "source_set": "res-1k", "author_id": "me"} | names
    return neuronpedia.explanation_batches(descriptions, **known)


def lines(content):
    return [json.loads(line) for line in gzip.decompress(content).decode().split("\n") if line]


def test_neuronpedia_batches_bring_everything_back():
    files = batches(OURS)
    assert sorted(files) == [f"v1/llama/{n}-res-1k/explanations/batch-0.jsonl.gz" for n in (0, 3)]
    found = neuronpedia.read_explanations(files.items())
    # Sorted as text, 10 comes before 2; the candidates of one latent stay in order.
    assert found.descriptions == [OURS[2], OURS[0], OURS[1], OURS[3], OURS[4]] and not found.unused
    assert batches(OURS) == files


def test_neuronpedia_lines_have_every_column_the_index_as_text_and_ids_of_their_own():
    rows = [row for content in batches(OURS).values() for row in lines(content)]
    columns = "id modelId layer index authorId description embedding typeName explanationModelName"
    columns += " umap_x umap_y umap_cluster umap_log_feature_sparsity notes"
    assert all(list(row) == columns.split() for row in rows)
    assert [row["index"] for row in rows] == ["10", "2", "2", "1", "5"]
    assert len({row["id"] for row in rows}) == 5
    first = rows[0]
    assert (first["typeName"], first["explanationModelName"], first["layer"], first["notes"]) == (
        "oai_token-act-pair",
        "gpt-4o-mini",
        "0-res-1k",
        None,
    )


def test_neuronpedia_batches_hold_1024_lines_in_order_of_the_index_as_text():
    many = [Description(4, number, f"number {number}", "lexicon") for number in range(2500)]
    files = batches(many)
    assert [len(lines(files[f"v1/llama/4-res-1k/explanations/batch-{n}.jsonl.gz"])) for n in range(3)] == [
        1024,
        1024,
        452,
    ]
    order = [row["index"] for content in files.values() for row in lines(content)]
    assert order == sorted(map(str, range(2500))) and order[:4] == ["0", "1", "10", "100"]


def test_published_neuronpedia_rows_of_every_age_are_read():
    rows = [
        {"layer": "5-llamascope-res-32k", "index": "7", "description": "cats", "embedding": "[0.1]",
         "typeName": "np_max-act", "explanationModelName": "gpt-4o-mini", "notes": None},
        {"layer": "5-llamascope-res-32k", "index": "7", "description": "felines", "explanationModel": "gpt-3.5"},
        {"layer": "5-llamascope-res-32k", "index": 8, "description": "dogs", "notes": "by hand"},
        {"layer": "5-llamascope-res-32k", "index": "9", "description": ""},
        {"layer": "logits", "index": "9", "description": "x"},
        {"layer": "5-llamascope-res-32k", "index": "x", "description": "x"},
    ]  # fmt: skip
    content = "\n".join(map(json.dumps, rows)).encode()
    found = neuronpedia.read_explanations([("batch-0.jsonl", content)])
    assert [(one.layer, one.latent, one.text, one.source) for one in found.descriptions] == [
        (5, 7, "cats", "neuronpedia:np_max-act:gpt-4o-mini"),
        (5, 7, "felines", "neuronpedia::gpt-3.5"),
        (5, 8, "dogs", "neuronpedia"),
    ]
    assert found.unused == [
        ("batch-0.jsonl, line 4", "no_description"),
        ("batch-0.jsonl, line 5", "source_without_layer"),
        ("batch-0.jsonl, line 6", "index_is_no_number"),
    ]


def test_unusable_neuronpedia_files_are_refused():
    row = {"layer": "5-a", "index": "1", "description": "x"}

    def refused(*rows, cut=None):
        content = gzip.compress("\n".join(map(json.dumps, rows)).encode())[:cut]
        with pytest.raises(UserError) as error:
            neuronpedia.read_explanations([("b", content)])
        return str(error.value)

    assert "b, line 2: no field 'index'; fields found: layer, description" in refused(
        row, {"layer": "5-a", "description": "x"}
    )
    assert "source 5-b beside 5-a" in refused(row, row | {"layer": "5-b"})
    assert "truncated or damaged" in refused(row, cut=-9)


def test_batches_are_told_by_their_names():
    names = ("batch-12.jsonl.gz", "batch-3.jsonl", "batch-x.jsonl", "source.jsonl")
    assert [neuronpedia.batch_number(name) for name in names] == [12, 3, None, None]


# --- delphi -----------------------------------------------------------------------------------------------------

JUDGED = [
    {"str_tokens": ["a", " cat"], "activations": [0.0, 2.5], "distance": 3, "activating": True, "prediction": True,
     "probability": 0.875, "correct": True},
    {"str_tokens": ["b"], "activations": [0.0], "distance": -1, "activating": False, "prediction": True,
     "probability": None, "correct": False},
    {"str_tokens": ["c"], "activations": [0.0], "distance": -1, "activating": False, "prediction": None,
     "probability": None, "correct": None},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("layers.5.mlp_latent12.txt", ("layers.5.mlp", (5, 12))),
        ("model.layers.11--res_latent0.txt", ("model.layers.11--res", (11, 0))),
        ("transformer.h.3_latent9.txt", ("transformer.h.3", (3, 9))),
        ("lm_head_latent9.txt", None),
        ("layers.5.mlp.txt", None),
    ],
)
def test_delphi_names_say_layer_and_latent(name, parsed):
    assert delphi.parse_name(name) == parsed


def test_delphi_files_come_back_as_they_were():
    assert delphi.file_name("layers/5.mlp", 12) == "layers--5.mlp_latent12.txt"
    content = delphi.explanation_file('says "Städte" \\ \n')
    found = delphi.read_explanations([("layers.5_latent1.txt", content), ("notes.txt", b'"x"')])
    assert found.descriptions == [Description(5, 1, 'says "Städte" \\ \n', "delphi")]
    assert found.unused == [("notes.txt", "name_of_no_latent")]
    assert delphi.explanation_file(found.descriptions[0].text) == content == '"says \\"Städte\\" \\\\ \\n"'.encode()

    content = json.dumps(JUDGED, separators=(",", ":")).encode()
    judged = delphi.read_judgements("fuzz", "layers.5_latent1.txt", content)
    assert delphi.judgements_file(judged.judgements) == content
    assert (judged.layer, judged.latent, judged.judgements[2].reason) == (5, 1, "no_answer")
    assert delphi.judged_scores(judged)["fuzz/recall"] == 1 and delphi.judged_scores(judged)["fuzz/precision"] == 0.5
    assert classification_scores(judged.judgements)["failure_rate"].value == pytest.approx(1 / 3)


def test_delphi_simulation_is_the_correlation_over_all_ranges():
    rows = [
        {"distance": 1, "ev_correlation_score": 0.9},
        {"distance": 0, "ev_correlation_score": 0.5},
        {"distance": 2, "ev_correlation_score": "nan"},
    ]

    def read(rows):
        return delphi.read_simulation("layers.5_latent1.txt", json.dumps(rows).encode())

    assert read(rows) == ((5, 1), 0.5)
    assert read([{"distance": 0, "ev_correlation_score": "nan"}]) == ((5, 1), None)


def test_unusable_delphi_files_are_refused():
    with pytest.raises(UserError, match=r"a_latent1\.txt: no JSON|layers\.5_latent1\.txt: no JSON"):
        delphi.read_explanations([("layers.5_latent1.txt", b"cats")])
    with pytest.raises(UserError, match=r"module layers\.5\.mlp beside layers\.5"):
        delphi.read_explanations([("layers.5_latent1.txt", b'"x"'), ("layers.5.mlp_latent1.txt", b'"x"')])
    for change, says in (
        ({"prediction": "yes"}, "field 'prediction' is 'yes'"),
        ({"activating": None}, "field 'activating' is None"),
        ({"activations": ["x"]}, "could not convert"),
    ):
        with pytest.raises(UserError, match=says):
            delphi.read_judgements("fuzz", "layers.5_latent1.txt", json.dumps([JUDGED[0] | change]).encode())
    with pytest.raises(UserError, match="missing: str_tokens"):
        row = {key: JUDGED[0][key] for key in JUDGED[0] if key != "str_tokens"}
        delphi.read_judgements("fuzz", "layers.5_latent1.txt", json.dumps([row]).encode())


def test_an_answer_is_correct_if_it_is_the_right_one_and_nothing_if_there_is_none():
    def correct(activating, prediction):
        return Judgement((), (), 0, activating, prediction).correct

    assert [correct(True, True), correct(True, False), correct(False, False), correct(True, None)] == [
        True,
        False,
        True,
        None,
    ]
