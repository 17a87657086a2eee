"""The gateway with the page, on loopback, over models that answer by fixed rules: no weights, no Ray."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import uvicorn

from introspect_ray.config import ServeConfig, ServedExplainer, ServedSimulator, ServedTarget
from introspect_ray.explainer.query import Query
from introspect_ray.serving import api
from introspect_ray.serving.auth import token_digest
from introspect_ray.serving.calls import Busy
from introspect_ray.serving.gateway import create_gateway
from introspect_ray.serving.values import Question, TrueActivations, VectorAt

LAYERS, LATENTS = 4, 16
TEXTS = [
    "The language spoken by Kakres Siroun is Dutch.",
    "What kind of device is the Braishal?\nChoose phone or clock or engine or camera.\nHint: camera\nAnswer:",
    "The mother tongue of Lusha Stubri is",
]
SERVED = {"features": ("feature_description", 3), "changes": ("activation_patching", 4), "hints": ("input_ablation", 4)}
"""Explainers: their task, and of how many layers."""
CONFIG = ServeConfig(
    quickstart=None,
    targets=(ServedTarget(),),
    explainers=tuple(ServedExplainer(name=name, tasks=(task,)) for name, (task, _) in SERVED.items()),
    simulators=(ServedSimulator(),),
)
MODELS = api.Models.model_validate(
    {
        "targets": [
            {
                "name": "target_a",
                "num_layers": LAYERS,
                "width": 3,
                "coders": [{"name": "sae", "layer": 1, "num_latents": LATENTS}],
            }
        ],
        "explainers": [
            {"name": name, "target": "target_a", "layers": list(range(layers)), "tasks": [task]}
            for name, (task, layers) in SERVED.items()
        ],
        "simulators": [{"name": "simulator", "target": "target_a"}],
        "examples": {
            "texts": TEXTS,
            "patches": [
                {"text": TEXTS[2], "position": 6, "source_text": TEXTS[0], "source_position": 6, "layers": [1, 2]}
            ],
            "ablations": [{"text": TEXTS[1], "span": [79, 92]}],
        },
    }
)


@dataclass
class Faults:
    """What goes wrong; a test sets it before it acts."""

    busy: int = 0
    """So many of the next calls find all replicas busy."""
    break_stream: bool = False
    """Streams end after their first piece, without a word."""
    held_after: int | None = None
    """Streams wait after so many pieces, for as long as this stands."""


@dataclass(frozen=True, eq=False)
class Named(VectorAt):
    """A vector that knows what it stands for, so that the explainer need not guess."""

    word: str


def tokens_of(text):
    """A begin token, then words with the blank before them, signs and line breaks."""
    spans = [(0, 0), *(found.span() for found in re.finditer(r" ?\w+|[^\w\s]|\s", text))]
    return [
        api.Token(index=index, text=text[start:end], start=start, end=end) for index, (start, end) in enumerate(spans)
    ]


def vector_of(token, layer):
    """Points one way for capital letters and another for the rest."""
    is_name = token.text.strip()[:1].isupper()
    return [float(is_name), 1.0 - is_name, 0.5 * layer + 0.25 * (token.index % 3)]


def simulated_of(description, tokens):
    """Ten where the description names the token, two on other words with a capital letter."""
    words = description.split()
    return [10.0 if token.text.strip() in words else 2.0 * token.text.strip()[:1].isupper() for token in tokens]


class FixedModels:
    """`calls.Models` by the rules above. What is called is named as in the services."""

    def __init__(self, faults):
        self.faults = faults

    async def call(self, deployment, method, *arguments, model=""):  # noqa: ARG002 - one answer for all models
        if self.faults.busy > 0:
            self.faults.busy -= 1
            raise Busy
        return getattr(self, method)(*arguments)

    async def stream(self, deployment, method, vector, max_new_tokens, model=""):  # noqa: ARG002
        (whole,) = self.describe([vector], max_new_tokens)
        for number, piece in enumerate(re.findall(r"\S+\s*", whole.explanation)):
            while self.faults.held_after == number:
                await asyncio.sleep(0.01)
            yield piece
            if self.faults.break_stream:
                return
        yield whole

    def activations(self, request):
        tokens = tokens_of(request.text)
        layers = list(range(LAYERS)) if request.layers is None else request.layers
        vectors = np.array([[vector_of(token, layer) for token in tokens] for layer in layers])
        return api.Activations(
            tokens=tokens,
            layers=layers,
            norms=np.linalg.norm(vectors, axis=-1).tolist(),
            positions=list(range(len(tokens))) if request.vectors else [],
            vectors=api.encoded_vectors(vectors) if request.vectors else None,
            next_tokens=[
                api.NextToken(text=" German", probability=0.91),
                api.NextToken(text=" Greek", probability=0.04),
            ],
        )

    def vectors(self, items):
        return [self.vector(item) for item in items]

    def vector(self, item):
        if item.kind == "latent":
            if item.latent >= LATENTS:
                return api.failed("not_found", f"sae has {LATENTS} latents, found {item.latent}", "latent")
            return Named(np.zeros(3), 1, f"latent {item.latent}")
        tokens = tokens_of(item.text)
        if item.position >= len(tokens):
            return api.failed("bad_request", f"the text has {len(tokens)} tokens, found {item.position}", "position")
        if item.position == 0:
            return api.failed("bad_request", "the first token has no words")
        token = tokens[item.position]
        return Named(np.array(vector_of(token, item.layer)), item.layer, f"the word {token.text.strip()}")

    def describe(self, vectors, max_new_tokens):  # noqa: ARG002
        return [
            api.Explanation(explanation=f"{one.word} at layer {one.layer}", query="", layer=one.layer)
            for one in vectors
        ]

    def simulate(self, items):
        found = [(tokens_of(item.text)[1:], item.description) for item in items]
        return [api.Simulated(tokens=tokens, activations=simulated_of(words, tokens)) for tokens, words in found]

    def true_activations(self, items):
        found = [(tokens_of(item.text)[1:], item.latent) for item in items]
        return [
            TrueActivations(tokens, np.array([float(token.index == latent) for token in tokens]))
            for tokens, latent in found
        ]

    def patch(self, request):  # noqa: ARG002
        """A patch changes German to Dutch, as predicted."""
        return Question(Query(("patch",)), api.Clean(token="German"), api.Truth(changed=True, content="Dutch"))

    def ablate(self, request, layout):  # noqa: ARG002
        """A span that is dropped changes nothing, against the prediction."""
        return Question(Query(("ablate",)), api.Clean(token="German"), api.Truth(changed=False, content="German"))

    def predict(self, query):
        content = "Dutch" if query.text == "patch" else "phone"
        return api.Prediction(changed=True, content=content, text=f"{content} (changed)")


@dataclass
class PageServer:
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, dict]] = field(default_factory=list)
    """(path, body) of every request, in order."""
    url: str = ""

    def __post_init__(self):
        self.gateway = create_gateway(CONFIG, MODELS, FixedModels(self.faults), None)

    def reset(self, token=None):
        """As new; `token`: what requests need from now on."""
        vars(self.faults).update(vars(Faults()))
        self.requests.clear()
        self.gateway.digest = token and token_digest(token)

    async def __call__(self, scope, receive, send):
        body = b""

        async def heard():
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body"):
                self.requests.append((scope["path"], json.loads(body or b"{}")))
            return message

        await self.gateway(scope, heard, send)


@contextmanager
def page_server():
    """Yields a `PageServer` that runs in a thread until the end of the block."""
    server = PageServer()
    runner = uvicorn.Server(uvicorn.Config(server, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
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
