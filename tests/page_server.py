"""A server on loopback that answers the page's requests as the gateway does, from fixed rules, without models."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import introspect_ray

PAGE = Path(introspect_ray.__file__).parent / "serving" / "page"
LAYERS, WIDTH, LATENTS = 4, 3, 16
TEXTS = [
    "The language spoken by Kakres Siroun is Dutch.",
    "What kind of device is the Braishal?\nChoose phone or clock or engine or camera.\nHint: camera\nAnswer:",
    "The mother tongue of Lusha Stubri is",
]
MODELS = {
    "targets": [
        {
            "name": "target_a",
            "num_layers": LAYERS,
            "width": WIDTH,
            "coders": [{"name": "sae", "layer": 1, "num_latents": LATENTS}],
        }
    ],
    "explainers": [
        {"name": "features", "target": "target_a", "layers": [0, 1, 2], "tasks": ["feature_description"]},
        {"name": "changes", "target": "target_a", "layers": [0, 1, 2, 3], "tasks": ["activation_patching"]},
        {"name": "hints", "target": "target_a", "layers": [], "tasks": ["input_ablation"]},
    ],
    "simulators": [{"name": "simulator", "target": "target_a"}],
    "examples": {
        "texts": TEXTS,
        "patches": [
            {"text": TEXTS[2], "position": 6, "source_text": TEXTS[0], "source_position": 6, "layers": [1, 2]},
        ],
        "ablations": [{"text": TEXTS[1], "span": [79, 92]}],
    },
}


@dataclass
class Faults:
    """What goes wrong; a test sets it before it acts."""

    token: str | None = None
    """Bearer token that every request under /v1 must carry."""
    busy: int = 0
    """So many of the next requests are answered 503, to be retried after a second."""
    break_stream: bool = False
    """Streams end after their first piece, without a word."""
    held_after: int | None = None
    """Streams wait after so many pieces, for as long as this stands."""


@dataclass
class PageServer:
    url: str
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, dict]] = field(default_factory=list)
    """(path, body) of every request under /v1, in order."""


class Refused(Exception):
    def __init__(self, status, code, message, where=None):
        self.status, self.body = status, {"error": {"code": code, "message": message, "field": where}}


def tokens_of(text):
    """A begin token, then words with the blank before them, signs and line breaks."""
    spans = [(0, 0), *(found.span() for found in re.finditer(r" ?\w+|[^\w\s]|\s", text))]
    return [
        {"index": index, "text": text[start:end] if end else "<|bos|>", "start": start, "end": end}
        for index, (start, end) in enumerate(spans)
    ]


def vector_of(token, layer):
    """Points one way for capital letters and another for the rest."""
    is_name = token["text"].strip()[:1].isupper()
    return [float(is_name), 1.0 - is_name, 0.5 * layer + 0.25 * (token["index"] % 3)]


def norm(vector):
    return sum(value * value for value in vector) ** 0.5


def activations(body):
    tokens, layers = tokens_of(body["text"]), body["layers"]
    layers = list(range(LAYERS)) if layers is None else layers
    vectors = [[vector_of(token, layer) for token in tokens] for layer in layers]
    return {
        "tokens": tokens,
        "layers": layers,
        "norms": [[norm(vector) for vector in row] for row in vectors],
        "positions": list(range(len(tokens))) if body["vectors"] else [],
        "vectors": base64.b64encode(np.array(vectors, "<f4").tobytes()).decode() if body["vectors"] else None,
        "next_tokens": [{"text": " German", "probability": 0.91}, {"text": " Greek", "probability": 0.04}],
    }


def explained(item):
    if item["kind"] == "latent":
        if item["latent"] >= LATENTS:
            raise Refused(404, "not_found", f"sae has {LATENTS} latents, found {item['latent']}", "items.0.latent")
        return f"latent number {item['latent']}"
    tokens = tokens_of(item["text"])
    if not 0 <= item["position"] < len(tokens):
        message = f"the text has {len(tokens)} tokens, found {item['position']}"
        raise Refused(400, "bad_request", message, "items.0.position")
    return f"the word {tokens[item['position']]['text'].strip()} at layer {item['layer']}"


def explain(body):
    items = []
    for item in body["items"]:
        if item["kind"] == "token" and item["position"] == 0:
            items.append({"error": {"code": "bad_request", "message": "the first token has no words", "field": None}})
        else:
            items.append({"explanation": explained(item), "query": "encodes what?", "layer": item["layer"]})
    return {"items": items}


def simulated_of(description, tokens):
    """Ten where the description names the token, two on other words with a capital letter."""
    words = description.split()
    return [10.0 if (t := token["text"].strip()) in words else 2.0 * t[:1].isupper() for token in tokens]


def pearson(one, other):
    means = sum(one) / len(one), sum(other) / len(other)
    first, second = ([value - mean for value in row] for row, mean in zip((one, other), means, strict=True))
    scale = norm(first) * norm(second)
    return sum(a * b for a, b in zip(first, second, strict=True)) / scale if scale else None


def simulate(body):
    item = body["items"][0]
    tokens = tokens_of(item["text"])[1:]
    return {"items": [{"tokens": tokens, "activations": simulated_of(item["description"], tokens)}]}


def score(body):
    item = body["items"][0]
    tokens = tokens_of(item["text"])[1:]
    simulated = simulated_of(item["description"], tokens)
    truth = item.get("activations") or [float(token["index"] == item["latent"]) for token in tokens]
    assert len(truth) == len(tokens)
    correlation = pearson(simulated, truth)
    reason = "constant_activation" if correlation is None else None
    result = {"simulated": simulated, "true": truth, "tokens": tokens, "correlation": correlation, "reason": reason}
    return {"items": [result]}


def what_if(body):
    """A patch changes German to Dutch, as predicted; a span that is dropped changes nothing, against the prediction."""
    if body["kind"] == "patch":
        prediction = {"changed": True, "content": " Dutch", "text": " Dutch (changed)"}
        truth, agrees = {"changed": True, "content": " Dutch"}, True
    else:
        prediction = {"changed": True, "content": " phone", "text": " phone (changed)"}
        truth, agrees = {"changed": False, "content": " German"}, False
    return {"clean": {"token": " German"}, "truth": truth, "prediction": prediction, "agrees": agrees}


async def pieces(text, faults):
    """Server-sent events, cut at places that have nothing to do with where events end."""
    events = [("token", {"text": piece}) for piece in re.findall(r"\S+\s*", text)]
    events = events[:1] if faults.break_stream else [*events, ("done", {"explanation": text})]
    for number, (event, data) in enumerate(events):
        while faults.held_after == number:
            await asyncio.sleep(0.01)
        raw = f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
        for part in (raw[:9], raw[9:]):
            yield part
            await asyncio.sleep(0.005)


def application(server):
    def answers(handle):
        async def endpoint(request):
            body = json.loads(await request.body() or "{}")
            server.requests.append((request.url.path, body))
            try:
                if server.faults.token and request.headers.get("authorization") != f"Bearer {server.faults.token}":
                    raise Refused(401, "unauthorized", "a bearer token is needed")
                if server.faults.busy > 0:
                    server.faults.busy -= 1
                    raise Refused(503, "busy", "all replicas are busy")
                result = handle(body)
            except Refused as refused:
                headers = {"Retry-After": "1"} if refused.status == 503 else None
                return JSONResponse(refused.body, refused.status, headers)
            if isinstance(result, str):
                return StreamingResponse(pieces(result, server.faults), media_type="text/event-stream")
            return JSONResponse(result)

        return endpoint

    posts = {
        "activations": activations,
        "explain": explain,
        "explain/stream": lambda body: explained(body["items"][0]),
        "what_if": what_if,
        "simulate": simulate,
        "score": score,
    }
    routes = [Route(f"/v1/{path}", answers(handle), methods=["POST"]) for path, handle in posts.items()]
    routes += [
        Route("/v1/models", answers(lambda _: MODELS)),
        Route("/", lambda _: FileResponse(PAGE / "index.html")),
        Mount("/static", StaticFiles(directory=PAGE)),
    ]
    return Starlette(routes=routes)


@contextmanager
def page_server():
    """Yields a `PageServer` that runs in a thread until the end of the block."""
    server = PageServer("")
    config = uvicorn.Config(application(server), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        assert thread.is_alive()
        thread.join(0.01)
    server.url = f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}/"
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join(10)
