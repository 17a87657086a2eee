"""Language models that are asked in words: what is said, what comes back, and what both kinds of model can do.

An answer that did not come is a `Failure` with a reason, one for every conversation, so that whoever asks can count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable


@dataclass(frozen=True)
class Message:
    """One turn. There is no system role: not every chat template has one."""

    role: Literal["user", "assistant"]
    content: str


Conversation = tuple[Message, ...]
"""Turns that begin and end with the user's."""


@dataclass(frozen=True)
class Completion:
    """An answer, and what it took in tokens."""

    text: str
    tokens_sent: int
    tokens_answered: int
    truncated: bool = False
    """Whether it ended because it reached the longest length."""


@dataclass(frozen=True)
class Choice:
    """Which of several answers was given."""

    index: int
    probabilities: tuple[float, ...] | None = None
    """Of every answer, summing to 1; none where the model does not tell."""


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    reason: str
    """A short name, to count by."""
    detail: str = ""
    is_general: bool = False
    """Whether every other call would fail as well: a wrong key, a wrong address."""
    may_pass: bool = False
    """Whether the same call may succeed at another time, or with other settings of the endpoint."""


A = TypeVar("A", Completion | Failure, Choice | Failure)

COST_CAP = "cost_cap"
"""Reason of a call that was not made because it could have cost more than what was left."""
NO_CHOICE = "answer_is_no_choice"


@runtime_checkable
class ChatModel(Protocol):
    """Answers conversations, in their order; batching and concurrency change no answer but for float rounding."""

    def complete(self, conversations: Sequence[Conversation], sample: int = 0) -> list[Completion | Failure]:
        """One answer each. At temperatures above 0, another `sample` draws another answer, and the same the same."""

    def choose(self, conversations: Sequence[Conversation], choices: Sequence[str]) -> list[Choice | Failure]:
        """One of the choices each: by exact probabilities where the model has them, else as its answer says."""


class Metered:
    """A `ChatModel` that counts what another one answers."""

    def __init__(self, model: ChatModel):
        self.model = model
        self.num_answers = 0
        self.failures: Counter[str] = Counter()
        """Reason -> calls that failed."""
        self.may_pass: Counter[str] = Counter()
        """Those of them that may succeed at another time."""

    def complete(self, conversations: Sequence[Conversation], sample: int = 0) -> list[Completion | Failure]:
        return self._counted(self.model.complete(conversations, sample))

    def choose(self, conversations: Sequence[Conversation], choices: Sequence[str]) -> list[Choice | Failure]:
        return self._counted(self.model.choose(conversations, choices))

    def _counted(self, answers: list[A]) -> list[A]:
        for answer in answers:
            if isinstance(answer, Failure):
                self.failures[answer.reason] += 1
                self.may_pass[answer.reason] += answer.may_pass
            else:
                self.num_answers += 1
        return answers


def ask(text: str) -> Conversation:
    """A conversation of one question."""
    return (Message("user", text),)


_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


def spoken(text: str) -> str | None:
    """What an answer says after its thoughts; None where it is nothing but an unfinished thought."""
    left = _THOUGHT.sub("", text)
    if "</think>" in left:  # the template had opened the thought
        left = left.rpartition("</think>")[2]
    return None if "<think>" in left else left.strip()


def parse_choice(completion: Completion, choices: Sequence[str]) -> Choice | Failure:
    """The choice that an answer begins with, whatever its case and the punctuation after it."""
    words = re.findall(r"\w+", spoken(completion.text) or "")
    folded = [choice.casefold() for choice in choices]
    if not words or words[0].casefold() not in folded:
        return Failure(NO_CHOICE, completion.text[:80])
    return Choice(folded.index(words[0].casefold()))
