"""Every overlay is rendered and checked, and mistakes that are planted are found."""

import copy
import json
import re
from collections import Counter
from pathlib import Path

import manifests
import pytest
import yaml
from manifest_problems import problems
from manifests import K8S, REPOSITORY, pods, ray_clusters, render
from ray._private import ray_constants
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount
from ray.scripts.scripts import cli

import introspect_ray.presets
from introspect_ray.config import TrainConfig

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
BEFORE = ("base", "models", "models/fill")
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))

pytestmark = pytest.mark.skipif(manifests.kustomize() is None, reason="no kubectl with kustomize 4 or newer on PATH")


@pytest.fixture(scope="module")
def rendered():
    """Each overlay with what is applied before it."""
    before = [document for name in BEFORE for document in render(K8S / name)]
    return {name: [*copy.deepcopy(before), *render(K8S / "overlays" / name)] for name in OVERLAYS}


def test_there_is_an_overlay_for_each_use():
    assert {"try-out", "generate-gpu", "rewrite-gpu", "train-70b", "train-70b-kueue", "serving"} <= set(OVERLAYS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_right(rendered, name):
    assert problems(rendered[name]) == []


def test_all_documents_are_in_the_namespace_or_above(rendered):
    above = {"Namespace", "PriorityClass"}
    for documents in rendered.values():
        found = {document["metadata"].get("namespace") for document in documents if document["kind"] not in above}
        assert found == {"introspect"}


def test_what_is_deleted_with_an_overlay_is_its_own():
    for name in OVERLAYS:
        found = {(document["kind"], document["metadata"]["name"]) for document in render(K8S / "overlays" / name)}
        shared = {(one["kind"], one["metadata"]["name"]) for folder in BEFORE for one in render(K8S / folder)}
        assert not found & shared, name


def test_base_brings_no_workload():
    assert not {document["kind"] for document in render(K8S / "base")} & {"RayCluster", "RayJob", "Pod", "Secret"}


def test_no_secret_is_in_any_file(rendered):
    assert all(document["kind"] != "Secret" for documents in rendered.values() for document in documents)
    assert set(manifests.made_secrets()) == {
        "introspect-ray-token",
        "introspect-serving-token",
        "introspect-redis",
        "introspect-credentials",
    }


def test_clusters_shrink_to_no_workers_where_they_are_autoscaled(rendered):
    shared = dict(ray_clusters(rendered["try-out"]))["RayCluster introspect"]
    generation = dict(ray_clusters(rendered["generate-gpu"]))["RayJob generate-dataset"]
    rewriting = dict(ray_clusters(rendered["rewrite-gpu"]))["RayJob rewrite"]
    for cluster in (shared, generation, rewriting):
        assert all(group["minReplicas"] == group["replicas"] == 0 for group in cluster["workerGroupSpecs"])
        assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    for cluster in (generation, rewriting):
        labels = [group["labels"]["ray.io/market-type"] for group in cluster["workerGroupSpecs"]]
        assert labels == ["spot", "on-demand"]


@pytest.mark.parametrize(("overlay", "job"), [("generate-gpu", "generate-dataset"), ("rewrite-gpu", "rewrite")])
def test_the_autoscaler_takes_spot_nodes_first(rendered, overlay, job):
    """By Ray's own scheduler. Groups that fit alike take turns, so a run of two nodes or more has the one on demand."""
    cluster = dict(ray_clusters(rendered[overlay]))[f"RayJob {job}"]
    types = {
        group["groupName"]: NodeTypeConfig(
            name=group["groupName"],
            min_worker_nodes=0,
            max_worker_nodes=group["maxReplicas"],
            resources={"CPU": 7, "GPU": 1},
            labels=group["labels"],
        )
        for group in cluster["workerGroupSpecs"]
    }

    def launched(count):
        asked = ResourceRequestByCount(request=ResourceRequestUtil.make({"GPU": 1, "CPU": 4}), count=count)
        request = SchedulingRequest(
            disable_launch_config_check=True, node_type_configs=types, resource_requests=[asked]
        )
        reply = ResourceDemandScheduler(event_logger=None).schedule(request)
        return {one.instance_type: one.count for one in reply.to_launch}

    assert launched(1) == {"gpu-spot": 1}
    assert launched(8) == {"gpu-spot": 7, "gpu-on-demand": 1}
    assert launched(17) == {"gpu-spot": 16, "gpu-on-demand": 1}


def test_nodes_are_chosen_by_labels_that_the_guide_tells_of(rendered):
    """Labels that only nodes which are there already carry would keep groups from growing from nothing."""
    guide = (REPOSITORY / "docs" / "operations.md").read_text()
    chosen = {
        f"{name}: {value}"
        for documents in rendered.values()
        for _, pod in pods(documents)
        for name, value in pod["spec"].get("nodeSelector", {}).items()
    }
    assert chosen and all(one.startswith("introspect-ray/") and f"`{one}`" in guide for one in chosen), chosen


def test_pods_that_share_a_claim_of_one_node_are_on_it(rendered):
    for documents in rendered.values():
        claims = manifests.of_kind(documents, "PersistentVolumeClaim")
        for name, pod in pods(documents):
            for volume in pod["spec"].get("volumes", []):
                claim = claims.get(volume.get("persistentVolumeClaim", {}).get("claimName"))
                if claim is not None and claim["spec"]["accessModes"] == ["ReadWriteOnce"]:
                    (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
                    assert term["topologyKey"] == "kubernetes.io/hostname", name
                    assert term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), name


def test_the_guide_says_what_trying_out_asks_for(rendered):
    asked = Counter()
    for name, pod in pods(rendered["try-out"]):
        copies = {"RayJob quickstart cpu": 2, "RayCluster introspect cpu": 0, "Job fill-models": 0}.get(name, 1)
        for container in pod["spec"]["containers"]:
            asked["memory"] += copies * manifests.amount(container["resources"]["requests"]["memory"])
    asked["memory"] += manifests.amount(
        manifests.of_kind(rendered["try-out"], "RayCluster")["introspect"]["spec"]["autoscalerOptions"]["resources"][
            "requests"
        ]["memory"]
    )
    guide = (REPOSITORY / "docs" / "operations.md").read_text()
    assert f"{asked['memory'] / 2**30:g} GiB of memory" in guide


def test_training_has_all_its_gpus_or_none(rendered):
    for name in ("train-70b", "train-70b-kueue"):
        job = manifests.of_kind(rendered[name], "RayJob")["train-70b"]
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        container = group["template"]["spec"]["containers"][0]
        config = manifests.entry_config(job, rendered[name])
        assert isinstance(config, introspect_ray.presets.Train70BConfig | TrainConfig)
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert config.trainer.num_workers == group["replicas"] * gpus
        assert config.trainer.cpus_per_worker * gpus <= int(container["resources"]["limits"]["cpu"])
        assert "://" in config.output, "a retry is a new cluster, which must find what the last one left"
    queued = manifests.of_kind(rendered["train-70b-kueue"], "RayJob")["train-70b"]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] and queued["spec"]["suspend"]
    assert queued["spec"]["shutdownAfterJobFinishes"] and not queued["spec"]["rayClusterSpec"].get(
        "enableInTreeAutoscaling"
    )


