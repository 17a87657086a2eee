"""What waits while a batch runs is the next one; keys take turns, and who has left is not run."""

import asyncio

import pytest

from introspect_ray.config import BatchingConfig
from introspect_ray.serving.batches import Batches
from introspect_ray.serving.calls import Lost


class Models:
    """Records batches; runs each until it is let go."""

    def __init__(self):
        self.batches = []
        self.free = asyncio.Semaphore(0)

    async def run(self, key, requests):
        self.batches.append((key, requests))
        await self.free.acquire()
        if "cancelled" in requests:
            raise asyncio.CancelledError
        if "bad" in requests:
            raise ValueError("a bad batch")
        return [f"{key}{request}" for request in requests if request != "short"]


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


def batches_of(models, max_size=3):
    return Batches(models.run, BatchingConfig(max_size=max_size, wait_s=0))


def test_requests_that_come_while_one_runs_form_full_batches():
    async def run():
        models = Models()
        batches = batches_of(models)
        first = asyncio.ensure_future(batches.ask(0))
        await settled()
        later = []
        for number in range(1, 6):  # each in a moment of its own
            later.append(asyncio.ensure_future(batches.ask(number)))
            await settled()
        assert models.batches == [("", [0])]
        for _ in range(3):
            models.free.release()
        answers = await asyncio.gather(first, *later)
        return models.batches, answers

    found, answers = asyncio.run(run())
    assert found == [("", [0]), ("", [1, 2, 3]), ("", [4, 5])]
    assert answers == ["0", "1", "2", "3", "4", "5"]


def test_keys_take_turns_and_never_share_a_batch():
    async def run():
        models = Models()
        batches = batches_of(models, max_size=2)
        asked = [asyncio.ensure_future(batches.ask(number, "a" if number else "b")) for number in (1, 2, 3, 4, 0)]
        for _ in range(3):
            models.free.release()
        return await asyncio.gather(*asked), models.batches

    answers, found = asyncio.run(run())
    assert answers == ["a1", "a2", "a3", "a4", "b0"]
    assert found == [("a", [1, 2]), ("b", [0]), ("a", [3, 4])]


def test_a_failed_batch_fails_its_own_requests_and_one_that_was_left_is_not_run():
    async def run():
        models = Models()
        batches = batches_of(models)
        bad = [asyncio.ensure_future(batches.ask(request)) for request in ("bad", 1)]
        await settled()
        left, kept = (asyncio.ensure_future(batches.ask(request)) for request in (2, 3))
        await settled()
        left.cancel()
        models.free.release()
        models.free.release()
        for one in bad:
            with pytest.raises(ValueError, match="a bad batch"):
                await one
        assert await kept == "3"
        # Somebody who leaves while the batch runs harms nobody, and the next request finds a runner again.
        leaving, staying = (asyncio.ensure_future(batches.ask(request)) for request in (4, 5))
        await settled()
        leaving.cancel()
        models.free.release()
        assert await staying == "5"
        return models.batches

    assert asyncio.run(run()) == [("", ["bad", 1]), ("", [3]), ("", [4, 5])]


def test_batches_are_cut_by_items():
    async def run():
        models = Models()
        batches = batches_of(models, max_size=4)
        sizes = {"a": 2, "b": 2, "c": 1, "large": 9, "d": 3, "e": 1}
        asked = [asyncio.ensure_future(batches.ask(name, items=items)) for name, items in sizes.items()]
        for _ in range(4):
            models.free.release()
        assert await asyncio.gather(*asked) == list(sizes)
        return [requests for _, requests in models.batches]

    assert asyncio.run(run()) == [["a", "b"], ["c"], ["large"], ["d", "e"]]


def test_an_answer_too_few_fails_its_batch_and_no_other():
    async def run():
        models = Models()
        batches = batches_of(models, max_size=2)
        asked = [asyncio.ensure_future(batches.ask(request)) for request in (1, "short", 2)]
        models.free.release()
        models.free.release()
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)

    found = asyncio.run(run())
    assert (found[0], found[2]) == ("1", "2") and isinstance(found[1], ValueError)


def test_nobody_waits_for_batches_that_were_cancelled():
    async def run():
        models = Models()
        batches = batches_of(models, max_size=2)
        asked = [asyncio.ensure_future(batches.ask(request)) for request in (1, "cancelled", 2)]
        models.free.release()
        lost = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
        models.free.release()
        return lost, await asyncio.wait_for(batches.ask(3), 5)

    lost, after = asyncio.run(run())
    assert [type(one) for one in lost] == [Lost] * 3 and after == "3"
