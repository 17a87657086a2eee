"""k8s/ as tests see it: rendered, and taken apart into clusters, pods and configs. manifest_problems.py checks them."""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import yaml
from manifest_schemas import Document

from introspect_ray import config as configs
from introspect_ray import presets
from introspect_ray.cli import parse

REPOSITORY = Path(__file__).parents[1]
K8S = REPOSITORY / "k8s"
APP, CONFIG = "/app/", "/etc/introspect/"
"""Where the image keeps jobs/ and cluster/, and where pods see their config maps."""


@cache
def kustomize() -> list[str] | None:
    """A command that renders a folder; None where there is none with kustomize 4 or newer (kubectl 1.24 says which)."""
    for command, version in (
        (["kubectl", "kustomize"], ["kubectl", "version", "--client"]),
        (["kustomize", "build"], ["kustomize", "version"]),
    ):
        if shutil.which(command[0]):
            said = subprocess.run(version, capture_output=True, text=True, check=False).stdout
            line = said.splitlines()[-1] if said else ""  # "Kustomize Version: v5.5.0", or the version alone
            found = re.search(r"^(?:Kustomize Version: )?v(\d+)\.", line)
            if found is not None and int(found[1]) >= 4:
                return command
    return None


def render(folder: Path) -> list[Document]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run([*(kustomize() or []), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return list(yaml.safe_load_all(done.stdout))


def ray_clusters(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Name and spec of every Ray cluster that would come into being."""
    for document in documents:
        if document["kind"] == "RayCluster":
            yield f"RayCluster {document['metadata']['name']}", document["spec"]
        elif document["kind"] == "RayJob":
            yield f"RayJob {document['metadata']['name']}", document["spec"]["rayClusterSpec"]
        elif document["kind"] == "RayService":
            yield f"RayService {document['metadata']['name']}", document["spec"]["rayClusterConfig"]


def groups(cluster: Document) -> list[Document]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def start_params(documents: Sequence[Document]) -> dict[str, dict[str, str]]:
    """The rayStartParams of all heads and of all workers, which must be the same everywhere."""
    found: dict[str, dict[str, str]] = {}
    for name, cluster in ray_clusters(documents):
        for group in groups(cluster):
            params = group["rayStartParams"]
            role = "worker" if "groupName" in group else "head"
            assert found.setdefault(role, params) == params, f"{name}: {params}"
    return found


def hooks(documents: Sequence[Document]) -> list[list[str]]:
    """The different preStop commands of all pods."""
    found = []
    for _, pod in pods(documents):
        for container in pod["spec"]["containers"]:
            command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            if command is not None and command not in found:
                found.append(command)
    return found


def pods(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Name and template of every pod that would come into being."""
    for name, cluster in ray_clusters(documents):
        for group in groups(cluster):
            yield f"{name} {group.get('groupName', 'head')}", group["template"]
    for document in documents:
        if document["kind"] == "RayJob":
            yield f"RayJob {document['metadata']['name']} submitter", document["spec"]["submitterPodTemplate"]
        elif document["kind"] in ("StatefulSet", "Job"):
            yield f"{document['kind']} {document['metadata']['name']}", document["spec"]["template"]


def of_kind(documents: Sequence[Document], kind: str) -> dict[str, Document]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def amount(quantity: str) -> float:
    """A quantity of Kubernetes as a number: "200m" is 0.2."""
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMGT]i)?", quantity).groups()
    return float(number) * {None: 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def made_secrets() -> dict[str, str]:
    """Secrets that k8s/secrets.sh makes, with what it makes them of."""
    text = (K8S / "secrets.sh").read_text().replace("\\\n", " ")
    return dict(re.findall(r"create secret generic (\S+)\s+(.*)", text))


def job_class(script: Path) -> type[configs.Config]:
    """The config class that a job script parses its command line into."""
    match = re.search(r"run_job\((\w+), main", script.read_text())
    assert match is not None, f"{script} is no job"
    return getattr(configs, match[1], None) or getattr(presets, match[1])


def entry_config(job: Document, documents: Sequence[Document]) -> configs.Config:
    """The config that a RayJob's entry point would run with, read as the job reads it."""
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python" and script.startswith(APP), "expected python /app/jobs/NAME.py"
    with tempfile.TemporaryDirectory() as folder:
        for name, text in mounted_files(job, documents).items():
            (Path(folder) / name).write_text(text)
        words = [word.replace(CONFIG, f"{folder}/") for word in arguments]
        return parse(job_class(REPOSITORY / script.removeprefix(APP)), "", words)


def mounted_files(job: Document, documents: Sequence[Document]) -> dict[str, str]:
    """The files that a RayJob's head finds under /etc/introspect."""
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(one["name"] for one in head["containers"][0]["volumeMounts"] if f"{one['mountPath']}/" == CONFIG)
    volume = next(one for one in head["volumes"] if one["name"] == mount)
    return of_kind(documents, "ConfigMap")[volume["configMap"]["name"]]["data"]
