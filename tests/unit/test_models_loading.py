"""Model paths and loading: what a user can get wrong is one line."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import randomized, tiny_model, tiny_tokenizer
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from introspect_ray.config import ActorConfig, GenerateConfig, ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.interventions.hooked import hooked_logits
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import Intervention
from introspect_ray.models import paths
from introspect_ray.models.loading import check_placement, load_model, load_tokenizer
from introspect_ray.models.paths import check_model, resolve_device, resolve_model_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def refused(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_loads_frozen_in_the_dtype_asked_for(folder):
    config = ModelConfig(path=str(folder), dtype="bfloat16", device="cpu")
    assert check_model(config).model_type == "llama"
    model = load_model(config)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert (
        load_model(ModelConfig(path=str(folder), device="cpu", attention="eager")).config._attn_implementation
        == "eager"
    )
    assert load_tokenizer(config)("the").input_ids == tiny_tokenizer()("the").input_ids


def test_loaded_weights_are_the_saved_ones(folder):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        saved = tiny_model("llama")(input_ids=ids).logits
        loaded = load_model(ModelConfig(path=str(folder), device="cpu"))(input_ids=ids).logits
    assert torch.equal(saved, loaded)


def test_pocket_names_resolve_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "POCKET_ARTIFACTS", tmp_path)
    for name in ("target_a", "target_b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert resolve_model_path("pocket:target_a") == str(tmp_path / "target_a")
    assert refused(resolve_model_path, "pocket:nope") == (
        "model path 'pocket:nope' does not exist: expected one of pocket:target_a, pocket:target_b"
    )
    assert "does not exist" in refused(resolve_model_path, "pocket:../target_a")


def test_paths_that_are_no_model(tmp_path):
    assert refused(resolve_model_path, "/nowhere/at/all") == (
        "model path '/nowhere/at/all' does not exist: expected a folder with a config.json, a hub id owner/name, "
        "or pocket:NAME"
    )
    assert refused(resolve_model_path, str(tmp_path)) == (
        f"model path '{tmp_path}' is no model folder: expected a config.json in it"
    )
    assert resolve_model_path("owner/name-1.5B") == "owner/name-1.5B"


def test_a_config_that_is_no_causal_language_model_is_refused_before_weights_load(tmp_path):
    BertConfig(hidden_size=8).to_json_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert refused(check_model, ModelConfig(path=str(tmp_path))) == (
        f"model path '{tmp_path}' holds a vit model: expected a causal language model"
    )
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    assert refused(check_model, ModelConfig(path=str(tmp_path))).endswith("set attention to 'eager'")
    (tmp_path / "config.json").write_text("{not json")
    assert refused(check_model, ModelConfig(path=str(tmp_path))).startswith(
        f"model path '{tmp_path}' could not be loaded"
    )


def test_a_hub_id_that_cannot_be_reached_is_one_line():
    line = refused(check_model, ModelConfig(path="no-such-owner/no-such-model"))
    assert line.startswith("model path 'no-such-owner/no-such-model' could not be loaded:")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert refused(resolve_device, "tpux") == "device 'tpux' is unknown: expected auto, cpu, cuda or cuda:N"


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert refused(load_model, ModelConfig(path=str(tmp_path), device="cpu")) == (
        f"model path '{tmp_path}' lacks 1 weights that its config.json asks for, e.g. model.layers.1.mlp.up_proj.weight"
    )


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert refused(load_tokenizer, ModelConfig(path=str(tmp_path))).startswith(f"model path '{tmp_path}' could not")


def test_four_bit_weights_compute_nearly_the_same(tmp_path):
    # bitsandbytes packs weights in blocks of 64 and needs whole ones in every row on a CPU.
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = randomized(LlamaForCausalLM(LlamaConfig(**shape, vocab_size=97, max_position_embeddings=64)))
    whole.save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path), device="cpu", quantization="nf4"))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert model.dtype == torch.float32 and not any(parameter.requires_grad for parameter in model.parameters())
    target = Target(model, tiny_tokenizer())
    runs = target.clean_runs([[5, 6, 7, 8], [9, 10]])
    logits = torch.stack([whole(input_ids=torch.tensor([run.ids])).logits[0, -1].detach() for run in runs])
    found = torch.stack([run.logits for run in runs])
    assert 0 < (found - logits).norm() < 0.5 * logits.norm()
    # Patched runs of a quantized target go up the ladder as well, and say what hooks say.
    rows = [Intervention((1,), (1,), vectors=torch.ones(1, 64)) for _ in runs]
    (one,), (other,) = target.patched_logits(runs, [[row] for row in rows])
    torch.testing.assert_close(torch.stack([one, other]), hooked_logits(model, runs, rows), rtol=0, atol=1e-4)
    assert runs[0].cache is not None, "keys and values are kept only if the ladder passed its self-check"


def test_a_device_map_places_the_layers_and_excludes_a_device(folder):
    model = load_model(ModelConfig(path=str(folder), device_map="auto"))
    assert {parameter.device.type for parameter in model.parameters()} == {resolve_device("auto").type}
    with pytest.raises(ValidationError, match="device_map auto chooses devices itself: found device cpu"):
        ModelConfig(path=str(folder), device="cpu", device_map="auto")
    with pytest.raises(ValidationError, match=r"device_map auto spreads layers .*: set actors.num_gpus, found 0"):
        GenerateConfig(target=ModelConfig(path=str(folder), device_map="auto"))
    GenerateConfig(target=ModelConfig(path=str(folder), device_map="auto"), actors=ActorConfig(num_gpus=0.5))


def test_a_model_that_its_gpus_do_not_hold_is_refused():
    config = ModelConfig(path="big", device_map="auto")
    on_gpus = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": torch.device("cuda:1"),
        "lm_head": "cuda:1",
    }
    check_placement(config, on_gpus, torch.device("cuda"))
    check_placement(config, {"": "cpu"}, torch.device("cpu"))
    for placed, beside, device in (
        ({**on_gpus, "model.layers.1": "cpu"}, "1 of 4 parts", "cuda"),
        ({**on_gpus, "model.layers.1": "disk", "lm_head": torch.device("cpu")}, "2 of 4 parts", "cuda"),
        ({"": torch.device("cpu")}, "1 of 1 parts", "cuda"),
        ({"model": "cpu", "lm_head": "disk"}, "1 of 2 parts", "cpu"),
    ):
        line = refused(check_placement, config, placed, torch.device(device))
        assert (
            line.startswith("model path 'big' does not fit")
            and f"left {beside} outside of the memory of {device}" in line
        )
