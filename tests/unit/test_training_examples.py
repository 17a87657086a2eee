"""Examples on disk: the same as encoded in memory, written once per machine, and not held in memory."""

import multiprocessing
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from explainer_helpers import explainer
from training_helpers import train_config, write_dataset

from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.manifest import read_manifest, write_manifest
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.tasks.registry import get_task
from introspect_ray.training import examples as module
from introspect_ray.training.examples import Ahead, load_examples
from introspect_ray.training.loop import fit
from introspect_ray.training.run import prepare
from introspect_ray.training.workers import Workers


@pytest.fixture
def made(tmp_path):
    return explainer(tmp_path / "base")


def test_examples_equal_what_is_encoded_in_memory(tmp_path, made):
    """Two datasets, one with vectors that float16 holds and one without; records of other splits are left out."""
    write_dataset(tmp_path / "one", count=30, splits=("train", "test"))
    write_dataset(tmp_path / "two", count=7)
    examples = load_examples(made, [str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "scratch")
    expected, ids = [], []
    for name in ("one", "two"):
        records = open_dataset(str(tmp_path / name)).records("train")
        ids += [record["record_id"] for record in records]
        rendered = [get_task("activation_patching").render(record) for record in records]
        expected += made.encode([one.query for one in rendered], [one.answer for one in rendered])
    assert examples.sizes == (15, 7)
    assert len(examples) == 22
    assert [examples.record_id(index) for index in range(22)] == ids
    for index, one in enumerate(expected):
        found = examples[index]
        assert (found.ids, found.loss_mask, found.vector_positions) == (one.ids, one.loss_mask, one.vector_positions)
        assert examples.lengths[index] == len(one.ids)
        assert examples.loss_tokens[index] == one.num_loss_tokens
        for vector, other in zip(found.vectors, one.vectors, strict=True):
            assert vector.layers == other.layers
            np.testing.assert_array_equal(vector.values, other.values)
            assert vector.values.dtype == np.float32


def test_vectors_keep_what_float16_cannot_hold():
    exact = np.array([0.5, -2.0, 65504.0], dtype=np.float32)
    assert module._smallest(exact).dtype == np.float16
    for lossy in (0.1, 70000.0, 1e-9):
        values = np.array([0.5, lossy], dtype=np.float32)
        assert module._smallest(values) is values


def test_examples_are_written_once_and_found_again(tmp_path, made, monkeypatch):
    write_dataset(tmp_path / "dataset")
    urls = [str(tmp_path / "dataset")]
    started, release, calls = threading.Event(), threading.Event(), []
    real = module.write_examples

    def slow(*arguments):
        calls.append(1)
        started.set()
        assert release.wait(60)
        real(*arguments)

    monkeypatch.setattr(module, "write_examples", slow)
    found = []
    load = lambda: found.append(load_examples(made, urls, tmp_path / "scratch"))  # noqa: E731
    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    release.set()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    assert len(calls) == 1
    found[0].remove()
    assert not (tmp_path / "scratch").exists()
    assert found[1][3].ids == found[2][3].ids  # open files outlive their names


def test_a_write_that_was_interrupted_counts_as_none(tmp_path, made):
    write_dataset(tmp_path / "dataset")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "examples.bin").write_bytes(b"half of an exa")
    assert len(load_examples(made, [str(tmp_path / "dataset")], tmp_path / "scratch")) == 24


