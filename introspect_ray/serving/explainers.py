"""What a process that holds explainers answers. No Ray here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from introspect_ray.config import ServedExplainer
from introspect_ray.errors import UserError
from introspect_ray.explainer.encoding import Encoded
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.explainer.sharing import ExplainerPool
from introspect_ray.explainer.streaming import AnswerStreamer
from introspect_ray.serving.api import Explanation, Failed, Prediction, failed
from introspect_ray.serving.values import VectorAt
from introspect_ray.tasks.verdict import VerdictTask


@dataclass(frozen=True, eq=False)
class Asked:
    """Queries of one request, and how long their answers may be (none: the explainer's own limit)."""

    queries: tuple[Query, ...]
    max_new_tokens: int | None


class ExplainerService:
    """Trained explainers by name. Not for several threads at once."""

    def __init__(self, served: Sequence[ServedExplainer], device: str, most: int, batch_size: int):
        """`most`: explainers held at a time. `batch_size`: queries that are answered at once."""
        self.served = {one.name: one for one in served}
        self.batch_size = batch_size
        self._pool = ExplainerPool({one.name: one.folder for one in served}, device, most)

    def load(self, name: str) -> None:
        """Make sure that an explainer is here. Raises UserError if it cannot be loaded."""
        self._pool.use(name)

    def question(self, name: str, vector: VectorAt) -> Query:
        """What this explainer is asked about a vector."""
        return feature_query(self.served[name], vector)

    def answer(self, name: str, requests: Sequence[Asked]) -> list[list[str | Failed]]:
        """The answers to each request's queries; those of equal limits are generated together."""
        explainer = self._pool.use(name)
        answers: list[list[str | Failed]] = [[] for _ in requests]
        encoded: dict[int | None, list[tuple[int, int, Encoded]]] = {}
        for number, asked in enumerate(requests):
            for place, query in enumerate(asked.queries):
                one = _encoded(explainer, query, asked.max_new_tokens)
                answers[number].append(one if isinstance(one, Failed) else "")
                if isinstance(one, Encoded):
                    encoded.setdefault(asked.max_new_tokens, []).append((number, place, one))
        for limit, together in encoded.items():
            texts = explainer.answer([one for _, _, one in together], self.batch_size, max_new_tokens=limit)
            for (number, place, _), text in zip(together, texts, strict=True):
                answers[number][place] = text
        return answers

    def describe(
        self, name: str, requests: Sequence[tuple[Sequence[VectorAt], int | None]]
    ) -> list[list[Explanation | Failed]]:
        """What the vectors of each request encode, each request with its limit of new tokens."""
        asked = [Asked(tuple(self.question(name, one) for one in vectors), limit) for vectors, limit in requests]
        return [
            [
                text
                if isinstance(text, Failed)
                else Explanation(explanation=text, query=query.text, layer=vector.layer)
                for vector, query, text in zip(vectors, one.queries, texts, strict=True)
            ]
            for (vectors, _), one, texts in zip(requests, asked, self.answer(name, asked), strict=True)
        ]

    def stream(
        self,
        name: str,
        vector: VectorAt,
        max_new_tokens: int | None,
        tell: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> Explanation | Failed:
        """What a vector encodes; `tell` hears it piece by piece, and `stop` may end it."""
        explainer, query = self._pool.use(name), self.question(name, vector)
        encoded = _encoded(explainer, query, max_new_tokens)
        if isinstance(encoded, Failed):
            return encoded
        streamer = AnswerStreamer(explainer.encoder.decode, tell, stop)
        (text,) = explainer.answer([encoded], 1, max_new_tokens=max_new_tokens, streamer=streamer)
        return Explanation(explanation=text, query=query.text, layer=vector.layer)

    def predict(self, name: str, queries: Sequence[Query]) -> list[Prediction | Failed]:
        """What the explainer says of interventions."""
        (texts,) = self.answer(name, [Asked(tuple(queries), None)])
        return [text if isinstance(text, Failed) else predicted(text) for text in texts]


def feature_query(served: ServedExplainer, vector: VectorAt) -> Query:
    """The question of feature_description about one vector, in the layout of the explainer's training."""
    before, after = served.features.question.replace("{layer}", str(vector.layer)).split("{vector}")
    return Query((before, Vector(vector.values, (vector.layer,)), after))


def predicted(text: str) -> Prediction:
    """The verdict and the content that an answer to a causal task holds."""
    answer = VerdictTask().parse(text)
    if answer is None:
        return Prediction(changed=None, content=None, text=text)
    return Prediction(changed=answer.changed, content=answer.content, text=text)


def _encoded(explainer: Explainer, query: Query, max_new_tokens: int | None) -> Encoded | Failed:
    try:
        return explainer.encode([query], None, ["query"], max_new_tokens)[0]
    except UserError as error:
        return failed("bad_request", str(error))
