"""Sparse coders: the maths of every architecture against its definition, and refusals of broken folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from introspect_ray.errors import UserError
from introspect_ray.features import coder as coder_module
from introspect_ray.features.coder import SparseCoder, fraction_unexplained
from introspect_ray.features.sae import check_sae, load_sae, save_transcoder

WIDTH, LATENTS = 3, 5


def weights(width_out: int = WIDTH, **extra: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "W_enc": torch.randn(WIDTH, LATENTS, generator=generator),
        "b_enc": torch.randn(LATENTS, generator=generator),
        "W_dec": torch.randn(LATENTS, width_out, generator=generator),
        "b_dec": torch.randn(width_out, generator=generator),
        **extra,
    }


def folder(tmp_path: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    defaults = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "dtype": "float32",
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.2.hook_resid_post"},
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(defaults | config))
    return str(tmp_path)


X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3.0, 1.0, -4.0]])


def before_activation(tensors: dict[str, Tensor], x: Tensor, subtract: bool) -> list[list[float]]:
    """x_i W_ij + b_j, summed term by term."""
    return [
        [
            sum(
                float(row[i] - (tensors["b_dec"][i] if subtract else 0)) * float(tensors["W_enc"][i, j])
                for i in range(WIDTH)
            )
            + float(tensors["b_enc"][j])
            for j in range(LATENTS)
        ]
        for row in x
    ]


@pytest.mark.parametrize("subtract", [True, False])
def test_standard_is_relu_of_the_linear_map(tmp_path: Path, subtract: bool) -> None:
    tensors = weights()
    sae = load_sae(folder(tmp_path, tensors, apply_b_dec_to_input=subtract))
    expected = [[max(0.0, value) for value in row] for row in before_activation(tensors, X, subtract)]
    torch.testing.assert_close(sae.encode(X), torch.tensor(expected))
    torch.testing.assert_close(sae.forward(X), torch.tensor(expected) @ tensors["W_dec"] + tensors["b_dec"])
    assert (sae.kind, sae.layer, sae.num_latents, sae.width) == ("sae", 2, LATENTS, WIDTH)
    assert torch.equal(sae.feature_vectors, tensors["W_dec"])


def test_jumprelu_keeps_the_value_above_its_threshold_only(tmp_path: Path) -> None:
    tensors = weights(threshold=torch.tensor([0.0, 0.5, 1.0, 2.0, 100.0]))
    sae = load_sae(folder(tmp_path, tensors, architecture="jumprelu", apply_b_dec_to_input=False))
    rows = before_activation(tensors, X, subtract=False)
    thresholds = tensors["threshold"].tolist()
    expected = [[v if v > t and v > 0 else 0.0 for v, t in zip(row, thresholds, strict=True)] for row in rows]
    torch.testing.assert_close(sae.encode(X), torch.tensor(expected))
    assert (sae.encode(X)[:, 4] == 0).all()


def test_topk_keeps_the_largest_and_none_below_zero(tmp_path: Path) -> None:
    tensors = weights() | {"b_enc": torch.tensor([-9.0, -9.0, -9.0, -9.0, 1.0])}
    sae = load_sae(folder(tmp_path, tensors, architecture="topk", k=2, apply_b_dec_to_input=False))
    latents = sae.encode(torch.zeros(1, WIDTH))
    assert latents.tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0]]
    big = load_sae(folder(tmp_path, weights(), architecture="topk", k=2, apply_b_dec_to_input=False)).encode(X)
    for row, found in zip(before_activation(weights(), X, subtract=False), big, strict=True):
        largest = sorted(range(LATENTS), key=lambda j: -row[j])[:2]
        assert set(found.nonzero().flatten().tolist()) == {j for j in largest if row[j] > 0}


def test_gated_fires_by_one_bias_and_counts_by_the_other(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["b_enc"]
    tensors |= {"b_gate": torch.tensor([1.0, -9, 0, 0.5, 2]), "r_mag": torch.tensor([0.0, 0, 0.7, -1, 0.2])}
    tensors |= {"b_mag": torch.tensor([0.3, 8.0, -0.2, 1.0, 0.0])}
    sae = load_sae(folder(tmp_path, tensors, architecture="gated", apply_b_dec_to_input=False))
    for row, found in zip(X, sae.encode(X), strict=True):
        for latent in range(LATENTS):
            linear = sum(float(row[i]) * float(tensors["W_enc"][i, latent]) for i in range(WIDTH))
            size = linear * float(tensors["r_mag"][latent].exp()) + float(tensors["b_mag"][latent])
            fires = linear + float(tensors["b_gate"][latent]) > 0
            assert float(found[latent]) == pytest.approx(max(0.0, size) if fires else 0.0, abs=1e-5)


def test_abstopk_keeps_the_largest_sizes_with_their_signs(tmp_path: Path) -> None:
    sae = load_sae(folder(tmp_path, weights(), architecture="abstopk", k=2, apply_b_dec_to_input=False))
    for row, found in zip(before_activation(weights(), X, subtract=False), sae.encode(X), strict=True):
        largest = sorted(range(LATENTS), key=lambda j: -abs(row[j]))[:2]
        assert found.tolist() == pytest.approx([row[j] if j in largest else 0.0 for j in range(LATENTS)], abs=1e-5)
    assert (sae.encode(X) < 0).any()


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_units_are_taken_off_before_and_put_back_after(tmp_path: Path, kind: str) -> None:
    tensors, x = weights(), torch.tensor([[1.0, -2.0, 4.0], [3.0, 1.0, -4.0]])
    plain = load_sae(folder(tmp_path, tensors, apply_b_dec_to_input=False))
    sae = load_sae(folder(tmp_path, tensors, apply_b_dec_to_input=False, normalize_activations=kind))
    for row in x:
        if kind == "layer_norm":
            offset, scale = row.mean(), row.std()
            given = (row - offset) / (scale + 1e-5)
        else:
            offset, scale = torch.tensor(0.0), row.norm() / WIDTH**0.5
            given = row / scale
        torch.testing.assert_close(sae.encode(row), plain.encode(given))
        torch.testing.assert_close(sae.forward(row), plain.forward(given) * scale + offset)


def test_skip_transcoder_adds_the_skip_of_its_input(tmp_path: Path) -> None:
    tensors = weights(
        2, W_skip=torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.0]]), threshold=torch.full((LATENTS,), 0.2)
    )
    place = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    path = folder(tmp_path, tensors, architecture="jumprelu_skip_transcoder", d_out=2, metadata=place)
    coder = load_sae(path)
    assert (coder.kind, coder.layer, coder.width) == ("transcoder", 1, 2)
    none = coder.decode(torch.zeros(1, LATENTS), torch.tensor([[1.0, 1.0, 1.0]]))
    torch.testing.assert_close(none, tensors["b_dec"] + torch.tensor([[6.0, -1.0]]))
    torch.testing.assert_close(coder.forward(X), coder.decode(coder.encode(X), X))


def test_saved_transcoder_is_read_back_unchanged(tmp_path: Path) -> None:
    tensors = weights(threshold=torch.rand(LATENTS), W_skip=torch.randn(WIDTH, WIDTH))
    coder = SparseCoder(
        kind="transcoder",
        layer=0,
        encoder=tensors["W_enc"],
        encoder_bias=tensors["b_enc"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
        threshold=tensors["threshold"],
        skip=tensors["W_skip"],
    )
    save_transcoder(coder, tmp_path / "new", {"hook_name": "blocks.0.mlp.hook_in"})
    again = load_sae(str(tmp_path / "new"))
    assert torch.equal(again.forward(X), coder.forward(X))
    assert (again.kind, again.layer) == ("transcoder", 0)


def test_sparse_latents_are_the_dense_ones_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_module, "ENCODE_ENTRIES", 2 * LATENTS)
    sae = load_sae(folder(tmp_path, weights()))
    x = torch.randn(7, WIDTH)
    active = sae.encode_sparse(x)
    assert torch.equal(active.dense(), sae.encode(x))
    places = list(zip(active.vectors.tolist(), active.latents.tolist(), strict=True))
    assert places == sorted(places)
    assert len(sae.encode_sparse(x[:0])) == 0


def test_unexplained_variance_of_a_lopsided_case() -> None:
    true = torch.tensor([[0.0, 0.0], [4.0, 0.0], [8.0, 3.0]])
    predicted = torch.tensor([[0.0, 0.0], [4.0, 2.0], [8.0, 3.0]])
    assert fraction_unexplained(predicted, true) == pytest.approx(4 / (16 + 16 + 1 + 1 + 4))
    assert fraction_unexplained(true.mean(0).expand(3, 2), true) == pytest.approx(1)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("model.layers.12", 12),
        ("layers.0", 0),
    ],
)
def test_layer_is_the_one_whose_output_is_read(tmp_path: Path, hook: str, layer: int) -> None:
    assert load_sae(folder(tmp_path, weights(), metadata={"hook_name": hook})).layer == layer


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not supported: expected one of standard"),
        ({"architecture": "gated"}, "has no tensor b_gate, which architecture 'gated' needs"),
        ({"metadata": 3}, "metadata is 3: expected an object"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z' is not supported"),
        ({"d_sae": "5"}, "d_sae is '5': expected a positive integer"),
        ({"d_sae": 6}, "tensor W_enc has shape (3, 5), but cfg.json says (3, 6)"),
        ({"architecture": "jumprelu"}, "has no tensor threshold, which architecture 'jumprelu' needs"),
        ({"architecture": "topk", "k": 6}, "k is 6: expected at most d_sae, 5"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "normalize_activations 'expected_average_only_in' is not",
        ),
        ({"metadata": {}}, "metadata.hook_name '' names no place that is read"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_z"}}, "'blocks.1.attn.hook_z' names no place that is read"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "'blocks.0.hook_resid_pre' reads the embeddings"),
    ],
)
def test_folders_that_contradict_themselves_are_refused_in_one_line(
    tmp_path: Path, config: dict[str, Any], line: str
) -> None:
    path = folder(tmp_path, weights(), **config)
    for read in (load_sae, lambda path: check_sae(path, WIDTH)):
        with pytest.raises(UserError) as caught:
            read(path)
        assert line in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SAE path 'nowhere' does not exist: expected a sae-lens folder"):
        load_sae("nowhere")
    with pytest.raises(UserError, match="SAE path 'pocket:other' does not exist: expected pocket:sae or pocket:trans"):
        load_sae("pocket:other")
    with pytest.raises(UserError, match=r"has no cfg\.json: expected a sae-lens folder"):
        load_sae(str(tmp_path))
    path = folder(tmp_path, weights())
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"sae_weights\.safetensors cannot be read"):
        check_sae(path, WIDTH)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(UserError, match=r"cfg\.json cannot be read"):
        check_sae(path, WIDTH)


def test_nan_and_foreign_width_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, weights())
    with pytest.raises(UserError, match="has feature vectors of width 3: the target has width 4"):
        check_sae(path, 4)
    assert check_sae(path, WIDTH).num_latents == LATENTS
    place = {"hook_name": "blocks.1.mlp.hook_in"}
    (tmp_path / "transcoder").mkdir()
    other = folder(tmp_path / "transcoder", weights(4), architecture="transcoder", d_out=4, metadata=place)
    with pytest.raises(UserError, match="reads vectors of width 3: the target has width 4"):
        check_sae(other, 4)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["b_enc"][2] = torch.nan
    with pytest.raises(UserError, match="tensor b_enc holds NaN or infinity"):
        load_sae(folder(tmp_path, tensors))
