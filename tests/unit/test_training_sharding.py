"""Sharded weights in one process: streamed as `load_model` would load them, trained to what an unsharded run gets."""

import gc
import json
import weakref

import pytest
import torch
import torch.distributed as dist
from explainer_helpers import model_folder, queries
from safetensors.torch import load_file, save_file
from training_helpers import train_config, write_dataset

from introspect_ray.config import ModelConfig
from introspect_ray.errors import UserError
from introspect_ray.explainer.files import adapter_start
from introspect_ray.explainer.model import Explainer
from introspect_ray.models.loading import load_model
from introspect_ray.models.streaming import Streamer, WeightFiles, empty_model
from introspect_ray.training import sharding
from introspect_ray.training.checkpoint import Checkpoints, CheckpointStore, TrainState
from introspect_ray.training.loop import build, fit
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.run import prepare
from introspect_ray.training.schedule import make_optimizer
from introspect_ray.training.step import Stepper
from introspect_ray.training.workers import Workers

ALONE = Workers(0, 1)


@pytest.fixture(autouse=True)
def own_group():
    """A run that nobody has put into a process group makes one; later tests are to have none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # untied and tied heads; names with and without prefix
def test_streamed_weights_are_those_that_load(tmp_path, family):
    config = ModelConfig(path=str(model_folder(tmp_path, family)), device="cpu", attention="eager")
    expected = load_model(config)
    files = WeightFiles(config)
    model = empty_model(config, torch.float32, num_tokens=0)
    assert all(parameter.is_meta for parameter in model.parameters())
    Streamer(model, files, torch.device("cpu"), fill=lambda name, _: pytest.fail(name)).load(model)
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_layer_that_was_cut_up_is_not_kept_whole(tmp_path, monkeypatch, method):
    """So a process holds one layer beside its shards, whatever the model's size."""
    whole = []
    real = sharding.fully_shard

    def watched(module, **options):
        if not isinstance(module, Explainer):
            gc.collect()
            assert [ref for ref in whole if ref() is not None] == []
            whole.extend(weakref.ref(parameter.untyped_storage()) for parameter in module.parameters())
        return real(module, **options)

    monkeypatch.setattr(sharding, "fully_shard", watched)
    build(run_of(tmp_path, "run", method=method, trainer__sharding="fsdp2"))
    assert len(whole) > 2


def test_checkpoints_of_another_model_are_refused(tmp_path):
    config = ModelConfig(path=str(model_folder(tmp_path, "llama")), device="cpu")
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"

    def stream():
        files = WeightFiles(config)
        model = empty_model(config, torch.float32, 0)
        Streamer(model, files, torch.device("cpu"), lambda name, _: pytest.fail(name)).load(model)

    save_file({**weights, name: torch.zeros(3, 4)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} is \[3, 4\], its config.json asks for \[64, 32\]"):
        stream()
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"lacks 1 weights that its config.json asks for .*, e.g. {name}"):
        stream()


def run_of(folder, output, **changes):
    """A run whose explainer gets new tokens and projections, and whose weights are drawn apart by dropout."""
    if not (folder / "base").exists():
        model_folder(folder / "base", "llama", placeholders=False)
        write_dataset(folder / "dataset", width=20)
    settings = {"lora__rank": 2, "lora__dropout": 0.3, "optimization__learning_rate": 1e-3}
    run = prepare(train_config(folder, output=str(folder / output), **{**settings, **changes}))
    run.record({})
    return run


