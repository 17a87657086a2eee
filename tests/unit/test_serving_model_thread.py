"""Models run one call after the other; a batch that fails leaves those of its requests that can be answered."""

import asyncio
import threading
import time

import pytest

from introspect_ray.serving.api import Failed
from introspect_ray.serving.calls import Lost
from introspect_ray.serving.model_thread import ModelThread, by_request


@pytest.fixture
def ended():
    """One entry for each time that the process was to end."""
    return []


@pytest.fixture
def thread(ended):
    return ModelThread(end=lambda: ended.append(True))


def test_calls_run_one_after_the_other_and_off_the_loop(thread):
    running = []

    def call():
        running.append(threading.current_thread())
        assert len(running) == 1
        time.sleep(0.02)
        return running.pop()

    async def run():
        return await asyncio.gather(*(thread.run(call) for _ in range(4)))

    threads = set(asyncio.run(run()))
    assert len(threads) == 1 and threads != {threading.current_thread()}


def test_what_a_batch_cannot_do_its_requests_do_alone(thread, ended):
    calls = []

    def doubled(items):
        calls.append(list(items))
        if len(items) > 3 or "bad" in items:
            raise RuntimeError("out of memory")
        return [2 * item for item in items]

    found = asyncio.run(thread.run_batch(by_request(doubled), [["a", "b"], ["bad", "c"], [], ["d"]]))
    assert calls[0] == ["a", "b", "bad", "c", "d"]
    assert [found[0], found[2], found[3]] == [["aa", "bb"], [], ["dd"]]
    assert [type(one) for one in found[1]] == [Failed, Failed] and found[1][0].error.code == "internal"
    assert not ended


def test_one_request_fails_as_it_is(thread):
    def call(_requests):
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        asyncio.run(thread.run_batch(call, [["a"]]))


@pytest.mark.parametrize("requests", [[["a"]], [["a"], ["b"]]])
def test_a_failed_device_ends_the_process_and_its_calls_are_lost(thread, ended, requests):
    calls = []

    def call(items):
        calls.append(items)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(Lost):
        asyncio.run(thread.run_batch(call, requests))
    assert ended == [True] and len(calls) == 1, "nothing more is tried on that device"


def test_a_failure_of_the_only_request_of_a_failed_batch_may_be_the_devices(thread, ended):
    def call(items):
        raise RuntimeError("CUDA error: device-side assert" if len(items) == 1 else "CUDA out of memory")

    with pytest.raises(Lost):
        asyncio.run(thread.run_batch(call, [["a"], ["b"]]))
    assert ended == [True]
