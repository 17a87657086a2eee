"""A saved explainer answers as before; a damaged or unfinished one is refused in one line."""

import json

import pytest
import torch
from explainer_helpers import explainer, model_folder, queries, vector
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from introspect_ray.config import ExplainerConfig, LoraConfig, ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import TargetInfo, local_target
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.projections import Projections, resolve_kind
from introspect_ray.explainer.query import Query

TARGET = TargetInfo(path="target", width=20, num_layers=4)


def nudge(made: Explainer) -> None:
    """Change everything that training would change."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.trainable_parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("placeholders", [True, False])
def test_round_trip_gives_equal_answers(tmp_path, method, family, placeholders):
    path = model_folder(tmp_path / "base", family, placeholders=placeholders)
    config = ExplainerConfig(model=ModelConfig(path=str(path), device="cpu"), max_new_tokens=6)
    made = Explainer.create(config, TARGET, seed=0)
    untrained = made.explain(queries(6, 20), 4)
    if method == "lora":
        made.add_adapter(LoraConfig(rank=2, dropout=0, target_modules=("q_proj", "c_attn")), seed=0)
    else:
        made.model.requires_grad_(True)
    made.projections.requires_grad_(True)
    nudge(made)
    answers = made.explain(queries(6, 20), 4)
    assert answers != untrained
    made.save(str(tmp_path / "saved"))
    loaded = Explainer.load(str(tmp_path / "saved"), device="cpu", dtype="float32")
    assert loaded.card == made.card
    assert loaded.explain(queries(6, 20), 4) == answers
    assert set(load_file(tmp_path / "saved" / "projections.safetensors")) == {f"{layer}.weight" for layer in range(4)}
    assert (tmp_path / "saved" / "adapter_config.json").is_file() == (method == "lora")


def test_new_tokens_get_mean_rows(tmp_path):
    path = model_folder(tmp_path, "llama", placeholders=False)
    config = ExplainerConfig(model=ModelConfig(path=str(path), device="cpu"))
    made = Explainer.create(config, TARGET, seed=0)
    weight = made.causal.get_input_embeddings().weight
    assert weight.shape[0] == 256 + 5 + 3
    for row in (made.encoder.begin_id, made.encoder.vector_id, made.encoder.close_id):
        torch.testing.assert_close(weight[row], weight[:261].mean(dim=0))


def test_remote_folder(tmp_path):
    made = explainer(tmp_path)
    made.save("memory://runs/explainer")
    loaded = Explainer.load("memory://runs/explainer", device="cpu", dtype="auto")
    assert loaded.explain(queries(3), 2) == made.explain(queries(3), 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "explainer.json").unlink(), "is not a finished explainer: it has no explainer.json"),
        (lambda folder: (folder / "explainer.json").write_text("{"), "explainer.json is not valid JSON"),
        (lambda folder: edit(folder, format_version=9), "format_version is 9, expected 1"),
        (lambda folder: edit(folder, max_new_tokens="many"), "explainer.json: field max_new_tokens"),
        (lambda folder: (folder / "projections.safetensors").unlink(), "cannot be loaded: .*projections.safetensors"),
        (lambda folder: (folder / "projections.safetensors").write_bytes(b"xx"), "cannot be loaded: "),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"xx"), "could not be loaded: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded: "),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "could not be loaded: "),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    made = explainer(tmp_path, target_width=20)
    made.save(str(tmp_path / "saved"))
    damage(tmp_path / "saved")
    with pytest.raises(UserError, match=message) as error:
        Explainer.load(str(tmp_path / "saved"), device="cpu", dtype="float32")
    assert "\n" not in str(error.value)


def edit(folder, **changes):
    card = json.loads((folder / "explainer.json").read_text())
    (folder / "explainer.json").write_text(json.dumps({**card, **changes}))


def test_widths_without_a_projection(tmp_path):
    with pytest.raises(UserError, match="vector width 20 does not fit an explainer of width 32 without a projection"):
        explainer(tmp_path, target_width=20, projection="none")


def test_projection_kinds():
    assert resolve_kind(ExplainerConfig(), 8, 8) == "none"
    assert resolve_kind(ExplainerConfig(), 8, 12) == "linear"
    assert resolve_kind(ExplainerConfig(projection="linear"), 8, 8) == "linear"
    assert resolve_kind(ExplainerConfig(fitted_projection="somewhere"), 8, 8) == "linear"


def test_projection_starts_near_norm_preserving_and_is_seeded():
    made = [Projections("linear", 2, 64, 256) for _ in range(3)]
    for projections, seed in zip(made, (0, 0, 1), strict=True):
        projections.initialize(seed)
    vectors = torch.stack([torch.tensor(vector(64, seed).values) for seed in range(50)])
    ratio = (made[0](vectors, [(0, 1)] * 50).norm(dim=-1) / vectors.norm(dim=-1)).mean()
    assert 0.9 < ratio < 1.1
    assert torch.equal(made[0]["1"].weight, made[1]["1"].weight)
    assert not torch.equal(made[0]["1"].weight, made[2]["1"].weight)


def test_projection_of_equal_widths_starts_as_the_identity():
    projections = Projections("linear", 2, 8, 8)
    projections.initialize(0)
    vectors = torch.randn(3, 8)
    torch.testing.assert_close(projections(vectors, [(0,), (1,), (0, 1)]), vectors)


def test_projection_of_a_block_is_the_mean_of_its_layers():
    projections = Projections("linear", 3, 4, 6)
    vectors = torch.randn(5, 4)
    blocks = [(2,), (0, 1), (2,), (0,), (1, 0)]
    expected = [
        torch.stack([projections[str(layer)](one) for layer in block]).mean(dim=0)
        for one, block in zip(vectors, blocks, strict=True)
    ]
    torch.testing.assert_close(projections(vectors, blocks), torch.stack(expected))


def test_query_changes_reach_the_encoding(tmp_path):
    """What controls do: a query without its vector has no marker tokens left."""
    made = explainer(tmp_path)
    query = Query(("a", vector(32, 0), "b"))
    (kept,), (removed,) = made.encode([query], None), made.encode([query.map_vectors(lambda _: None)], None)
    assert len(kept.ids) - len(removed.ids) == 3
    assert removed.vector_positions == []


@pytest.mark.parametrize("card", ["explainer.json", "simulator.json"])
def test_a_card_is_uploaded_after_all_that_it_vouches_for(monkeypatch, card):
    sent, real = [], MemoryFileSystem.put_file

    def put_file(self, local, remote, **options):
        sent.append(remote.rpartition("/")[2])
        return real(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with local_target(f"memory://cards/{card}", last=card) as folder:
        for name in ("a.json", card, "tokenizer.json", "weights.safetensors"):
            (folder / name).write_text("{}")
    assert sorted(sent[:-1]) == ["a.json", "tokenizer.json", "weights.safetensors"] and sent[-1] == card
