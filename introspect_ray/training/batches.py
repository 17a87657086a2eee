"""Which examples make up which optimizer step: a function of the seed and the step alone, so resuming loses nothing.

The order is one permutation per epoch, read on end to end; step `s` takes the next `batch_size` places. Within a step
the examples are dealt to the workers and cut into micro-batches of similar length. Neither changes the loss, which is
the sum over all answer tokens of the step divided by their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def num_steps(epochs: float, num_examples: int, batch_size: int) -> int:
    """Optimizer steps that go through all examples so often."""
    return max(1, math.ceil(epochs * num_examples / batch_size))


def step_indices(step: int, batch_size: int, num_examples: int, seed: int) -> list[int]:
    """Examples of one optimizer step (counted from 0), in the order of the epochs' permutations."""
    assert num_examples > 0
    start = step * batch_size
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, offset = divmod(start + len(indices), num_examples)
        order = np.random.default_rng((seed % 2**32, epoch)).permutation(num_examples)
        indices += order[offset : offset + batch_size - len(indices)].tolist()
    return indices


def share(indices: Sequence[int], lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """One worker's examples of a step: dealt out in order of length, so that all workers get about equal work.

    Args:
        lengths: tokens of every example of the dataset.
    """
    ranked = sorted(indices, key=lambda index: (lengths[index], index))
    return ranked[rank::world_size]


def micro_batches(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Runs of similar length whose padded size stays within `max_tokens`; an example longer than that goes alone."""
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda index: (lengths[index], index)):
        # Sorted by length, the newest example is the longest: it sets the padded length of the whole group.
        if groups and (len(groups[-1]) + 1) * lengths[index] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def step_seed(step: int, seed: int, rank: int) -> int:
    """Seed of one worker's random draws (dropout) in one step."""
    return int(np.random.SeedSequence((seed % 2**32, step, rank)).generate_state(1, np.uint64)[0] >> 1)
