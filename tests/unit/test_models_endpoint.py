"""Nothing is lost: every conversation is answered or has a reason, whatever the endpoint does."""

import email.utils
import threading
import time

import pytest
from chat_server import Reply, chat_server, said

from introspect_ray.config import ChatConfig, EndpointConfig
from introspect_ray.errors import UserError
from introspect_ray.models.chat import Choice, Completion, Failure, Message, ask, spoken
from introspect_ray.models.endpoint import EndpointChat
from introspect_ray.models.journal import Entry, Journal


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def client(url, sleeps=None, **settings):
    known = {name: settings.pop(name) for name in ("max_tokens", "temperature") if name in settings}
    endpoint = EndpointConfig(url=url, **{"attempts": 3, "first_wait_s": 8.0, "timeout_s": 5.0, **settings})
    return EndpointChat(
        ChatConfig(kind="endpoint", endpoint=endpoint, **known),
        seed=3,
        sleep=(sleeps if sleeps is not None else []).append,
    )


def outcomes(url, texts, **settings):
    return client(url, **settings).complete([ask(text) for text in texts])


def test_answers_come_in_order_with_what_was_sent_and_no_more_calls_at_once_than_allowed():
    gate, under_way, most = threading.Lock(), [0], [0]
    two_there = threading.Event()

    def answer(text, _number):
        with gate:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            if under_way[0] == 2:
                two_there.set()
        two_there.wait(5)
        with gate:
            under_way[0] -= 1
        return said(f"about {text}", finish="length" if text == "3" else "stop")

    with chat_server(answer) as (url, requests):
        chat = client(url, concurrency=2, model="m", max_tokens=7, temperature=0.5)
        found = chat.complete([ask(str(n)) for n in range(8)], sample=4)
    assert [one.text for one in found] == [f"about {n}" for n in range(8)]
    assert [one.truncated for one in found] == [n == 3 for n in range(8)]
    assert most[0] == 2
    _, body = requests[0]
    assert {name: body[name] for name in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 7,
    }


def test_turns_are_sent_as_they_are():
    with chat_server(lambda *_: said("x")) as (url, requests):
        client(url).complete([(Message("user", "a"), Message("assistant", "b"), Message("user", "c"))])
    assert [(one["role"], one["content"]) for one in requests[0][1]["messages"]] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_an_answer_in_parts_is_one_text_and_the_limit_has_the_name_that_is_asked_for():
    parts = b'{"choices": [{"message": {"content": [{"type": "text", "text": "ca"}, {"type": "text", "text": "ts"}]}}]}'
    with chat_server(lambda *_: Reply(body=parts)) as (url, requests):
        (found,) = outcomes(url, ["q"], limit_name="max_completion_tokens", max_tokens=9)
    assert found.text == "cats" and found.tokens_answered == 9
    assert requests[0][1]["max_completion_tokens"] == 9 and "max_tokens" not in requests[0][1]


@pytest.mark.parametrize("status", [429, 500, 503, 529])
def test_a_busy_or_broken_endpoint_is_asked_again_after_growing_waits(status):
    sleeps = []
    with chat_server(lambda _, number: Reply(status) if number < 3 else said("at last")) as (url, _):
        (found,) = client(url, sleeps).complete([ask("q")])
    assert isinstance(found, Completion) and found.text == "at last"
    assert 4 <= sleeps[0] <= 8 and 8 <= sleeps[1] <= 16


def test_after_the_last_attempt_the_reason_stands():
    with chat_server(lambda *_: Reply(500, b"out of \n order")) as (url, requests):
        (found,) = outcomes(url, ["q"])
    assert (found.reason, found.detail, len(requests)) == ("http_500", "out of order", 3)


def test_the_wait_that_is_asked_for_is_kept_in_seconds_or_as_a_date():
    later = email.utils.formatdate(time.time() + 40, usegmt=True)
    headers = {1: {"Retry-After": "33"}, 2: {"Retry-After": later}}
    sleeps = []
    with chat_server(lambda _, number: Reply(429, headers=headers[number]) if number < 3 else said("x")) as (url, _):
        (found,) = client(url, sleeps).complete([ask("q")])
    assert isinstance(found, Completion)
    assert sleeps[0] == 33 and 30 < sleeps[1] <= 40


def test_a_wait_beyond_patience_is_a_failure_with_its_reason():
    sleeps = []
    with chat_server(lambda *_: Reply(429, headers={"Retry-After": "86400"})) as (url, requests):
        (found,) = client(url, sleeps).complete([ask("q")])
    assert (found.reason, sleeps, len(requests)) == ("asked_to_wait", [], 1)


def test_slow_answers_and_closed_connections_are_failures_of_their_own():
    never = threading.Event()
    with chat_server(lambda text, _: Reply(hold=never) if text == "slow" else None) as (url, _):
        found = outcomes(url, ["slow", "closed"], timeout_s=0.2, attempts=2)
        never.set()
    assert [one.reason for one in found] == ["timeout", "connection_lost"]


def test_an_address_where_nothing_listens_is_not_reached():
    with chat_server(lambda *_: said("x")) as (url, _):
        pass
    assert [one.reason for one in outcomes(url, ["q"])] == ["not_reached"]


