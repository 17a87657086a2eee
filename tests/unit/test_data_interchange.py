"""A dataset that goes out in P1's layouts comes back with the same content; what cannot be taken over is counted."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_task import make_dataset
from safetensors.torch import load_file
from task_helpers import WIDTH, fact, says_only, tiny_target
from test_data_pickles import tar

from introspect_ray.config import ConvertConfig, GenerateConfig, SourceConfig
from introspect_ray.data import interchange
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.inspect import inspect_dataset
from introspect_ray.data.sources import load_source
from introspect_ray.errors import UserError
from introspect_ray.tasks.registry import get_task

WORDS = ("cat", "mat", "Paris", "France")
SAME = {
    "activation_patching": ("text", "other_text", "layers", "position", "token_start", "token_end"),
    "input_ablation": ("text", "hint_start", "hint_end", "hint"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny target on disk, and loaded."""
    folder = tmp_path_factory.mktemp("target")
    found = tiny_target("llama", bos=True)
    says_only(found, ("A", "B", "C", "D"))
    found.model.save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)
    return found, str(folder)


@pytest.fixture(scope="module", params=list(SAME))
def exported(request, target, tmp_path_factory):
    """A generated dataset of the task, and the folder of published files that it became."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "activation_patching":
        rows = [fact(row, f"Person {row}", WORDS[row % 4]) for row in range(40)]
        rows = [{**row, "relation": row["template"]} for row in rows]
    else:
        rows = [
            {"question": f"Which is it, {row}?", "subject": "s", "choices": list(WORDS), "answer": row % 4}
            for row in range(40)
        ]
    (folder / "rows.json").write_text(json.dumps(rows))
    config = GenerateConfig.model_validate(
        {
            "task": request.param,
            "target": {"path": target[1]},
            "source": {"path": str(folder / "rows.json")},
            "output": str(folder / "ours"),
            "activation_patching": {"num_blocks": 2, "pairs_per_subject": 1, "balance": False},
            "items_per_shard": 16,
        }
    )
    make_dataset(config, get_task(request.param), target[0])
    convert = ConvertConfig.model_validate(
        {"source": config.output, "output": str(folder / "theirs"), "target": {"path": target[1]}}
    )
    return request.param, config.output, convert, interchange.to_published(convert)


def test_columns_and_types_are_the_published_ones(exported, target):
    task, ours, convert, line = exported
    manifest = open_dataset(ours).manifest
    assert line == f"wrote {convert.output}: {sum(manifest.selected.values())} rows in {len(manifest.selected)} splits"
    for split, count in manifest.selected.items():
        table = pq.read_table(f"{convert.output}/{split}.parquet")
        expected = interchange.ACT_PATCH if task == "activation_patching" else interchange.INPUT_ABLATION
        assert table.schema.equals(expected) and table.num_rows == count
        if task == "activation_patching":
            tokenizer = target[0].tokenizer
            for row, record in zip(table.to_pylist(), open_dataset(ours).records(split), strict=True):
                assert tokenizer.convert_tokens_to_string(row["input_tokens"]) == record["text"]
                ids = tokenizer(record["text"]).input_ids
                assert (
                    tokenizer.decode([ids[row["patch_position"]["orig_pos"]]])
                    == row["patch_position"]["orig_text_token"]
                )
                others = tokenizer(record["other_text"]).input_ids
                other = row["patch_position"]["counterfact_pos"]
                assert others[other + 1 :] == ids[row["patch_position"]["orig_pos"] + 1 :]
                assert len(row["patch_position"]["intervention_vector"]) == WIDTH
                assert tokenizer.convert_tokens_to_string(row["original_continuation"]).strip() == record["original"]


def test_what_went_out_comes_back(exported, target, tmp_path):
    task, ours, convert, _ = exported
    back = ConvertConfig.model_validate(
        {
            "action": "from_published",
            "source": convert.output,
            "output": str(tmp_path / "back"),
            "target": {"path": target[1]},
            "records_per_shard": 50,
        }
    )
    interchange.from_published(back)
    names = (*SAME[task], "split", "original", "content", "changed")

    def contents(url):
        records = open_dataset(url, task).records(None)
        vectors = [record["vector"].tobytes() if "vector" in record else b"" for record in records]
        return sorted(
            (repr([record[name] for name in names]), vector) for record, vector in zip(records, vectors, strict=True)
        )

    assert contents(back.output) == contents(ours)
    shards = open_dataset(back.output).manifest.shards
    assert [shard.num_rows for shard in shards[:-1]] == [50] * (len(shards) - 1) and shards[-1].num_rows <= 50
    assert inspect_dataset(back.output, 1).problems == []
    again = back.model_copy(update={"action": "to_published", "source": back.output, "output": str(tmp_path / "again")})
    interchange.to_published(again)
    for split in open_dataset(ours).manifest.selected:
        files = sorted((tmp_path / "again").glob(f"{split}*.parquet"))
        one, others = pq.read_table(f"{convert.output}/{split}.parquet"), [pq.read_table(file) for file in files]
        assert max(table.num_rows for table in others) <= 50
        if len(files) > 1:
            total = f"of-{len(files):05d}"
            assert [file.stem for file in files] == [f"{split}-{n:05d}-{total}" for n in range(len(files))]
        assert sorted(map(repr, one.to_pylist())) == sorted(repr(row) for table in others for row in table.to_pylist())


def test_a_conversion_that_fails_halfway_leaves_nothing(exported, target, tmp_path):
    task, _, convert, _ = exported
    (tmp_path / "in").mkdir()
    table = pq.read_table(f"{convert.output}/train.parquet")
    half = table.num_rows // 2
    column = "counterfactual_text" if task == "activation_patching" else "hint"
    marked = [f"{row} mark of the second half" if row >= half else "x" for row in range(table.num_rows)]
    place = table.schema.get_field_index(column)
    table = table.set_column(place, table.schema.field(place), pa.array(marked))
    damaged = tmp_path / "in" / "train.parquet"
    pq.write_table(table, damaged, row_group_size=half, compression="none", write_page_checksum=True)
    content = damaged.read_bytes()
    place = content.index(b"mark of the second half", len(content) // 3)
    damaged.write_bytes(content[:place] + b"XXXX" + content[place + 4 :])
    values = {"action": "from_published", "source": str(tmp_path / "in"), "target": {"path": target[1]}}
    config = ConvertConfig.model_validate({**values, "output": str(tmp_path / "out"), "records_per_shard": 4})
    with pytest.raises(UserError, match=r"source .*train.parquet is not a complete Parquet file"):
        interchange.from_published(config)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("position", "line"),
    [(pa.string(), "is string, expected a struct with"), (pa.struct([("orig_pos", pa.int64())]), "expected a struct")],
)
def test_a_patch_position_of_another_type_is_refused(target, tmp_path, position, line):
    (tmp_path / "in").mkdir()
    schema = pa.schema(
        [one if one.name != "patch_position" else one.with_type(position) for one in interchange.ACT_PATCH]
    )
    pq.write_table(schema.empty_table(), tmp_path / "in" / "train.parquet")
    values = {"action": "from_published", "source": str(tmp_path / "in"), "target": {"path": target[1]}}
    config = ConvertConfig.model_validate({**values, "output": str(tmp_path / "out")})
    with pytest.raises(UserError, match=line):
        interchange.from_published(config)
    pq.write_table(interchange.ACT_PATCH.empty_table(), tmp_path / "in" / "train.parquet")
    with pytest.raises(UserError, match="holds no rows"):
        interchange.from_published(config)
    pq.write_table(interchange.INPUT_ABLATION.empty_table(), tmp_path / "in" / "test.parquet")
    with pytest.raises(UserError, match="files of activation_patching and of input_ablation, expected one task"):
        interchange.from_published(config)


def test_rows_that_do_not_fit_are_counted(target, tmp_path, exported):
    task, _, convert, _ = exported
    (tmp_path / "in").mkdir()
    table = pq.read_table(f"{convert.output}/train.parquet")
    rows = table.to_pylist()[:6]
    if task == "activation_patching":
        rows[1]["patch_position"]["orig_pos"] = 9999
        rows[2]["patch_position"]["orig_text_token"] = "elsewhere"
        rows[3]["patch_position"]["intervention_vector"] = [1.0]
        rows[4]["patch_position"]["intervention_vector"][0] = float("nan")
        rows[5]["patch_position"]["intervention_vector"][0] = 1e6  # overflows in float16
        rows.append(rows[0])
        names = ("position_out_of_range", "token_is_another", "vector_width", "vector_not_finite", "duplicate_row")
        reasons = dict.fromkeys(names, 1) | {"vector_not_finite": 2}
    else:
        rows[1]["hint"] = "no such hint"
        rows[2]["zeroshot_prediction"] = None
        rows.append(rows[0])
        reasons = dict.fromkeys(("hint_not_found", "missing_value", "duplicate_row"), 1)
    pq.write_table(table.schema.empty_table().from_pylist(rows, schema=table.schema), tmp_path / "in" / "train.parquet")
    pq.write_table(table, tmp_path / "in" / "train_full.parquet")
    config = ConvertConfig.model_validate(
        {
            "action": "from_published",
            "source": str(tmp_path / "in"),
            "output": str(tmp_path / "out"),
            "target": {"path": target[1]},
        }
    )
    line = interchange.from_published(config)
    manifest = open_dataset(config.output).manifest
    assert manifest.source.rejected == reasons
    assert manifest.source.rows == 7 and manifest.source.used == manifest.num_records
    assert all(f"{count} rows left out: {reason}" in line for reason, count in reasons.items())
    with pytest.raises(UserError, match="is not empty"):
        interchange.from_published(config)
    pq.write_table(table.drop_columns([table.schema.names[1]]), tmp_path / "in" / "train.parquet")
    with pytest.raises(UserError, match=f"has no column '{table.schema.names[1]}'"):
        interchange.from_published(config.model_copy(update={"output": str(tmp_path / "other")}))


def test_a_folder_without_splits(target, tmp_path):
    config = ConvertConfig.model_validate(
        {
            "action": "from_published",
            "source": str(tmp_path),
            "output": str(tmp_path / "x"),
            "target": {"path": target[1]},
        }
    )
    with pytest.raises(UserError, match=r"holds no file train\*.parquet"):
        interchange.from_published(config)


def test_published_pickles_become_safetensors_and_labels(tmp_path):
    weights = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    found = {"chosen_label": "cats", "all_labels": ["cats", "felines"], "all_label_scores": {"cats": 0.9}}
    source = tar(
        tmp_path / "a.tar.gz",
        {
            "features/layer_3.pkl": pickle.dumps(weights),
            "explanations/train_explanations.pkl": pickle.dumps([((3, 1), found)]),
            "explanations/train_layer_feature_idxs.pkl": pickle.dumps([(3, 1), (3, 2)]),
            "exemplar_config.json": b"{}",
        },
    )
    config = ConvertConfig(action="pickles", source=str(source), output=str(tmp_path / "out"))
    assert interchange.convert_pickles(config) == f"wrote {config.output}: 3 files; 1 others passed over"
    back = load_file(tmp_path / "out" / "features" / "layer_3.safetensors")["tensor"]
    assert back.dtype == torch.bfloat16 and torch.equal(back, weights)
    labels = tmp_path / "out" / "explanations" / "train_explanations.parquet"
    (row,) = load_source(SourceConfig(path=str(labels)), "feature_description", ("latent_labels",)).rows
    assert (row["layer"], row["index"], row["description"], row["accepted"], row["score"]) == (
        3,
        1,
        "cats",
        ["felines"],
        0.9,
    )
    pairs = pq.read_table(tmp_path / "out" / "explanations" / "train_layer_feature_idxs.parquet").to_pylist()
    assert pairs == [{"layer": 3, "index": 1}, {"layer": 3, "index": 2}]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"../x.pkl": pickle.dumps(torch.ones(1))}, "lies outside of it"),
        ({"a_explanations.pkl": pickle.dumps([("x", {})])}, "entry 0 is no explanation"),
        ({"a_explanations.pkl": pickle.dumps({})}, "expected a list of explanations"),
        ({"a_idxs.pkl": pickle.dumps([1])}, "holds no list of"),
        ({"a.txt": b""}, "holds no file that ends in .pkl or .pt"),
        ({"a.pkl": pickle.dumps(np.float64)}, "asks for numpy.float64"),
    ],
)
def test_pickles_that_hold_something_else(tmp_path, files, line):
    config = ConvertConfig(
        action="pickles", source=str(tar(tmp_path / "a.tar", files, "w")), output=str(tmp_path / "out")
    )
    with pytest.raises(UserError, match=line):
        interchange.convert_pickles(config)
