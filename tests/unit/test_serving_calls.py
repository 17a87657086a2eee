"""Calls whose caller has left end in the replica, too; and Ray's ways to lose a call are all told as one."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, LocalRayletDiedError, NodeDiedError, OutOfMemoryError, RayTaskError

from introspect_ray.serving.calls import Busy, Lost, Retrying, together
from introspect_ray.serving.handles import ServeDeployments


class Response:
    """A DeploymentResponse that ends as told, or never."""

    def __init__(self, error=None):
        self.error = error
        self.cancelled = False

    def cancel(self):
        self.cancelled = True

    def __await__(self):
        return self._run().__await__()

    async def _run(self):
        if self.error:
            raise self.error
        await asyncio.sleep(60)


class Handle:
    """A DeploymentHandle that gives one response after the other."""

    def __init__(self, *responses):
        self.responses = list(responses)
        self.given = []

    def options(self, **_):
        return self

    @property
    def ask(self):
        return self

    def remote(self, *_):
        self.given.append(self.responses.pop(0))
        return self.given[-1]


async def settled():
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_call_ends_with_its_caller():
    async def run():
        handle = Handle(Response())
        asked = asyncio.ensure_future(ServeDeployments({"d": handle}).call("d", "ask"))
        await settled()
        assert not handle.given[0].cancelled
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        return handle.given[0].cancelled

    assert asyncio.run(run())


def raised_by_a_replica(error):
    return RayTaskError("ask", "traceback", error).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        OutOfMemoryError("the memory monitor"),
        NodeDiedError("gone"),
        LocalRayletDiedError(),
        raised_by_a_replica(Lost("the device has failed")),
        raised_by_a_replica(ActorDiedError()),
    ],
)
def test_whatever_loses_a_call_it_may_be_made_again(error):
    with pytest.raises(Lost) as caught:
        asyncio.run(ServeDeployments({"d": Handle(Response(error))}).call("d", "ask"))
    assert type(caught.value) is Lost


def test_a_defect_is_no_loss():
    handle = Handle(Response(raised_by_a_replica(ValueError("a defect"))))
    with pytest.raises(ValueError):
        asyncio.run(ServeDeployments({"d": handle}).call("d", "ask"))


@pytest.mark.parametrize("leaves", [False, True])
def test_calls_made_together_end_together(leaves):
    """All of them when the caller leaves, the others when one fails; what is raised is the failure itself."""

    async def run():
        handle = Handle(Response(), Response(None if leaves else Lost()), Response())
        calls = Retrying(ServeDeployments({"d": handle}), retries=0 if leaves else 1)
        handle.responses.append(Response(OSError("a defect")))  # of the second, when it is made again
        (asked,) = map(asyncio.ensure_future, [together(calls.call("d", "ask") for _ in range(3))])
        await settled()
        if leaves:
            asked.cancel()
        with pytest.raises(asyncio.CancelledError if leaves else OSError):
            await asyncio.wait_for(asked, 5)
        return [one.cancelled for one in handle.given]

    assert asyncio.run(run()) == ([True] * 3 if leaves else [True, False, True, False])


def test_answers_of_calls_made_together_are_in_their_order():
    async def run():
        async def after(turns, answer):
            for _ in range(turns):
                await asyncio.sleep(0)
            if answer is Busy:
                raise Busy
            return answer

        assert await together(after(3 - n, n) for n in range(3)) == [0, 1, 2]
        with pytest.raises(Busy):
            await together(after(n, answer) for n, answer in enumerate((1, Busy, 3)))

    asyncio.run(run())
