"""Checkpoints in the layouts that P1 published, made here, load and answer as what they were made of."""

import json

import peft
import pytest
import torch
from explainer_helpers import model, queries, tokenizer, vector
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from introspect_ray.config import ExplainerConfig, LoraConfig, ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.published import is_published, load_published

LLAMA_TOKENS = [f"<|reserved_special_token_{number}|>" for number in range(13)]
WIDE = TargetInfo(path="wide", width=20, num_layers=4)


def p1_tokenizer(tokens=LLAMA_TOKENS):
    text = tokenizer(placeholders=False)
    text.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    return text


def base_folder(folder, tokens=LLAMA_TOKENS):
    """What an explainer of P1 starts from."""
    text = p1_tokenizer(tokens)
    model("llama", len(text)).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def add_keys(folder, tensors):
    """Put tensors beside the weights, into the same file."""
    file = next(file for file in folder.glob("*.safetensors"))
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def random_maps(count=4, width=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, width, generator=generator) for _ in range(count)]


def load(folder, **options):
    return Explainer(*load_published(str(folder), "cpu", "float32", **options))


def project(explainer, layer):
    """One vector of the target as it enters the explainer."""
    values = torch.tensor(vector(explainer.card.target.width, 1).values)
    return explainer.projections(values[None], [(layer,)])[0], values


def test_full_weights_of_a_self_explainer(tmp_path):
    folder = base_folder(tmp_path / "Transluce" / "features_explain_llama3.1_8b_llama3.1_8b_instruct")
    add_keys(folder, {f"embed_projs.{layer}.weight": weight for layer, weight in enumerate(random_maps(2, 32))})
    loaded = Explainer.load(str(folder), "cpu", "float32")
    card = loaded.card
    assert card.target == TargetInfo(path="meta-llama/Llama-3.1-8B", width=32, num_layers=2)
    assert card.base.path == "meta-llama/Llama-3.1-8B-Instruct"
    assert (card.weights, card.projection) == ("full", "none"), "P1's code skips projections of equal widths"
    assert card.placeholders.all == tuple(f"<|reserved_special_token_{number}|>" for number in (10, 12, 11))
    config = ExplainerConfig(model=ModelConfig(path=str(folder), device="cpu"), max_new_tokens=card.max_new_tokens)
    same = Explainer.create(config, TargetInfo(path="t", width=32, num_layers=2), seed=0)
    asked = [query.map_vectors(lambda _: vector(32, 5, (1,))) for query in queries(6)]
    assert loaded.explain(asked, 4) == same.explain(asked, 4)


@pytest.mark.parametrize("layout", ["keys", "file", "alignment", "alignment in the folder"])
def test_projections_of_another_target(tmp_path, layout):
    folder, maps = base_folder(tmp_path / "explainer"), random_maps()
    options = {}
    aligned = {f"alignments.{layer}.weight": weight.T.contiguous() for layer, weight in enumerate(maps)}
    if layout == "keys":
        add_keys(folder, {f"embed_projs.{layer}.weight": weight for layer, weight in enumerate(maps)})
    elif layout == "file":
        torch.save({f"{layer}.weight": weight for layer, weight in enumerate(maps)}, folder / "embed_projs.pt")
    elif layout == "alignment":
        torch.save(aligned, tmp_path / "alignment.pt")
        options["alignment"] = str(tmp_path / "alignment.pt")
    else:
        save_file(aligned, folder / "alignments.safetensors")
    loaded = load(folder, **options)
    assert loaded.card.target == TargetInfo(path="unknown", width=20, num_layers=4)
    assert loaded.card.projection == "linear"
    for layer in range(4):
        projected, values = project(loaded, layer)
        torch.testing.assert_close(projected, maps[layer] @ values)
    loaded.save(str(tmp_path / "converted"))
    assert not is_published(str(tmp_path / "converted"))
    converted = Explainer.load(str(tmp_path / "converted"), "cpu", "float32")
    assert converted.card == loaded.card
    assert converted.explain(queries(3, 20), 2) == loaded.explain(queries(3, 20), 2)


