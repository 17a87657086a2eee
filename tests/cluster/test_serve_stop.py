"""jobs/serve.py is told to stop under load: what it has taken it answers, also where Serve's variables are exported."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from introspect_ray.serving.run import CHEAPER_REQUESTS

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
TARGETS = '[{"name": "target_a", "replicas": {"num_cpus": 0.1}}]'
ARGUMENTS = ["--port", "0", "--quickstart", "null", "--targets", TARGETS, "--simulators", "[]"]
BODY = {"target": "target_a", "text": "The landmark of Fokan is the tower. " * 20}


def test_sigterm_answers_what_was_taken():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **CHEAPER_REQUESTS}
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), *ARGUMENTS]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        said = []
        for line in job.stdout:
            said.append(line.decode())
            if "ready at " in said[-1]:
                break
        assert job.poll() is None and said, said
        url = said[-1].split("ready at ")[1].split()[0]
        found = []

        def ask():
            with httpx2.Client(base_url=url, timeout=60) as client:
                while True:
                    try:
                        answer = client.post("/v1/activations", json=BODY)
                    except httpx2.ConnectError:
                        return
                    except httpx2.TransportError as error:
                        found.append(repr(error))
                        return
                    found.append(answer.status_code)
                    if answer.status_code != 200:
                        return

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        while found.count(200) < 16:
            assert set(found) <= {200}
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        rest = job.stdout.read().decode()
    assert set(found) <= {200, 503}, found
    assert "stopping: requests under way" in rest and "not waited for" not in rest and "not answered" not in rest, rest
