"""A shard whose process dies again and again ends all the same, and only the item that did it is failed."""

import pytest
from fake_task import FakeTask, fake_config, fake_target

from introspect_ray.data.attempts import ATTEMPTS, BATCH_DEATHS, ITEM_DEATHS, LOADS, counted_loading, has_begun
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.finish import finish
from introspect_ray.data.prepare import begin, prepare
from introspect_ray.data.storage import Folder
from introspect_ray.data.writer import PROCESS_DIED, write_shard
from introspect_ray.errors import RunFailed

QUESTIONS = [f"question {number}" for number in range(5)]


class Death(BaseException):
    """What `kill -9` is to a process, for one call: nothing in the way catches it."""


class DeadlyTask(FakeTask):
    """Dies where `die` is in a question; counts its calls and the items of each."""

    def __init__(self, deadly=("die",)):
        super().__init__()
        self.deadly = deadly
        self.calls = []

    def generate(self, target, items, config):
        self.calls.append(len(items))
        if any(word in item["text"] for word in self.deadly for item in items):
            raise Death
        return super().generate(target, items, config)


def begun(tmp_path, questions, deadly=("die",)):
    config = fake_config(tmp_path, questions, items_per_shard=len(questions), max_error_share=1)
    prepared = prepare(config, DeadlyTask(deadly))
    begin(prepared, prepared.orders)
    return prepared


def attempt(prepared, run_id):
    """One attempt at the only shard: its info, or None if the process died."""
    try:
        return write_shard(prepared.task, fake_target(prepared.config), prepared.config, prepared.orders[0], run_id)
    except Death:
        return None


def attempts_until_done(prepared, run_id):
    for number in range(1, ATTEMPTS + 1):
        if info := attempt(prepared, run_id):
            return number, info
    return ATTEMPTS, None


def statuses(prepared, info):
    finish(prepared, {0: info})
    records = open_dataset(prepared.config.output).records(None, selected=False)
    return {record["text"]: record["status"] for record in records}, [
        record for record in records if record["status"] == PROCESS_DIED
    ]


def test_deadly_items_are_found_and_the_others_are_kept(tmp_path):
    prepared = begun(tmp_path, [*QUESTIONS[:2], "die one", QUESTIONS[2], "die two", *QUESTIONS[3:]])
    number, info = attempts_until_done(prepared, "run")
    assert number == BATCH_DEATHS + 2 * ITEM_DEATHS + 1
    found, dead = statuses(prepared, info)
    assert {text: found[text] for text in QUESTIONS} == dict.fromkeys(QUESTIONS, "ok")
    assert [record["detail"] for record in dead] == ["2 processes ended while this item ran alone"] * 2
    assert not list((tmp_path / "out" / "plan").glob("*attempts*"))


def test_more_deadly_items_than_one_run_finds_are_found_by_the_next(tmp_path):
    prepared = begun(tmp_path, [QUESTIONS[0], *(f"die {number}" for number in range(6))])
    assert attempts_until_done(prepared, "first")[1] is None
    number, info = attempts_until_done(prepared, "second")
    assert number == ITEM_DEATHS + 1
    assert len(statuses(prepared, info)[1]) == 6


def test_a_death_from_outside_costs_one_more_batch(tmp_path):
    prepared = begun(tmp_path, [*QUESTIONS, "die"])
    assert attempt(prepared, "run") is None
    prepared.task.deadly = ()
    assert attempt(prepared, "run").num_rows == 12
    assert prepared.task.calls == [6, 6]


def test_deaths_with_the_driver_blame_nobody(tmp_path):
    prepared = begun(tmp_path, [*QUESTIONS, "die"])
    for run in range(3 * ATTEMPTS):
        assert attempt(prepared, f"run {run}") is None
    assert set(prepared.task.calls) == {6}


def test_blame_outlives_the_driver_and_suspicion_does_not(tmp_path):
    prepared = begun(tmp_path, ["die one", *QUESTIONS, "die two"])
    for _ in range(BATCH_DEATHS + ITEM_DEATHS + 1):
        assert attempt(prepared, "first") is None
    # "die one" is known by now, and "die two" has one death, which the next run does not count.
    number, info = attempts_until_done(prepared, "second")
    assert number == ITEM_DEATHS + 1
    assert len(statuses(prepared, info)[1]) == 2


def test_loading_that_ends_the_process_is_tried_a_few_times(tmp_path):
    folder = Folder(str(tmp_path))
    died = [counted_loading(folder, "run", "a") for _ in range(LOADS)]
    for loading in died:
        loading.__enter__()  # and never left, as a killed process never leaves it
    with (
        pytest.raises(RunFailed, match="3 processes ended while they loaded the target"),
        counted_loading(folder, "run", "a"),
    ):
        pass
    for _ in range(2 * LOADS):
        with counted_loading(folder, "run", "b"):
            assert has_begun(folder, "run") and not has_begun(folder, "another")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"begun": "often"}'])
def test_torn_notes_count_as_none(tmp_path, content):
    prepared = begun(tmp_path, QUESTIONS)
    (tmp_path / "out" / prepared.orders[0].attempts_name).write_bytes(content)
    assert attempt(prepared, "run").num_rows == 10


def test_an_attempt_shows_that_its_run_has_begun(tmp_path):
    prepared = begun(tmp_path, [*QUESTIONS, "die"])
    assert not has_begun(prepared.folder, "run")
    assert attempt(prepared, "run") is None
    assert has_begun(prepared.folder, "run") and not has_begun(prepared.folder, "another")
