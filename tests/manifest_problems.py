"""What is wrong with Kubernetes documents of k8s/: by the schemas, and by what no schema knows."""

import re
from collections.abc import Sequence

import yaml
from manifest_schemas import Document, schema_problems
from manifests import amount, entry_config, groups, made_secrets, of_kind, pods, ray_clusters
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import start
from serve_configs import serve_problems, served_replicas, service_config

from introspect_ray.errors import UserError

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
"""The definition takes any text here."""
RAY_CONTAINERS = ("ray-head", "ray-worker")
AGENT = {"path": "/api/healthz", "port": 52365}
"""What Ray's agent answers on each node."""
PROXY = {"path": "/-/healthz", "port": 8000}
"""What Serve's proxy answers where it takes requests; only such pods should get any."""


def problems(documents: Sequence[Document], whole: bool = True) -> list[str]:
    """Everything that is wrong; `whole` if the documents must bring all that they name."""
    found = [line for document in documents for line in schema_problems(document)]
    if found:
        return found
    found += [
        line for document in documents if document["kind"] == "RayJob" for line in job_problems(document, documents)
    ]
    for name, document in of_kind(documents, "RayService").items():
        found += [f"RayService {name}: {line}" for line in service_problems(document["spec"])]
    for name, spec in ray_clusters(documents):
        found += [f"{name}: {line}" for line in cluster_problems(spec)]
    for name, pod in pods(documents):
        found += [f"{name}: {line}" for line in pod_problems(pod)]
    return found + (reference_problems(documents) if whole else [])


def cluster_problems(cluster: Document) -> list[str]:
    found = []
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("authOptions.mode is not token: whoever reaches the dashboard runs code")
    secret = cluster.get("authOptions", {}).get("secretName")
    if "auth_token=" not in made_secrets().get(secret, ""):
        found.append(f"secret {secret} with the key auth_token is not made by k8s/secrets.sh")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("the head has processors for actors")
    password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}).get("valueFrom", {})
    if password and not has_key(password["secretKeyRef"]):
        found.append(f"secret {password['secretKeyRef']} is not made by k8s/secrets.sh")
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
            asked = container["name"] == "ray-worker" and any(port["name"] == "serve" for port in container["ports"])
            for kind in ("startup", "liveness", "readiness"):
                wanted = PROXY if kind == "readiness" and asked else AGENT
                if {key: container.get(f"{kind}Probe", {}).get("httpGet", {}).get(key) for key in wanted} != wanted:
                    found.append(f"container {container['name']} lacks a {kind} probe of {wanted['path']}")
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


def service_problems(spec: Document) -> list[str]:
    """A RayService's text, and whether its replicas have room and its upgrades leave no gap."""
    found = serve_problems(spec["serveConfigV2"])
    if found:
        return found
    if spec.get("upgradeStrategy", {}).get("type") != "NewCluster":
        found.append("upgradeStrategy.type is not NewCluster: an upgrade ends what is there first")
    content = yaml.safe_load(spec["serveConfigV2"])
    if content["http_options"] | {"host": "0.0.0.0", "port": PROXY["port"]} != content["http_options"]:
        found.append(f"http_options are {content['http_options']}: pods are asked at 0.0.0.0:{PROXY['port']}")
    for group in groups(spec["rayClusterConfig"]):
        ports = group["template"]["spec"]["containers"][0]["ports"]
        if {"name": "serve", "containerPort": PROXY["port"]} not in ports:
            found.append(f"group {group.get('groupName', 'head')} has no port serve: there would be no Service")
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    replicas = served_replicas(service_config(spec["serveConfigV2"]))
    for least, nodes in (("min_replicas", group["minReplicas"]), ("max_replicas", group["maxReplicas"])):
        for kind, resource in (("num_cpus", "cpu"), ("num_gpus", "nvidia.com/gpu")):
            wanted = sum(getattr(one, least) * getattr(one, kind) for one in replicas.values())
            if wanted > nodes * amount(limits[resource]):
                found.append(f"{least} of all deployments want {wanted:g} {resource}, {nodes} nodes have less")
    (application,) = content["applications"]
    apart = {one["name"] for one in application.get("deployments", []) if one.get("max_replicas_per_node") == 1}
    crowded = [name for name in apart & replicas.keys() if replicas[name].surge_percent]
    found += [f"an update of {name} waits for nodes that are taken" for name in crowded]
    found += [f"{name} may have all its replicas on one node" for name in replicas.keys() - apart]
    found += [f"there is no deployment {name}" for name in apart - replicas.keys()]
    if any(one.min_replicas < 2 for one in replicas.values()):
        found.append("a deployment may have a single replica, which takes its requests with it")
    return found


