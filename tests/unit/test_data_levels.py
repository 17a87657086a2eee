"""Arrays and simulated levels on disk: read back as written, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from unit.rewrite_helpers import LookUp

from introspect_ray.data.arrays import read_arrays, write_arrays
from introspect_ray.data.levels import LevelCache, simulate_block
from introspect_ray.data.rewrite_texts import TextShard
from introspect_ray.data.rewriting import assemble
from introspect_ray.data.storage import Folder
from introspect_ray.features.windows import Window
from introspect_ray.rewrite.texts import RewriteText, rewrite_text

WINDOWS = [Window((4, 5, 6), ("a", "b", "c")), Window((5,), ("b",))]
SIMULATOR = LookUp({"fives": frozenset({5}), "fours": frozenset({4})})


def test_arrays_come_back_as_they_were(tmp_path):
    folder = Folder(str(tmp_path))
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3).T, "b": np.zeros((0, 2), np.float32), "c": np.array(True)}
    write_arrays(folder, "x/one.parquet", "key", arrays, {"note": [1, "two"]})
    found, note = read_arrays(folder, "x/one.parquet", "key")
    assert note == {"note": [1, "two"]}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
    assert read_arrays(folder, "x/one.parquet", "other key") is None
    assert read_arrays(folder, "x/two.parquet", "key") is None


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda _content: b"", lambda content: flipped(content)]
)
def test_damaged_arrays_are_not_read(tmp_path, damage):
    write_arrays(Folder(str(tmp_path)), "one.parquet", "key", {"a": np.arange(1000)})
    file = tmp_path / "one.parquet"
    file.write_bytes(damage(file.read_bytes()))
    assert read_arrays(Folder(str(tmp_path)), "one.parquet", "key") is None


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def test_levels_are_kept_by_simulator_and_windows(tmp_path):
    cache = LevelCache(str(tmp_path), "simulator-a")
    levels, failed = simulate_block(SIMULATOR, ["fives", "fours"], WINDOWS)
    np.testing.assert_array_equal(levels, [[0, 10, 0, 10], [10, 0, 0, 0]])
    cache.write(WINDOWS, ["fives", "fours"], levels, failed)
    found, reasons = cache.read(WINDOWS)
    assert reasons == {} and found["fours"].tolist() == [10, 0, 0, 0]
    assert LevelCache(str(tmp_path), "simulator-b").read(WINDOWS) == ({}, {})
    assert cache.read(WINDOWS[:1]) == ({}, {})


def test_one_description_that_fails_does_not_take_the_others_with_it(tmp_path):
    simulator = LookUp(SIMULATOR.ids, broken=frozenset({"bad"}))
    levels, failed = simulate_block(simulator, ["fives", "bad", "fours"], WINDOWS)
    assert failed == {"bad": "ValueError: this description breaks it"}
    assert np.isnan(levels[1]).all() and levels[0].tolist() == [0, 10, 0, 10]
    cache = LevelCache(str(tmp_path), "simulator")
    cache.write(WINDOWS, ["fives", "bad", "fours"], levels, failed)
    assert cache.read(WINDOWS)[1] == failed
    # Once it works, a later file says so, whichever is read last.
    cache.write(WINDOWS, ["bad"], np.zeros((1, 4), np.float32), {})
    again = cache.read(WINDOWS)
    assert again[1] == {} and again[0]["bad"].tolist() == [0, 0, 0, 0]


def test_levels_of_several_shards_know_windows_and_measured_tokens():
    texts = [RewriteText(0, (1, 4, 5, 6, 9), 1, (1, 2, 3)), RewriteText(1, (5, 8, 9), 0, (1,))]
    windows = [Window(text.window, tuple("abc"[: len(text.window)])) for text in texts]
    shards = [TextShard("a", (texts[0],), (windows[0],)), TextShard("b", (texts[1],), (windows[1],))]
    levels = [
        {"x": np.array([1.0, 2.0, 3.0]), "y": np.zeros(3)},
        {"y": np.array([7.0, 8.0]), "x": np.array([4.0, 5.0])},
    ]
    found = assemble(shards, levels, ["y", "x"])
    assert found.index == {"y": 0, "x": 1}
    np.testing.assert_array_equal(found.levels[:, 1], [1, 2, 3, 4, 5])
    assert found.starts.tolist() == [True, False, False, True, False]
    assert found.measured.tolist() == [0, 1, 2, 4], "of the second text only its last position is measured"


def test_texts_cut_for_all_positions_and_for_the_last_one():
    ids = [1, *range(10, 60)]
    every = rewrite_text(7, ids, "all", 20, True, 0)
    assert every is not None and len(every.ids) == 21 and every.positions == tuple(range(1, 20))
    assert every.window == tuple(ids[1:20]) and every.places == tuple(range(19))
    short = rewrite_text(7, [1, 10, 11], "all", 20, True, 0)
    assert short is not None and short.positions == (1,) and short.window == (10,)
    assert rewrite_text(7, [1, 10], "all", 20, True, 0) is None
    ends = set()
    for row in range(40):
        last = rewrite_text(row, ids, "last", 8, True, 0)
        assert last is not None and last == rewrite_text(row, ids, "last", 8, True, 0)
        (position,) = last.positions
        assert position == len(last.ids) - 2 and len(last.ids) <= 9
        assert last.window == last.ids[last.first : -1] and last.places == (position - last.first,)
        assert (last.first == 1) == (last.ids[0] == 1), "begin-of-text is no part of a window"
        ends.add(last.ids[-1])
    assert len(ends) > 15, "windows end at random"
