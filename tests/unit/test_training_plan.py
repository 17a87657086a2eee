"""Plans against truth: parameters of real models, bytes that the allocator gave out and arithmetic that was done in
real steps, and what is refused."""

import gc
import itertools
import runpy
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import yaml
from explainer_helpers import FAMILIES, model, tokenizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import train_config, write_dataset
from transformers import LlamaConfig, LlamaForCausalLM

from introspect_ray.cli import run_job
from introspect_ray.config import HUB_IDS, GpuName, KnownModel, LoraConfig, TrainConfig, resolved
from introspect_ray.errors import UserError
from introspect_ray.models.shapes import known_shape, model_shape
from introspect_ray.presets import Train8BConfig, Train70BConfig
from introspect_ray.training.census import arithmetic_of, count
from introspect_ray.training.footprint import LiveBytes
from introspect_ray.training.hardware import GPUS, gpu_named
from introspect_ray.training.loop import build
from introspect_ray.training.needs import GIB, PROCESS_BYTES
from introspect_ray.training.plan import changed, check_plan, plan_run
from introspect_ray.training.plan_table import table
from introspect_ray.training.run import prepare
from introspect_ray.training.schedule import make_optimizer
from introspect_ray.training.step import Stepper
from introspect_ray.training.train import check_memory
from introspect_ray.training.validation import Evaluator, load_held_out
from introspect_ray.training.workers import Workers

