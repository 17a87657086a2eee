"""k8s/models: the command of the Job that fills the claim runs, against a hub of this machine."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from manifests import K8S

FILES = {"config.json": b"{}", "original/consolidated.pth": b"the same again"}
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download asks of it."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        about = {"id": "meta-llama/Llama-3.1-8B", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
        tree = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": COMMIT} for name in FILES]
        api, files = f"/api/models/{about['id']}", f"/{about['id']}/resolve/{COMMIT}/"
        answers = {
            f"{api}/revision/main": json.dumps(about).encode(),
            f"{api}/tree/{COMMIT}": json.dumps(tree).encode(),
        }
        answers |= {files + name: content for name, content in FILES.items()}
        content = answers.get(path)
        self.send_response(404 if content is None else 200)
        for name, value in {"Content-Length": len(content or b""), "ETag": '"1"', "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_job_puts_a_model_where_the_jobs_look_for_it(hub, tmp_path):
    job = yaml.safe_load((K8S / "models" / "fill" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    command = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in container["command"]]
    command = [word.replace("/models/", f"{tmp_path}/models/") for word in command]
    environment = {name: value.replace("/tmp/", f"{tmp_path}/") for name, value in values.items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"PATH": path, "HOME": str(tmp_path), "HF_ENDPOINT": hub}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = yaml.safe_load((K8S / "jobs" / "generate" / "generate_dataset.yaml").read_text())["target"]["path"]
    folder = tmp_path / wanted.lstrip("/")
    assert (folder / "config.json").read_bytes() == FILES["config.json"] and not (folder / "original").exists()
