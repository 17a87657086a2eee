"""Joining the Ray cluster that `RAY_ADDRESS` names, or starting a local one, without noise.

Ray's own log lines and progress bars stay off unless the environment variable INTROSPECT_RAY_VERBOSE is set to
something; its log files are written either way.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.data  # its loggers exist from here on

from introspect_ray.data.nodes import watched_nodes
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.interruption import sigterm_kept

VERBOSE_VARIABLE = "INTROSPECT_RAY_VERBOSE"
ADDRESS_VARIABLE = "RAY_ADDRESS"
_PORT_TIMEOUT_S = 10
_PROBE_TIMEOUT_S = 60
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False); ray.shutdown()"

_telling = threading.Lock()
_ways_past: list[TextIO] = []
"""Streams to the real standard error, of the `quiet_stderr` blocks that are entered."""

_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_ENABLE_CONTROLLER_LOGGING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about a change of default
    "RAY_USAGE_STATS_ENABLED": "0",
}


def is_verbose() -> bool:
    return bool(os.environ.get(VERBOSE_VARIABLE))


def is_elsewhere() -> bool:
    """Whether RAY_ADDRESS names a cluster; else one is started on this machine."""
    return os.environ.get(ADDRESS_VARIABLE, "") not in ("", "local")


@contextmanager
def connect() -> Iterator[None]:
    """Ray is connected inside the block; on leaving, what was started here is stopped and nothing else.

    Within an existing connection the block does nothing. Raises UserError if RAY_ADDRESS names no cluster that answers,
    RunFailed if a local one does not start.
    """
    if not is_verbose():
        _hush()
    if ray.is_initialized():
        yield
        return
    if is_elsewhere():
        address = os.environ[ADDRESS_VARIABLE]
        check_address(address)
        _start(address=address)
    else:
        _ensure_token()
        # The dashboard costs two processes; only its absence makes Ray Train warn, in logs that nobody sees here.
        _start(address="local", num_cpus=_machine_cpus(), include_dashboard=is_verbose())
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        if is_elsewhere():
            stack.enter_context(watched_nodes(tell))
        yield


def _hush() -> None:
    """Keep Ray's Python loggers off the terminal; their files stay."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for logger in map(logging.getLogger, ("ray", "ray.data", "ray.train", "ray.serve")):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL + 1)


@contextmanager
def quiet_stderr() -> Iterator[TextIO]:
    """Discards what is written to file descriptor 2 inside the block, unless Ray is to be verbose; yields a way past.

    Ray's C++ parts write errors there past every log level, among them one for each actor that may be restarted. Their
    log files have the same lines.
    """
    if is_verbose():
        yield sys.stderr
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with os.fdopen(os.dup(terminal), "w") as past:
            with _telling:
                _ways_past.append(past)
            try:
                yield past
            finally:
                with _telling:
                    _ways_past.remove(past)
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


def tell(line: str) -> None:
    """A line on standard error, from any thread, also where it is quiet just now."""
    with _telling:
        stream = _ways_past[-1] if _ways_past else sys.stderr
        stream.write(f"{line}\n")
        stream.flush()


def _start(**options: Any) -> None:
    try:
        with sigterm_kept():
            ray.init(
                **options,
                log_to_driver=is_verbose(),
                logging_level=logging.INFO if is_verbose() else logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if options["address"] == "local":
            raise RunFailed(f"a local Ray cluster did not start: {reason}") from error
        raise UserError(f"{ADDRESS_VARIABLE} is {options['address']}, which cannot be joined: {reason}") from error


def _machine_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_address(address: str) -> None:
    """Refuse an address where no Ray cluster answers; `ray.init` itself would retry there for many minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{ADDRESS_VARIABLE} is {address}, expected HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PORT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{ADDRESS_VARIABLE} is {address}, where no Ray cluster answers: {error}") from None
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return  # a submitted job: the cluster itself started this process
    # Something answers, Ray or not. Joining cannot be interrupted from inside, so another process tries it first.
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{ADDRESS_VARIABLE} is {address}, where something listens that is no Ray cluster, or none that lets this"
            f" process in (no answer for {_PROBE_TIMEOUT_S} s; is RAY_AUTH_TOKEN set?)"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{ADDRESS_VARIABLE} is {address}, which cannot be joined: {reason}")


def _ensure_token() -> None:
    """Local clusters ask for a token, which Ray keeps under HOME; if HOME is not writable, it lives in this process."""
    # RAY_AUTH_MODE stays as it is: Ray caches it at import, and setting it later splits driver and cluster.
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