@pytest.mark.parametrize(
    ("overlay", "name", "pools"),
    [
        ("generate-gpu", "generate-dataset", ["actors"]),
        ("rewrite-gpu", "rewrite", ["simulator_actors", "target_actors"]),
    ],
)
def test_actors_fit_their_nodes(rendered, overlay, name, pools):
    """One actor per node, and a place for each of the largest pool."""
    documents = rendered[overlay]
    job = manifests.of_kind(documents, "RayJob")[name]
    config = manifests.entry_config(job, documents)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    actors = [getattr(config, pool) for pool in pools]
    assert max(one.max_size for one in actors) == sum(group["maxReplicas"] for group in groups)
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for one in actors:
            assert one.num_gpus == int(limits["nvidia.com/gpu"])
            assert one.num_cpus <= int(limits["cpu"])


def test_the_queue_of_the_example_admits_the_training(rendered):
    """All pods that Kueue counts, with each of their resources, fit into its quota; names lead from job to quota."""
    queue = render(K8S / "kueue")
    assert problems(queue, whole=False) == []
    job = manifests.of_kind(rendered["train-70b-kueue"], "RayJob")["train-70b"]
    labels = job["metadata"]["labels"]
    local = manifests.of_kind(queue, "LocalQueue")[labels["kueue.x-k8s.io/queue-name"]]
    assert local["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert labels["kueue.x-k8s.io/priority-class"] in manifests.of_kind(queue, "WorkloadPriorityClass")
    spec = manifests.of_kind(queue, "ClusterQueue")[local["spec"]["clusterQueue"]]["spec"]
    assert spec["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": job["metadata"]["namespace"]}
    (group,) = spec["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] in manifests.of_kind(queue, "ResourceFlavor")
    quota = {resource["name"]: manifests.amount(resource["nominalQuota"]) for resource in flavor["resources"]}
    assert set(quota) == set(group["coveredResources"])
    asked = Counter()
    for name, pod in pods([job]):
        groups = {
            f"RayJob train-70b {one['groupName']}": one for one in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        }
        copies = groups.get(name, {}).get("replicas", 1)
        for container in pod["spec"]["containers"]:
            for resource, wanted in container["resources"]["requests"].items():
                asked[resource] += copies * manifests.amount(wanted)
    assert set(asked) == set(quota) and all(asked[name] <= quota[name] for name in asked), (asked, quota)


def test_hooks_are_commands_that_ray_has(rendered):
    """And what they leave running has as long as they say, whichever way SIGTERM takes to Ray."""
    going = [
        (pod["spec"], container)
        for documents in rendered.values()
        for _, pod in pods(documents)
        for container in pod["spec"]["containers"]
        if "lifecycle" in container
    ]
    assert going
    assert hasattr(ray_constants, DRAIN_VARIABLE)
    for spec, container in going:
        ray, command, *arguments = container["lifecycle"]["preStop"]["exec"]["command"]
        assert ray == "ray"
        found = cli.commands[command].make_context(command, arguments).params
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment[DRAIN_VARIABLE] == str(found["deadline_remaining_seconds"])
        assert found["deadline_remaining_seconds"] < spec["terminationGracePeriodSeconds"]


PLANTED = {
    "a misspelt field": (
        lambda job: job["spec"].update(shutdownAfterJobFinish=True),
        "'shutdownAfterJobFinish' was unexpected",
    ),
    "a misspelt field of a container": (
        lambda job: _container(job).update(imagee="x"),
        "'imagee' was unexpected",
    ),
    "a wrong type": (
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "0 is not of type 'string'",
    ),
    "a wrong quantity": (lambda job: _container(job)["resources"]["limits"].update(memory="8 GB"), "'8 GB'"),
    "a missing secret": (
        lambda job: _container(job)["envFrom"].append({"secretRef": {"name": "hub"}}),
        "secret hub is not made by k8s/secrets.sh",
    ),
    "a missing token": (
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(secretName="token"),
        "secret token with the key auth_token is not made",
    ),
    "no authentication": (
        lambda job: job["spec"]["rayClusterSpec"].pop("authOptions"),
        "authOptions.mode is not token",
    ),
    "a secret written down": (
        lambda job: _container(job)["env"].append({"name": "HF_TOKEN", "value": "hf_0"}),
        "holds HF_TOKEN itself",
    ),
    "a submission mode that is none": (
        lambda job: job["spec"].update(submissionMode="K8sMode"),
        "submissionMode is K8sMode",
    ),
    "an option that ray start lacks": (
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpu": "0"}),
        "ray start has no --num-cpu",
    ),
    "a job that is not there": (lambda job: _entry(job, "/app/jobs/generate.py"), "No such file"),
    "a flag that the job lacks": (lambda job: _entry(job, "--config", "--confg"), "not known"),
    "a runtime environment that Ray does not know": (
        lambda job: job["spec"].update(runtimeEnvYAML="env_var: {A: b}"),
        "runtimeEnvYAML has env_var",
    ),
    "a volume that is not there": (
        lambda job: _container(job)["volumeMounts"].append({"name": "data", "mountPath": "/data"}),
        "volume data is not there",
    ),
    "a service account that is not there": (
        lambda job: _pod(job)["spec"].update(serviceAccountName="ray"),
        "ServiceAccount ray is not there",
    ),
    "a pod that may be root": (lambda job: _pod(job)["spec"].pop("securityContext"), "may run as root"),
    "a head with processors": (
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": "4"}),
        "the head has processors for actors",
    ),
    "autoscaling turned off": (
        lambda job: job["spec"]["rayClusterSpec"].pop("enableInTreeAutoscaling"),
        "autoscaler v2 is not on",
    ),
}


def _pod(job):
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]


def _container(job):
    return _pod(job)["spec"]["containers"][0]


def _entry(job, *words):
    old, new = ("/app/jobs/generate_dataset.py", words[0]) if len(words) == 1 else words
    job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace(old, new)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(rendered, name):
    plant, expected = PLANTED[name]
    documents = copy.deepcopy(rendered["generate-gpu"])
    plant(manifests.of_kind(documents, "RayJob")["generate-dataset"])
    assert any(expected in line for line in problems(documents)), problems(documents)


def _serve(service, old, new):
    text = service["spec"]["serveConfigV2"]
    assert old in text
    service["spec"]["serveConfigV2"] = text.replace(old, new)


def _workers(service):
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


PLANTED_IN_SERVING = {
    "a key that Serve would drop": (
        lambda service: _serve(service, "route_prefix:", "route_prefx:"),
        "applications.route_prefx is not known to Serve",
    ),
    "a key that the service lacks": (
        lambda service: _serve(service, "explainer_replicas:", "explainer_replica:"),
        "explainer_replica: Extra inputs are not permitted",
    ),
    "an application that is not there": (
        lambda service: _serve(service, ":build", ":builds"),
        ":builds is not there",
    ),
    "more GPUs than nodes have": (
        lambda service: _serve(service, "num_gpus: 0.5", "num_gpus: 1"),
        "min_replicas of all deployments want 6 nvidia.com/gpu, 3 nodes have less",
    ),
    "a deployment that is not there": (
        lambda service: _serve(service, "{name: Explainer,", "{name: Explainers,"),
        "there is no deployment Explainers",
    ),
    "an update that waits for itself": (
        lambda service: _serve(service, "surge_percent: 0", "surge_percent: 50"),
        "an update of Gateway waits for nodes that are taken",
    ),
    "a single replica": (
        lambda service: _serve(service, "min_replicas: 2", "min_replicas: 1"),
        "may have a single replica",
    ),
    "a port that pods are not asked at": (
        lambda service: _serve(service, "port: 8000", "port: 8001"),
        "pods are asked at 0.0.0.0:8000",
    ),
    "a head without the port of the Service": (
        lambda service: service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0][
            "ports"
        ].pop(2),
        "group head has no port serve",
    ),
    "an upgrade with a gap": (
        lambda service: service["spec"]["upgradeStrategy"].update(type="None"),
        "upgradeStrategy.type is not NewCluster",
    ),
    "requests for pods that are not ready for them": (
        lambda service: _workers(service)["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"].update(
            path="/api/healthz", port=52365
        ),
        "lacks a readiness probe of /-/healthz",
    ),
    "a key that the secret lacks": (
        lambda service: _workers(service)["template"]["spec"]["containers"][0]["env"][-1]["valueFrom"][
            "secretKeyRef"
        ].update(key="auth_token"),
        "secret introspect-serving-token has no key auth_token",
    ),
}


