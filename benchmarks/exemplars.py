"""Collecting a coder's activations in tokens per second: ours beside delphi's cache, and what memory it takes.

The peer is delphi's `LatentCache.run`, which keeps every activation; ours is the scan that an actor of
`collect_exemplars.py` runs, tokenizing included, which keeps exemplars. Both read the same contexts with the same
model and the same TopK SAE, on one thread, in turns. delphi's way to encode is the one that it has for sparsify
coders: the k largest, scattered into dense latents.

Before anything is timed, both look at the same contexts: every activation of every token but the first (which ours
leaves out) is compared, and so are the number of firings and the maximum of each latent. Then memory: our scans and
merges of N and of 10 N tokens, in a fresh process each, with shards of the same size. With `--state FILE` every step is
kept as it is done, and the same command goes on after a stop. Last one JSON object:

    ours, peer              tokens per second of CPU time, median over the rounds
    ratio                   ours / peer of the same round, median over the rounds
    max_difference          largest difference between two activations
    peak_mib, peak_mib_10x  peak memory of a process that collects from N and from 10 N tokens
    memory_growth           the second over the first, less one

delphi's wheel asks for vLLM, faiss and more, of which its cache needs nothing:
    pip install --no-deps eai-delphi==0.1.3 simple-parsing==0.1.7 docstring-parser==0.17.0
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from introspect_ray.config import CollectConfig
from introspect_ray.data.collecting import ScanOrder
from introspect_ray.data.merging import BlockOrder, ChooseOrder, GatherOrder, Merging
from introspect_ray.data.scanning import Scanner, scan_shard, scan_texts
from introspect_ray.data.shards import write_items
from introspect_ray.data.storage import Folder
from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.contexts import Text, cut
from introspect_ray.features.inputs import CoderInputs

LAYERS, WIDTH, MLP, HEADS, VOCABULARY = 6, 512, 2048, 8, 50_304
"""A model of the shape of Pythia 70M."""
CONTEXT = 256
LAYER = 3


@dataclass(frozen=True)
class Setting:
    """What both sides work on."""

    scanner: Scanner
    config: CollectConfig

    @property
    def coder(self) -> SparseCoder:
        return self.scanner.coders[0]


def make_setting(num_latents: int, k: int) -> Setting:
    """A model and an SAE with random weights, and a tokenizer in which every number is one token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    decoder = torch.nn.functional.normalize(torch.randn(num_latents, WIDTH), dim=1)
    coder = SparseCoder(
        kind="sae",
        layer=LAYER,
        encoder=decoder.T.contiguous(),
        encoder_bias=torch.zeros(num_latents),
        decoder=decoder,
        decoder_bias=torch.zeros(WIDTH),
        k=k,
    )
    words = {"<s>": 0, **{str(number): number for number in range(1, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    collect = CollectConfig(context_tokens=CONTEXT, texts_per_batch=16, texts_per_shard=16)
    return Setting(Scanner(model, tokenizer, (coder,)), collect)


def make_texts(count: int, first: int = 0) -> list[Text]:
    """Texts of one whole context each, words as frequent as in a natural language (Zipf's law)."""
    texts = []
    for row in range(first, first + count):
        ranks = np.random.default_rng(row).zipf(1.3, size=4 * CONTEXT)
        words = ranks[ranks < VOCABULARY][: CONTEXT - 1]
        assert len(words) == CONTEXT - 1
        texts.append(Text(row, row % 3, " ".join(map(str, words))))
    return texts


def token_matrix(setting: Setting, texts: list[Text]) -> Tensor:
    return torch.tensor(cut(texts, setting.scanner.tokenizer, CONTEXT, CONTEXT).contexts)


# --- the peer ---------------------------------------------------------------------------------------------------


def delphi_cache_class() -> Any:
    """delphi's LatentCache, without the rest of delphi.latents, which imports what a cache does not need."""
    found = importlib.util.find_spec("delphi")
    if found is None or found.submodule_search_locations is None:
        sys.exit("delphi is not installed; the top of this file says how")
    package = types.ModuleType("delphi.latents")
    package.__path__ = [str(Path(found.submodule_search_locations[0]) / "latents")]
    sys.modules["delphi.latents"] = package
    from delphi.latents import cache

    cache.tqdm = partial(tqdm, disable=True)
    return cache.LatentCache


def run_delphi(setting: Setting, tokens: Tensor, batch_size: int) -> Any:
    """delphi's cache after it has seen these contexts."""
    coder = setting.coder

    def dense_latents(x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        before = torch.nn.functional.linear(flat, coder.encoder.T, coder.encoder_bias).relu()
        values, indices = before.topk(coder.k, sorted=False)
        latents = torch.zeros(len(flat), coder.num_latents, dtype=flat.dtype)
        return latents.scatter_(-1, indices, values).reshape(*x.shape[:-1], -1)

    cache = delphi_cache_class()(setting.scanner.model, {f"model.layers.{LAYER}": dense_latents}, batch_size)
    cache.run(tokens.numel(), tokens)
    return cache


# --- checks and measurements ------------------------------------------------------------------------------------


def check(setting: Setting, texts: list[Text], batch_size: int) -> float:
    """Largest difference between two activations; stops where one side has an activation that the other lacks."""
    tokens = token_matrix(setting, texts)
    cache = run_delphi(setting, tokens, batch_size).cache
    hook = f"model.layers.{LAYER}"
    row, position, latent = cache.latent_locations[hook].T
    seen = position > 0
    theirs = torch.zeros(len(texts), CONTEXT - 1, setting.coder.num_latents)
    theirs[row[seen], position[seen] - 1, latent[seen]] = cache.latent_activations[hook][seen]
    theirs = theirs.flatten(0, 1)
    inputs = CoderInputs(setting.scanner.model, [(LAYER, setting.coder.reads)])
    ours = torch.zeros_like(theirs).unflatten(0, (len(texts), CONTEXT - 1))
    for batch, read in inputs.batches(tokens.tolist()):
        dense = setting.coder.encode_sparse(read[LAYER, setting.coder.reads]).dense()
        ours[list(batch)] = dense.unflatten(0, (len(batch), CONTEXT - 1))
    ours = ours.flatten(0, 1)
    difference = (ours - theirs).abs().max().item()
    collector = scan_texts(setting.scanner, setting.config, texts)[0].collector
    same_counts = (collector.counts == (theirs > 0).sum(0).numpy()).all()
    off = np.abs(collector.maxima - theirs.amax(0).numpy()).max()
    if not same_counts or difference > 1e-3 or off > 1e-3:
        sys.exit(f"values differ: by {difference} at most, maxima by {off}, counts equal: {same_counts}")
    return max(difference, float(off))


def cpu_rate(call: Callable[[], Any], tokens: int) -> float:
    """Tokens per second of CPU time."""
    start = time.process_time()
    call()
    return tokens / (time.process_time() - start)


class Steps:
    """Results of steps by name; those of an earlier process with the same arguments are taken as they are."""

    def __init__(self, file: Path | None, about: str):
        self._file, self._about = file, about
        lines = file.read_text().splitlines() if file and file.exists() else []
        rows = [json.loads(line) for line in lines]
        self._found = {row["step"]: row["result"] for row in rows if row["about"] == about}

    def __contains__(self, step: str) -> bool:
        return step in self._found

    def do(self, step: str, call: Callable[[], Any]) -> Any:
        """What `call` gives, or gave."""
        if step not in self._found:
            self._found[step] = call()
            if self._file:
                with self._file.open("a") as file:
                    file.write(json.dumps({"about": self._about, "step": step, "result": self._found[step]}) + "\n")
        return self._found[step]


def rates(setting: Setting, number: int, contexts: int, batch_size: int) -> tuple[float, float]:
    """Tokens per second of either side."""
    texts = make_texts(contexts, first=1000 * (number + 1))
    tokens = token_matrix(setting, texts)
    return (
        cpu_rate(lambda: scan_texts(setting.scanner, setting.config, texts), tokens.numel()),
        cpu_rate(lambda: run_delphi(setting, tokens, batch_size), tokens.numel()),
    )


def measure(setting: Setting, steps: Steps, rounds: int, contexts: int, batch_size: int) -> dict[str, float]:
    ours, peer = [], []
    if any(f"round {number}" not in steps for number in range(1, rounds + 1)):
        rates(setting, 0, contexts, batch_size)  # what a process does for the first time is not counted
    for number in range(1, rounds + 1):
        found = steps.do(f"round {number}", lambda number=number: rates(setting, number, contexts, batch_size))
        print(f"round {number}: {found[0]:.0f} and {found[1]:.0f} tokens/s", flush=True)
        ours.append(found[0])
        peer.append(found[1])
    return {
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": statistics.median(map(truediv, ours, peer)),
    }


def collect_all(setting: Setting, num_shards: int) -> int:
    """Scan and merge so many shards as the job does; peak memory of this process so far, in KiB."""
    config = setting.config.model_copy(update={"latents_per_block": 4096})
    with tempfile.TemporaryDirectory() as folder:
        work, output = Folder(f"{folder}/work"), Folder(f"{folder}/out")
        for shard in range(num_shards):
            order = ScanOrder(shard, "key")
            items = [vars(text) for text in make_texts(config.texts_per_shard, shard * config.texts_per_shard)]
            write_items(work, order, items)
            scan_shard(setting.scanner, config, work, order, "run")
        merging = Merging(config, work, "key", (output,), (setting.coder.num_latents,), num_shards)
        for step in (ChooseOrder, GatherOrder, BlockOrder):
            for order in merging.orders(step):
                merging.make(order)
    return peak_kib()


def peak_kib() -> int:
    """Peak memory of this process. Not `ru_maxrss`, which starts at what the process was that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def peak(shards: int, latents: int) -> float:
    """Peak memory in MiB of a fresh process that collects from so many shards."""
    command = [sys.executable, __file__, "--collect", str(shards), "--latents", str(latents)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def memory(arguments: argparse.Namespace, steps: Steps) -> dict[str, float]:
    peaks = []
    for shards in (arguments.shards, 10 * arguments.shards):
        peaks.append(steps.do(f"memory of {shards}", lambda shards=shards: peak(shards, arguments.latents)))
        print(f"{shards * 16 * CONTEXT} tokens: peak {peaks[-1]:.0f} MiB", flush=True)
    return {"peak_mib": peaks[0], "peak_mib_10x": peaks[1], "memory_growth": peaks[1] / peaks[0] - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=32_768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=16, help="of 256 tokens, per round and side")
    parser.add_argument("--batch-size", type=int, default=16, help="contexts that delphi runs at once")
    parser.add_argument("--shards", type=int, default=1, help="of 16 contexts, in the smaller run of the memory test")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory test out")
    parser.add_argument("--state", type=Path, help="file in which finished steps are kept")
    parser.add_argument("--collect", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batch_size = min(arguments.batch_size, arguments.contexts)
    if arguments.contexts % batch_size:
        parser.error("--contexts must be a multiple of --batch-size: delphi leaves out what does not fill a batch")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    setting = make_setting(arguments.latents, arguments.k)
    if arguments.collect is not None:
        print(collect_all(setting, arguments.collect))
        return
    steps = Steps(arguments.state, f"{arguments.latents} {arguments.k} {arguments.contexts} {batch_size}")
    difference = steps.do("check", lambda: check(setting, make_texts(4), 4))
    print(f"activations, counts and maxima agree: the largest difference is {difference:.2g}", flush=True)
    result = measure(setting, steps, arguments.rounds, arguments.contexts, batch_size)
    result["max_difference"] = difference
    if not arguments.no_memory:
        result |= memory(arguments, steps)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in result.items()}))


if __name__ == "__main__":
    main()
