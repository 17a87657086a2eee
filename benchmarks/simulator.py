"""Simulated (latent, token) pairs per second: all tokens of a window in one pass, beside one pass per token.

The per-token way asks about one token at a time: instructions, description, and the window up to that token, as the
code of "Partially Rewriting a Transformer in Natural Language" does. It is given what ours has: the same model, prompt
and levels, batches, the instructions' keys and values computed once, and 11 logits in place of the vocabulary's. Both
first show that they give the same levels, then run in turns in one process on one thread, each round with other
windows. One line per round, and last one JSON object of medians:

    ours, peer        pairs per second
    ratio             median over the rounds of ours over peer
    max_difference    largest difference in levels, of 0 to 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from introspect_ray.config import ModelConfig
from introspect_ray.features.windows import Window, window
from introspect_ray.pocket.sources import WORLD_SEED
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.world import World
from introspect_ray.simulator.passes import Ask
from introspect_ray.simulator.prompted import PromptedSimulator
from introspect_ray.simulator.reading import Reading

DESCRIPTIONS = ("the word barn", "words before devices", "names of people", "the first word of a text")
TOLERANCE = 1e-3
Method = Callable[[Sequence[str], Sequence[Window]], list[np.ndarray]]


def per_token(simulator: PromptedSimulator, descriptions: Sequence[str], windows: Sequence[Window]) -> list[np.ndarray]:
    """One row per description and token: it ends where the token's level is to be predicted."""
    asks: list[Ask] = []
    for description, one in zip(descriptions, windows, strict=True):
        reading = simulator.read(one)
        own = simulator.encode(description)
        for position in reading.positions:
            asks.append(Ask(own, Reading(reading.ids[: position + 1], (position,))))
    levels = iter(simulator.passes.read(asks))
    return [np.array([float(next(levels)[0]) for _ in one.pieces]) for one in windows]


def windows_of(simulator: PromptedSimulator, count: int, length: int, seed: int) -> list[Window]:
    """Windows of whole texts of the pocket world, end on end."""
    corpus = Corpus(World(WORLD_SEED), seed)
    ids: list[int] = []
    while len(ids) < count * length:
        ids += simulator.tokenizer(f"{corpus.document().text} ", add_special_tokens=False).input_ids
    return [window(ids[start : start + length], simulator.tokenizer) for start in range(0, count * length, length)]


def measure(method: Method, descriptions: Sequence[str], windows: Sequence[Window]) -> tuple[float, list[np.ndarray]]:
    """Pairs per second, and the levels."""
    begin = time.perf_counter()
    levels = method(descriptions, windows)
    return sum(map(len, windows)) / (time.perf_counter() - begin), levels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket:target_a", help="any causal language model, by folder or hub id")
    parser.add_argument("--windows", type=int, default=6, help="windows per round, each with every description")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a window")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    simulator = PromptedSimulator.load(ModelConfig(path=arguments.model))
    methods: dict[str, Method] = {
        "ours": simulator.simulate,
        "peer": lambda descriptions, windows: per_token(simulator, descriptions, windows),
    }
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    difference = 0.0
    for number in range(arguments.rounds + 1):
        windows = windows_of(simulator, arguments.windows, arguments.tokens, seed=number)
        pairs = [(description, one) for description in DESCRIPTIONS for one in windows]
        order = list(methods) if number % 2 else list(reversed(methods))
        levels: dict[str, list[np.ndarray]] = {}
        for name in order:
            speed, levels[name] = measure(methods[name], [pair[0] for pair in pairs], [pair[1] for pair in pairs])
            if number:  # the first round checks and warms up
                speeds[name].append(speed)
        difference = max(
            difference, *(float(np.abs(a - b).max()) for a, b in zip(levels["ours"], levels["peer"], strict=True))
        )
        if difference > TOLERANCE:
            print(f"levels differ by {difference:.3g}, expected at most {TOLERANCE:g}", file=sys.stderr)
            return 1
        if number:
            print(f"round {number}: " + ", ".join(f"{name} {found[-1]:,.0f} pairs/s" for name, found in speeds.items()))
    ratios = [ours / peer for ours, peer in zip(speeds["ours"], speeds["peer"], strict=True)]
    result = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    print(json.dumps({**result, "ratio": round(statistics.median(ratios), 2), "max_difference": difference}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