@pytest.mark.parametrize("name", PLANTED_IN_SERVING)
def test_planted_mistakes_in_serving_are_found(rendered, name):
    plant, expected = PLANTED_IN_SERVING[name]
    documents = copy.deepcopy(rendered["serving"])
    plant(manifests.of_kind(documents, "RayService")["serving"])
    assert any(expected in line for line in problems(documents)), problems(documents)


def test_planted_mistakes_in_core_kinds_are_found(rendered):
    documents = copy.deepcopy(rendered["train-70b"])
    policy = manifests.of_kind(documents, "NetworkPolicy")["dashboard-in"]
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    budget = manifests.of_kind(documents, "PodDisruptionBudget")["train-70b"]
    budget["spec"]["selector"]["matchLabels"]["introspect-ray/workload"] = "train-7b"
    assert any("'ingres' was unexpected" in line for line in problems(documents))
    download = manifests.of_kind(documents, "Job")["fill-models"]
    download["spec"]["backOffLimit"] = download["spec"].pop("backoffLimit")
    assert any("'backOffLimit' was unexpected" in line for line in problems(documents))
    download["spec"].pop("backOffLimit")
    queue = render(K8S / "kueue")
    manifests.of_kind(queue, "ClusterQueue")["introspect"]["spec"]["resourceGroups"][0]["flavor"] = []
    assert any("'flavor' was unexpected" in line for line in problems(queue, whole=False))
    policy["spec"].pop("ingres")
    assert "PodDisruptionBudget train-70b keeps 2 of 0 pods" in problems(documents)


