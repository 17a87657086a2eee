"""Bearer tokens. Only a digest of the token ever leaves the process that read it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

from introspect_ray.config import AuthConfig
from introspect_ray.errors import UserError

SHORTEST_TOKEN = 16


def token_digest(token: str) -> str:
    """What tokens are compared by, in constant time and whatever their length."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def matches(header: str | None, digest: str) -> bool:
    """Whether an Authorization header holds the bearer token of that digest."""
    scheme, _, token = (header or "").partition(" ")
    is_bearer = scheme.lower() == "bearer"
    return hmac.compare_digest(token_digest(token.strip()), digest) and is_bearer


def read_token(config: AuthConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token of the file or the environment variable; none if there is no such variable, or it is empty.

    Raises UserError if the file cannot be read or the token is short.
    """
    if config.token_file is not None:
        origin = f"auth.token_file {config.token_file}"
        try:
            token = Path(config.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{origin} cannot be read: {type(error).__name__}") from None
    else:
        origin = f"environment variable {config.token_variable}"
        token = environment.get(config.token_variable, "").strip()
        if not token:
            return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or any(character.isspace() for character in token):
        raise UserError(
            f"{origin} holds no usable token: expected at least {SHORTEST_TOKEN} ASCII characters without blanks"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address, or the host name `localhost`, can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def checked_digest(config: AuthConfig, host: str) -> str | None:
    """Digest of the token that requests need; none if they need none, which only a loopback address may do.

    Raises UserError for another address without a token.
    """
    token = read_token(config)
    if token is not None:
        return token_digest(token)
    if is_loopback(host):
        return None
    raise UserError(
        f"host is {host!r}, which others can reach, and there is no token: set environment variable"
        f" {config.token_variable}, or auth.token_file"
    )
