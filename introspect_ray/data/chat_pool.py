"""Chat models for jobs: an endpoint, called from the driver, or a pool of Ray actors that hold a local model.

driver  conversations -> chunks of similar length -> whichever actor is free -> answers in their order
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from introspect_ray.config import ActorConfig, ChatConfig, resolved
from introspect_ray.data.cluster import connect
from introspect_ray.data.identity import identify_target
from introspect_ray.data.pool import check_resources
from introspect_ray.data.workers import WorkerPool, use_assigned_threads
from introspect_ray.models.chat import ChatModel, Choice, Completion, Conversation, Failure
from introspect_ray.models.endpoint import EndpointChat
from introspect_ray.models.journal import Journal
from introspect_ray.models.local_chat import LocalChat
from introspect_ray.tasks.base import stable_id


def check_chat(config: ChatConfig) -> dict[str, str]:
    """What answers come from, as a name and a digest; of an endpoint only the names are known.

    Raises UserError for a chat model that cannot be asked, without asking or loading it.
    """
    if config.kind == "local":
        path = config.local.model.path
        return {f"model {path}": stable_id(identify_target(config.local.model).model_dump())}
    EndpointChat(config, seed=0)
    return {f"endpoint {config.endpoint.url}": config.endpoint.model}


def relevant_chat(config: ChatConfig) -> dict[str, Any]:
    """The resolved config without what cannot change answers: patience, prices, and the kind that is not asked."""
    tree = resolved(config)
    del tree["local" if config.kind == "endpoint" else "endpoint"]
    if config.kind == "endpoint":
        tree["endpoint"] = {name: tree["endpoint"][name] for name in ("url", "model")}
    else:
        del tree["local"]["batch_size"]
        tree["local"]["model"]["device"] = "auto"
    return tree


@contextmanager
def chat_model(config: ChatConfig, actors: ActorConfig, seed: int, journal: Journal) -> Iterator[ChatModel]:
    """The chat model of `config`; Ray is connected inside the block if the model is a local one.

    `journal` has the calls of an endpoint, those of earlier runs too.
    """
    if config.kind == "endpoint":
        yield EndpointChat(config, seed, journal)
        return
    with connect():
        check_resources(actors)
        yield ChatPool(config, actors, seed)


class ChatWorker:
    """Holds a local chat model."""

    def __init__(self, config: ChatConfig, seed: int):
        use_assigned_threads()
        self.chat = LocalChat.load(config, seed)

    def ask(self, method: str, conversations: Sequence[Conversation], argument: Any) -> list[Any]:
        """Answers of one method of a chat model."""
        answers: list[Any] = getattr(self.chat, method)(conversations, argument)
        return answers


class ChatPool:
    """A `ChatModel` on Ray actors."""

    def __init__(self, config: ChatConfig, actors: ActorConfig, seed: int):
        self._pool = WorkerPool(ChatWorker, (config, seed), actors)
        self._chunk = config.local.batch_size

    def complete(self, conversations: Sequence[Conversation], sample: int = 0) -> list[Completion | Failure]:
        return self._ask("complete", conversations, sample)

    def choose(self, conversations: Sequence[Conversation], choices: Sequence[str]) -> list[Choice | Failure]:
        return self._ask("choose", conversations, tuple(choices))

    def _ask(self, method: str, conversations: Sequence[Conversation], argument: Any) -> list[Any]:
        """Raises UserError if the model cannot be loaded, RunFailed if its process dies again and again."""
        order = sorted(range(len(conversations)), key=lambda row: sum(len(turn.content) for turn in conversations[row]))
        chunks = [order[start : start + self._chunk] for start in range(0, len(order), self._chunk)]
        answers: list[Any] = [None] * len(conversations)
        calls = [(method, [conversations[row] for row in rows], argument) for rows in chunks]
        for rows, found in zip(chunks, self._pool.map("ask", calls), strict=True):
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers
