"""What one node says about itself, and what it can reach. No Ray here: tasks on each node call these functions."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "safetensors",
    "pyarrow",
    "fsspec",
)
"""Those whose versions decide whether processes of one run understand each other."""
GIB = 2**30
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_TORCH = (
    "import json, torch\n"
    "works, count = torch.cuda.is_available(), torch.cuda.device_count()\n"
    "print(json.dumps({'cuda': torch.version.cuda, 'count': count, 'works': works}))"
)
_COMMAND_TIMEOUT_S = 120


@dataclass(frozen=True)
class NodeFacts:
    """One node as its own processes see it."""

    python: str
    packages: dict[str, str]
    """Version of each of `PACKAGES`; "missing" where it is not installed."""
    gpus: tuple[str, ...]
    """Names, as the driver reports them; empty without a driver."""
    gpu_memory_gib: float
    """Of the smallest GPU; 0 without one."""
    driver: str
    """Version of the NVIDIA driver; "" without one."""
    cuda_problem: str
    """Why torch cannot use the GPUs that are there; "" if it can, or if there are none."""
    disk_free_gib: float
    """Under the folder for temporary files, where training lays its examples."""
    shm_gib: float
    """Size of /dev/shm, where Ray keeps objects; 0 where there is none."""


def probe() -> NodeFacts:
    """Facts about the machine, or container, that this process runs on."""
    gpus = read_gpus(_output(_NVIDIA_SMI))
    return NodeFacts(
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        gpus=tuple(name for name, _, _ in gpus),
        gpu_memory_gib=min((memory for _, memory, _ in gpus), default=0.0),
        driver=gpus[0][2] if gpus else "",
        cuda_problem=_cuda_problem(len(gpus)) if gpus else "",
        disk_free_gib=shutil.disk_usage(tempfile.gettempdir()).free / GIB,
        shm_gib=shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0,
    )


def read_gpus(text: str) -> list[tuple[str, float, str]]:
    """Name, memory in GiB and driver version of each GPU, from nvidia-smi's lines; memory it does not tell counts 0."""
    found = []
    for line in text.splitlines():
        name, memory, driver = (part.strip() for part in line.rsplit(",", 2))
        found.append((name, float(memory) / 1024 if memory.replace(".", "", 1).isdigit() else 0.0, driver))
    return found


def _cuda_problem(num_gpus: int) -> str:
    """Asked in another process, because Ray hides GPUs from a task that reserves none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    text = _output((sys.executable, "-c", _TORCH), environment)
    if not text:
        return "torch cannot be imported"
    found = json.loads(text.splitlines()[-1])
    if found["cuda"] is None:
        return "torch is a build for CPUs"
    if not found["works"]:
        return f"torch, built for CUDA {found['cuda']}, does not work with this driver"
    return "" if found["count"] == num_gpus else f"torch sees {found['count']} of {num_gpus} GPUs"


def _output(command: tuple[str, ...], environment: dict[str, str] | None = None) -> str:
    """What a command prints; "" if it is not there, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def mark(url: str, run: str, who: str) -> None:
    """Leave a note in a folder that the others look for. Raises UserError if it cannot be written."""
    Folder(url).write(_mark(run, who), who.encode())


def see_mark(url: str, run: str, who: str) -> str:
    """Why the note of another node cannot be read here; "" if it can."""
    try:
        found = Folder(url).read(_mark(run, who))
    except (FileNotFoundError, NotADirectoryError):
        return "what another node wrote is not there: the folder is not shared"
    except UserError as error:
        return str(error)
    return "" if found == who.encode() else "what another node wrote reads differently"


def remove_mark(url: str, run: str, who: str) -> None:
    """Take the note away. Raises UserError if deleting is refused."""
    Folder(url).remove(_mark(run, who))


def _mark(run: str, who: str) -> str:
    return f"{TEMPORARY}check-{run}-{who}"


def open_model(path: str) -> str:
    """Why a model cannot be opened here; "" if its config can be read."""
    from introspect_ray.config import ModelConfig
    from introspect_ray.models.paths import check_model  # imports transformers, which takes seconds

    try:
        check_model(ModelConfig(path=path))
    except UserError as error:
        return str(error)
    return ""
