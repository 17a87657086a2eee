"""Runs jobs that must be refused, one after the other in one process where starting Ray or loading weights is recorded.

The process is another one, because the jobs import Ray.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

JOBS = Path(__file__).parents[1] / "jobs"
Order = tuple[str, Sequence[str], Mapping[str, str]]
"""A job's name, its arguments, and environment variables for it alone."""

_DRIVER = """
import contextlib, errno, io, json, os, runpy, sys, traceback
import fsspec, ray, s3fs, transformers
from fsspec.implementations.memory import MemoryFileSystem

class FullDisk(MemoryFileSystem):
    protocol, store, pseudo_dirs = "full", {}, [""]

    def pipe_file(self, path, value, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

fsspec.register_implementation("full", FullDisk)
started = []

def refuse(what):
    def fail(*args, **kwargs):
        started.append(what)
        raise RuntimeError(what)
    return fail

ray.init = refuse("Ray was started")
transformers.AutoModelForCausalLM.from_pretrained = refuse("weights were loaded")
outcomes = {}
unchanged = dict(os.environ)
for name, (job, arguments, environment) in json.load(sys.stdin).items():
    started.clear()
    os.environ.clear()
    os.environ.update(unchanged | environment)
    s3fs.S3FileSystem.clear_instance_cache()
    said, status = io.StringIO(), None
    sys.argv = [job, *arguments]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(job, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        except Exception:
            status = traceback.format_exc()
    outcomes[name] = {"status": status, "stderr": said.getvalue(), "started": list(started)}
print(json.dumps(outcomes))
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}


def run_jobs(orders: Mapping[str, Order]) -> dict[str, dict[str, Any]]:
    """Name -> exit status (or a traceback), standard error, and what was started although it must not be.

    `full://` is a file system without space.
    """
    content = {name: (str(JOBS / f"{job}.py"), list(words), dict(own)) for name, (job, words, own) in orders.items()}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps(content),
        capture_output=True,
        text=True,
        timeout=250,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_line(stderr: str, expected: Sequence[str]) -> None:
    """One line for the user, in which every expected part stands."""
    assert stderr.startswith("error: ") and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    for part in expected:
        assert part in stderr, stderr
