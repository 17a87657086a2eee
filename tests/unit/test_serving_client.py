"""The clients against scripted answers: what is sent again, what is not, and how long they wait."""

import asyncio
import json

import httpx2
import pytest

from introspect_ray.serving.api import LatentItem, VectorItem, failed
from introspect_ray.serving.asking import Retries
from introspect_ray.serving.client import AsyncClient, Client, ServiceError

ITEM = LatentItem(kind="latent", coder="sae", latent=1)
DONE = {"explanation": "the word x", "query": "q", "layer": 1}
QUICK = Retries(most=3, first_pause_s=0, longest_pause_s=0)
BUSY = (503, failed("busy", "later").model_dump())


def stream(*events):
    return 200, "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)


class Script:
    """Answers one after the other; an exception is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        return httpx2.Response(status, **({"text": body} if isinstance(body, str) else {"json": body}))


def explain(kind, script, token=None):
    """One explanation by the plain or the async client."""
    transport = httpx2.MockTransport(script)
    if kind == "plain":
        with Client("http://service", token, retries=QUICK, transport=transport) as client:
            return client.explain("e", [ITEM])

    async def run():
        async with AsyncClient("http://service", token, retries=QUICK, transport=transport) as client:
            return await client.explain("e", [ITEM])

    return asyncio.run(run())


def streamed(kind, script):
    transport = httpx2.MockTransport(script)
    if kind == "plain":
        with Client("http://service", retries=QUICK, transport=transport) as client:
            return list(client.explain_stream("e", ITEM))

    async def run():
        async with AsyncClient("http://service", retries=QUICK, transport=transport) as client:
            return [piece async for piece in client.explain_stream("e", ITEM)]

    return asyncio.run(run())


both = pytest.mark.parametrize("kind", ["plain", "async"])


@both
def test_what_says_later_or_was_lost_is_sent_again(kind):
    script = Script(BUSY, httpx2.ReadError("reset"), (500, "Internal Server Error"), (200, {"items": [DONE]}))
    (item,) = explain(kind, script)
    assert item.explanation == "the word x"
    assert len({request.content for request in script.requests}) == 1 and len(script.requests) == 4


@both
def test_a_mistake_is_not_sent_again(kind):
    script = Script((400, failed("bad_request", "no such layer", "items.0.layer").model_dump()))
    with pytest.raises(ServiceError, match=r"bad_request: no such layer \(items.0.layer\)") as caught:
        explain(kind, script)
    assert caught.value.status == 400 and len(script.requests) == 1


@both
def test_a_defect_is_not_sent_again(kind):
    script = Script((500, failed("internal", "a defect").model_dump()))
    with pytest.raises(ServiceError, match="internal"):
        explain(kind, script)


@both
def test_what_took_too_long_is_sent_again_once(kind):
    late = (503, failed("timeout", "no answer within 60 s").model_dump())
    script = Script(BUSY, late, BUSY, late, (200, {"items": [DONE]}))
    with pytest.raises(ServiceError, match="timeout"):
        explain(kind, script)
    assert len(script.requests) == 4
    script = Script(BUSY, late, BUSY, (200, {"items": [DONE]}))
    assert explain(kind, script)[0].explanation == "the word x"
    script = Script(late, stream(), late)
    with pytest.raises(ServiceError, match="timeout"):
        streamed(kind, script)
    script = Script(*[httpx2.ReadTimeout("late")] * 2)
    with pytest.raises(ServiceError, match="no answer: ReadTimeout"):
        explain(kind, script)


@both
def test_after_the_last_try_the_error_is_raised(kind):
    script = Script(*[httpx2.ConnectError("refused")] * 4)
    with pytest.raises(ServiceError, match="no answer: ConnectError") as caught:
        explain(kind, script)
    assert caught.value.status == 0 and len(script.requests) == 4


@both
def test_a_stream_is_sent_again_only_before_its_first_piece(kind):
    whole = stream(("token", {"text": "the"}), ("token", {"text": " word x"}), ("done", DONE))
    script = Script(BUSY, stream(), whole)
    *pieces, last = streamed(kind, script)
    assert pieces == ["the", " word x"] and last.explanation == "the word x" and len(script.requests) == 3
    cut = Script(stream(("token", {"text": "the"})), whole)
    with pytest.raises(ServiceError, match="ended early"):
        streamed(kind, cut)
    assert len(cut.requests) == 1
    failing = stream(("token", {"text": "the"}), ("error", failed("unavailable", "lost").model_dump()))
    with pytest.raises(ServiceError, match="unavailable: lost"):
        streamed(kind, Script(failing))


@both
def test_the_token_is_sent(kind, monkeypatch):
    for given, expected in ((None, "Bearer of-the-environment"), ("mine", "Bearer mine")):
        monkeypatch.setenv("INTROSPECT_RAY_TOKEN", "of-the-environment")
        script = Script((200, {"items": [DONE]}))
        explain(kind, script, given)
        assert script.requests[0].headers["authorization"] == expected


def test_pauses_double_up_to_a_bound_and_heed_the_service():
    retries = Retries(most=9, first_pause_s=1, longest_pause_s=4)
    lost = httpx2.ReadError("reset")
    for attempt, most in enumerate((1, 2, 4, 4)):
        assert most / 2 <= retries.pause_s(attempt, lost, None) <= most
    assert retries.pause_s(0, lost, httpx2.Response(503, headers={"retry-after": "7"})) == 7


def test_numbers_survive_the_way_there():
    values = [0.1, 1e-30, 123456.789]
    script = Script((200, {"items": [DONE]}))
    with Client("http://service", transport=httpx2.MockTransport(script)) as client:
        client.explain("e", [VectorItem(kind="vector", vector=values, layer=0)])
    assert json.loads(script.requests[0].content)["items"][0]["vector"] == values
