"""k8s/ as tests see it: rendered, checked against schemas, and searched for what no schema knows."""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import yaml
from manifest_schemas import Document, schema_problems
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import start

from introspect_ray import config as configs
from introspect_ray import presets
from introspect_ray.cli import parse
from introspect_ray.errors import UserError

REPOSITORY = Path(__file__).parents[1]
K8S = REPOSITORY / "k8s"
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
"""The definition takes any text here."""
RAY_CONTAINERS = ("ray-head", "ray-worker")
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


def problems(documents: Sequence[Document], whole: bool = True) -> list[str]:
    """Everything that is wrong; `whole` if the documents must bring all that they name."""
    found = [line for document in documents for line in schema_problems(document)]
    if found:
        return found
    found += [
        line for document in documents if document["kind"] == "RayJob" for line in job_problems(document, documents)
    ]
    for name, spec in ray_clusters(documents):
        found += [f"{name}: {line}" for line in cluster_problems(spec)]
    for name, pod in pods(documents):
        found += [f"{name}: {line}" for line in pod_problems(pod)]
    return found + (reference_problems(documents) if whole else [])


# What the documents are made of


def ray_clusters(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Name and spec of every Ray cluster that would come into being."""
    for document in documents:
        if document["kind"] == "RayCluster":
            yield f"RayCluster {document['metadata']['name']}", document["spec"]
        elif document["kind"] == "RayJob":
            yield f"RayJob {document['metadata']['name']}", document["spec"]["rayClusterSpec"]


def groups(cluster: Document) -> list[Document]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Name and template of every pod that would come into being."""
    for name, cluster in ray_clusters(documents):
        for group in groups(cluster):
            yield f"{name} {group.get('groupName', 'head')}", group["template"]
    for document in documents:
        if document["kind"] == "RayJob":
            yield f"RayJob {document['metadata']['name']} submitter", document["spec"]["submitterPodTemplate"]


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


# Checks that no schema makes


def cluster_problems(cluster: Document) -> list[str]:
    found = []
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("authOptions.mode is not token: whoever reaches the dashboard runs code")
    secret = cluster.get("authOptions", {}).get("secretName")
    if "auth_token=" not in made_secrets().get(secret, ""):
        found.append(f"secret {secret} with the key auth_token is not made by k8s/secrets.sh")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("the head has processors for actors")
    known = {option.lstrip("-") for parameter in start.params for option in parameter.opts}
    for group in groups(cluster):
        found += [f"ray start has no --{name}" for name in group["rayStartParams"] if name not in known]
        if group.get("minReplicas", 0) > group.get("replicas", 0) or group.get("replicas", 0) > group.get(
            "maxReplicas", 0
        ):
            found.append(f"group {group['groupName']}: replicas are not between minReplicas and maxReplicas")
    if any(group["minReplicas"] < group["maxReplicas"] for group in cluster["workerGroupSpecs"]):
        options = cluster.get("autoscalerOptions", {})
        if not cluster.get("enableInTreeAutoscaling") or options.get("version") != "v2":
            found.append("groups may grow, but autoscaler v2 is not on")
    return found


def pod_problems(pod: Document) -> list[str]:
    found, spec = [], pod["spec"]
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("the pod may run as root, or without a seccomp profile")
    if "app.kubernetes.io/component" not in pod["metadata"]["labels"]:
        found.append("no label that network policies know the pod by")
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            found.append(f"container {container['name']} may gain privileges")
        resources = container.get("resources", {})
        for kind in ("requests", "limits"):
            if not {"cpu", "memory"} <= resources.get(kind, {}).keys():
                found.append(f"container {container['name']} has no {kind} for cpu and memory")
        if container["name"] in RAY_CONTAINERS:
            probes = [container.get(f"{name}Probe") for name in ("startup", "liveness", "readiness")]
            if not all(probe and probe.get("httpGet", {}).get("path") == "/api/healthz" for probe in probes):
                found.append(f"container {container['name']} lacks a probe of /api/healthz")
        for entry in container.get("env", []):
            if re.search("TOKEN|SECRET|KEY|PASSWORD", entry["name"]) and "value" in entry:
                found.append(f"container {container['name']} holds {entry['name']} itself")
    return found


def job_problems(job: Document, documents: Sequence[Document]) -> list[str]:
    """A RayJob's texts: submission mode, runtime environment, and the entry point with its config."""
    name, spec = f"RayJob {job['metadata']['name']}", job["spec"]
    found = []
    if spec.get("submissionMode") not in SUBMISSION_MODES:
        found.append(f"{name}: submissionMode is {spec.get('submissionMode')}")
    environment = yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))
    found += [f"{name}: runtimeEnvYAML has {key}" for key in environment if key not in RuntimeEnv.known_fields]
    try:
        RuntimeEnv(**{key: value for key, value in environment.items() if key in RuntimeEnv.known_fields})
    except (TypeError, ValueError) as error:
        found.append(f"{name}: runtimeEnvYAML: {error}")
    try:
        entry_config(job, documents)
    except (UserError, OSError, AssertionError, KeyError) as error:
        found.append(f"{name}: entrypoint {spec['entrypoint']!r}: {error}")
    return found


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


def reference_problems(documents: Sequence[Document]) -> list[str]:
    """Names that nothing answers to."""
    found = []
    kinds = {
        kind: of_kind(documents, kind)
        for kind in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount", "PriorityClass")
    }
    labels = [pod["metadata"]["labels"] for _, pod in pods(documents)]

    def want(name: str, kind: str, wanted: str | None) -> None:
        if wanted is not None and wanted not in kinds[kind]:
            found.append(f"{name}: {kind} {wanted} is not there")

    for name, pod in pods(documents):
        spec = pod["spec"]
        want(name, "ServiceAccount", spec.get("serviceAccountName"))
        want(name, "PriorityClass", spec.get("priorityClassName"))
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            want(name, "ConfigMap", volume.get("configMap", {}).get("name"))
            want(name, "PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName"))
        for container in spec["containers"]:
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            found += [f"{name}: volume {mount} is not there" for mount in mounts - volumes.keys()]
            sources = [entry.get("secretRef") for entry in container.get("envFrom", [])]
            sources += [entry.get("valueFrom", {}).get("secretKeyRef") for entry in container.get("env", [])]
            for source in filter(None, sources):
                if source["name"] not in made_secrets():
                    found.append(f"{name}: secret {source['name']} is not made by k8s/secrets.sh")
    for name, document in of_kind(documents, "NetworkPolicy").items():
        selector = document["spec"]["podSelector"].get("matchLabels", {})
        if not any(selector.items() <= one.items() for one in labels):
            found.append(f"NetworkPolicy {name} selects no pod")
    return found + budget_problems(documents)


def budget_problems(documents: Sequence[Document]) -> list[str]:
    """Kubernetes knows no wanted number of pods that an operator owns, so budgets must say it: all they select."""
    found = []
    for name, budget in of_kind(documents, "PodDisruptionBudget").items():
        selector = budget["spec"]["selector"]["matchLabels"]
        selected = sum(
            group.get("replicas", 1)
            for _, cluster in ray_clusters(documents)
            for group in groups(cluster)
            if selector.items() <= group["template"]["metadata"]["labels"].items()
        )
        if budget["spec"].get("minAvailable") != selected or not selected:
            found.append(f"PodDisruptionBudget {name} keeps {budget['spec'].get('minAvailable')} of {selected} pods")
    return found
