"""Library errors as failures that name a field of the request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from introspect_ray.errors import UserError
from introspect_ray.serving.api import ErrorCode, Failed, failed

P = ParamSpec("P")
T = TypeVar("T")


class FieldError(Exception):
    """A request that cannot be answered because of one of its fields."""

    def __init__(self, message: str, field: str | None, code: ErrorCode = "bad_request"):
        super().__init__(message)
        self.failure = failed(code, message, field)


@contextmanager
def field(name: str | None) -> Iterator[None]:
    """A UserError inside the block is about this field of the request."""
    try:
        yield
    except UserError as error:
        raise FieldError(str(error), name) from None


def failing(call: Callable[P, T]) -> Callable[P, T | Failed]:
    """The same call, which gives a FieldError's failure back as a value."""

    @wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T | Failed:
        try:
            return call(*args, **kwargs)
        except FieldError as error:
            return error.failure

    return wrapped
