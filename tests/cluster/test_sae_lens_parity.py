"""Coders that we write are read by sae-lens, and those that it writes by us, with the same numbers.

Here and not among the unit tests, because importing sae_lens takes ten seconds and more.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from introspect_ray.errors import UserError
from introspect_ray.features.batch_topk import BatchTopKConfig, shuffled_batches
from introspect_ray.features.card import SAE_ARCHITECTURES, TRANSCODER_ARCHITECTURES
from introspect_ray.features.coder import SparseCoder, fraction_unexplained
from introspect_ray.features.sae import check_sae, load_sae, save_transcoder
from introspect_ray.features.sae_training import SaeTraining, train_sae
from introspect_ray.features.snapshots import Snapshot

WIDTH, LATENTS = 16, 40
PLACE = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}


def assert_same(folder: Path, x: Tensor, dtype: str | None = None) -> None:
    """sae-lens' loader and ours agree on latents and on the output, to 1e-5 of the largest value."""
    from sae_lens import SAE

    theirs, ours = SAE.load_from_disk(str(folder), device="cpu", dtype=dtype), load_sae(str(folder))
    with torch.no_grad():
        for expected, found in ((theirs.encode(x), ours.encode(x)), (theirs(x), ours.forward(x))):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert theirs.cfg.metadata.hook_name == json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"]


def test_trained_sae(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    present = (torch.rand(4000, 24, generator=generator) < 0.08).float()
    x = 20 * present @ torch.randn(24, WIDTH, generator=generator) + 7
    config = BatchTopKConfig(
        num_latents=LATENTS, num_active=4, steps=300, batch_size=256, learning_rate=5e-3, dead_after=50, seed=0
    )
    losses: list[float] = []
    train_sae(x, config, PLACE, tmp_path / "sae", lambda _, loss: losses.append(loss))
    assert_same(tmp_path / "sae", x[:200])
    sae = load_sae(str(tmp_path / "sae"))
    assert (sae.kind, sae.layer, len(losses)) == ("sae", 1, 300)
    assert fraction_unexplained(sae.forward(x), x) < 0.2
    assert 2 < len(sae.encode_sparse(x)) / len(x) < 8

    train_sae(x, config, PLACE, tmp_path / "again", lambda *_: None)
    assert torch.equal(load_sae(str(tmp_path / "again")).encoder, sae.encoder)


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "standard"])
def test_training_goes_on_from_a_snapshot_and_sae_lens_reads_what_it_made(tmp_path: Path, architecture: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    x = 3 * torch.randn(900, WIDTH, generator=generator).relu() + 1
    config = BatchTopKConfig(
        num_latents=LATENTS, num_active=4, steps=40, batch_size=64, learning_rate=5e-3, dead_after=5, seed=0
    )
    losses: list[list[float]] = [[], []]
    for number, stop in enumerate((None, 23)):
        training = SaeTraining.begun(x, config, PLACE, architecture)
        for step, rows in enumerate(shuffled_batches(len(x), config)):
            if step == stop:
                snapshot = Snapshot.from_bytes(training.snapshot().to_bytes())
                training = SaeTraining.restored(snapshot, config, PLACE, architecture)
            losses[number].append(training.step(x[rows]))
        assert training.steps_done == 40 and 0 < training.measures().unexplained < 1
        training.save(tmp_path / str(number))
    assert losses[0] == losses[1]
    assert (tmp_path / "0" / "cfg.json").read_text() == (tmp_path / "1" / "cfg.json").read_text()
    one, other = (load_file(tmp_path / name / "sae_weights.safetensors") for name in "01")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same(tmp_path / "0", x[:100])


@pytest.mark.parametrize("skip", [True, False])
def test_saved_transcoder(tmp_path: Path, skip: bool) -> None:
    coder = SparseCoder(
        kind="transcoder",
        layer=3,
        encoder=torch.randn(WIDTH, LATENTS),
        encoder_bias=torch.randn(LATENTS),
        decoder=torch.randn(LATENTS, WIDTH),
        decoder_bias=torch.randn(WIDTH),
        threshold=torch.rand(LATENTS) * 3,
        skip=torch.randn(WIDTH, WIDTH) if skip else None,
    )
    save_transcoder(coder, tmp_path, {"hook_name": "blocks.3.mlp.hook_in"})
    assert_same(tmp_path, torch.randn(50, WIDTH))


SAES = ["standard", "topk", "abstopk", "jumprelu", "gated"]
TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]


