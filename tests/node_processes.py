"""A Ray cluster whose nodes are processes of this machine, each with an object store of its own, behind a token.

Nodes are started by cluster/start.sh. Only processes that were started here are ended.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
START_LIMIT_S = 240
"""For a node to join; seconds on an idle machine."""


def free_port() -> int:
    """One that nobody else takes meanwhile: above the ports of Ray's workers, below those that the system hands out."""
    while True:
        port = secrets.choice(range(20000, 32000))
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class NodeProcesses:
    """A head without processors, and workers with one each."""

    def __init__(
        self,
        folder: Path,
        of_head: Sequence[str] = (),
        start_params: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
        **variables: str,
    ):
        """Start the head, with more options if asked.

        `start_params`: the rayStartParams of a manifest for "head" and "worker", which become options as KubeRay makes
        them, except that ports are free ones and nothing listens beyond this machine.
        `variables`: of every node, as pods get them from Secrets.
        """
        self.folder = folder
        self.start_params = start_params
        # Short, because sockets lie in it. Each node has a folder of its own there, as machines have: nodes that shared
        # one would take away each other's copies of the working directory.
        self.temporary = Path(tempfile.mkdtemp(prefix="nodes-"))
        self.token = secrets.token_hex(16)
        (folder / "auth_token").write_text(self.token)
        self.dashboard, gcs = free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.agents: dict[str, int] = {}
        """Port of each living node's agent, which answers probes."""
        self._started = 0
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.without_token = plain | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), plain["PATH"]]),
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A killed node is missed after seconds, not after a quarter of a minute.
            "RAY_health_check_period_ms": "1000",
            **variables,
        }
        self.environment = self.without_token | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
        }
        self._of_head = [
            f"--port={gcs}",
            f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={free_port()}",
            *of_head,
        ]
        try:
            self.start_head()
            self.address = re.findall(r"ray start --address='(\S+)'", self._log("head").read_text())[0]
        except BaseException:
            self.stop()
            raise

    def start_head(self) -> None:
        """For the first time, or again under its old address."""
        # A new pod finds nothing of the one before. With its folder Ray would know the address that ran last, and take
        # workers that name it for a head which is still there.
        shutil.rmtree(self.temporary / "head", ignore_errors=True)
        self._start("head", "head", *self._of_head)
        self._wait_until_joined("head")

    def add_workers(self, count: int) -> None:
        """Start them side by side, and wait until all have joined."""
        names = [f"worker-{self._started + index}" for index in range(count)]
        for name in names:
            self._start(name, "worker", self.address, "--num-cpus=1")
        for name in names:
            self._wait_until_joined(name)

    def lose_a_worker(self) -> None:
        """A worker is gone from one moment to the next; another one joins."""
        self.kill(next(name for name in self.processes if name != "head"))
        self.add_workers(1)

    def _start(self, name: str, *words: str) -> None:
        self._started += 1
        self.agents[name] = free_port()
        log = self._log(name)
        here = {"dashboard-agent-listen-port": str(self.agents[name]), "metrics-export-port": str(free_port())}
        asked = dict(self.start_params.get(words[0], {}))
        if "dashboard-host" in asked:
            here["dashboard-host"] = "127.0.0.1"
        unknown = [option for option in asked if option.endswith("-port") and option not in here]
        assert not unknown, f"{unknown}: of these every node here needs its own"
        options = [f"--{option}={value}" for option, value in (asked | here).items()]
        options += [f"--temp-dir={self.temporary / name}", "--object-store-memory=100000000", "--block"]
        with log.open("wb") as stream:
            self.processes[name] = subprocess.Popen(
                [REPOSITORY / "cluster" / "start.sh", *words, *options],
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _wait_until_joined(self, name: str) -> None:
        log, deadline = self._log(name), time.monotonic() + START_LIMIT_S
        while "Ray runtime started" not in log.read_text():
            assert self.processes[name].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def run_hook(self, name: str, hook: Sequence[str]) -> str:
        """Run a pod's preStop command for that node; its id.

        In a pod `ray drain-node` means the only node there is. Here all share an address, so it is told which.
        """
        node = self._python(
            "print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] and sys.argv[1] in n['RayletSocketName']])",
            str(self.temporary / name),
        )
        assert len(node.split()) == 1, node
        done = subprocess.run(
            [*hook, f"--node-id={node}"],
            env=self.environment | {"RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return node

    def why_it_went(self, node: str) -> str:
        """What Ray says of the end of the node with that id; "" while it is there."""
        code = "print(*[n['DeathReasonMessage'] for n in ray.nodes() if n['NodeID'] == sys.argv[1] and not n['Alive']])"
        return self._python(code, node)

    def _python(self, code: str, *words: str) -> str:
        """What the code prints as a driver of the cluster."""
        start = "import sys, ray; ray.init(log_to_driver=False, logging_level='ERROR'); "
        done = subprocess.run(
            [sys.executable, "-c", start + code, *words],
            env=self.environment | {"RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def take_away(self, name: str, hook: Sequence[str] = ()) -> None:
        """End a node as Kubernetes ends a pod that may take its time, after its hook; returns when it is gone."""
        if hook:
            self.run_hook(name, hook)
        self.agents.pop(name)
        process = self.processes.pop(name)
        process.terminate()
        process.wait()

    def kill(self, name: str) -> None:
        """End a node as a machine ends: all of it at once, and without a word."""
        process = self.processes.pop(name)
        self.agents.pop(name)
        with suppress(psutil.NoSuchProcess):
            tree = psutil.Process(process.pid)
            for part in [*tree.children(recursive=True), tree]:
                with suppress(psutil.NoSuchProcess):
                    part.kill()
        process.wait()

    def stop(self) -> None:
        for name in list(self.processes):
            self.kill(name)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def ask(self, path: str, token: bool = True, method: str = "GET", content: Any = None) -> Any:
        """What the dashboard answers, if anything; the HTTP status where it refuses."""
        headers = {"Authorization": f"Bearer {self.token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}{path}", headers=headers, method=method)
        if content is not None:
            request.data = json.dumps(content).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = response.read()
                return json.loads(answer) if answer else None
        except urllib.error.HTTPError as error:
            return error.code

    def ray(self, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of Ray's job line, e.g. `logs ID`."""
        command, *others = words
        return subprocess.run(
            ["ray", "job", command, f"--address=http://127.0.0.1:{self.dashboard}", *others],
            env=self.environment if token else self.without_token,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )

    def submit(self, name: str, *entry: str) -> subprocess.CompletedProcess[str]:
        """Start a job under that id, with what travels to any other cluster."""
        done = self.ray(
            "submit",
            f"--submission-id={name}",
            "--runtime-env=cluster/runtime-env.yaml",
            "--working-dir=.",
            "--no-wait",
            "--",
            *entry,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def status(self, name: str) -> str:
        return self.ask(f"/api/jobs/{name}")["status"]

    def stop_job(self, name: str) -> None:
        """What `ray job stop` asks for, without the seconds that the command takes to start."""
        assert self.ask(f"/api/jobs/{name}/stop", method="POST") == {"stopped": True}

    def logs(self, name: str) -> str:
        return self.ask(f"/api/jobs/{name}/logs")["logs"]

    def wait(self, name: str, limit_s: float) -> dict[str, Any]:
        """The job once it has ended, as the dashboard tells of it, with its `logs`."""
        deadline = time.monotonic() + limit_s
        while self.status(name) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self.logs(name)
            time.sleep(2)
        return self.ask(f"/api/jobs/{name}") | {"logs": self.logs(name)}
