"""Coders that we write are read by sae-lens, and those that it writes by us, with the same numbers.

Here and not among the unit tests, because importing sae_lens takes ten seconds and more.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from introspect_ray.features.batch_topk import BatchTopKConfig, train_sae
from introspect_ray.features.coder import SparseCoder, fraction_unexplained
from introspect_ray.features.sae import load_sae, save_transcoder

WIDTH, LATENTS = 16, 40
PLACE = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}


def assert_same(folder: Path, x: Tensor) -> None:
    """sae-lens' loader and ours agree on latents and on the output, to 1e-5 of the largest value."""
    from sae_lens import SAE

    theirs, ours = SAE.load_from_disk(str(folder), device="cpu"), load_sae(str(folder))
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


@pytest.mark.parametrize("architecture", ["standard", "topk", "topk_rescaled", "jumprelu"])
@pytest.mark.parametrize("subtract", [True, False])
def test_folders_that_sae_lens_writes(tmp_path: Path, architecture: str, subtract: bool) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    common = {
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "apply_b_dec_to_input": subtract,
        "metadata": SAEMetadata(**PLACE),
    }
    sae = {
        "standard": lambda: StandardSAE(StandardSAEConfig(**common)),
        "topk": lambda: TopKSAE(TopKSAEConfig(**common, k=5)),
        "topk_rescaled": lambda: TopKSAE(TopKSAEConfig(**common, k=5, rescale_acts_by_decoder_norm=True)),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**common)),
    }[architecture]()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.save_model(tmp_path)
    assert_same(tmp_path, torch.randn(50, WIDTH))
