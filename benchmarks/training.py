"""Explainer training in tokens per second: ours beside the reference recipe, on the same model, data and loss values.

The reference is transformers' own Trainer as explainers are usually trained: batches in the order of the data, padded
on the left to their longest example, logits and loss over all positions. Ours is the training job's loop without Ray:
packed rows, logits at answers only, examples read from disk. Optimizer, schedule, examples of every step and the loss
(mean over the answers' tokens) are the same. Tokens are real ones: prompts and answers, no padding.

Data: records that the tasks generate on the pocket world here and now, input ablation and activation patching in equal
parts, in the pocket tokenizer. Model: a Llama with random weights and 128,256 tokens in its vocabulary, in float32,
8 layers of width 512; adapters of rank 16 and the projections train, or everything with `--method full`.

Both train in turns, step by step. All losses are compared before anything is reported. Last one JSON object:

    ours, reference         tokens per second, median over the rounds
    ratio                   ours / reference of the same round, median over the rounds
    max_loss_difference     largest difference between both over all steps, in nats per token

`--device cuda` measures ours alone, at the shapes of Llama 8B and 70B with random weights in 4 bits and adapters on top
(QLoRA, one GPU, bfloat16): tokens per second, share of the GPU's peak arithmetic, peak memory, and the
plan's. One JSON object per shape.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from introspect_ray.config import (
    POCKET_QUESTIONS,
    GenerateConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
    TrainConfig,
    TrainerConfig,
)
from introspect_ray.data.sources import load_source
from introspect_ray.explainer.card import ExplainerCard, TargetInfo
from introspect_ray.explainer.encoding import Encoded, Frame, choose_placeholders
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.projections import Projections
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.streaming import Streamer, WeightFiles, empty_model, quantize_layers
from introspect_ray.models.structure import decoder_layers
from introspect_ray.tasks.base import OK
from introspect_ray.tasks.registry import get_task
from introspect_ray.training.batches import step_indices
from introspect_ray.training.examples import Examples, write_examples
from introspect_ray.training.plan import plan_run
from introspect_ray.training.schedule import learning_rate, make_optimizer
from introspect_ray.training.speed import operations_per_token, peak_of
from introspect_ray.training.step import Stepper
from introspect_ray.training.workers import Workers

VOCABULARY = 128256
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "head_dim": 64}
LARGE = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
TOLERANCE = 1e-4
"""Largest difference allowed between the two losses of one step, in nats per token."""
ALONE = Workers(0, 1)


# --- data -------------------------------------------------------------------------------------------------------


def records_of(task_name: Any, count: int) -> list[dict[str, Any]]:
    """Records of the training split, as the job would generate them on the pocket target."""
    config = GenerateConfig(task=task_name, input_ablation=POCKET_QUESTIONS)
    task = get_task(task_name)
    rows = load_source(config.source, task_name, task.source_formats).rows
    plan = task.plan(rows, config, lambda _: "train")
    target = Target.load(config.target)
    found: list[dict[str, Any]] = []
    for start in range(0, len(plan.items), 16):
        found += [r for r in task.generate(target, plan.items[start : start + 16], config) if r["status"] == OK]
        if len(found) >= 4 * count:
            break
    step = max(1, len(found) // count)
    return found[::step][:count]


def examples_of(explainer: Explainer, records: dict[str, list[dict[str, Any]]], folder: Path) -> Examples:
    """The records, encoded, where a worker keeps them."""
    datasets = []
    for name, of_task in records.items():
        rendered = [get_task(name).render(record) for record in of_task]  # type: ignore[arg-type]
        encoded = explainer.encode([one.query for one in rendered], [one.answer for one in rendered])
        datasets.append([(encoded, [record["record_id"] for record in of_task])])
    write_examples(folder, datasets)
    return Examples(folder)


# --- model ------------------------------------------------------------------------------------------------------


def explainer_around(model: PreTrainedModel, method: str, lora: LoraConfig) -> Explainer:
    """An explainer of the pocket target, ready to be trained, with the pocket tokenizer."""
    tokenizer = load_tokenizer(ModelConfig())
    placeholders = choose_placeholders(tokenizer)
    target = TargetInfo(path="pocket:target_a", width=160, num_layers=4)
    device, width = model.device, model.config.hidden_size
    projections = Projections("linear", target.num_layers, target.width, width)
    projections.initialize(0)
    card = ExplainerCard(
        target=target,
        base=ModelConfig(),
        weights="full",
        placeholders=placeholders,
        frame=Frame.of(tokenizer),
        projection="linear",
        vector_norm=None,
        max_new_tokens=1,
    )
    explainer = Explainer(model, tokenizer, projections.to(device, model.dtype), card)
    if method == "full":
        explainer.model.requires_grad_(True)
    else:
        explainer.add_adapter(lora, seed=0)
    explainer.projections.requires_grad_(True)
    return explainer.train()


def small_model() -> PreTrainedModel:
    """The same random weights on every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=VOCABULARY, tie_word_embeddings=False))