JOBS = Path(__file__).parents[2] / "jobs"
METHODS = ("full", "lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama large enough for its activations to matter, and a dataset for it."""
    path = tmp_path_factory.mktemp("plan")
    shape = LlamaConfig(
        vocab_size=3000,
        hidden_size=96,
        intermediate_size=320,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(shape).save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    write_dataset(path / "dataset", count=10, width=64)
    write_dataset(path / "held out", count=30, width=64, splits=("train", "validation", "validation"))
    return path


@pytest.fixture(autouse=True)
def own_group():
    """A sharded run that nobody has put into a process group makes one; later tests are to have none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def config_of(folder, method, **changes):
    options = {"lora__rank": 8, "optimization__batch_size": 10, "trainer__micro_batch_tokens": 4000}
    return train_config(folder, method=method, **options | {"trainer__packing": False} | changes)


def first_step(config):
    """A stepper and its optimizer after one step."""
    explainer, examples = build(prepare(config))
    stepper = Stepper(explainer, examples, config, Workers(0, 1))
    optimizer = make_optimizer(stepper.trainable.own.values(), config.optimization)
    stepper.step(0, optimizer)
    return stepper, optimizer


def real_bytes(config):
    """What a worker of this run holds between steps, and what a step takes beside it at its peak."""
    stepper, optimizer = first_step(config)
    own = stepper.trainable.own.values()
    tensors = [getattr(one, "_local_tensor", one) for one in stepper.explainer.parameters()]
    tensors += [one.grad for one in own]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    gc.collect()  # what earlier tests left would be given back in the step, and counted against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stepper.step(1, optimizer)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors), max(itertools.accumulate(changes))


@pytest.mark.parametrize(("method", "is_checkpointed"), itertools.product(METHODS, [False, True]))
def test_the_peak_is_what_the_allocator_gives_out(folder, method, is_checkpointed):
    config = config_of(folder, method, trainer__activation_checkpointing=is_checkpointed)
    memory = plan_run(config).memory
    held, peak = real_bytes(config)
    standing = memory.weights + memory.adapters + memory.gradients + memory.optimizer
    assert standing == pytest.approx(held, rel=0.001)
    assert memory.peak - standing == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("method", "sharding", "is_checkpointed", "dtype"),
    [
        ("full", "fsdp2", True, "bfloat16"),
        ("full", "fsdp2", False, "model"),
        ("lora", "fsdp2", True, "model"),
        ("qlora", "fsdp2", True, "bfloat16"),
        ("qlora", "fsdp2", False, "model"),
        ("qlora", "none", False, "bfloat16"),
    ],
)
def test_sharded_and_quantized_runs_stay_within_their_plan(folder, method, sharding, is_checkpointed, dtype):
    """One worker that gathers what it has itself; packed bits, scales and gathered layers are counted by the
    allocator."""
    config = config_of(
        folder,
        method,
        lora__dropout=0.0,
        trainer__sharding=sharding,
        trainer__activation_checkpointing=is_checkpointed,
        trainer__compute_dtype=dtype,
    )
    memory = plan_run(config).memory
    held, peak = real_bytes(config)
    standing = memory.weights + memory.adapters + memory.gradients + memory.optimizer
    assert standing == pytest.approx(held, rel=0.01)
    assert memory.peak == pytest.approx(held + peak, rel=0.15)


def test_evaluations_are_counted(folder):
    options = {"datasets": [str(folder / "held out")], "trainer__activation_checkpointing": True}
    config = config_of(folder, "lora", **options, evaluation__every=2, explainer__max_new_tokens=12)
    memory = plan_run(config).memory
    explainer, _ = build(prepare(config))
    evaluator = Evaluator(explainer, load_held_out(explainer, config), config, Workers(0, 1))
    with LiveBytes([*explainer.parameters(), *explainer.buffers()]) as alive:
        evaluator.scores()
    assert alive.peak <= memory.evaluation <= 2 * alive.peak
    assert plan_run(config_of(folder, "lora", **options)).memory.evaluation == 0
    many = changed(config, {"trainer.micro_batch_tokens": 40000, "evaluation.max_examples": 4000})
    assert plan_run(many).memory.peak > plan_run(changed(many, {"evaluation.every": 0})).memory.peak


@pytest.mark.parametrize("method", METHODS)
def test_arithmetic_is_what_a_step_does(folder, method):
    # One example at a time, because padding is work that the plan leaves out.
    config = config_of(folder, method, explainer__model__attention="eager", trainer__micro_batch_tokens=1)
    stepper, optimizer = first_step(config)
    with FlopCounterMode(display=False) as counted:
        stepper.step(1, optimizer)
    assert plan_run(config).pace.flop_per_step == pytest.approx(counted.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_real_model(family):
    real = model(family, 300)
    shape = real.config
    arithmetic = arithmetic_of(TrainConfig(), shape)._replace(attention="eager")
    census = count(shape, arithmetic)
    assert census.base == sum(parameter.numel() for parameter in real.parameters())
    assert census.base == census.rest + 2 * census.layer and census.adapter == 0
    if family == "llama":
        lora = LoraConfig(rank=3)
        adapted = count(shape, arithmetic._replace(lora=lora))
        weights = [part.weight for part in real.model.layers.modules() if isinstance(part, torch.nn.Linear)]
        assert adapted.adapter == sum(lora.rank * sum(weight.shape) for weight in weights) == 2 * adapted.layer_adapter
        assert adapted.linear == sum(weight.numel() for weight in weights)
        assert adapted._replace(adapter=0, layer_adapter=0) == census


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.1-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360), ("llama-3.1-70b", 70_553_706_496)],
)
def test_known_shapes_have_the_published_number_of_parameters(name, parameters):
    shape = known_shape(name)
    assert count(shape, arithmetic_of(TrainConfig(), shape)).base == parameters


def test_known_models_and_gpus_are_complete():
    assert set(HUB_IDS) == set(get_args(KnownModel)) and set(GPUS) == set(get_args(GpuName))


def plan_70b(**changes):
    config = changed(Train70BConfig().training(), {name.replace("__", "."): value for name, value in changes.items()})
    return plan_run(config)


@pytest.mark.parametrize(
    ("gpu", "workers", "low", "high"), [("H100-80", 8, 15, 40), ("H100-80", 4, 20, 50), ("H200-141", 1, 50, 110)]
)
def test_70b_fits(gpu, workers, low, high):
    """4-bit weights are 31.9 GiB, embeddings and head 3.9, scales 1.0 on each worker."""
    plan = plan_70b(plan__gpu=gpu, trainer__num_workers=workers)
    check_plan(plan)
    assert low * GIB < plan.memory.peak < high * GIB
    assert plan.memory.weights / GIB == pytest.approx((31.9 + 3.9) / workers + 1.0, rel=0.01)
    shown = table(plan)
    assert f"{workers} x {gpu}" in shown and f"{plan.memory.peak / GIB:.2f}" in shown and "fits" in shown
    hours = plan.pace.seconds_per_step * plan.pace.steps * workers / 3600
    assert shown.endswith(f"\nrent: {hours:.1f} GPU hours")
    priced = replace(plan, config=changed(plan.config, {"plan.price_per_gpu_hour": 2.5}))
    assert table(priced).endswith(f"\nrent: {hours:.1f} GPU hours, {2.5 * hours:,.2f} at 2.5 each")


def test_a_plan_that_does_not_fit_names_a_setting_that_does():
    plan = plan_70b(trainer__num_workers=2, method="full")
    with pytest.raises(UserError) as caught:
        check_plan(plan)
    line = str(caught.value)
    assert "a worker needs" in line and "of a H100-80 72.9 are usable; it would fit with method qlora" in line
    assert "DOES NOT FIT" in table(plan)


def test_sharding_is_named_before_a_smaller_model_and_workers_after():
    config = changed(
        Train8BConfig().training(), {"trainer.sharding": "none", "trainer.activation_checkpointing": False}
    )
    with pytest.raises(UserError, match=r"it would fit with trainer.sharding fsdp2"):
        check_plan(plan_run(config))
    with pytest.raises(UserError, match=r"it would fit with trainer.num_workers [248] "):
        check_plan(plan_70b(trainer__num_workers=1, plan__gpu="A100-40"))


@pytest.mark.parametrize(
    ("types", "gpu"),
    [
        ([], None),
        (["H100"], "H100-80"),
        (["A100"], "A100-80"),  # of two sizes the one that refuses nothing that could run
        (["A100-40G"], "A100-40"),
        (["A10G", "L40S"], "L40S-48"),
        (["H100", "TPU-V4"], None),
    ],
)
def test_gpus_by_the_names_that_ray_has_for_them(types, gpu):
    assert gpu_named(types) == gpu


def test_a_run_that_its_gpus_do_not_hold_is_refused_without_asking_for_a_plan():
    config = changed(Train8BConfig().training(), {"trainer.sharding": "none"})
    with pytest.raises(UserError, match=r"does not fit: a worker needs .* of a A100-80 .* usable; it would fit with"):
        check_memory(config, {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0})
    check_memory(config, {"GPU": 2.0, "accelerator_type:B200": 1.0})
    check_memory(config, {"GPU": 2.0, "accelerator_type:UNKNOWN": 1.0})
    check_memory(changed(config, {"trainer.gpus_per_worker": 0}), {"accelerator_type:L4": 1.0})
    with pytest.raises(UserError, match="does not fit"):  # two workers on each GPU
        check_memory(changed(config, {"trainer.gpus_per_worker": 0.5}), {"accelerator_type:B200": 1.0})


def test_what_a_plan_leaves_out_is_said():
    config = Train8BConfig().training()
    shown = [table(plan_run(changed(config, {"trainer.compile": is_on}))) for is_on in (False, True)]
    assert ["torch.compile is not counted" in one for one in shown] == [False, True]


def test_a_plan_that_nothing_makes_fit():
    plan = plan_70b(plan__gpu="L4-24", explainer__projection="linear", plan__usable_share=0.1)
    with pytest.raises(UserError, match="no sharding, adapter or batch of up to 256 workers makes it fit"):
        check_plan(plan)


def test_what_saves_memory_saves_memory():
    config = changed(Train8BConfig().training(), {"trainer.num_workers": 8, "optimization.batch_size": 1024})
    peak = plan_run(config).memory.peak
    for settings in (
        {"trainer.activation_checkpointing": False},
        {"trainer.micro_batch_tokens": 8192},
        {"trainer.num_workers": 4},
        {"trainer.compute_dtype": "model"},
    ):
        assert plan_run(changed(config, settings)).memory.peak > peak, settings
    assert plan_run(changed(config, {"method": "lora", "explainer.model.dtype": "bfloat16"})).memory.peak < peak


def test_lengths_come_from_the_dataset(folder):
    config = config_of(folder, "full")
    _, examples = build(prepare(config))
    plan = plan_run(config)
    assert plan.workload.mean_tokens == pytest.approx(sum(examples.lengths) / len(examples.lengths), rel=0.02)
    assert plan.workload.longest == max(examples.lengths)
    assert plan.workload.target_width == 64 and plan.workload.num_examples == 10
    assert plan.pace.seconds_per_step is None and plan.fits
    missing = plan_run(changed(config, {"datasets": [str(folder / "nowhere")], "plan.task": "input_ablation"}))
    assert "assumed" in missing.workload.source and not missing.workload.has_vectors
    with pytest.raises(UserError, match="nowhere"):
        plan_run(changed(config, {"datasets": [*config.datasets, str(folder / "nowhere")]}))


def test_host_memory_counts_the_copies_of_a_checkpoint(folder):
    settings = {"trainer.gpus_per_worker": 1, "explainer.model.device": "auto"}
    few, many = (plan_run(changed(config_of(folder, "lora"), {**settings, "lora.rank": rank})) for rank in (4, 4096))
    trained = many.memory.gradients - few.memory.gradients
    assert trained > 0 and many.host_bytes - PROCESS_BYTES == 3 * many.memory.gradients
    assert few.host_bytes < many.host_bytes


def test_epochs_are_steps(folder):
    config = config_of(folder, "full", optimization__epochs=2.5, optimization__batch_size=3)
    assert plan_run(config).pace.steps == 9
    run = prepare(config)
    assert (run.config.optimization.steps, run.config.optimization.epochs) == (9, None)
    same = config_of(folder, "full", optimization__steps=9, optimization__batch_size=3, plan__gpu="L4-24")
    assert prepare(same).run_key == run.run_key


def test_a_model_without_a_shape(folder):
    with pytest.raises(UserError, match=r"does not exist.*; shapes are known of meta-llama/Llama-3.1-8B, "):
        plan_run(changed(config_of(folder, "full"), {"explainer.model.path": "/nowhere/at/all"}))
    assert model_shape(TrainConfig().explainer.model.model_copy(update={"path": "/x/Qwen3-8B"})).vocab_size == 151936


@pytest.mark.parametrize(
    ("job", "config_class", "arguments", "status"),
    [
        ("train_70b_explainer", Train70BConfig, [], 0),
        ("train_70b_explainer", Train70BConfig, ["--trainer.num_workers", "1"], 2),
        ("train_8b_explainer", Train8BConfig, ["--model", "qwen3-8b", "--task", "activation_patching"], 0),
        ("train_explainer", TrainConfig, ["--config", "FILE"], 0),
    ],
)
def test_jobs_print_the_plan_and_end(folder, monkeypatch, capsys, job, config_class, arguments, status):
    monkeypatch.syspath_prepend(JOBS)
    module = runpy.run_path(str(JOBS / f"{job}.py"))
    (folder / "plan.yaml").write_text(yaml.safe_dump(resolved(config_of(folder, "full"))))
    given = [str(folder / "plan.yaml") if word == "FILE" else word for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        run_job(config_class, module["main"], "A job.", ["--plan", *given], switches={"plan": "plan.show"})
    written = capsys.readouterr()
    assert stopped.value.code == status
    assert "\npeak" in written.out and "\nsteps: " in written.out
    errors = [line for line in written.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (status == 2) and all("it would fit with" in line for line in errors)
    assert ("\ntime: " in written.out) == (job != "train_explainer")
