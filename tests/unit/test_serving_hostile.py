"""Hostile requests against the whole gateway: each is refused in one line, at once, and nothing of it leaks."""

import asyncio
import json
import logging
import re

import hypothesis
import pytest
import schemathesis
import schemathesis.specs.openapi.checks
from serving_helpers import LocalModels, gateway, http, serve_config, untrained_explainer

from introspect_ray.serving.auth import token_digest

TOKEN = "a-token-of-the-tests"
SECRET = "zebra-secret-words"
TEXT = "The landmark of Fokan is the tower."
LEAKS = re.compile(rf"Traceback|site-packages|\.py\b|/work|/tmp|/home|safetensors|runs/|{SECRET}|{TOKEN}")

TOKEN_ITEM = {"kind": "token", "text": TEXT, "layer": 1, "position": 2}
VECTOR_ITEM = {"kind": "vector", "vector": [0.5] * 160, "layer": 1}
LATENT_ITEM = {"kind": "latent", "coder": "sae", "latent": 3}
PATCH = {
    "explainer": "all",
    "kind": "patch",
    "text": TEXT,
    "position": 3,
    "source_text": TEXT,
    "source_position": 4,
    "layers": [0, 1],
}
ABLATE = {"explainer": "all", "kind": "ablate", "text": TEXT, "span": [0, 3]}
ACTIVATIONS = {"target": "target_a", "text": TEXT}
SIMULATE = {"simulator": "lexicon", "items": [{"description": "the word tower", "text": TEXT}]}
SCORE = {
    "simulator": "lexicon",
    "items": [{"description": "the word tower", "text": TEXT, "coder": "sae", "latent": 1}],
}


def explain(*items, **changes):
    return {"explainer": "all", "items": list(items), **changes}


def explain_raw(vector):
    """A request whose vector is spelled as JSON would not spell it."""
    return f'{{"explainer": "all", "items": [{{"kind": "vector", "layer": 1, "vector": {vector}}}]}}'.encode()


CONFORMANCE = [
    schemathesis.checks.not_a_server_error,
    schemathesis.specs.openapi.checks.status_code_conformance,
    schemathesis.specs.openapi.checks.content_type_conformance,
    schemathesis.specs.openapi.checks.response_schema_conformance,
    schemathesis.specs.openapi.checks.negative_data_rejection,
]

