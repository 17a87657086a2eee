"""Bad input: exit status 2 and one clear line that names value and expectation, before Ray starts or weights load.

The jobs run in processes of their own, because they import Ray: two as a user starts them, all others one after the
other in a single process in which starting Ray or loading weights is recorded and refused.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from fake_task import WIDTH, question, write_model_config
from job_driver import JOBS, check_line, environment, run_jobs
from safetensors.torch import save_file
from training_helpers import write_dataset

from introspect_ray.config import GenerateConfig, ModelConfig
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.manifest import write_manifest
from introspect_ray.data.prepare import begin, prepare
from introspect_ray.data.shards import ShardOrder, write_records
from introspect_ray.explainer.card import ExplainerCard, TargetInfo, write_card
from introspect_ray.explainer.encoding import OWN_TOKENS, Frame
from introspect_ray.tasks.registry import get_task


def counterfact(count):
    columns = ("relation", "relation_id")
    return [
        dict(zip(columns, ("{} is in", "P17"), strict=True)) | {"subject": f"S{n}", "target_true": f" T{n % 3}"}
        for n in range(count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_sae(folder):
    """An SAE of layer 1 of a target of width 8."""
    folder.mkdir()
    tensors = {"W_enc": (WIDTH, 3), "b_enc": (3,), "W_dec": (3, WIDTH), "b_dec": (WIDTH,)}
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, folder / "sae_weights.safetensors")
    card = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": 3,
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(card))
    return str(folder)


def put_nan(folder, split):
    """One NaN in the vector of the first record of `split`; the manifest fits."""
    dataset = open_dataset(str(folder))
    records = dataset.records(None, selected=False)
    row = next(number for number, record in enumerate(records) if record["split"] == split)
    records[row]["vector"][3] = np.nan
    schema = get_task("activation_patching").schema(dataset.manifest.target.width, dataset.config)
    info = write_records(dataset.folder, ShardOrder(0, dataset.manifest.run_key), records, schema)
    write_manifest(dataset.folder, dataset.manifest.model_copy(update={"shards": (info,)}))
    return row


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return len(content)


def write_explainer(folder, base):
    """An explainer without weights, as far as it is read before they are."""
    folder.mkdir()
    card = ExplainerCard(
        target=TargetInfo(path="target", width=32, num_layers=4),
        base=ModelConfig(path=base),
        weights="full",
        placeholders=OWN_TOKENS,
        frame=Frame(prefix="", suffix="\n", end="<|end|>"),
        projection="linear",
        vector_norm=None,
        max_new_tokens=4,
    )
    write_card(folder, card)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def cases(folder):
    """Name -> (job, arguments, what the line must hold)."""
    target = str(write_model_config(folder / "target", num_layers=4))
    facts = write_rows(folder / "facts.jsonl", counterfact(12))
    label = {"layer": 9, "index": 0, "description": "d", "accepted": [], "score": 0.9}
    labels = write_rows(folder / "labels.jsonl", [label | {"layer": 1}, label])
    (folder / "empty.jsonl").write_text("\n")
    lacking = write_rows(folder / "lacking.jsonl", [question("q0"), {"question": "q1", "subject": "s", "answer": 0}])
    common = {"target": {"path": target}, "source": {"path": facts}, "output": str(folder / "claimed")}
    prepared = prepare(GenerateConfig.model_validate(common), get_task("activation_patching"))
    begin(prepared, prepared.orders)
    whole = str(write_dataset(folder / "whole", splits=("train", "test")))
    held_out = str(write_dataset(folder / "held out", splits=("train", "validation")))
    torn, nan = write_dataset(folder / "torn"), write_dataset(folder / "nan", splits=("train", "test"))
    shard = "shards/shard-00000.parquet"
    size = cut(torn / shard)
    nan_row = put_nan(nan, "test")
    explainer = write_explainer(folder / "explainer", target)

    absent = str(folder / "nowhere")

    def generate(*arguments):
        usual = ("--target.path", target, "--source.path", facts, "--output", str(folder / "new"))
        return "generate_dataset", [*usual, *arguments]

    def train(*arguments):
        return "train_explainer", ["--explainer.model.path", target, "--output", str(folder / "new"), *arguments]

    def evaluate(dataset):
        runs = json.dumps([{"dataset": str(dataset), "explainer": explainer}])
        return "evaluate_explainer", ["--runs", runs, "--output", str(folder / "scores")]

    def describe(*arguments):
        usual = ("--method", "chat", "--exemplars", absent, "--output", str(folder / "new"))
        return "describe_latents", [*usual, "--chat.local.model.path", target, *arguments]

    description = {"layer": 1, "latent": 0, "text": "d", "source": "lexicon", "scores": {}}
    lacking_source = {key: value for key, value in description.items() if key != "source"}
    descriptions = write_rows(folder / "descriptions.jsonl", [description, lacking_source])
    features = ("--task", "feature_description", "--feature_description.sae", write_sae(folder / "sae"))
    texts = write_rows(folder / "texts.jsonl", [{"text": f"text {number}"} for number in range(8)])
    of_target = ("--target.path", target, "--output", str(folder / "new"))
    return {
        "unknown task": (
            *generate("--task", "patching"),
            ("'task'", "'feature_description', 'activation_patching' or 'input_ablation'", "found 'patching'"),
        ),
        "unknown config key": (*generate("--sed", "3"), ("config key 'sed' is not known", "did you mean 'seed'")),
        "layer of a label": (
            *generate(*features, "--source.path", labels),
            (f"source {labels}, row 1 names layer 9", "has 4 layers: expected 0 to 3"),
        ),
        "more blocks than layers": (
            *generate("--activation_patching.num_blocks", "5"),
            ("activation_patching.num_blocks is 5", "has 4 layers: expected 1 to 4"),
        ),
        "model path of a target": (
            *generate("--target.path", absent),
            (f"model path '{absent}' does not exist", "expected a folder with a config.json, a hub id"),
        ),
        "model path of an explainer": (
            *train("--datasets", whole, "--explainer.model.path", absent),
            (f"model path '{absent}' does not exist", "expected a folder with a config.json, a hub id"),
        ),
        "output of another config": (
            *generate("--output", str(folder / "claimed"), "--seed", "1"),
            (
                f"output folder {folder / 'claimed'} belongs to another config",
                "seed is 0 there, 1 here",
                "choose another",
            ),
        ),
        "output that is something else": (
            *generate("--output", str(folder)),
            (f"output folder {folder} is not empty and holds no dataset", "choose another folder"),
        ),
        "truncated shard": (
            *train("--datasets", str(torn)),
            (f"{torn / shard} has {size // 2} bytes", f"dataset.json says {size} bytes", "generate the dataset again"),
        ),
        "truncated shard of an evaluation": (*evaluate(torn), (f"{torn / shard} has {size // 2} bytes",)),
        "width without projection": (
            *train("--datasets", whole, "--explainer.projection", "none"),
            (f"vector width 32 does not fit an explainer of width {WIDTH} without a projection",),
        ),
        "NaN in a vector": (
            *evaluate(nan),
            (f"{nan / shard}, row {nan_row}: column 'vector' holds a NaN", "expected finite numbers"),
        ),
        "NaN in a vector to train on": (
            *train("--datasets", str(nan), "--output", str(folder / "from nan")),
            (f"{nan / shard}, row {nan_row}: column 'vector' holds a NaN", "expected finite numbers"),
        ),
        "evaluation without validation records": (
            *train("--datasets", whole, "--evaluation.every", "5"),
            ("evaluation.every is 5", f"dataset {whole} has no records in its validation split"),
        ),
        "metric of no dataset": (
            *train("--datasets", held_out, "--evaluation.every", "5", "--evaluation.metric", "accuracy"),
            ("evaluation.metric is 'accuracy'", "expected one of exact_match, has_changed_f1"),
        ),
        "explainers without names": (
            "evaluate_explainer",
            ["--runs", json.dumps([{"dataset": whole, "explainer": explainer}] * 2)],
            (f"dataset {whole} has several explainers: name each after the first",),
        ),
        "export of no explainer": (
            "export_explainer",
            ["--explainer", whole, "--output", str(folder / "new")],
            (f"{whole} is not a finished explainer: it has no explainer.json",),
        ),
        "coder without an id": (
            *generate(*features[:-1], "sae-lens:llama_scope_lxr_8x", "--source.path", labels),
            ("SAE path 'sae-lens:llama_scope_lxr_8x' is incomplete: expected sae-lens:RELEASE:ID",),
        ),
        "layer of a coder": (
            "train_sae",
            [*of_target, "--source.path", texts, "--layer", "4"],
            ("layer is 4", "has 4 layers: expected 0 to 3"),
        ),
        "more latents than tokens": (
            "train_transcoder",
            [*of_target, "--source.path", texts, "--batch_size", "8"],
            ("num_latents is 1024", "holds 256 (stream.buffer_batches x batch_size)"),
        ),
        "vectors of no text": (
            "collect_vectors",
            [*of_target, "--texts.path", texts, "--split.train", "0", "--split.validation", "0", "--split.test", "1"],
            (f"source {texts} has no text outside of the test split",),
        ),
        "descriptions without a field": (
            "convert_descriptions",
            ["--source", descriptions, "--source_format", "descriptions", "--output", str(folder / "new")],
            (f"{descriptions}, line 2: field 'source' is missing, expected text",),
        ),
        "key of an endpoint": (
            *describe("--chat.kind", "endpoint", "--chat.endpoint.api_key_variable", "NO_SUCH_KEY"),
            ("chat.endpoint.api_key_variable is NO_SUCH_KEY", "no such variable"),
        ),
        "cost cap without a price": (
            *describe("--chat.endpoint.max_cost", "5"),
            ("max_cost needs input_price and output_price",),
        ),
        "exemplars that are not there": (*describe(), (f"{absent} has no exemplars.json",)),
        "simulator without exemplars": (
            "train_simulator",
            ["--model.path", target, "--exemplars", absent, "--output", str(folder / "new")],
            (f"{absent} has no exemplars.json", "collect_exemplars.py writes it last"),
        ),
        "scores by no simulator": (
            "score_descriptions",
            ["--simulator.model.path", whole, "--simulator.kind", "finetuned", "--output", str(folder / "new")],
            (f"{whole} is not a finished simulator: it has no simulator.json",),
        ),
        "width of a coder to collect with": (
            "collect_exemplars",
            [*of_target, "--source.path", texts],
            (f"has feature vectors of width 160: the target has width {WIDTH}",),
        ),
        "shards of broken batches": (
            "collect_exemplars",
            [*of_target, "--texts_per_shard", "100"],
            ("texts_per_shard must be a multiple of texts_per_batch, 64", "found 100"),
        ),
        "service for others without a token": (
            "serve",
            ["--host", "0.0.0.0", "--quickstart", "none"],
            ("host is '0.0.0.0', which others can reach", "set environment variable INTROSPECT_RAY_TOKEN"),
        ),
        "served explainer of another target": (
            "serve",
            ["--quickstart", "none", "--explainers", f"[{{name: e, folder: {explainer}}}]"],
            ("explains a target with 4 layers of width 32", "has 4 of width 160"),
        ),
        "page of no exemplars": ("browse_latents", [absent], (f"{absent} has no exemplars.json",)),
        "empty source": (
            *generate("--source.path", str(folder / "empty.jsonl")),
            (f"source {folder / 'empty.jsonl'} is empty, expected at least one row",),
        ),
        "source row without a field": (
            *generate("--task", "input_ablation", "--source.path", lacking),
            (f"source {lacking}, row 1 (counted from 0) has no field 'choices'", "which format mmlu needs"),
        ),
    }


NAMES = (
    *("unknown task", "unknown config key", "layer of a label", "more blocks than layers", "model path of a target"),
    *("model path of an explainer", "output of another config", "output that is something else", "truncated shard"),
    *("truncated shard of an evaluation", "width without projection", "NaN in a vector"),
    *("NaN in a vector to train on", "empty source", "source row without a field"),
    *("evaluation without validation records", "metric of no dataset", "explainers without names"),
    *("export of no explainer", "simulator without exemplars", "scores by no simulator"),
    *("coder without an id", "layer of a coder", "more latents than tokens", "vectors of no text"),
    *("width of a coder to collect with", "shards of broken batches", "page of no exemplars"),
    *("descriptions without a field", "key of an endpoint", "cost cap without a price"),
    *("exemplars that are not there", "service for others without a token", "served explainer of another target"),
)
AS_A_USER = ("unknown task", "truncated shard")


@pytest.fixture(scope="module")
def outcomes(cases):
    """Name -> exit status, standard error, and what was started although it must not be."""
    return run_jobs({name: (job, arguments, {}) for name, (job, arguments, _) in cases.items()})


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_clear_line(name, cases, outcomes):
    assert set(NAMES) == set(cases)
    found = outcomes[name]
    assert found["started"] == []
    assert found["status"] == 2
    check_line(found["stderr"], cases[name][2])


@pytest.mark.parametrize("name", AS_A_USER)
def test_a_user_sees_the_line_and_nothing_else(name, cases):
    job, arguments, expected = cases[name]
    done = subprocess.run(
        [sys.executable, str(JOBS / f"{job}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment(),
        cwd=JOBS.parent,
    )
    assert done.returncode == 2
    check_line(done.stderr, expected)


def test_nothing_was_written(outcomes, folder):  # noqa: ARG001 - after all jobs ran
    assert not (folder / "new").exists()
