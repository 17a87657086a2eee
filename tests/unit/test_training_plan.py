"""Plans against truth: parameters of real models, bytes that the allocator gave out in real steps, work counted twice."""

import math

import pytest
import torch
from explainer_helpers import tokenizer
from torch.profiler import ProfilerActivity, profile
from training_helpers import train_config, write_dataset
from transformers import LlamaConfig, LlamaForCausalLM

from introspect_ray.training.loop import build
from introspect_ray.training.plan import plan_run
from introspect_ray.training.run import prepare
from introspect_ray.training.schedule import make_optimizer
from introspect_ray.training.step import Stepper
from introspect_ray.training.workers import Workers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama large enough for its activations to matter, and a dataset for it."""
    path = tmp_path_factory.mktemp("plan")
    shape = LlamaConfig(
        vocab_size=3000,
        hidden_size=96,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(shape).save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    write_dataset(path / "dataset", width=64)
    return path


def allocated(config, is_checkpointed):
    """Bytes that a worker holds between steps, and the most that one step allocates beside them."""
    explainer, examples = build(prepare(config))
    if is_checkpointed:
        explainer.causal.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = explainer.trainable_parameters()
    optimizer = make_optimizer(parameters.values(), config.optimization)
    stepper = Stepper(explainer, examples, config, Workers(0, 1))
    stepper.step(0, optimizer)
    tensors = [*explainer.parameters(), *(parameter.grad for parameter in parameters.values())]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stepper.step(1, optimizer)
    live = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return held, peak


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_peak_is_what_the_allocator_gives_out(folder, method, is_checkpointed):
    options = {"method": method, "lora__rank": 8, "optimization__batch_size": 24, "trainer__packing": False}
    config = train_config(folder, **options, trainer__micro_batch_tokens=1500)
    memory = plan_run(
        train_config(
            folder, **options, trainer__micro_batch_tokens=1500, trainer__activation_checkpointing=is_checkpointed
        )
    ).memory
    held, peak = allocated(config, is_checkpointed)
    standing = memory.weights + memory.adapters + memory.gradients + memory.optimizer
    print(method, is_checkpointed, held, standing, peak, memory.peak - standing, memory)
    assert standing == pytest.approx(held, rel=0.001)
    assert memory.peak - standing == pytest.approx(peak, rel=0.15)
