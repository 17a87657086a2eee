"""Which split a group belongs to, decided by a stable hash of its key alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from introspect_ray.config import SplitConfig

SPLITS = ("train", "validation", "test")


def split_of(group_key: str, config: SplitConfig) -> str:
    """ "train", "validation" or "test": the same on every machine, run and shard layout, so no group is in two."""
    position = unit_interval(f"{config.salt}\x1f{group_key}")
    if position < config.train:
        return "train"
    # Compared from the top end, so that a share of zero stays empty whatever the rounding of the sum.
    return "test" if position >= 1 - config.test else "validation"


def splitter(config: SplitConfig) -> Callable[[str], str]:
    """`split_of` with its config filled in."""
    return lambda group_key: split_of(group_key, config)


def unit_interval(text: str) -> float:
    """A number in [0, 1) from the 53 leading bits of a hash: uniform over texts, equal for equal texts."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
