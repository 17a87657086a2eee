"""Splits are stable over machines and versions, and close to their shares."""

from collections import Counter

import pytest

from introspect_ray.config import SplitConfig
from introspect_ray.data.splits import split_of, unit_interval


def test_pinned_assignments():
    keys = ["Rome", "Vinson Massif", "What is it?", "", "é", "latent/3/17", "a", "b", "c", "d"]
    assert [split_of(key, SplitConfig()) for key in keys] == PINNED
    assert unit_interval("Rome") == pytest.approx(PINNED_NUMBER, abs=1e-12)


PINNED = ["train", "train", "test", "train", "train", "test", "test", "train", "train", "train"]
PINNED_NUMBER = 0.6115355150925373


def test_shares_and_salt():
    keys = [f"group {number}" for number in range(8000)]
    config = SplitConfig(train=0.5, validation=0.1, test=0.4)
    found = Counter(split_of(key, config) for key in keys)
    for split, share in (("train", 0.5), ("validation", 0.1), ("test", 0.4)):
        assert found[split] / len(keys) == pytest.approx(share, abs=0.02)
    other = config.model_copy(update={"salt": "another"})
    agreement = sum(split_of(key, config) == split_of(key, other) for key in keys) / len(keys)
    assert agreement == pytest.approx(0.5**2 + 0.1**2 + 0.4**2, abs=0.02)


@pytest.mark.parametrize("shares", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 0, 0.7), (0.9, 0.1, 0)])
def test_a_share_of_zero_stays_empty(shares):
    config = SplitConfig(train=shares[0], validation=shares[1], test=shares[2])
    found = {split_of(f"group {number}", config) for number in range(2000)}
    assert found == {name for name, share in zip(("train", "validation", "test"), shares, strict=True) if share}


def test_growing_the_test_share_moves_groups_only_into_test():
    small, large = (
        SplitConfig(train=0.7, validation=0.05, test=0.25),
        SplitConfig(train=0.65, validation=0.05, test=0.3),
    )
    keys = [f"group {number}" for number in range(500)]
    assert all(split_of(key, large) == "test" for key in keys if split_of(key, small) == "test")
