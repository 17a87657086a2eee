"""The shipped pocket artifacts are what their manifest says; a stopped build goes on to the same weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from introspect_ray.config import BuildPocketConfig, ModelConfig, PocketTargetConfig
from introspect_ray.errors import UserError
from introspect_ray.features.sae import load_sae
from introspect_ray.interventions.target import Target
from introspect_ray.models.paths import POCKET_ARTIFACTS
from introspect_ray.models.tokens import single_token
from introspect_ray.pocket.abilities import measure_abilities
from introspect_ray.pocket.build import build_pocket
from introspect_ray.pocket.tokenizer import BOS, CHAT, CHAT_TEMPLATE, END, PAD, PLACEHOLDERS, train_tokenizer
from introspect_ray.pocket.world import RELATIONS, World

MANIFEST = POCKET_ARTIFACTS / "manifest.json"
TARGETS = ("target_a", "target_b")
CODERS = ("sae", "transcoder")

shipped = pytest.mark.skipif(
    not MANIFEST.is_file(), reason="the pocket artifacts are not built: run `python jobs/build_pocket.py`"
)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return json.loads(MANIFEST.read_text())


@pytest.fixture(scope="module")
def target_a() -> Target:
    return Target.load(ModelConfig(path="pocket:target_a", device="cpu"))


# --- files ------------------------------------------------------------------------------------------------------


@shipped
def test_files_are_those_of_the_manifest(manifest: dict[str, Any]) -> None:
    found = {
        path.relative_to(POCKET_ARTIFACTS).as_posix(): path for path in POCKET_ARTIFACTS.rglob("*") if path.is_file()
    }
    assert set(found) - {"manifest.json"} == set(manifest["files"])
    for name, about in manifest["files"].items():
        content = found[name].read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (about["bytes"], about["sha256"]), name


@shipped
def test_artifacts_are_small(manifest: dict[str, Any]) -> None:
    total = sum(path.stat().st_size for path in POCKET_ARTIFACTS.rglob("*") if path.is_file())
    assert total <= 24_000_000
    assert total == manifest["total_bytes"] + MANIFEST.stat().st_size
    suffixes = {path.suffix for path in POCKET_ARTIFACTS.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja"}


# --- targets ----------------------------------------------------------------------------------------------------


@shipped
def test_targets_are_small_and_of_two_architectures(manifest: dict[str, Any]) -> None:
    configs = [json.loads((POCKET_ARTIFACTS / name / "config.json").read_text()) for name in TARGETS]
    assert [config["model_type"] for config in configs] == ["llama", "qwen3"]
    assert [manifest["targets"][name]["architecture"] for name in TARGETS] == ["llama", "qwen3"]
    assert configs[0]["hidden_size"] != configs[1]["hidden_size"]
    assert configs[0]["num_hidden_layers"] != configs[1]["num_hidden_layers"]
    for name in TARGETS:
        stored = load_file(POCKET_ARTIFACTS / name / "model.safetensors")
        count = sum(tensor.numel() for tensor in stored.values())
        assert 1_000_000 <= count <= 4_000_000
        assert manifest["targets"][name]["parameters"] == count


@shipped
@pytest.mark.parametrize("name", TARGETS)
def test_tokenizers_are_those_that_the_code_would_write(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET_ARTIFACTS / name)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    ids = tokenizer.convert_tokens_to_ids([PAD, BOS, END, *CHAT, *PLACEHOLDERS])
    assert ids == list(range(len(ids)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, END, PAD)
    values = [value for relation in RELATIONS for value in relation.values]
    assert [value for value in values if single_token(tokenizer, f" {value}") is None] == []


@shipped
@pytest.mark.parametrize("name", TARGETS)
def test_targets_know_their_world(manifest: dict[str, Any], name: str) -> None:
    abilities = manifest["targets"][name]["abilities"]
    assert abilities["common_facts"] >= 0.95
    assert abilities["questions_on_common_facts"] >= 0.85
    assert 0.25 <= abilities["swayed_by_hints"] <= 0.75


@shipped
def test_abilities_are_those_of_the_manifest(manifest: dict[str, Any], target_a: Target) -> None:
    expected = manifest["targets"]["target_a"]["abilities"]
    measured = measure_abilities(target_a, World(manifest["seed"]), manifest["seed"])
    assert measured == {name: pytest.approx(share, abs=0.02) for name, share in expected.items()}


# --- sparse coders ----------------------------------------------------------------------------------------------


@shipped
@pytest.mark.parametrize("name", CODERS)
def test_coders_explain_and_are_described(manifest: dict[str, Any], target_a: Target, name: str) -> None:
    report = json.loads((POCKET_ARTIFACTS / name / "training.json").read_text())
    assert report == manifest[name]
    assert report["unexplained"] < 0.2
    assert report["live"] > 0 and report["labelled"] >= report["live"] / 3
    coder = load_sae(f"pocket:{name}")
    assert (coder.kind, coder.layer, coder.num_latents) == (name, report["layer"], report["num_latents"])
    assert coder.width == target_a.width and 0 < coder.layer < target_a.num_layers - 1
    assert (coder.skip is not None) == (name == "transcoder")


@shipped
@pytest.mark.parametrize("name", CODERS)
def test_labels_are_those_of_live_latents(manifest: dict[str, Any], name: str) -> None:
    labels = [json.loads(line) for line in (POCKET_ARTIFACTS / name / "labels.jsonl").read_text().splitlines()]
    about = manifest[name]
    assert len(labels) == about["live"] == len({label["index"] for label in labels})
    assert {label["layer"] for label in labels} == {about["layer"]}
    assert all(0 <= label["index"] < about["num_latents"] and 0 <= label["score"] <= 1 for label in labels)
    assert sum(label["score"] >= 0.7 for label in labels) == pytest.approx(about["labelled"], abs=1)
    for label in labels:
        assert label["description"] and all(label["accepted"]), label
        assert len(set(label["accepted"])) == len(label["accepted"]), label
        # What is right of a latent at all is right by the same bar as its label.
        assert label["score"] >= 0.7 or label["description"] not in label["accepted"], label


# --- building ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_at(stage: str, step: int):
    """A progress callback that stops the build, and what it heard."""
    heard: list[tuple[str, int]] = []

    def progress(now: str, done: int, steps: int, loss: float) -> None:  # noqa: ARG001
        heard.append((now, done))
        if (now, done) == (stage, step):
            raise Stopped

    return progress, heard


def tiny_build(folder: Path, tokenizer: Path, seed: int = 0) -> BuildPocketConfig:
    """Nine steps per target; the tokenizer is there already."""
    work = folder / "work"
    if not work.exists():
        shutil.copytree(tokenizer, work / "tokenizer")
    shape = {"layers": 1, "width": 8, "mlp_width": 8, "heads": 1, "steps": 9, "rows": 2, "row_length": 16}
    return BuildPocketConfig(
        output=str(folder / "artifacts"),
        work=str(work),
        target_a=PocketTargetConfig(architecture="llama", checkpoint_every=2, **shape),
        target_b=PocketTargetConfig(architecture="qwen3", checkpoint_every=2, **shape),
        threads=1,
        seed=seed,
    )


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["The mother tongue of Ann is Greek."] * 9, 400).save_pretrained(folder)
    return folder


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stopped_at", [1, 5, 6, 9])
@pytest.mark.usefixtures("one_thread")
def test_a_stopped_build_goes_on_to_the_same_weights(tmp_path: Path, tokenizer_folder: Path, stopped_at: int) -> None:
    whole = tiny_build(tmp_path / "whole", tokenizer_folder)
    with pytest.raises(Stopped):
        build_pocket(whole, stop_at("target_b", 1)[0])
    broken = tiny_build(tmp_path / "broken", tokenizer_folder)
    with pytest.raises(Stopped):
        build_pocket(broken, stop_at("target_a", stopped_at)[0])
    assert not (Path(broken.output) / "target_a").exists()
    progress, heard = stop_at("target_b", 1)
    with pytest.raises(Stopped):
        build_pocket(broken, progress)
    # The newest checkpoint is that of the last even step that was done before the callback heard of it.
    first = min(8, stopped_at // 2 * 2) + 1
    assert heard == [*(("target_a", step) for step in range(first, 10)), ("target_b", 1)]
    one, two = (Path(config.output) / "target_a" / "model.safetensors" for config in (whole, broken))
    assert one.read_bytes() == two.read_bytes()
    progress, heard = stop_at("target_b", 9)
    with pytest.raises(Stopped):
        build_pocket(broken, progress)
    assert heard[0] == ("target_b", 1), "a target that is done is kept"


def test_a_build_of_another_config_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(Stopped):
        build_pocket(tiny_build(tmp_path, tokenizer_folder), stop_at("target_a", 1)[0])
    with pytest.raises(UserError, match="holds a build with another config: choose another --work or delete it"):
        build_pocket(tiny_build(tmp_path, tokenizer_folder, seed=1), stop_at("target_a", 1)[0])
