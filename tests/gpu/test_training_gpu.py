"""On a GPU: QLoRA under FSDP2 trains, evaluates and goes on after a stop, and takes the memory that its plan says."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from explainer_helpers import tokenizer
from training_helpers import train_config, write_dataset
from transformers import LlamaConfig, LlamaForCausalLM

from introspect_ray.config import TrainConfig
from introspect_ray.explainer.model import Explainer
from introspect_ray.training.loop import fit
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.plan import plan_run
from introspect_ray.training.run import TrainingRun, prepare
from introspect_ray.training.step import Stepper
from introspect_ray.training.workers import Workers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

ALONE = Workers(0, 1)
QLORA = {
    "method": "qlora",
    "lora__rank": 8,
    "lora__dropout": 0.0,
    "explainer__model__device": "cuda",
    "explainer__model__dtype": "bfloat16",
    "explainer__projection": "linear",
    "optimization__learning_rate": 1e-3,
    "trainer__gpus_per_worker": 1,
    "trainer__sharding": "fsdp2",
    "trainer__compute_dtype": "bfloat16",
    "trainer__activation_checkpointing": True,
    "trainer__log_every": 1,
}


@pytest.fixture(autouse=True)
def own_group():
    """A sharded run that nobody has put into a process group makes one; later tests are to have none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def begun(config: TrainConfig) -> TrainingRun:
    run = prepare(config)
    run.record({})
    return run


def test_a_stopped_run_goes_on_to_the_same_losses_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "dataset", count=36, splits=("train", "train", "validation"))
    settings = {**QLORA, "evaluation__every": 4, "trainer__checkpoint_every": 2}
    undisturbed, run = (begun(train_config(tmp_path, output=str(tmp_path / name), **settings)) for name in ("a", "b"))
    expected = fit(undisturbed, ALONE)
    real = Stepper.step

    def stops(self, number, optimizer):
        if number == 5:
            raise KeyboardInterrupt
        return real(self, number, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            fit(run, ALONE)
    told: list[str] = []
    found = fit(run, ALONE, told.append)
    assert told[0].startswith("goes on from the checkpoint of step ")
    assert (found["step"], set(found["best"])) == (expected["step"], set(expected["best"]))
    # Sums on a GPU have no fixed order, and bfloat16 has 8 bits of mantissa.
    losses = [[line["loss"] for line in read_metrics(one.folder)] for one in (undisturbed, run)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert Explainer.load(str(tmp_path / "b"), "cuda", "bfloat16").card.weights == "lora"


def test_a_run_takes_the_memory_that_its_plan_says(tmp_path: Path) -> None:
    """At a size beside which the workspaces of matrix products do not count."""
    shape = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    write_dataset(tmp_path / "dataset", count=300, width=256)
    settings = {"optimization__steps": 3, "optimization__batch_size": 128, "trainer__micro_batch_tokens": 4096}
    config = train_config(tmp_path, **{**QLORA, **settings})
    planned = plan_run(config).memory.peak
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fit(begun(config), ALONE)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.15)