def made_by_sae_lens(architecture: str, folder: Path, **config: Any) -> None:
    """A coder of random weights, written by sae-lens itself."""
    from sae_lens.registry import SAE_CLASS_REGISTRY
    from sae_lens.saes.sae import SAEMetadata

    place = PLACE
    if architecture in TRANSCODERS:
        config |= {"d_out": WIDTH + 3, "apply_b_dec_to_input": False}
        place = {**PLACE, "hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    coder_class, config_class = SAE_CLASS_REGISTRY[architecture]
    known = config_class(d_in=WIDTH, d_sae=LATENTS, metadata=SAEMetadata(**place), **config)
    coder = coder_class(known)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    coder.save_model(folder)


def test_every_architecture_of_sae_lens_is_read_or_refused_by_name(tmp_path: Path) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    assert set(SAES + TRANSCODERS) == {*SAE_ARCHITECTURES, *TRANSCODER_ARCHITECTURES}
    assert set(SAE_CLASS_REGISTRY) == {*SAES, *TRANSCODERS, "temporal", "matching_pursuit"}
    (tmp_path / "cfg.json").write_text('{"architecture": "matching_pursuit", "metadata": {"hook_name": "layers.1"}}')
    (tmp_path / "sae_weights.safetensors").touch()
    with pytest.raises(UserError, match="architecture 'matching_pursuit' is not supported"):
        load_sae(str(tmp_path))


@pytest.mark.parametrize("architecture", SAES + TRANSCODERS)
def test_folders_that_sae_lens_writes(tmp_path: Path, architecture: str) -> None:
    x = 3 * torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(9)) + 1
    kinds: list[dict[str, Any]] = [{}, {"normalize_activations": "layer_norm"}, {"dtype": "bfloat16"}]
    kinds += [{"normalize_activations": "constant_norm_rescale"}]
    if architecture in SAES:
        kinds += [{"apply_b_dec_to_input": False}]
    for number, kind in enumerate(kinds):
        extra = {"k": 5} if "topk" in architecture else {}
        for rescale in (False, True) if extra else (False,):
            extra = extra | ({"rescale_acts_by_decoder_norm": True} if rescale else {})
            folder = tmp_path / f"{number}{rescale}"
            made_by_sae_lens(architecture, folder, **kind, **extra)
            # Ours computes in float32 whatever the weights are stored in; so does theirs if it is told to.
            assert_same(folder, x, dtype="float32")


