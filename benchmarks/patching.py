"""Patched runs per second: ours beside nnsight (one trace per intervention; batched invokes) and plain batched hooks.

Random-weight Llama and Qwen3 shapes, prompts of 64 to 100 tokens, and the sweep of activation patching: every layer at
six positions spread over the prompt. All methods first show that they give the same logits, then run in turns. Every
second counts, clean runs included. One line per model, and last one JSON object over both:

    ours, nnsight_single, nnsight_batched, hooks    interventions per second
    floor_share             share of the speed that is left to reach: the time of the floating-point work that remains
                            after reuse of layers and prefix, at the rate of a plain batched forward pass of the same
                            run, over the time of ours
    max_logit_difference    largest difference between ours and any other method
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from introspect_ray.interventions.clean import clean_runs
from introspect_ray.interventions.hooked import hooked_logits
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import Intervention
from introspect_ray.models.structure import decoder_layers, num_layers, text_config

SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000}
LARGE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LARGE_LLAMA = {**LARGE, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
LARGE_QWEN3 = {**LARGE, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
SHORTEST, LONGEST = 64, 100
"""Tokens per prompt."""
NUM_POSITIONS = 6
INVOKES_PER_TRACE = 24
"""Of nnsight, batched: each invoke is a thread, and more of them were no faster."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
"""Largest difference allowed: in logits for float32, as a share of the largest logit for bfloat16."""


@dataclass(frozen=True)
class Sweep:
    """Every layer at six positions of one prompt."""

    ids: tuple[int, ...]
    rows: tuple[Intervention, ...]


Method = Callable[[], Tensor]
"""One pass over all sweeps; last-position logits [rows of all sweeps, vocabulary]."""


def build(family: str, device: torch.device) -> PreTrainedModel:
    """A model with random weights: a small one in float32 on a CPU, the shape of the 8B in bfloat16 on a GPU."""
    large = device.type == "cuda"
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(torch.bfloat16 if large else torch.float32)
        if family == "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**(LARGE_LLAMA if large else SMALL)))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**(LARGE_QWEN3 if large else SMALL)))
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def sweeps(model: PreTrainedModel, num_prompts: int) -> list[Sweep]:
    """The workload: lengths and positions evenly spread, one random vector per intervention, half as long as usual."""
    generator = torch.Generator().manual_seed(1)
    config = text_config(model)
    found = []
    for number in range(num_prompts):
        length = SHORTEST + (LONGEST - SHORTEST) * number // max(1, num_prompts - 1)
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
        positions = [round((length - 1) * (place + 0.5) / NUM_POSITIONS) for place in range(NUM_POSITIONS)]
        rows = []
        for layer in range(num_layers(model)):
            for position in positions:
                vector = torch.randn(1, config.hidden_size, generator=generator) * 0.3
                rows.append(Intervention((layer,), (position,), vectors=vector.to(model.device, model.dtype)))
        found.append(Sweep(tuple(ids), tuple(rows)))
    return found


# --- methods ----------------------------------------------------------------------------------------------------


def ours(model: PreTrainedModel, work: list[Sweep]) -> Method:
    """As the tasks call it: clean runs, then all interventions of all prompts."""
    target = Target(model, None)  # type: ignore[arg-type]  # nothing here is tokenized

    def run() -> Tensor:
        runs = target.clean_runs([sweep.ids for sweep in work])
        return torch.cat(target.patched_logits(runs, [sweep.rows for sweep in work]))

    return run


def hooks(model: PreTrainedModel, work: list[Sweep]) -> Method:
    """Whole prompts in batches, one hook per layer, logits at the last position only."""
    runs = clean_runs(model, [sweep.ids for sweep in work], keep_cache=False)
    of_rows = [run for run, sweep in zip(runs, work, strict=True) for _ in sweep.rows]
    rows = [row for sweep in work for row in sweep.rows]
    return lambda: hooked_logits(model, of_rows, rows)


def nnsight_model(model: PreTrainedModel) -> Any:
    """The model as nnsight sees it. Ends the process with one line if nnsight is not installed."""
    try:
        from nnsight import TransformersModel
    except ImportError:
        sys.exit('nnsight is not installed: pip install -c constraints.txt -e ".[benchmarks]"')
    # Only asked how to pad, and prompts of one trace are equally long.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0}, unk_token="[PAD]")), pad_token="[PAD]"
    )
    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")


@torch.no_grad()
def nnsight_single(traced: Any, work: list[Sweep]) -> Tensor:
    """One trace per intervention, which has all logits computed, as the published code does."""
    found = []
    for sweep in work:
        ids = torch.tensor([sweep.ids])
        for row in sweep.rows:
            layer, position, vector = row.layers[0], row.positions[0], row.values()[0, 0]
            with traced.trace(ids):
                traced.model.layers[layer].output[:, position] = vector
                logits = traced.lm_head.output[:, -1].save()
            found.append(logits)
    return torch.cat(found)


@torch.no_grad()
def nnsight_batched(traced: Any, work: list[Sweep]) -> Tensor:
    """Many invokes per trace, which nnsight runs as one batch."""
    found: list[Tensor] = []
    for sweep in work:
        ids = torch.tensor([sweep.ids])
        for start in range(0, len(sweep.rows), INVOKES_PER_TRACE):
            rows = sweep.rows[start : start + INVOKES_PER_TRACE]
            with traced.trace() as tracer:
                saved = [].save()
                for row in rows:
                    layer, position, vector = row.layers[0], row.positions[0], row.values()[0, 0]
                    with tracer.invoke(ids):
                        traced.model.layers[layer].output[:, position] = vector
                        saved.append(traced.lm_head.output[:, -1])
            found += list(saved)
    return torch.cat(found)


