"""What raises is told apart: an item, all items, the device; and a disturbed shard ends like an undisturbed one."""

import numpy as np
import pytest
import torch
from fake_task import FakeTask, fake_config, fake_target

from introspect_ray.data.attempts import BATCH_DEATHS, ITEM_DEATHS, last_fault
from introspect_ray.data.prepare import begin, prepare
from introspect_ray.data.writer import DeviceFailed, generate_records, write_shard
from introspect_ray.errors import UserError

QUESTIONS = [f"question {number}" for number in range(4)]
ILLEGAL = "CUDA error: an illegal memory access was encountered"


class BatchTask(FakeTask):
    """Vectors depend on how many items run together, as padding makes them; `trouble` sees the texts of each call."""

    def __init__(self, trouble=lambda _texts: None):
        super().__init__()
        self.trouble = trouble
        self.calls = []

    def generate(self, target, items, config):
        texts = [item["text"] for item in items]
        self.calls.append(texts)
        self.trouble(texts)
        records = super().generate(target, items, config)
        return [{**record, "vector": record["vector"] + len(items)} for record in records]


class Death(BaseException):
    pass


def planned(folder, questions, task):
    folder.mkdir(exist_ok=True)
    prepared = prepare(fake_config(folder, questions, items_per_shard=len(questions)), task)
    begin(prepared, prepared.orders)
    return prepared


def write(prepared, run_id="run"):
    return write_shard(prepared.task, fake_target(prepared.config), prepared.config, prepared.orders[0], run_id)


def run(folder, questions, task):
    """Records of one shard."""
    prepared = planned(folder, questions, task)
    return generate_records(task, fake_target(prepared.config), prepared.plan.items, prepared.config)


def statuses(records):
    return {record.get("text", record["group"]): record["status"] for record in records}


def test_a_device_that_fails_is_no_fault_of_the_items(tmp_path):
    def broken(texts):
        if QUESTIONS[2] in texts or broken.now:
            broken.now = True
            raise torch.AcceleratorError(ILLEGAL)

    broken.now = False
    prepared = planned(tmp_path, QUESTIONS, BatchTask(broken))
    with pytest.raises(DeviceFailed):
        write(prepared)
    assert prepared.task.calls == [QUESTIONS], "nothing else is tried in a process whose device failed"
    assert prepared.finished() == {}
    assert last_fault(prepared.folder, prepared.orders) == f"AcceleratorError: {ILLEGAL}"


def test_an_item_that_breaks_the_device_alone_is_found(tmp_path):
    def broken(texts):
        if "bad" in texts:
            raise RuntimeError(ILLEGAL)

    prepared = planned(tmp_path, [*QUESTIONS, "bad"], BatchTask(broken))
    for _ in range(BATCH_DEATHS + ITEM_DEATHS):
        with pytest.raises(DeviceFailed):
            write(prepared)
    assert write(prepared).num_rows == 2 * len(QUESTIONS) + 1


def test_a_device_that_is_broken_for_good_blames_no_item(tmp_path):
    def broken(_texts):
        raise RuntimeError(ILLEGAL)

    prepared = planned(tmp_path, QUESTIONS, BatchTask(broken))
    for _ in range(BATCH_DEATHS + 2 * ITEM_DEATHS):
        with pytest.raises(DeviceFailed):
            write(prepared, "first")
    prepared.task.trouble = lambda _texts: None
    assert write(prepared, "second").num_rows == 2 * len(QUESTIONS)


def test_an_error_that_all_items_share_is_raised(tmp_path):
    def broken(_texts):
        raise ZeroDivisionError("a defect")

    prepared = planned(tmp_path, QUESTIONS, BatchTask(broken))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        write(prepared)
    assert prepared.finished() == {}


@pytest.mark.parametrize("kind", [UserError, ValueError])
def test_an_error_of_the_only_item_is_its_record(tmp_path, kind):
    def refuse(_texts):
        raise kind("vector 0 holds a NaN")

    (record,) = run(tmp_path, ["alone"], BatchTask(refuse))
    assert record["status"] == "generation_error"
    assert record["detail"] == f"{kind.__name__}: vector 0 holds a NaN"


def test_different_errors_of_all_items_are_their_records(tmp_path):
    def differ(texts):
        raise ValueError("one") if texts[0] == "a" else KeyError("other")

    assert [record["status"] for record in run(tmp_path, ["a", "b"], BatchTask(differ))] == ["generation_error"] * 2


def vectors(records):
    return {record["record_id"]: record["vector"] for record in records if "vector" in record}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_a_passing_error_leaves_the_records_of_an_undisturbed_run(tmp_path):
    def once(texts):
        if len(texts) > 1 and not once.seen:
            once.seen = True
            raise MemoryError

    once.seen = False
    undisturbed = run(tmp_path / "one", QUESTIONS, BatchTask())
    disturbed = run(tmp_path / "other", QUESTIONS, BatchTask(once))
    assert once.seen and same(vectors(undisturbed), vectors(disturbed))


@pytest.mark.parametrize("deaths", [1, BATCH_DEATHS, BATCH_DEATHS + 1])
def test_deaths_that_no_item_caused_leave_the_records_of_an_undisturbed_run(tmp_path, deaths):
    def die(_texts):
        if die.left:
            die.left -= 1
            raise Death

    die.left = deaths
    one, other = planned(tmp_path / "one", QUESTIONS, BatchTask()), planned(tmp_path / "two", QUESTIONS, BatchTask(die))
    undisturbed = write(one)
    for _ in range(deaths):
        with pytest.raises(Death):
            write(other)
    assert write(other).digest == undisturbed.digest


def test_the_others_run_as_a_batch_once_the_bad_ones_are_known(tmp_path):
    def one_raises(texts):
        if "bad" in texts:
            raise ValueError("bad")

    task = BatchTask(one_raises)
    found = run(tmp_path, ["bad", *QUESTIONS], task)
    assert statuses(found) == {"bad": "generation_error", **dict.fromkeys(QUESTIONS, "ok")}
    assert task.calls[-1] == QUESTIONS
    batch = run(tmp_path / "good", QUESTIONS, BatchTask())
    assert [record["vector"].tolist() for record in found[1:]] == [record["vector"].tolist() for record in batch]


def test_items_that_only_together_end_the_process_keep_their_own_records(tmp_path):
    def together(texts):
        if len(texts) > 1:
            raise Death

    prepared = planned(tmp_path, QUESTIONS, BatchTask(together))
    for _ in range(BATCH_DEATHS + ITEM_DEATHS):
        with pytest.raises(Death):
            write(prepared)
    assert write(prepared).num_rows == 2 * len(QUESTIONS)
