"""The RayService of k8s/, at pocket size, deployed as KubeRay does it to nodes that are processes of this machine."""

import json
import secrets
import shutil
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import manifests
import pytest
import yaml
from control_store import control_store
from manifests import K8S
from node_processes import NodeProcesses, free_port

LIMIT_S = 400
TOKEN = secrets.token_hex(16)
APPLICATIONS = "/api/serve/applications/"
TINY = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.2, "surge_percent": 0}

pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]


def manifest():
    return yaml.safe_load((K8S / "serving" / "rayservice.yaml").read_text())


def serve_config(port, **changes):
    """The manifest's, with models of the pocket world; one proxy, because all nodes here share this machine's ports."""
    content = yaml.safe_load(manifest()["spec"]["serveConfigV2"])
    content |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (application,) = content["applications"]
    application["args"] |= {
        "targets": [{"name": "target_a", "replicas": TINY}],
        "explainers": [],
        "simulators": [{"name": "lexicon", "kind": "lexicon", "replicas": TINY | {"min_replicas": 1}}],
        "gateway": application["args"]["gateway"] | TINY,
        **changes,
    }
    names = {"TargetModel-llama-3.1-8b": "TargetModel-target_a", "Simulator-finetuned": "Simulator-lexicon"}
    application["deployments"] = [
        one | {"name": names.get(one["name"], one["name"])}
        for one in application["deployments"]
        if one["name"] != "Explainer"
    ]
    return content


class Caller:
    """Asks the service the same again and again, from two threads, without a second try."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        self.answers, self.failures = [], []

    def ask(self, path, content=None, token=TOKEN):
        """Status and answer."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    @contextmanager
    def asking(self):
        """Asks while the block runs; at its end every request must have been answered, and all alike."""
        done = threading.Event()
        before = len(self.answers)

        def run():
            while not done.is_set():
                try:
                    status, answer = self.ask("/v1/activations", {"target": "target_a", "text": "Maria lives here."})
                except OSError as error:
                    status, answer = 0, str(error)
                (self.answers if status == 200 else self.failures).append((status, answer))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not self.failures, (len(self.answers), self.failures[:3])
        assert len(self.answers) > before and len(set(self.answers)) == 1


def wait_until(condition, what):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(1)


def deploy(nodes, content):
    """Put the config where KubeRay puts it, and wait until all of it runs."""
    assert nodes.ask(APPLICATIONS, token=False, method="PUT", content=content) == 401
    assert nodes.ask(APPLICATIONS, method="PUT", content=content) is None
    (application,) = content["applications"]

    def runs():
        found = nodes.ask(APPLICATIONS)["applications"].get(application["name"])
        if found is None or (found["deployed_app_config"] or {}).get("args") != application["args"]:
            return False
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        return found["status"] == "RUNNING" and {one["status"] for one in found["deployments"].values()} == {"HEALTHY"}

    wait_until(runs, "the service does not run")


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    """Address and password of a store that was started by the manifest's command; none without redis-server."""
    if shutil.which("redis-server") is None:
        yield None
        return
    with control_store(tmp_path_factory.mktemp("redis")) as (port, password):
        yield f"127.0.0.1:{port}", password


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, redis):
    variables = {"INTROSPECT_RAY_TOKEN": TOKEN, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "30"}
    of_head = []
    if redis is not None:  # what KubeRay makes of gcsFaultToleranceOptions
        variables |= {"RAY_REDIS_ADDRESS": redis[0], "RAY_external_storage_namespace": "test"}
        variables |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        of_head = [f"--redis-password={redis[1]}"]
    start_params = manifests.start_params([manifest()])
    nodes = NodeProcesses(tmp_path_factory.mktemp("nodes"), of_head, start_params, **variables)
    try:
        nodes.add_workers(2)
        yield nodes
    finally:
        nodes.stop()


@pytest.fixture(scope="module")
def caller(cluster):
    """Of the service, which runs."""
    port = free_port()
    deploy(cluster, serve_config(port))
    return Caller(port)


def test_the_service_answers_who_has_its_token(cluster, caller):
    (probe,) = {
        group["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"]
        for group in manifest()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    assert caller.ask(probe, token=None)[0] == 200
    assert caller.ask("/v1/ready")[0] == 200
    assert caller.ask("/v1/models", token=cluster.token)[0] == 401, "Ray's token is another one"
    status, models = caller.ask("/v1/models")
    assert status == 200 and [one["name"] for one in json.loads(models)["targets"]] == ["target_a"]


def test_an_upgrade_of_the_config_drops_no_request(cluster, caller):
    content = serve_config(int(caller.url.rpartition(":")[2]), limits={"items": 3})
    items = [{"description": "words", "text": "Maria lives here."}] * 4
    request = {"simulator": "lexicon", "items": items}
    assert caller.ask("/v1/simulate", request)[0] == 200
    with caller.asking():
        deploy(cluster, content)
    assert caller.ask("/v1/simulate", request)[0] == 413


def test_a_pod_that_goes_with_notice_drops_no_request(cluster, caller):
    cluster.add_workers(1)
    going = next(name for name in cluster.processes if name != "head")
    with caller.asking():
        (hook,) = manifests.hooks([manifest()])
        cluster.take_away(going, hook)


def test_replicas_outlive_the_head(cluster, caller, redis):
    """They are the same ones that the new head's controller finds, and they answer."""
    if redis is None:
        pytest.skip("no redis-server on PATH")

    before = settled_replicas(cluster)
    cluster.kill("head")
    cluster.start_head()
    wait_until(lambda: _answers(caller), "the service does not answer")
    assert settled_replicas(cluster) == before, "they have not started again"


def settled_replicas(cluster):
    """Name and process of every replica, once all of them run: a node that went is made up for."""
    found = {}

    def settled():
        applications = cluster.ask(APPLICATIONS)["applications"].values()
        deployments = [one for application in applications for one in application["deployments"].values()]
        replicas = [replica for one in deployments for replica in one["replicas"]]
        found.update(now={replica["replica_id"]: replica.get("pid") for replica in replicas})
        states = {one["status"] for one in deployments} | {replica["state"] for replica in replicas}
        return states == {"HEALTHY", "RUNNING"}

    wait_until(settled, "not all replicas run")
    return found["now"]


def _answers(caller):
    try:
        return caller.ask("/v1/ready")[0] == 200
    except OSError:
        return False