# --- both ways --------------------------------------------------------------------------------------------------

Method = Callable[[int, int], tuple[float, list[float]]]
"""Take the steps from the first to before the last; seconds, and the loss of every step in nats per token."""


def ours(explainer: Explainer, examples: Examples, config: TrainConfig) -> Method:
    """Steps as the training loop takes them."""
    optimizer = make_optimizer(explainer.trainable_parameters().values(), config.optimization)
    stepper = Stepper(explainer, examples, config, ALONE)

    def run(first: int, last: int) -> tuple[float, list[float]]:
        start = time.perf_counter()
        results = [stepper.step(number, optimizer) for number in range(first, last)]
        return time.perf_counter() - start, [result.loss_sum / result.loss_tokens for result in results]

    return run


class Padded(nn.Module):
    """The usual way to a loss: one batch padded on the left, all logits, labels that are ignored outside of answers."""

    def __init__(self, explainer: Explainer):
        super().__init__()
        self.explainer = explainer
        self.losses: list[float] = []

    def forward(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        collated = self.explainer.collate(examples, "left")
        inputs = self.explainer.inputs(collated, "left")
        logits = self.explainer.model(use_cache=False, **inputs._asdict()).logits
        labels = torch.full_like(collated.ids, -100).flatten()
        labels[collated.loss_positions + 1] = collated.loss_targets
        labels = labels.view_as(collated.ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        self.losses.append(loss.item())
        return {"loss": loss}


class InOrder(Trainer):
    """Trainer that takes the examples in the order in which they are given."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class Alike(TrainerCallback):
    """Gradients of what a batch does not touch are zeros, so that AdamW's momentum moves it on as it does in ours.

    Each layer of the target has a projection of its own, and not every batch has vectors of every layer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._parameters = parameters

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class Stopwatch(TrainerCallback):
    """Seconds between the beginning and the end of training, Trainer's own preparations left out."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._start


def reference(explainer: Explainer, examples: Examples, config: TrainConfig, folder: str) -> Method:
    """transformers' Trainer on the same examples of every step."""
    settings = config.optimization
    optimizer = make_optimizer(explainer.trainable_parameters().values(), settings)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, settings) / settings.learning_rate)
    padded = Padded(explainer)
    transformers_logging.set_verbosity_error()

    def run(first: int, last: int) -> tuple[float, list[float]]:
        chosen = [
            index
            for step in range(first, last)
            for index in step_indices(step, settings.batch_size, examples.sizes, config.seed)
        ]
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=last - first,
            per_device_train_batch_size=settings.batch_size,
            max_grad_norm=settings.max_grad_norm,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        padded.losses.clear()
        watch = Stopwatch()
        trainer = InOrder(
            padded,
            arguments,
            data_collator=lambda batch: {"examples": batch},
            train_dataset=[examples[index] for index in chosen],
            optimizers=(optimizer, schedule),
            callbacks=[watch, Alike(list(explainer.trainable_parameters().values()))],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watch.seconds, list(padded.losses)

    return run


def compare(arguments: argparse.Namespace) -> dict[str, float]:
    """The last line; ends the process if the losses differ."""
    count = arguments.batch_size * arguments.rounds * arguments.steps
    records = {name: records_of(name, math.ceil(count / 2)) for name in ("input_ablation", "activation_patching")}
    optimization = OptimizationConfig(
        steps=arguments.rounds * arguments.steps, batch_size=arguments.batch_size, learning_rate=1e-4
    )
    config = TrainConfig(
        optimization=optimization, trainer=TrainerConfig(micro_batch_tokens=arguments.micro_batch_tokens)
    )
    lora = LoraConfig(rank=16, dropout=0)
    with tempfile.TemporaryDirectory() as folder:
        explainers = [explainer_around(small_model(), arguments.method, lora) for _ in range(2)]
        examples = examples_of(explainers[0], records, Path(folder) / "examples")
        describe(examples)
        methods = {
            "ours": ours(explainers[0], examples, config),
            "reference": reference(explainers[1], examples, config, folder),
        }
        speeds: dict[str, list[float]] = {name: [] for name in methods}
        losses: dict[str, list[float]] = {name: [] for name in methods}
        for number in range(arguments.rounds):
            first, last = number * arguments.steps, (number + 1) * arguments.steps
            tokens = sum(
                examples.lengths[index]
                for step in range(first, last)
                for index in step_indices(step, arguments.batch_size, examples.sizes, config.seed)
            )
            for name, method in methods.items():
                seconds, found = method(first, last)
                speeds[name].append(tokens / seconds)
                losses[name] += found
            shown = ", ".join(f"{name} {of[-1]:.0f} tokens/s" for name, of in speeds.items())
            print(f"round {number + 1}: {shown}, loss {losses['ours'][-1]:.4f} nats per token", flush=True)
    difference = max(abs(one - other) for one, other in zip(losses["ours"], losses["reference"], strict=True))
    if not difference <= TOLERANCE:
        sys.exit(f"losses differ by {difference:.2g} nats per token, allowed are {TOLERANCE:g}: nothing was measured")
    speed = {name: statistics.median(of) for name, of in speeds.items()}
    return {
        **{name: round(value, 1) for name, value in speed.items()},
        "ratio": round(statistics.median(map(truediv, speeds["ours"], speeds["reference"])), 2),
        "max_loss_difference": difference,
    }


def describe(examples: Examples) -> None:
    """What the examples look like, in one line."""
    lengths, answers = list(examples.lengths), list(examples.loss_tokens)
    print(
        f"{len(examples)} examples of {min(lengths)} to {max(lengths)} tokens, on average "
        f"{statistics.mean(lengths):.0f}, of them {statistics.mean(answers):.1f} of the answer",
        flush=True,
    )


# --- one GPU ----------------------------------------------------------------------------------------------------


class RandomWeights(WeightFiles):
    """What a checkpoint of the model would hold, drawn when it is asked for."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.path = "random weights"
        self._empty = model.state_dict()
        self.file_of = dict.fromkeys(self._empty, "")
        self._generator = torch.Generator(device).manual_seed(0)

    def read(self, name: str) -> Tensor:
        empty = self._empty[name]
        made = torch.ones(empty.shape, dtype=empty.dtype, device=self._generator.device)
        return made if made.dim() == 1 else made.normal_(0, 0.02, generator=self._generator)


def quantized_model(folder: str, device: torch.device) -> PreTrainedModel:
    """The model of a folder's config.json with random weights, its layers in 4 bits as the training job puts them."""
    model = empty_model(ModelConfig(path=folder), torch.bfloat16, num_tokens=0)
    weights = RandomWeights(model, device)
    quantize_layers(model, torch.bfloat16)

    def fill(name: str, _: torch.Size) -> Tensor:
        raise AssertionError(f"{name} is no weight of a checkpoint")

    streamer = Streamer(model, weights, device, fill)
    for layer in decoder_layers(model):
        streamer.load(layer)
    streamer.load(model)
    return model


@dataclass(frozen=True)
class OnGpu:
    """What one shape did on one GPU."""

    shape: str
    tokens_per_second: float
    share_of_peak: float | None
    peak_gib: float
    planned_gib: float


def planned_gib(training: TrainConfig, folder: str) -> float:
    """Peak memory of one worker that the plan foresees for the model of a folder's config.json."""
    model = training.explainer.model.model_copy(update={"path": folder, "dtype": "bfloat16"})
    explainer = training.explainer.model_copy(update={"model": model})
    trainer = training.trainer.model_copy(update={"gpus_per_worker": 1})
    plan = plan_run(training.model_copy(update={"explainer": explainer, "trainer": trainer, "method": "qlora"}))
    return plan.memory.peak / 2**30


def on_gpu(shape: str, arguments: argparse.Namespace) -> OnGpu:
    """Train a shape with adapters on 4-bit weights and measure it after one step of warm-up."""
    device = torch.device(arguments.device)
    config = LlamaConfig(**LARGE[shape], num_key_value_heads=8, head_dim=128, vocab_size=VOCABULARY)
    steps = arguments.steps + 1
    training = TrainConfig(
        optimization=OptimizationConfig(steps=steps, batch_size=arguments.batch_size, learning_rate=1e-4),
        trainer=TrainerConfig(micro_batch_tokens=arguments.micro_batch_tokens, activation_checkpointing=True),
    )
    count = math.ceil(arguments.batch_size * steps / 2)
    records = {name: records_of(name, count) for name in ("input_ablation", "activation_patching")}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        planned = planned_gib(training, folder)
        explainer = explainer_around(quantized_model(folder, device), "lora", training.lora)
        explainer.causal.enable_input_require_grads()
        explainer.causal.gradient_checkpointing_enable({"use_reentrant": False})
        examples = examples_of(explainer, records, Path(folder) / "examples")
        describe(examples)
        train = ours(explainer, examples, training)
        train(0, 1)
        torch.cuda.reset_peak_memory_stats(device)
        seconds, losses = train(1, steps)  # reading the loss waits for the device
        tokens = sum(
            examples.lengths[index]
            for step in range(1, steps)
            for index in step_indices(step, arguments.batch_size, examples.sizes, training.seed)
        )
    assert all(map(math.isfinite, losses))
    peak = peak_of(device)
    work = operations_per_token(explainer) * tokens / seconds
    return OnGpu(
        shape=shape,
        tokens_per_second=round(tokens / seconds, 1),
        share_of_peak=None if peak is None else round(work / peak, 4),
        peak_gib=round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
        planned_gib=round(planned, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for QLoRA at large shapes (default: cpu)")
    parser.add_argument("--shapes", nargs="+", choices=tuple(LARGE), default=list(LARGE), help="on a GPU: which shapes")
    parser.add_argument("--method", choices=("lora", "full"), default="lora", help="on a CPU (default: lora)")
    parser.add_argument("--batch-size", type=int, help="examples per optimizer step (default: 16, on a GPU 64)")
    parser.add_argument("--micro-batch-tokens", type=int, help="tokens of one pass (default: 1024, on a GPU 4096)")
    parser.add_argument("--steps", type=int, default=1, help="steps of each per round (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds in which both train in turn (default: 20)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    arguments = parser.parse_args()
    is_gpu = arguments.device.startswith("cuda")
    if is_gpu and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device} asked for, but this process has no GPU")
    arguments.batch_size = arguments.batch_size or (64 if is_gpu else 16)
    arguments.micro_batch_tokens = arguments.micro_batch_tokens or (4096 if is_gpu else 1024)
    if arguments.steps < 1 or arguments.rounds < 1:
        parser.error("--steps and --rounds must be at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not is_gpu:
        print(json.dumps(compare(arguments)), flush=True)
        return
    for shape in arguments.shapes:
        print(json.dumps(asdict(on_gpu(shape, arguments))), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
