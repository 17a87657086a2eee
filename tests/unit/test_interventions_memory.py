"""Batches that fit the memory there is, on a device that refuses more than so many tokens."""

import logging

import pytest
import torch
from tiny_models import prompts_of, tiny_model, tiny_tokenizer

from introspect_ray.interventions import memory
from introspect_ray.interventions.forward import batches, run_padded
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import Intervention

CPU = torch.device("cpu")


class Device:
    """Refuses calls on more than `limit` tokens; remembers the sizes of the others."""

    def __init__(self, lengths, limit):
        self.lengths, self.limit = lengths, limit
        self.sizes = []

    def __call__(self, batch):
        tokens = len(batch) * max(self.lengths[index] for index in batch)
        if tokens > self.limit:
            raise torch.OutOfMemoryError(f"{tokens} tokens")
        self.sizes.append(tokens)
        return list(batch)


def test_refused_batches_are_halved_until_they_fit_and_nothing_is_lost():
    lengths = [10] * 32
    device, budget = Device(lengths, limit=90), TokenBudget(320, CPU)
    done = [index for _, part in run_padded(lengths, budget, device) for index in part]
    assert sorted(done) == list(range(32))
    assert max(device.sizes) == 80
    assert budget.tokens == 80


def test_a_refusal_is_remembered_for_a_while_and_then_the_budget_grows_again(monkeypatch):
    monkeypatch.setattr(memory, "PATIENCE", 3)
    lengths = [1] * 400
    device, budget = Device(lengths, limit=20), TokenBudget(32, CPU)
    for _, _ in run_padded(lengths[:32], budget, device):
        pass
    assert device.sizes == [16, 16]
    device.limit = 64
    assert [len(part) for part, _ in run_padded(lengths, budget, device)][:4] == [16, 32, 32, 32]


def test_a_single_item_that_does_not_fit_raises_what_the_device_said():
    budget = TokenBudget(100, CPU)
    with pytest.raises(torch.OutOfMemoryError, match="30 tokens"):
        list(run_padded([30, 5], budget, Device([30, 5], limit=20)))


def test_other_errors_pass_through_untouched():
    def broken(_batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(run_padded([5, 5], TokenBudget(100, CPU), broken))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert memory.is_out_of_memory(error) is expected
    assert not memory.is_device_error(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    ],
)
def test_a_failed_device_is_not_out_of_memory(error):
    assert memory.is_device_error(error) and not memory.is_out_of_memory(error)


def test_a_gpu_budget_starts_small_and_grows_to_what_was_measured(monkeypatch):
    """A device of 100,000 bytes of which a token takes 50: 0.8 of them hold 1,600 tokens."""
    budget = TokenBudget(10_000, torch.device("cuda"))
    ran = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 1000 + 50 * ran[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100_000, 200_000))
    lengths = [1] * 8000
    for _ in run_padded(lengths, budget, lambda batch: ran.append(len(batch))):
        pass
    assert ran[:4] == [512, 1024, 1600, 1600]


def test_patched_and_clean_runs_are_the_same_on_a_device_with_little_memory(monkeypatch, caplog):
    """Through the whole of a target: every forward pass over more than 40 tokens is refused."""
    prompts = prompts_of((12, 9, 10, 8, 11))
    rows = [[Intervention((1,), (3,), vectors=torch.ones(1, 32)) for _ in range(6)] for _ in prompts]

    def everything(target):
        runs = target.clean_runs(prompts)
        return [target.next_token_logits(prompts), *target.patched_logits(runs, rows)]

    expected = everything(Target(tiny_model("llama"), tiny_tokenizer()))
    model = tiny_model("llama")
    target = Target(model, tiny_tokenizer())
    plain, refused = model.model.forward, []

    def stingy(*arguments, **inputs):
        ids = inputs.get("input_ids")
        shape = (ids if ids is not None else inputs["inputs_embeds"]).shape
        if shape[0] * shape[1] > 40:
            refused.append(tuple(shape))
            raise torch.OutOfMemoryError(str(tuple(shape)))
        return plain(*arguments, **inputs)

    monkeypatch.setattr(model.model, "forward", stingy)
    with caplog.at_level(logging.WARNING):
        found = everything(target)
    assert len(refused) >= 3
    assert "tokens at once were too many" in caplog.text
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_batches_follow_a_budget_that_changes_between_them():
    budget = TokenBudget(4, CPU)
    sizes = []
    for batch in batches([1] * 12, budget):
        sizes.append(len(batch))
        budget.tokens = 2
    assert sizes == [4, 2, 2, 2, 2]