def reference_problems(documents: Sequence[Document]) -> list[str]:
    """Names that nothing answers to."""
    found = []
    kinds = {
        kind: of_kind(documents, kind)
        for kind in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount", "PriorityClass")
    }
    labels = [pod["metadata"]["labels"] for _, pod in pods(documents)]
    claims = {
        f"StatefulSet {name}": document["spec"]["volumeClaimTemplates"]
        for name, document in of_kind(documents, "StatefulSet").items()
    }

    def want(name: str, kind: str, wanted: str | None) -> None:
        if wanted is not None and wanted not in kinds[kind]:
            found.append(f"{name}: {kind} {wanted} is not there")

    for name, pod in pods(documents):
        spec = pod["spec"]
        want(name, "ServiceAccount", spec.get("serviceAccountName"))
        want(name, "PriorityClass", spec.get("priorityClassName"))
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        claimed = {claim["metadata"]["name"] for claim in claims.get(name, [])}
        for volume in volumes.values():
            want(name, "ConfigMap", volume.get("configMap", {}).get("name"))
            want(name, "PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName"))
        for container in spec["containers"]:
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            found += [f"{name}: volume {mount} is not there" for mount in mounts - volumes.keys() - claimed]
            sources = [entry.get("secretRef") for entry in container.get("envFrom", [])]
            sources += [entry.get("valueFrom", {}).get("secretKeyRef") for entry in container.get("env", [])]
            for source in filter(None, sources):
                if source["name"] not in made_secrets():
                    found.append(f"{name}: secret {source['name']} is not made by k8s/secrets.sh")
                elif not has_key(source):
                    found.append(f"{name}: secret {source['name']} has no key {source['key']}")
    for name, document in of_kind(documents, "NetworkPolicy").items():
        selector = document["spec"]["podSelector"].get("matchLabels", {})
        if selector.get("app.kubernetes.io/component") == "submitter" and not of_kind(documents, "RayJob"):
            continue  # k8s/base is for all
        if not any(selector.items() <= one.items() for one in labels):
            found.append(f"NetworkPolicy {name} selects no pod")
    return found + budget_problems(documents)


def has_key(source: Document) -> bool:
    """Whether k8s/secrets.sh makes the secret with the key that is asked for, if one is."""
    made = made_secrets().get(source["name"], "")
    return bool(made) and ("key" not in source or f"--from-literal={source['key']}=" in made)


def budget_problems(documents: Sequence[Document]) -> list[str]:
    """Kubernetes knows no wanted number of pods that an operator owns, so budgets must say it: all they select.

    Of the workers of a service, one may go at a time.
    """
    found = []
    for name, budget in of_kind(documents, "PodDisruptionBudget").items():
        selector = budget["spec"]["selector"]["matchLabels"]
        selected = sum(
            group.get("replicas", 1)
            for _, cluster in ray_clusters(documents)
            for group in groups(cluster)
            if selector.items() <= group["template"]["metadata"]["labels"].items()
        )
        spare = 1 if name == "serving-workers" else 0
        if budget["spec"].get("minAvailable") != selected - spare or selected <= spare:
            found.append(f"PodDisruptionBudget {name} keeps {budget['spec'].get('minAvailable')} of {selected} pods")
    return found