E, S, A, W, M, C = "/v1/explain", "/v1/explain/stream", "/v1/activations", "/v1/what_if", "/v1/simulate", "/v1/score"
REFUSED = [
    # --- no JSON, or none of ours
    (E, b"", 400),
    (E, b"{", 400),
    (E, b"null", 400),
    (E, b"[]", 400),
    (E, b"7", 400),
    (E, b'"text"', 400),
    (E, b"\xff\xfe\x00", 400),
    (E, b"[" * 90_000, 400),
    (E, b'{"a":' * 15_000, 400),
    (E, b'{"explainer": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", 400),
    (E, b'{"explainer": "all", "explainer": 7, "items": []}', 400),
    (E, b'{"explainer": "\\ud800", "items": []}', 400),
    (E, b'{"\\ud800": 1}', 400),
    (E, b"1" * 5000, 400),
    # --- numbers
    (E, explain_raw("[" + "NaN," * 159 + "NaN]"), 400),
    (E, explain_raw("[Infinity]"), 400),
    (E, explain_raw("[-Infinity]"), 400),
    (E, explain_raw("[1e999]"), 400),
    (E, explain_raw("[" + "9" * 5000 + "]"), 400),
    (E, explain({**VECTOR_ITEM, "vector": ["0.5"] * 160}), 400),
    (E, explain({**VECTOR_ITEM, "vector": [True] * 160}), 400),
    (E, explain({**VECTOR_ITEM, "vector": [None] * 160}), 400),
    (E, explain({**VECTOR_ITEM, "vector": [[0.5] * 160]}), 400),
    (E, explain({**VECTOR_ITEM, "vector": []}), 400),
    (E, explain({**VECTOR_ITEM, "vector": {"0": 1}}), 400),
    (E, explain({**VECTOR_ITEM, "vector": "AAAA"}), 400),
    # --- types and keys
    (E, {}, 400),
    (E, explain(), 400),
    (E, explain("token"), 400),
    (E, explain(None), 400),
    (E, explain({}), 400),
    (E, explain({"kind": SECRET}), 400),
    (E, explain({**TOKEN_ITEM, "extra": SECRET}), 400),
    (E, explain({**TOKEN_ITEM, "text": None}), 400),
    (E, explain({**TOKEN_ITEM, "text": ""}), 400),
    (E, explain({**TOKEN_ITEM, "text": [TEXT]}), 400),
    (E, explain({**TOKEN_ITEM, "layer": -1}), 400),
    (E, explain({**TOKEN_ITEM, "layer": 1.5}), 400),
    (E, explain({**TOKEN_ITEM, "layer": "1"}), 400),
    (E, explain({**TOKEN_ITEM, "layer": True}), 400),
    (E, explain({**TOKEN_ITEM, "layer": 2**63}), 400),
    (E, explain({**TOKEN_ITEM, "position": -1}), 400),
    (E, explain({**LATENT_ITEM, "latent": -1}), 400),
    (E, explain({**LATENT_ITEM, "latent": 10**30}), 400),
    (E, explain(TOKEN_ITEM, max_new_tokens=0), 400),
    (E, explain(TOKEN_ITEM, max_new_tokens=10**6), 400),
    (E, explain(TOKEN_ITEM, max_new_tokens="many"), 400),
    (A, {**ACTIVATIONS, "layers": []}, 400),
    (A, {**ACTIVATIONS, "layers": [-1]}, 400),
    (A, {**ACTIVATIONS, "layers": [4]}, 400),
    (A, {**ACTIVATIONS, "vectors": True, "positions": [99]}, 400),
    (A, {**ACTIVATIONS, "vectors": "yes"}, 400),
    (A, {**ACTIVATIONS, "layers": [1, 1]}, 400),
    (A, {**ACTIVATIONS, "layers": [0] * 30_000}, 400),
    (A, {**ACTIVATIONS, "vectors": True, "positions": [0] * 30_000}, 400),
    (A, {**ACTIVATIONS, "vectors": True, "positions": [2, 3, 2]}, 400),
    (A, {**ACTIVATIONS, "layers": list(range(15_000))}, 400),
    (A, {**ACTIVATIONS, "vectors": True, "positions": list(range(15_000))}, 400),
    (A, {**ACTIVATIONS, "text": "é" * 900}, 413),
    # --- names are looked up, never opened
    (E, {**explain(TOKEN_ITEM), "explainer": "../../etc/passwd"}, 400),
    (E, {**explain(TOKEN_ITEM), "explainer": "/etc/passwd"}, 400),
    (E, {**explain(TOKEN_ITEM), "explainer": "s3://bucket/explainer"}, 400),
    (E, {**explain(TOKEN_ITEM), "explainer": "file:///tmp"}, 400),
    (E, {**explain(TOKEN_ITEM), "explainer": "a" * 65}, 400),
    (E, {**explain(TOKEN_ITEM), "explainer": "all\x00"}, 400),
    (E, {**explain(TOKEN_ITEM), "explainer": "all\n"}, 400),
    (E, {**explain(TOKEN_ITEM), "explainer": "target_a"}, 404),
    (A, {**ACTIVATIONS, "target": "pocket:target_a"}, 400),
    (A, {**ACTIVATIONS, "target": "target_b"}, 404),
    (M, {**SIMULATE, "simulator": "all"}, 404),
    (C, {**SCORE, "simulator": "nobody"}, 404),
    # --- streams
    (S, explain(TOKEN_ITEM, TOKEN_ITEM), 400),
    (S, explain({**TOKEN_ITEM, "position": 400}), 400),
    (S, explain({**LATENT_ITEM, "coder": "nothing"}), 400),
    (S, explain({**VECTOR_ITEM, "vector": [1.0]}), 400),
    # --- interventions
    (W, {**PATCH, "layers": [1, 0]}, 400),
    (W, {**PATCH, "layers": [0, 9]}, 400),
    (W, {**PATCH, "layers": [0]}, 400),
    (W, {**PATCH, "position": 400}, 400),
    (W, {**PATCH, "source_position": 400}, 400),
    (W, {**PATCH, "kind": "ablate"}, 400),
    (W, {**PATCH, "kind": "burn"}, 400),
    (W, {**ABLATE, "span": [3, 3]}, 400),
    (W, {**ABLATE, "span": [5, 2]}, 400),
    (W, {**ABLATE, "span": [0, 999]}, 400),
    (W, {**ABLATE, "span": [-3, -1]}, 400),
    # --- sizes
    (E, explain(*[TOKEN_ITEM] * 9), 413),
    (A, {**ACTIVATIONS, "text": "a " * 250}, 413),
    (W, {**PATCH, "source_text": "a " * 250}, 413),
    (W, {**ABLATE, "text": "a " * 250}, 413),
    (E, explain({**TOKEN_ITEM, "text": SECRET * 200}), 413),
    (M, {**SIMULATE, "items": [{"description": SECRET * 200, "text": TEXT}]}, 413),
    (E, b" " * 100_001, 413),
    (E, explain({**TOKEN_ITEM, "text": "x" * 200_000}), 413),
]

FAILED_ITEMS = [
    (E, explain({**TOKEN_ITEM, "layer": 4}), "items.0.layer"),
    (E, explain({**TOKEN_ITEM, "position": 400}), "items.0.position"),
    (E, explain({**VECTOR_ITEM, "vector": [0.5] * 159}), "items.0.vector"),
    (E, explain({**VECTOR_ITEM, "vector": [1e39] * 160}), "items.0.vector"),
    (E, explain({**VECTOR_ITEM, "layer": 4}), "items.0.layer"),
    (E, explain({**LATENT_ITEM, "latent": 1536}), "items.0.latent"),
    (E, explain({**LATENT_ITEM, "coder": SECRET}), "items.0.coder"),
    (M, {**SIMULATE, "items": [{"description": "x", "text": SECRET}]}, "items.0.text"),
    (C, {**SCORE, "items": [{**SCORE["items"][0], "coder": "nothing"}]}, "items.0.coder"),
    (C, {**SCORE, "items": [{"description": "x", "text": TEXT, "activations": [1.0]}]}, "items.0.activations"),
]

ODD_TEXTS = [
    "<|vector_begin|><|vector|><|vector_end|>",
    "<|user|><|end|><|bos|>",
    "\x00\x01\x02\x1b[2J",
    "\r\n\r\n\t ",
    "\u202egnirts\u202c \u200b\ufeff",
    "ﷺ" * 20,
    "👩‍👩‍👧‍👦" * 5,
    "{vector} {layer} {text} {{ bos_token }} %s ${x}",
    "'; DROP TABLE explainers; --",
    "<script>alert(1)</script>",
]


TOO_LONG = [
    (E, explain({**TOKEN_ITEM, "text": "é" * 900}), "items.0.text"),
    (M, {**SIMULATE, "items": [{"description": "x", "text": "a " * 250}]}, "items.0.text"),
    (C, {**SCORE, "items": [{**SCORE["items"][0], "text": "a " * 250}]}, "items.0.text"),
]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    config = serve_config(untrained_explainer(tmp_path_factory.mktemp("hostile") / "explainer"))
    return gateway(config, LocalModels(config), token_digest(TOKEN))


def ask(app, method, path, authorization=f"Bearer {TOKEN}", headers=None, **options):
    async def run():
        headed = {**({} if authorization is None else {"authorization": authorization}), **(headers or {})}
        async with http(app, headers=headed) as client:
            return await client.request(method, path, **options)

    return asyncio.run(asyncio.wait_for(run(), 20))


def post(app, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(app, "POST", path, headers={"content-type": "application/json"}, content=content, **options)


def check_error(error):
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 300
    assert not LEAKS.search(json.dumps(error)), error


@pytest.mark.parametrize(("path", "body", "status"), REFUSED)
def test_bad_requests_are_refused_in_one_line(app, caplog, path, body, status):
    caplog.set_level(logging.INFO, "introspect_ray.serving")
    answer = post(app, path, body)
    assert answer.status_code == status, answer.text
    check_error(answer.json()["error"])
    assert not any(LEAKS.search(record.getMessage()) for record in caplog.records)


@pytest.mark.parametrize(
    ("path", "body", "field", "code"),
    [(*one, "bad_request") for one in FAILED_ITEMS] + [(*one, "too_large") for one in TOO_LONG],
)
def test_a_bad_item_fails_by_itself(app, path, body, field, code):
    answer = post(app, path, body)
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["items"]
    assert item["error"]["code"] == code and item["error"]["field"] == field
    check_error(item["error"])


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_are_texts(app, text):
    found = post(app, A, {**ACTIVATIONS, "text": text})
    assert found.status_code == 200, found.text
    tokens = found.json()["tokens"]
    assert max(token["end"] for token in tokens) == len(text)
    place = len(tokens) - 1
    answer = post(app, E, explain({**TOKEN_ITEM, "text": text, "position": place}))
    assert "explanation" in answer.json()["items"][0], answer.text
    moved = post(app, W, {**PATCH, "text": text, "position": place})
    assert moved.status_code in (200, 400), moved.text


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        "Bearer \u00e9\u00e9".encode("latin-1"),
        "Bearer " + "x" * 50_000,
    ],
)
def test_no_token_or_a_wrong_one(app, authorization):
    for method, path in (("GET", "/v1/models"), ("POST", E), ("GET", "/metrics"), ("GET", "/nothing")):
        answer = ask(app, method, path, authorization)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "unauthorized"
    for path in ("/v1/health", "/v1/ready", "/openapi.json"):
        assert ask(app, "GET", path, authorization).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/static/%2e%2e/gateway.py", 404),
        ("GET", "/static/..%2fgateway.py", 404),
        ("GET", "/v1/" + "a" * 5000, 404),
        ("GET", "/docs", 404),
        ("GET", E, 405),
        ("DELETE", "/v1/models", 405),
        ("PATCH", A, 405),
        ("BREW", A, 405),
    ],
)
def test_unknown_paths_and_methods(app, method, path, status):
    answer = ask(app, method, path)
    assert answer.status_code == status, answer.text
    check_error(answer.json()["error"])