def test_a_checkpoint_is_read_at_the_scale_it_was_trained_at(tmp_path: Path) -> None:
    """sae-lens loads `expected_average_only_in` and does not apply it; folded by sae-lens, ours agrees."""
    from sae_lens import SAE

    made_by_sae_lens("jumprelu", tmp_path / "checkpoint", normalize_activations="expected_average_only_in")
    folded = SAE.load_from_disk(str(tmp_path / "checkpoint"))
    folded.fold_activation_norm_scaling_factor(0.25)
    folded.save_model(tmp_path / "folded")
    with pytest.raises(UserError, match="normalize_activations 'expected_average_only_in' is not supported"):
        load_sae(str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    x = torch.randn(20, WIDTH)
    ours, expected = (load_sae(str(tmp_path / name)) for name in ("checkpoint", "folded"))
    torch.testing.assert_close(ours.forward(x), expected.forward(x), rtol=0, atol=1e-5)
    assert_same(tmp_path / "folded", x)


def test_folders_of_sae_lens_before_6(tmp_path: Path) -> None:
    """Other names, no metadata, TopK as an activation function of a standard SAE, a scaling factor of ones."""
    made_by_sae_lens("topk", tmp_path, k=4)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**weights, "scaling_factor": torch.ones(LATENTS)}, tmp_path / "sae_weights.safetensors")
    old: dict[str, Any] = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "model_name": "tiny"}
    old |= {"hook_point": PLACE["hook_name"], "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    (tmp_path / "cfg.json").write_text(json.dumps(old | {"normalize_activations": False}))
    ours, card = load_sae(str(tmp_path)), check_sae(str(tmp_path), WIDTH)
    assert (ours.k, ours.layer, card.model_name) == (4, 1, "tiny")
    theirs, x = sae_class().load_from_disk(str(tmp_path)), torch.randn(20, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward(x), theirs(x), rtol=0, atol=1e-5)
    save_file({**weights, "scaling_factor": torch.full((LATENTS,), 2.0)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="tensor scaling_factor is not supported"):
        check_sae(str(tmp_path), WIDTH)


def sae_class() -> Any:
    from sae_lens import SAE

    return SAE


def in_hub_cache(cache: Path, repository: str) -> Path:
    """Where the hub's cache keeps the files of a repository, of which there is one revision."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_release_whose_scale_is_kept_apart_from_its_weights(cache: Path) -> None:
    """LlamaScope: sae-lens reads its layout, scales the threshold, and folds the norm factor of its own list."""
    from sae_lens import SAE

    release, sae_id = "llama_scope_lxr_8x", "l15r_8x"
    folder = in_hub_cache(cache, "fnlp/Llama3_1-8B-Base-LXR-8x") / "Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    about: dict[str, Any] = {"d_model": WIDTH, "d_sae": LATENTS, "jump_relu_threshold": 0.4}
    about |= {"dataset_average_activation_norm": {"in": 2.0}, "hook_point_in": "blocks.15.hook_resid_post"}
    (folder / "hyperparams.json").write_text(json.dumps(about))
    tensors = {"encoder.weight": torch.randn(LATENTS, WIDTH), "encoder.bias": torch.randn(LATENTS)}
    tensors |= {"decoder.weight": torch.randn(WIDTH, LATENTS), "decoder.bias": torch.randn(WIDTH)}
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(stored, folder / "checkpoints" / "final.safetensors")

    path = f"sae-lens:{release}:{sae_id}"
    card, ours = check_sae(path, WIDTH), load_sae(path)
    assert (card.layer, card.model_name, card.architecture) == (15, "meta-llama/Llama-3.1-8B", "jumprelu")
    theirs = SAE.from_pretrained(release, sae_id, dtype="float32")
    x = 0.2 * torch.randn(30, WIDTH)
    with torch.no_grad():
        for found, expected in ((ours.encode(x), theirs.encode(x)), (ours.forward(x), theirs(x))):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert 0 < int((ours.encode(x) > 0).sum()) < x.shape[0] * LATENTS
    # It was converted once: what it was made of may go.
    shutil.rmtree(cache)
    assert torch.equal(load_sae(path).encoder, ours.encoder)


def test_repository_by_its_own_name(cache: Path, tmp_path: Path) -> None:
    made_by_sae_lens("topk", in_hub_cache(cache, "somebody/coders") / "layer_1", k=4)
    assert check_sae("sae-lens:somebody/coders:layer_1", WIDTH).k == 4
    assert [part.name for part in (tmp_path / "introspect_ray_coders").iterdir()] == ["somebody--coders:layer_1"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("sae-lens:llama_scope_lxr_8x", "is incomplete: expected sae-lens:RELEASE:ID"),
        ("sae-lens:no_such_release:l1", "sae-lens knows no release 'no_such_release'"),
        ("sae-lens:llama_scope_lxr_8x:l99r_8x", "release llama_scope_lxr_8x has no 'l99r_8x': expected one of l0r_8x"),
        ("sae-lens:llama_scope_lxr_8x:l15r_8x", "cannot be had from the hub or its cache"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_releases_that_cannot_be_had_are_refused_in_one_line(path: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_sae(path, WIDTH)
    assert line in str(caught.value) and "\n" not in str(caught.value)
