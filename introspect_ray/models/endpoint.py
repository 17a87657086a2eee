"""Chat models behind any OpenAI-compatible endpoint: concurrent calls, retries, a cost cap.

conversations --threads--> journal: what a call may cost -> POST -> journal: what it did cost -> Completion
                                | nothing left: Failure      | busy, broken, silent: wait, again | else: Failure
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from typing import Any

from introspect_ray.config import ChatConfig
from introspect_ray.errors import UserError
from introspect_ray.models.chat import COST_CAP, Choice, Completion, Conversation, Failure, parse_choice
from introspect_ray.models.journal import Journal

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
GENERAL = frozenset({301, 302, 303, 307, 308, 401, 403, 404})
"""Statuses that say that no call will succeed. Redirects are not followed: the key would go with them."""
_LONGEST_ANSWER = 16 << 20
_FRAME_TOKENS = 16
"""Tokens that a chat template may put around a message, at most."""


@dataclass(frozen=True)
class _Problem:
    """Why one try gave no answer."""

    failure: Failure
    is_retried: bool
    may_be_charged: bool
    wait_s: float | None = None
    """How long the endpoint asks to wait."""


class EndpointChat:
    """A `ChatModel` behind an endpoint.

    Args:
        journal: calls of earlier runs, which the cap counts as well and whose answers are not asked for again; none
            keeps those of this one alone.
        sleep: waits so many seconds; for tests.

    Raises:
        UserError: the environment variable that should hold the key is not set.
    """

    def __init__(
        self,
        config: ChatConfig,
        seed: int,
        journal: Journal | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.config = config
        self.journal = Journal() if journal is None else journal
        self._key = _api_key(config.endpoint.api_key_variable)
        self._seed = seed
        self._sleep = sleep
        self._jitter = random.Random(seed)
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._general: Failure | None = None

    def complete(self, conversations: Sequence[Conversation], sample: int = 0) -> list[Completion | Failure]:
        """One answer each, or the reason why there is none; equal conversations are sent once."""
        different = list(dict.fromkeys(conversations))
        with ThreadPoolExecutor(self.config.endpoint.concurrency) as pool:
            found = dict(zip(different, pool.map(partial(self._answer, sample=sample), different), strict=True))
        return [found[one] for one in conversations]

    def choose(self, conversations: Sequence[Conversation], choices: Sequence[str]) -> list[Choice | Failure]:
        """The choice that each answer begins with; any other answer is a failure."""
        return [one if isinstance(one, Failure) else parse_choice(one, choices) for one in self.complete(conversations)]

    def _answer(self, conversation: Conversation, sample: int) -> Completion | Failure:
        endpoint = self.config.endpoint
        body = self._body(conversation, sample)
        request = hashlib.blake2b(endpoint.url.encode() + b"\n" + body, digest_size=16).hexdigest()
        if (known := self.journal.find(request)) is not None:
            return known
        sent = sum(len(message.content.encode()) + _FRAME_TOKENS for message in conversation) + _FRAME_TOKENS
        most = self._cost(sent, self.config.max_tokens)
        problem: _Problem | None = None
        for attempt in range(endpoint.attempts):
            if problem is not None and (stop := self._wait(attempt, problem)) is not None:
                return replace(stop, may_pass=True)
            if self._general is not None:
                return replace(self._general, may_pass=True)
            call = self.journal.begin(request, most, endpoint.max_cost)
            if call is None:
                detail = f"up to {most:.6f} for this call, {self.journal.spent:.6f} spent"
                return Failure(COST_CAP, detail, may_pass=True)
            found = self._try(body, sent)  # a process that ends here leaves a call that counts in full
            if isinstance(found, Completion):
                self.journal.end(call, self._cost(found.tokens_sent, found.tokens_answered), found)
                return found
            problem = found
            is_final = problem.may_be_charged and not problem.is_retried
            self.journal.end(call, most if problem.may_be_charged else 0.0, problem.failure if is_final else None)
            if problem.failure.is_general:
                self._general = problem.failure
                return replace(problem.failure, may_pass=True)
            if not problem.is_retried:
                break
        assert problem is not None
        return replace(problem.failure, may_pass=problem.is_retried)

    def _wait(self, attempt: int, problem: _Problem) -> Failure | None:
        """Wait before a further try; a failure if the endpoint asks for more patience than there is."""
        endpoint = self.config.endpoint
        asked = problem.wait_s or 0.0
        if asked > endpoint.longest_wait_s:
            return Failure("asked_to_wait", f"{asked:g} s after {problem.failure.reason}")
        growing = min(endpoint.first_wait_s * 2 ** (attempt - 1), endpoint.longest_wait_s)
        self._sleep(max(asked, growing * self._jitter.uniform(0.5, 1.0)))
        return None

    def _body(self, conversation: Conversation, sample: int) -> bytes:
        config = self.config
        content: dict[str, Any] = {
            "model": config.endpoint.model,
            "messages": [{"role": message.role, "content": message.content} for message in conversation],
            config.endpoint.limit_name: config.max_tokens,
            "temperature": config.temperature,
        }
        if config.temperature:
            content["seed"] = (self._seed + sample) % (1 << 31)
        return json.dumps(content).encode()

    def _cost(self, sent: int, answered: int) -> float:
        endpoint = self.config.endpoint
        return (sent * endpoint.input_price + answered * endpoint.output_price) / 1e6

    def _try(self, body: bytes, num_sent: int) -> Completion | _Problem:
        """One call, which sends at most `num_sent` tokens."""
        headers = {"Content-Type": "application/json", "User-Agent": "introspect-ray"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.config.endpoint.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        timeout = self.config.endpoint.timeout_s
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return _completion(_read(response, time.monotonic() + timeout), num_sent, self.config.max_tokens)
        except urllib.error.HTTPError as error:
            return self._http_problem(error)
        except TimeoutError:
            return _Problem(Failure("timeout", f"no answer in {timeout:g} s"), is_retried=True, may_be_charged=True)
        except urllib.error.URLError as error:
            reason = "timeout" if isinstance(error.reason, TimeoutError) else "not_reached"
            return _Problem(Failure(reason, str(error.reason)), is_retried=True, may_be_charged=False)
        except (OSError, HTTPException) as error:
            failure = Failure("connection_lost", f"{type(error).__name__}: {error}")
            return _Problem(failure, is_retried=True, may_be_charged=True)
        except _NoAnswer as error:
            return _Problem(Failure(error.reason, error.detail), error.is_retried, may_be_charged=True)

    def _http_problem(self, error: urllib.error.HTTPError) -> _Problem:
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            said = ""
        detail = " ".join(said.split())[:200]
        if self._key:
            detail = detail.replace(self._key, "***")  # some proxies repeat what they were sent
        failure = Failure(f"http_{error.code}", detail, is_general=error.code in GENERAL)
        return _Problem(failure, error.code in RETRIED, may_be_charged=False, wait_s=_retry_after(error.headers))


class _NoAnswer(Exception):
    """A response of status 200 that holds no answer."""

    def __init__(self, reason: str, detail: str, is_retried: bool):
        super().__init__(reason)
        self.reason, self.detail, self.is_retried = reason, detail, is_retried


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"chat.endpoint.api_key_variable is {variable}, but the environment has no such variable")
    return key


def _read(response: Any, deadline: float) -> bytes:
    """The whole body. Raises TimeoutError past the deadline, however steadily bytes trickle in."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _LONGEST_ANSWER:
            raise _NoAnswer("answer_too_large", f"more than {_LONGEST_ANSWER} bytes", False)
    return b"".join(parts)


def _completion(content: bytes, num_sent: int, max_tokens: int) -> Completion:
    """What a response says; without a usage, the most that it can have been is taken."""
    try:
        found = json.loads(content)
    except ValueError:
        raise _NoAnswer("no_json", content[:80].decode("utf-8", "replace"), True) from None
    try:
        choice = found["choices"][0]
        message = choice["message"]
        text, refusal = _joined(message.get("content")), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise _NoAnswer("no_answer_in_response", content[:80].decode("utf-8", "replace"), True) from None
    if not isinstance(text, str) or not text.strip():
        raise _NoAnswer("refused" if refusal else "empty_answer", str(refusal or "")[:80], False)
    usage = found.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    return Completion(
        text=text,
        tokens_sent=_count(counts.get("prompt_tokens"), num_sent),
        tokens_answered=_count(counts.get("completion_tokens"), max_tokens),
        truncated=choice.get("finish_reason") == "length",
    )


def _joined(content: Any) -> Any:
    """Content that comes in parts as one text."""
    if not isinstance(content, list):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def _count(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def _retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None if absent or unreadable."""
    value = (headers.get("Retry-After") if headers else None) or ""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