@pytest.mark.parametrize(
    ("body", "reason", "calls"),
    [
        (b"<html>gateway</html>", "no_json", 3),
        (b"[1, 2]", "no_answer_in_response", 3),
        (b'{"choices": []}', "no_answer_in_response", 3),
        (b'{"choices": [{"message": {"content": null}}]}', "empty_answer", 1),
        (b'{"choices": [{"message": {"content": "  "}}]}', "empty_answer", 1),
        (b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}', "refused", 1),
    ],
)
def test_responses_without_an_answer_are_failures(body, reason, calls):
    with chat_server(lambda *_: Reply(body=body)) as (url, requests):
        (found,) = outcomes(url, ["q"])
    assert (found.reason, len(requests)) == (reason, calls)


def test_a_bad_request_concerns_only_itself():
    with chat_server(lambda text, _: Reply(400, b"too long") if text == "long" else said("x")) as (url, requests):
        found = outcomes(url, ["long", "short"], concurrency=1)
    assert isinstance(found[0], Failure) and not found[0].is_general and isinstance(found[1], Completion)
    assert len(requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_that_holds_for_all_stops_all(status):
    with chat_server(lambda *_: Reply(status)) as (url, requests):
        found = outcomes(url, ["1", "2", "3"], concurrency=1)
    assert [(one.reason, one.is_general) for one in found] == [(f"http_{status}", True)] * 3
    assert len(requests) == 1


def test_the_key_comes_from_the_environment_and_appears_nowhere(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-123")

    def echo(*_):
        return Reply(400, b"you sent Bearer secret-123")

    with chat_server(echo) as (url, requests):
        (found,) = outcomes(url, ["q"], api_key_variable="MY_KEY")
    assert requests[0][0]["Authorization"] == "Bearer secret-123"
    assert "secret" not in repr(found) and "***" in found.detail


def test_redirects_are_not_followed_because_the_key_would_go_with_them(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-123")
    with chat_server(lambda *_: said("x")) as (other, stolen):  # noqa: SIM117
        with chat_server(lambda *_: Reply(302, headers={"Location": other})) as (url, _):
            (found,) = outcomes(url, ["q"], api_key_variable="MY_KEY")
    assert found.reason == "http_302" and not stolen


def test_a_missing_key_is_the_users_error(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="api_key_variable is MY_KEY"):
        client("http://127.0.0.1:1/v1", api_key_variable="MY_KEY")


def test_no_call_is_made_that_could_pass_the_cost_cap():
    # A call sends at most 1 byte and 16 tokens around the message and 16 around all, answers at most 10:
    # 33 tokens at 1 each and 10 at 2 each make 53 of the 80. It then costs 10 + 2 * 5 = 20.
    settings = {"input_price": 1e6, "output_price": 2e6, "max_cost": 80.0, "max_tokens": 10, "concurrency": 1}
    with chat_server(lambda *_: said("x")) as (url, requests):
        chat = client(url, **settings)
        found = chat.complete([ask(str(n)) for n in range(4)])
        earlier = Journal([Entry("a", "of an earlier run", 20.0)])
        again = EndpointChat(chat.config, seed=0, journal=earlier).complete([ask("q"), ask("r")])
    assert [type(one) for one in found] == [Completion, Completion, Failure, Failure]
    assert {one.reason for one in found[2:]} == {"cost_cap"} and chat.journal.spent == 40
    assert [type(one) for one in again] == [Completion, Failure]
    assert len(requests) == 3


def test_equal_requests_are_sent_and_paid_once_and_another_sample_is_another_request():
    with chat_server(lambda _, number: said(f"answer {number}", sent=3, answered=0)) as (url, requests):
        chat = client(url, temperature=1.0, input_price=1e6)
        first = chat.complete([ask("q"), ask("r"), ask("q")])
        assert chat.complete([ask("q")]) == first[:1] == first[2:]
        assert chat.complete([ask("q")], sample=1) != first[:1]
    assert (len(requests), chat.journal.spent) == (3, 9)


def test_calls_that_may_have_been_charged_count_in_full():
    never = threading.Event()
    settings = {"input_price": 1e6, "max_cost": 80.0, "timeout_s": 0.2, "concurrency": 1}
    with chat_server(lambda *_: Reply(hold=never)) as (url, requests):
        chat = client(url, **settings)
        (found,) = chat.complete([ask("q")])
        never.set()
    assert (found.reason, chat.journal.spent, len(requests)) == ("cost_cap", 66, 2)


def test_refusals_cost_nothing():
    with chat_server(lambda *_: Reply(429)) as (url, _):
        chat = client(url, input_price=1e6, max_cost=80.0)
        (found,) = chat.complete([ask("q")])
    assert (found.reason, chat.journal.spent) == ("http_429", 0)


def test_a_choice_is_the_word_that_an_answer_begins_with():
    answers = {"a": "Yes.", "b": "<think>no</think> no, it is not", "c": "Perhaps yes", "d": "yesterday"}
    with chat_server(lambda text, _: said(answers[text])) as (url, _):
        found = client(url).choose([ask(name) for name in answers], ["yes", "no"])
    assert found[:2] == [Choice(0), Choice(1)]
    assert [one.reason for one in found[2:]] == ["answer_is_no_choice"] * 2


def test_thoughts_are_not_answers():
    assert spoken("<think>so\nmuch</think>\n cats ") == "cats"
    assert spoken("thought </think> cats") == "cats"
    assert spoken("<think>never ends") is None
