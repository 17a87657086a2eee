"""Starting the service on this machine or on a cluster, and stopping it without dropping a request."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import ray
from ray import serve

from introspect_ray.config import ServeConfig
from introspect_ray.data.cluster import connect, is_elsewhere, is_verbose, quiet_stderr, tell
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.serving.api import Models
from introspect_ray.serving.app import application
from introspect_ray.serving.auth import checked_digest
from introspect_ray.serving.table import served_models, with_quickstart

APPLICATION = "introspect_ray"
CHEAPER_REQUESTS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
"""What Serve's processes inherit from the Ray that is started here: fewer threads to hand a request between (models
have one of their own anyway) and fewer writes of its access log. RAY_SERVE_THROUGHPUT_OPTIMIZED would open ports of
replicas as well."""
POLL_S = 0.2
WATCH_S = 5.0
LONGEST_REASON = 500
"""Characters of what Serve says, of which the end names the error."""


@dataclass(frozen=True)
class Service:
    """A service that answers."""

    url: str
    models: Models
    needs_token: bool


@contextmanager
def serving(config: ServeConfig) -> Iterator[Service]:
    """The service answers inside the block; on leaving, requests under way are answered, then everything stops.

    Raises UserError for what cannot be served, before Ray starts; RunFailed if a deployment does not start.
    """
    config = with_quickstart(config)
    models = served_models(config)
    digest = checked_digest(config.auth, config.host)
    port = config.port or _free_port(config.host)
    if not is_elsewhere():
        _check_port(config.host, port)
    with ExitStack() as stack:
        with _variables({} if is_elsewhere() else CHEAPER_REQUESTS):
            stack.enter_context(connect())
        _check_no_other()
        location = "EveryNode" if is_elsewhere() else "HeadOnly"
        level = "INFO" if is_verbose() else "ERROR"
        options = {"host": config.host, "port": port, "request_timeout_s": 2 * config.limits.seconds}
        with quiet_stderr():
            serve.start(proxy_location=location, http_options=options, logging_config={"log_level": level})
        try:
            _deploy(application(config, models, digest))
            try:
                yield Service(f"http://{_url_host(config.host)}:{port}", models, digest is not None)
            finally:
                with quiet_stderr():
                    drain(config.limits.drain_s)
        finally:
            with quiet_stderr():
                serve.shutdown()


def _deploy(bound: serve.Application) -> None:
    try:
        with quiet_stderr():
            serve.run(bound, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunFailed(f"the service did not start: {reason[-LONGEST_REASON:]}") from error


def drain(seconds: float) -> None:
    """Refuse new requests, then wait until those under way are answered, at most so long."""
    # In an event loop, because with CHEAPER_REQUESTS in this process's environment handles work nowhere else; and in a
    # thread, because this one may have a loop already.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(lambda: asyncio.run(_drain(seconds))).result()
        except TimeoutError:
            tell(f"requests were under way after {seconds:g} s: they are not answered")
        except (RuntimeError, ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
            tell(f"requests under way are not waited for: {' '.join(str(error).split())[:LONGEST_REASON]}")


async def _drain(seconds: float) -> None:
    gateway = serve.get_app_handle(APPLICATION)
    async with asyncio.timeout(seconds + POLL_S):
        # A new handle hears of its replicas a moment later.
        while not await gateway.broadcast("drain").results_async():
            await asyncio.sleep(POLL_S)
        while any(await gateway.broadcast("in_flight").results_async()):
            await asyncio.sleep(POLL_S)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables inside the block, where they are not set to something else already."""
    added = values.keys() - os.environ.keys()
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def watch() -> None:
    """Return only by KeyboardInterrupt (Ctrl-C, SIGTERM). Raises RunFailed if the service ends by itself."""
    while True:
        try:
            found = serve.status().applications
        except (RuntimeError, ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
            raise RunFailed(f"Ray does not answer any more: {error}") from error
        if APPLICATION not in found:
            raise RunFailed("somebody else has ended the service")
        time.sleep(WATCH_S)


def _check_no_other() -> None:
    """Serve's addresses are a cluster's, not an application's: another one's may be open to all."""
    if APPLICATION in serve.status().applications or serve.status().proxies:
        raise UserError("Ray Serve runs on that cluster already: use `serve deploy` with a config file instead")


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"host {host!r} with port {port} cannot be listened on: {error.strerror or error}") from None


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
