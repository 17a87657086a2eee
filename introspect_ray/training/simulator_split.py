"""Which latents a simulator is not trained on: the only place that decides it, for training and for scoring.

A latent is held out by a hash of its layer and number, so it is so in every source of descriptions. A text that also
describes a held-out latent is trained on for none, but only if it is equal as a whole: another text that is trained on
may name a word that a held-out latent's description names too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from introspect_ray.data.splits import unit_interval
from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import Description, same_words
from introspect_ray.simulator.examples import LatentKey
from introspect_ray.simulator.finetuned import LatentSplit, read_simulator_card

Part = Literal["held_out", "trained"]


def is_held_out(split: LatentSplit, key: LatentKey) -> bool:
    """Whether the latent is kept from training: the same on every machine and for every description of it."""
    return unit_interval(f"simulator\x1f{split.seed}\x1f{key[0]}/{key[1]}") < split.held_out_share


def part_of(
    groups: Mapping[LatentKey, Sequence[Description]], split: LatentSplit, part: Part
) -> dict[LatentKey, list[Description]]:
    """The descriptions of one part, by latent; latents of which nothing is left are not there.

    `held_out`: all that held-out latents have. `trained`: what the others have but for texts that a held-out one has
    too, so no text is in both parts.
    """
    held_out = {key: list(candidates) for key, candidates in groups.items() if is_held_out(split, key)}
    if part == "held_out":
        return held_out
    texts = {same_words(one.text) for candidates in held_out.values() for one in candidates}
    return {
        key: kept
        for key, candidates in groups.items()
        if key not in held_out and (kept := [one for one in candidates if same_words(one.text) not in texts])
    }


def split_of_simulator(folder: str, coder: str, coder_digest: str) -> LatentSplit:
    """The split that a simulator was trained with, to be used on latents of `coder`.

    Raises UserError in one line for a folder that says nothing about it, or one that was trained on another coder.
    """
    split = read_simulator_card(folder).split
    if split is None:
        raise UserError(f"simulator {folder} does not say which latents it was trained without: train it again")
    if split.coder_digest != coder_digest:
        raise UserError(
            f"simulator {folder} was trained on latents of {split.coder}, which are not those of {coder}:"
            " expected only all"
        )
    return split