def exported(folder):
    return load_file(folder / "projections.safetensors") | {
        name: tensor for file in sorted(folder.glob("*model*.safetensors")) for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_sharded_run_equals_a_whole_one_and_a_killed_one_goes_on(tmp_path, monkeypatch, method):
    whole = run_of(tmp_path, "whole", method=method)
    fit(whole, ALONE)
    sharded = run_of(
        tmp_path, "sharded", method=method, trainer__sharding="fsdp2", trainer__activation_checkpointing=True
    )
    monkeypatch.setattr("introspect_ray.explainer.files.EXPORT_FILE_BYTES", 40_000)
    real = Stepper.step

    def dies(self, number, optimizer):
        if number == 5:
            raise KeyboardInterrupt
        return real(self, number, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(sharded, ALONE)
    told = []
    fit(sharded, ALONE, told.append)
    assert told[0].startswith("goes on from the checkpoint of step ")
    one, other = exported(tmp_path / "whole"), exported(tmp_path / "sharded")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5)
    for first, second in zip(read_metrics(whole.folder), read_metrics(sharded.folder), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    if method == "full":
        assert len(json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    asked = [query for query in queries(3, width=20) if query.vectors]
    answers = [
        Explainer.load(str(tmp_path / output), "cpu", "float32").explain(asked, 2) for output in ("whole", "sharded")
    ]
    assert answers[0] == answers[1]


def test_runs_change_between_whole_and_sharded_weights(tmp_path):
    """Checkpoints do not depend on how the weights were laid out."""
    one = run_of(tmp_path, "run", method="lora")
    explainer, examples = build(one)
    stepper = Stepper(explainer, examples, one.config, ALONE)

    def checkpoints(stepper, config):
        optimizer = make_optimizer(stepper.trainable.own.values(), config.optimization)
        store = CheckpointStore(one.checkpoints, one.run_key, 2)
        return Checkpoints(store, stepper.trainable, optimizer, pytest.fail), optimizer

    writer, optimizer = checkpoints(stepper, one.config)
    stepper.step(0, optimizer)
    writer.start(TrainState(1))
    writer.settle(wait=True)
    other = run_of(tmp_path, "run", method="lora", trainer__sharding="fsdp2")
    sharded, _ = build(other)
    again = Stepper(sharded, examples, other.config, ALONE)
    reader, other_optimizer = checkpoints(again, other.config)
    assert again.trainable.is_sharded
    assert reader.restore() == TrainState(1)
    first, second = stepper.step(1, optimizer), again.step(1, other_optimizer)
    assert second.loss_sum == pytest.approx(first.loss_sum, abs=1e-4)
    for name, own in stepper.trainable.own.items():
        torch.testing.assert_close(again.trainable.own[name], own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_bfloat16_is_what_is_computed_in_and_not_what_is_kept(tmp_path, sharding):
    losses = {}
    for dtype in ("model", "bfloat16"):
        run = run_of(tmp_path, f"run-{dtype}", trainer__sharding=sharding, trainer__compute_dtype=dtype)
        explainer, examples = build(run)
        assert {parameter.dtype for parameter in explainer.trainable_parameters().values()} == {torch.float32}
        stepper = Stepper(explainer, examples, run.config, ALONE)
        stepper.trainable.clear_gradients()
        losses[dtype] = float(stepper._accumulate([0, 1, 2, 3], examples, 50))
    assert losses["model"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["model"], rel=1e-2)


def test_start_of_an_adapter_is_uniform_and_its_own():
    one = adapter_start("layers.0.q.lora_A.default.weight", torch.Size([64, 400]), seed=1)
    assert one.abs().max() <= 1 / 20
    assert one.std() == pytest.approx((1 / 20) / 3**0.5, rel=0.02)
    assert torch.equal(one, adapter_start("layers.0.q.lora_A.default.weight", torch.Size([64, 400]), seed=1))
    assert not torch.equal(one, adapter_start("layers.1.q.lora_A.default.weight", torch.Size([64, 400]), seed=1))
    assert not torch.equal(one, adapter_start("layers.0.q.lora_A.default.weight", torch.Size([64, 400]), seed=2))
    assert adapter_start("layers.0.q.lora_B.default.weight", torch.Size([4, 4]), seed=1).count_nonzero() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "explainer__model__quantization": "nf4"}, "but method full trains all weights"),
        ({"method": "qlora", "explainer__model__quantization": "nf4"}, "quantization is nf4, but method qlora places"),
        (
            {"trainer__sharding": "fsdp2", "explainer__model__device_map": "auto", "explainer__model__device": "auto"},
            "device_map is auto, but trainer.sharding fsdp2 places",
        ),
    ],
)
def test_weights_that_cannot_be_placed_so_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(train_config(tmp_path, **changes))


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_evaluations_while_training_leave_sharded_weights_as_they_are(tmp_path, method):
    """Generating takes other paths through sharded and 4-bit layers than training does."""
    write_dataset(tmp_path / "held_out", count=36, splits=("train", "train", "validation"))
    options = {
        "method": method,
        "datasets": [str(tmp_path / "held_out")],
        "optimization__steps": 4,
        "trainer__log_every": 1,
    }
    losses = {}
    for every in (0, 2):
        run = run_of(tmp_path, f"every-{every}", trainer__sharding="fsdp2", evaluation__every=every, **options)
        results = fit(run, ALONE)
        losses[every] = [line["loss"] for line in read_metrics(run.folder)]
        assert results["step"] == 4
    assert losses[0] == losses[2] and len(losses[2]) == 4
    assert set(results["best"]) == {"exact_match", "has_changed_f1", "content_match", "parse_rate"}
    loaded = Explainer.load(str(tmp_path / "every-2"), "cpu", "float32")
    assert loaded.explain(queries(1, loaded.card.target.width), batch_size=1)
