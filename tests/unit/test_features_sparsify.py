"""Folders of sparsify, made by hand from its layout: the maths of its forward pass, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from introspect_ray.errors import UserError
from introspect_ray.features.card import read_card
from introspect_ray.features.sae import check_sae, load_sae

WIDTH, LATENTS, K = 6, 12, 3


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    known = {"activation": "topk", "expansion_factor": 2, "num_latents": 0, "k": K, "multi_topk": False, "d_in": WIDTH}
    known |= {"normalize_decoder": True, "skip_connection": False, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(known | config))
    save_file(tensors, folder / "sae.safetensors")
    return str(folder)


def weights(skip: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {"encoder.weight": random(LATENTS, WIDTH), "encoder.bias": random(LATENTS)}
    found |= {"W_dec": random(LATENTS, WIDTH), "b_dec": random(WIDTH)}
    return found | ({"W_skip": random(WIDTH, WIDTH)} if skip else {})


def forward(tensors: dict[str, Tensor], x: Tensor, transcode: bool) -> Tensor:
    """One vector after another, as sparsify defines it: relu, then the k largest, then the decoder, then the skip."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    outputs = []
    for row in x:
        given = row if transcode else row - tensors["b_dec"]
        before = (tensors["encoder.weight"] @ given + tensors["encoder.bias"]).relu()
        output = tensors["b_dec"].clone()
        for latent in before.argsort(descending=True)[:K].tolist():
            output += before[latent] * tensors["W_dec"][latent]
        outputs.append(output + tensors["W_skip"] @ row if "W_skip" in tensors else output)
    return torch.stack(outputs)


X = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autoencoder_of_a_residual_output(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(dtype=dtype)
    (tmp_path / "config.json").write_text(json.dumps({"model": "owner/tiny"}))
    path = write(tmp_path / "layers.3", tensors)
    coder, card = load_sae(path), check_sae(path, WIDTH)
    assert (coder.kind, coder.layer, coder.reads, coder.writes) == ("sae", 3, "residual", "residual")
    assert card.model_name == "owner/tiny" and card.num_latents == LATENTS
    torch.testing.assert_close(coder.forward(X), forward(tensors, X, transcode=False), rtol=1e-5, atol=1e-5)
    assert int((coder.encode(X) != 0).sum(-1).max()) <= K
    assert "trained on activations of owner/tiny" in card.other_model("pocket:target_a")
    assert card.other_model("elsewhere/Tiny/") == ""


@pytest.mark.parametrize("skip", [True, False])
def test_transcoder_of_an_mlp(tmp_path: Path, skip: bool) -> None:
    tensors = weights(skip)
    coder = load_sae(
        write(tmp_path / "layers.0.mlp", tensors, transcode=True, skip_connection=skip, num_latents=LATENTS)
    )
    assert (coder.kind, coder.layer, coder.reads, coder.writes) == ("transcoder", 0, "mlp_input", "mlp_output")
    torch.testing.assert_close(coder.forward(X), forward(tensors, X, transcode=True), rtol=1e-5, atol=1e-5)


def test_autoencoder_of_an_mlp_output(tmp_path: Path) -> None:
    card = read_card(write(tmp_path / "layers.2.mlp", weights()))
    assert (card.kind, card.layer, card.reads) == ("sae", 2, "mlp_output")


def test_a_folder_of_several_names_them(tmp_path: Path) -> None:
    for layer in (1, 2):
        write(tmp_path / "run" / f"layers.{layer}", weights())
    with pytest.raises(UserError, match=r"run' holds 2 coders: expected one of its folders layers\.1, layers\.2"):
        load_sae(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "change", "config", "line"),
    [
        ("layers.1", {}, {"activation": "groupmax"}, "activation 'groupmax' is not supported: expected topk"),
        ("layers.1", {}, {"k": 99}, "k is 99: expected at most d_sae, 12"),
        ("layers.1", {}, {"d_in": None}, "d_in is None: expected a positive integer"),
        ("layers.1", {}, {"num_latents": 13}, "tensor encoder.weight has shape (12, 6), but cfg.json says (13, 6)"),
        ("layers.1", {"encoder.bias": None}, {}, "has no tensor encoder.bias"),
        ("layers.1", {}, {"skip_connection": True}, "skip_connection without transcode is not supported"),
        ("layers.1", {}, {"transcode": True}, "its name says the module, but 'layers.1' names no place of one MLP"),
        ("my_coder", {}, {}, "its name says the module, but 'my_coder' names no place that is read"),
    ],
)
def test_malformed_folders_are_refused_in_one_line(
    tmp_path: Path, name: str, change: dict[str, Any], config: dict[str, Any], line: str
) -> None:
    tensors = {key: tensor for key, tensor in weights().items() if key not in change}
    path = write(tmp_path / name, tensors, **config)
    with pytest.raises(UserError) as caught:
        check_sae(path, WIDTH)
    assert line in str(caught.value) and "\n" not in str(caught.value)