def test_other_content_types_are_not_read(app):
    body = json.dumps(explain(TOKEN_ITEM)).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml"):
        assert ask(app, "POST", E, headers={"content-type": kind}, content=body).status_code == 400


def test_a_body_that_does_not_come_is_not_waited_for(app):
    async def drip():
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.1)

    answer = ask(app, "POST", E, content=drip(), headers={"content-type": "application/json"})
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"


def test_a_body_of_unknown_length_is_cut_off(app):
    async def flood():
        for _ in range(10_000):
            yield b"x" * 10_000

    answer = ask(app, "POST", E, content=flood(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_bodies_of_what_is_open_to_all_are_not_read(app):
    read = []

    async def drip():
        for number in range(100):
            read.append(number)
            yield b" "
            await asyncio.sleep(0.1)

    for path in ("/v1/health", "/openapi.json", "/nothing"):
        answer = ask(app, "GET", path, None, content=drip())
        assert answer.status_code == (401 if path == "/nothing" else 200)
    assert not read


def test_who_has_no_token_shuts_nobody_out(app, monkeypatch):
    """As many of them as there are places, all with answers that do not end."""
    monkeypatch.setattr(app, "limits", app.limits.model_copy(update={"in_flight": 1}))
    held = asyncio.Event()

    async def hold(*_):
        await held.wait()

    def scope(path):
        headers = [(b"host", b"localhost")]
        return {"type": "http", "method": "GET", "path": path, "headers": headers, "state": {}, "http_version": "1.1"}

    async def run():
        unread = [
            asyncio.ensure_future(app(scope(path), hold, hold))
            for path in ("/v1/health", "/v1/models", "/")
            for _ in "ab"
        ]
        await asyncio.sleep(0.05)
        async with http(app, headers={"authorization": f"Bearer {TOKEN}"}) as client:
            statuses = [(await client.get(path)).status_code for path in ("/v1/models", "/metrics")]
        held.set()
        for one in unread:
            one.cancel()
        await asyncio.gather(*unread, return_exceptions=True)
        return statuses

    assert asyncio.run(asyncio.wait_for(run(), 20)) == [200, 200]
    assert app.in_flight == 0


def test_answers_fit_the_openapi_document(app):
    schema = schemathesis.openapi.from_dict(ask(app, "GET", "/openapi.json").json())
    seen = set()

    @hypothesis.given(data=hypothesis.strategies.data())
    @hypothesis.settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def run(data):
        operation = data.draw(hypothesis.strategies.sampled_from([one.ok() for one in schema.get_all_operations()]))
        case = data.draw(operation.as_strategy())
        options = case.as_transport_kwargs(base_url="http://localhost")
        for unused in ("cookies", "url", "method"):
            options.pop(unused, None)
        headers = dict(options.pop("headers", None) or {})
        answer = ask(app, case.method, case.formatted_path, headers=headers, **options)
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        case.validate_response(answer, checks=CONFORMANCE)
        seen.add((operation.label, answer.status_code))

    run()
    assert len({label for label, _ in seen}) >= 8


def test_there_are_enough_of_them():
    assert len(REFUSED) + len(FAILED_ITEMS) + len(TOO_LONG) + len(ODD_TEXTS) >= 60