def adapter_folder(tmp_path, embeddings=None):
    """A PEFT adapter that P1's code saved: with copies of the embeddings, which `embeddings` may change first."""
    base = base_folder(tmp_path / "base")
    config = ExplainerConfig(model=ModelConfig(path=str(base), device="cpu"), max_new_tokens=50)
    made = Explainer.create(config, TargetInfo(path="t", width=32, num_layers=4), seed=0)
    made.add_adapter(LoraConfig(rank=2, dropout=0, target_modules=("q_proj", "up_proj")), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.trainable_parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if embeddings is not None:
            embeddings(made.causal.get_input_embeddings().weight)
    made.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    return tmp_path / "adapter", made


def test_adapter_with_copies_of_the_embeddings(tmp_path):
    folder, made = adapter_folder(tmp_path)
    assert any("embed_tokens" in key for key in load_file(folder / "adapter_model.safetensors"))
    loaded = load(folder, target=TargetInfo(path="t", width=32, num_layers=4))
    assert loaded.card.weights == "lora"
    assert loaded.explain(queries(6), 4) == made.explain(queries(6), 4)
    loaded.save(str(tmp_path / "converted"))
    assert not any("embed" in key for key in load_file(tmp_path / "converted" / "adapter_model.safetensors"))
    converted = Explainer.load(str(tmp_path / "converted"), "cpu", "float32")
    assert converted.explain(queries(6), 4) == made.explain(queries(6), 4)


def test_adapter_with_other_embeddings_is_merged(tmp_path):
    folder, made = adapter_folder(tmp_path, lambda weight: weight.mul_(1.5))
    loaded = load(folder, target=TargetInfo(path="t", width=32, num_layers=4))
    assert loaded.card.weights == "full"
    assert loaded.explain(queries(6), 4) == made.explain(queries(6), 4)
    loaded.save(str(tmp_path / "converted"))
    converted = Explainer.load(str(tmp_path / "converted"), "cpu", "float32")
    assert converted.explain(queries(6), 4) == made.explain(queries(6), 4)


def test_base_of_an_adapter_by_another_name(tmp_path):
    folder, made = adapter_folder(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base' does not exist"):
        load(folder)
    loaded = load(folder, base=str(tmp_path / "moved"), target=TargetInfo(path="t", width=32, num_layers=4))
    assert loaded.explain(queries(3), 4) == made.explain(queries(3), 4)


def test_adapters_that_caught_the_projections(tmp_path):
    """P1's code puts adapters on its projections too, unless told otherwise."""
    folder, _ = adapter_folder(tmp_path)
    maps, settings = random_maps(), json.loads((folder / "adapter_config.json").read_text())
    generator = torch.Generator().manual_seed(9)
    pairs = [(torch.randn(2, 20, generator=generator), torch.randn(32, 2, generator=generator)) for _ in maps]
    tensors = {}
    for layer, (down, up) in enumerate(pairs):
        tensors[f"base_model.model.embed_projs.{layer}.lora_A.weight"] = down
        tensors[f"base_model.model.embed_projs.{layer}.lora_B.weight"] = up
    add_keys(folder, tensors)
    with pytest.raises(UserError, match=r"changes embed_projs\.0 but does not hold its weights"):
        load(folder, target=WIDE)
    add_keys(folder, {f"base_model.model.embed_projs.{n}.base_layer.weight": weight for n, weight in enumerate(maps)})
    loaded = load(folder, target=WIDE)
    for layer, (down, up) in enumerate(pairs):
        projected, values = project(loaded, layer)
        scale = settings["lora_alpha"] / settings["r"]
        torch.testing.assert_close(projected, maps[layer] @ values + scale * (up @ (down @ values)))


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda _: None, {"target": WIDE}, "has no projection of layer 0, expected one for each of the 4 layers"),
        (
            lambda folder: add_keys(folder, {f"embed_projs.{n}.weight": w for n, w in enumerate(random_maps(4, 21))}),
            {"target": WIDE},
            "the projection of layer 0 is 32 x 21, expected a finite one of 32 x 20",
        ),
        (
            lambda folder: add_keys(folder, {f"embed_projs.{n}.weight": w for n, w in enumerate(random_maps(3))}),
            {"target": WIDE},
            "has no projection of layer 3",
        ),
        (
            lambda folder: torch.save({"0.weight": print}, folder / "embed_projs.pt"),
            {},
            "embed_projs.pt cannot be read as tensors: ",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"xx"),
            {},
            "cannot be loaded: Error while deserializing",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), {}, "does not say what its base model is"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), {}, "cannot be loaded: Expecting property"),
        (
            lambda folder: tokenizer(placeholders=False).save_pretrained(folder),
            {},
            "its tokenizer has none of the placeholder tokens of P1",
        ),
        (lambda _: None, {"alignment": "nowhere.pt"}, "nowhere.pt cannot be read as tensors: "),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, damage, options, message):
    folder = base_folder(tmp_path / "explainer")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)


def test_an_unfinished_explainer_is_not_taken_for_a_published_one(tmp_path):
    folder = base_folder(tmp_path / "explainer")
    assert is_published(str(folder))
    (folder / "training.json").write_text("{}")
    assert not is_published(str(folder))
    with pytest.raises(UserError, match=r"is not a finished explainer: it has no explainer.json"):
        Explainer.load(str(folder), "cpu", "float32")


@torch.no_grad()
def logits(explainer):
    """Of some prompt, at every token."""
    return explainer.causal(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_adapters_answer_alike(tmp_path, quantization):
    base = tmp_path / "base"
    text = tokenizer()
    model("llama", len(text), width=64).save_pretrained(base)
    text.save_pretrained(base)
    config = ExplainerConfig(model=ModelConfig(path=str(base), device="cpu", quantization=quantization))
    made = Explainer.create(config, TargetInfo(path="t", width=64, num_layers=4), seed=0)
    made.add_adapter(LoraConfig(rank=2, dropout=0, target_modules=("q_proj", "up_proj")), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.trainable_parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    made.save(str(tmp_path / "adapter"))
    expected = logits(made)
    merging = Explainer.load(str(tmp_path / "adapter"), "cpu", "float32")
    untouched = logits(Explainer.create(config, made.card.target, seed=0))
    merging.merge_adapter()
    assert not isinstance(merging.model, peft.PeftModel) and merging.card.weights == "full"
    merging.save(str(tmp_path / "merged"))
    merged = Explainer.load(str(tmp_path / "merged"), "cpu", "float32")
    assert merged.card == merging.card and merged.card.base.quantization == "none"
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    effect = (untouched - expected).norm() / expected.norm()
    # In 4 bits, the CPU computes with activations of 8 bits of mantissa.
    assert (logits(merged) - expected).norm() / expected.norm() < (1e-4 if quantization == "none" else 0.1 * effect)
    assert effect > 0.1