# --- floor ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point operations: per token and layer, of these in the feed-forward part; per token, layer and token
    attended to; per logit row."""

    layer: int
    feed_forward: int
    attended: int
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Work:
        """A multiplication and an addition per weight of every matrix; 4 per attended token and attention channel."""
        config = text_config(model)
        layer: Any = decoder_layers(model)[0]
        whole, part = (
            2 * sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
            for module in (layer, layer.mlp)
        )
        head: Any = model.get_output_embeddings()
        return cls(whole, part, 4 * config.num_attention_heads * config.head_dim, 2 * head.weight.numel())

    def suffix(self, start: int, length: int, layers: int) -> int:
        """Tokens `[start, length)` through some layers, each attending to all tokens up to itself; one logit row."""
        tokens, attended = length - start, (length * (length + 1) - start * (start + 1)) // 2
        return layers * (tokens * self.layer + attended * self.attended) + self.head

    def remaining(self, work: list[Sweep], depth: int) -> int:
        """Clean runs, and of every row what its intervention can change and its last logits depend on."""
        clean = sum(self.suffix(0, len(sweep.ids), depth) for sweep in work)
        return clean + sum(
            self.row(row.positions[0], len(sweep.ids), depth - 1 - row.layers[0])
            for sweep in work
            for row in sweep.rows
        )

    def row(self, start: int, length: int, layers: int) -> int:
        """`suffix`, but of the last layer's feed-forward part the last token alone: nobody reads that of the others."""
        unread = length - start - 1 if layers else 0
        return self.suffix(start, length, layers) - unread * self.feed_forward


@torch.no_grad()
def plain_forward(model: PreTrainedModel, work: list[Sweep]) -> tuple[Method, int]:
    """A plain batched forward pass of one prompt repeated, logits at the last position; and its operations."""
    sweep = work[len(work) // 2]
    rows = INVOKES_PER_TRACE
    ids = torch.tensor([sweep.ids] * rows, device=model.device)
    operations = rows * Work.of(model).suffix(0, len(sweep.ids), num_layers(model))

    @torch.no_grad()
    def run() -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    return run, operations


# --- measuring --------------------------------------------------------------------------------------------------


def seconds(method: Method, device: torch.device) -> float:
    """Wall-clock time of one call, all work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    method()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def check(model: PreTrainedModel, methods: dict[str, Method]) -> float:
    """Largest difference in logits between ours and the others; ends the process if it is too large."""
    results = {name: method().float().cpu() for name, method in methods.items()}
    reference = results.pop("ours")
    difference = max((reference - other).abs().max().item() for other in results.values())
    allowed = TOLERANCE[model.dtype] * (1 if model.dtype == torch.float32 else reference.abs().max().item())
    if not difference <= allowed:
        sys.exit(f"logits differ by {difference:.2g}, allowed are {allowed:.2g}: nothing was measured")
    return difference


def measure(family: str, device: torch.device, num_prompts: int, rounds: int) -> dict[str, float]:
    """Seconds per pass of every method (median over the rounds), and what the summary needs beside."""
    model = build(family, device)
    work = sweeps(model, num_prompts)
    traced = nnsight_model(model)
    methods: dict[str, Method] = {
        "ours": ours(model, work),
        "nnsight_single": lambda: nnsight_single(traced, work),
        "nnsight_batched": lambda: nnsight_batched(traced, work),
        "hooks": hooks(model, work),
    }
    difference = check(model, methods)  # and warms everything up
    plain, operations = plain_forward(model, work)
    plain()
    times: dict[str, list[float]] = {name: [] for name in (*methods, "plain")}
    for _ in range(rounds):
        for name, method in (*methods.items(), ("plain", plain)):
            times[name].append(seconds(method, device))
    medians = {name: statistics.median(found) for name, found in times.items()}
    floor = Work.of(model).remaining(work, num_layers(model)) / (operations / medians.pop("plain"))
    return {
        **medians,
        "floor": floor,
        "interventions": sum(len(sweep.rows) for sweep in work),
        "max_logit_difference": difference,
    }


def summary(found: list[dict[str, float]]) -> dict[str, float]:
    """The keys of the last line, over one or more models."""
    interventions = sum(one["interventions"] for one in found)
    total = {name: sum(one[name] for one in found) for name in found[0]}
    names = ("ours", "nnsight_single", "nnsight_batched", "hooks")
    return {
        **{name: round(interventions / total[name], 2) for name in names},
        "floor_share": round(total["floor"] / total["ours"], 4),
        "max_logit_difference": max(one["max_logit_difference"] for one in found),
    }


def lines(arguments: argparse.Namespace) -> Iterator[str]:
    """One line per model, then the one over all."""
    device = torch.device(arguments.device)
    found = []
    for family in ("llama", "qwen3"):
        found.append(measure(family, device, arguments.prompts, arguments.rounds))
        yield f"{family}: {json.dumps(summary(found[-1:]))}"
    yield json.dumps(summary(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for 8B shapes in bfloat16 (default: cpu)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts, each swept over all layers (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which every method runs once (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.prompts < 1 or arguments.rounds < 1:
        parser.error("--prompts and --rounds must be at least 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device} asked for, but this process has no GPU")
    for line in lines(arguments):
        print(line, flush=True)


if __name__ == "__main__":
    main()