def test_a_disk_without_room_is_a_user_error(tmp_path, made, monkeypatch):
    write_dataset(tmp_path / "dataset")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(UserError, match=r"examples cannot be stored in .*: No space left on device; set TMPDIR"):
        load_examples(made, [str(tmp_path / "dataset")], tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("kind", ["link", "writable", "foreign"])
def test_a_folder_that_another_user_could_fill_is_refused(tmp_path, made, monkeypatch, kind):
    """What may lie there already is not read, and nothing is written where a link leads."""
    write_dataset(tmp_path / "dataset")
    parent, elsewhere = tmp_path / "introspect_ray-0", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "link":
        parent.symlink_to(elsewhere)
    else:
        parent.mkdir()
        parent.chmod(0o777 if kind == "writable" else 0o700)
    if kind == "foreign":
        own = module.os.getuid()
        monkeypatch.setattr(module.os, "getuid", lambda: own + 1)
    with pytest.raises(UserError, match=r"introspect_ray-0, where examples are to be stored, is not this user"):
        load_examples(made, [str(tmp_path / "dataset")], parent / "key")
    assert not list(parent.iterdir())


def test_files_of_another_version_are_not_read(monkeypatch):
    before = module.scratch_folder("key")
    monkeypatch.setattr(module, "FORMAT_VERSION", module.FORMAT_VERSION + 1)
    assert before != module.scratch_folder("key") and before.parent == module.scratch_folder("key").parent


def test_a_run_leaves_no_examples_behind(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    monkeypatch.setattr("introspect_ray.training.loop.scratch_folder", lambda _: scratch)
    run = prepare(train_config(tmp_path, optimization__steps=2))
    run.record({})
    fit(run, Workers(0, 1))
    assert run.is_complete()
    assert not scratch.exists()


def test_the_next_step_is_read_ahead(tmp_path, made):
    write_dataset(tmp_path / "dataset")
    examples = load_examples(made, [str(tmp_path / "dataset")], tmp_path / "scratch")
    asked, ahead_of = [], threading.Event()

    def indices_of(step):
        asked.append(step)
        if step == 5:
            ahead_of.set()
        return [step, step + 1]

    ahead = Ahead(examples, indices_of)
    assert list(ahead.get(4)) == [4, 5]
    assert ahead_of.wait(60)
    assert ahead.get(5)[6].ids == examples[6].ids
    assert list(ahead.get(2)) == [2, 3]
    assert asked.count(5) == 1


MEASURE = """
import resource, sys
from pathlib import Path
sys.path += [{tests!r}, {unit!r}]
from explainer_helpers import explainer
from introspect_ray.training.examples import load_examples

made = explainer(Path({base!r}), target_width=4096)
load_examples(made, [{warm!r}], Path({scratch!r}) / "warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
examples = load_examples(made, [{dataset!r}], Path({scratch!r}) / "measured")
total = sum(len(examples[index].vectors) for index in range(len(examples)))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(total, (after - before) * 1024)
"""


def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    """Eight shards, written and read example by example, raise the peak over that of two by less than one's size."""
    rows = 400
    write_dataset(tmp_path / "few", count=rows, width=4096)
    shutil.copytree(tmp_path / "few", tmp_path / "many")
    for name, shards in (("few", 2), ("many", 8)):
        folder = Folder(str(tmp_path / name))
        manifest = read_manifest(folder)
        repeated = {"shards": manifest.shards * shards, "num_records": rows * shards}
        counts = {"selected": {"train": rows * shards}, "counts": {"train": {"ok": rows * shards}}}
        write_manifest(folder, manifest.model_copy(update={**repeated, **counts}))
    here = module.Path(__file__).parent
    code = MEASURE.format(
        tests=str(here.parent),
        unit=str(here),
        base=str(tmp_path / "base"),
        warm=str(tmp_path / "few"),
        dataset=str(tmp_path / "many"),
        scratch=str(tmp_path),
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True)
    total, growth = map(int, done.stdout.split())
    assert total == 8 * rows
    as_vectors = 4 * 4096 * rows
    assert growth < as_vectors, f"the peak grew by {growth} bytes, the added vectors are {6 * as_vectors}"


def test_a_writer_that_is_killed_lets_go_of_the_lock(tmp_path, made):
    write_dataset(tmp_path / "dataset")
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold():
        with module._locked(tmp_path / "scratch"):
            held.set()
            threading.Event().wait()

    process = context.Process(target=hold)
    process.start()
    assert held.wait(60)
    process.kill()
    process.join()
    assert len(load_examples(made, [str(tmp_path / "dataset")], tmp_path / "scratch")) == 24