def _opens_8000(rule):
    return any(port["port"] == 8000 for port in rule.get("ports", [{"port": 8000}]))


def test_who_reaches_the_dashboard(rendered):
    """Only the rule that is meant for it names the port or the head alone."""
    policies = manifests.of_kind(rendered["try-out"], "NetworkPolicy")
    assert policies["deny-all"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    open_to = [
        name
        for name, policy in policies.items()
        for rule in policy["spec"].get("ingress", [])
        if any(port["port"] == 8265 for port in rule.get("ports", [{"port": 8265}]))
    ]
    assert open_to == ["dashboard-in", "inside-ray"]
    serving = manifests.of_kind(rendered["serving"], "NetworkPolicy")
    asked = [name for name in serving if any(map(_opens_8000, serving[name]["spec"].get("ingress", [])))]
    assert asked == ["inside-ray", "requests-in"], "tokens travel in plain HTTP: only through a gateway with TLS"
    submitters, operator = policies["dashboard-in"]["spec"]["ingress"][0]["from"]
    assert submitters["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "submitter"}
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}, (
        "and not its neighbours"
    )
    (inside,) = policies["inside-ray"]["spec"]["ingress"]
    assert inside["from"] == [{"podSelector": policies["inside-ray"]["spec"]["podSelector"]}]
    assert all("from" in rule for policy in policies.values() for rule in policy["spec"].get("ingress", []))


def test_monitoring_looks_at_ports_and_metrics_that_exist(rendered):
    documents = render(K8S / "monitoring")
    monitor = manifests.of_kind(documents, "PodMonitor")["introspect-ray"]["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    watched = [
        pod
        for all_documents in rendered.values()
        for _, pod in pods(all_documents)
        if monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ]
    assert watched
    for pod in watched:
        assert endpoint["port"] in [port["name"] for port in pod["spec"]["containers"][0]["ports"]]
    (text,) = manifests.of_kind(documents, "ConfigMap")["introspect-dashboard"]["data"].values()
    board = json.loads(text)
    used = {
        metric
        for panel in board["panels"]
        for target in panel.get("targets", [])
        for metric in re.findall(r"\bray_[a-z_0-9]+(?={)", target["expr"])
    }
    import ray.dashboard

    modules = Path(ray.dashboard.__file__).parent / "modules"
    sources = "\n".join(
        path.read_text() for folder in ("metrics", "reporter") for path in sorted((modules / folder).rglob("*.py"))
    )
    assert len(used) > 20 and any(metric.startswith("ray_serve_") for metric in used)
    unknown = [metric for metric in used if metric not in sources and f'"{metric.removeprefix("ray_")}"' not in sources]
    assert unknown == []


def test_versions_agree_everywhere(rendered):
    constraints = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    version = re.search(r'^version = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(), re.M)[1]
    tag = f"{version}-ray{constraints['ray']}"
    images = {
        container["image"]
        for documents in rendered.values()
        for _, pod in pods(documents)
        for container in pod["spec"]["containers"]
        if container["name"] != "redis"
    }
    assert images == {f"introspect-ray:{tag}"}
    assert {spec["rayVersion"] for documents in rendered.values() for _, spec in ray_clusters(documents)} == {
        constraints["ray"]
    }
    dockerfile = (REPOSITORY / "cluster" / "Dockerfile").read_text()
    assert f"-t introspect-ray:{tag}" in dockerfile
    assert (
        "ARG PYTHON=python:3.11-" in dockerfile
        and 'requires-python = ">=3.11"' in (REPOSITORY / "pyproject.toml").read_text()
    )
    for provider in ("aws", "gcp"):
        content = yaml.safe_load((REPOSITORY / "cluster" / f"{provider}.yaml").read_text())
        assert content["docker"]["image"].endswith(f"/introspect-ray:{tag}")
        pinned = re.findall(r"([\w-]+)==(\S+)", " ".join(content["head_setup_commands"]))
        assert pinned and all(constraints[name] == found for name, found in pinned)
