"""Jobs submitted to a head and two workers, behind a token, by the entry points and with the commands of k8s/.

Local processes stand for pods: the same entry points, hooks and probes, with configs of pocket size.
"""

import json
import re
import shlex
import time
import urllib.request

import manifests
import pytest
import yaml
from manifests import APP, CONFIG, K8S, REPOSITORY, pods
from node_processes import NodeProcesses

from introspect_ray.data.dataset import open_dataset

LIMIT_S = 400
"""Of one job; a minute on an idle machine, many more on one that others use as well."""
POCKET = {
    "generate_dataset": {
        "source": {"limit": 60},
        "items_per_shard": 6,
        "actors": {"max_size": 2, "initial_size": 2},
    },
    "evaluate_explainer": {
        "methods": ["majority", "explainer", "no_vector", "zero_vector", "swapped_vector"],
        "max_examples": 16,
        "batch_size": 2,
        "actors": {"min_size": 2, "initial_size": 2, "max_size": 2},
    },
    "rewrite_transformer": {
        "evaluation_texts": 12,
        "fit_texts": 12,
        "statistics_texts": 120,
        "texts_per_shard": 6,
        "fractions": [0.2],
        "simulators": [{"name": "exact", "kind": "exact"}],
        "lines": [
            {"name": "deleted", "kind": "deleted", "selection": "contribution"},
            {"name": "labels", "simulator": "exact", "selection": "contribution"},
        ],
        "headline": "labels",
        "bootstrap_samples": 200,
        "minimum_firings": 3,
        "target_actors": {"min_size": 1, "initial_size": 2, "max_size": 2},
        "simulator_actors": {"min_size": 1, "initial_size": 2, "max_size": 2},
    },
    "quickstart": {
        "tasks": ["activation_patching"],
        "max_examples": 16,
        "activation_patching": {"source": {"limit": 60}, "optimization": {"steps": 6, "batch_size": 8}},
        "actors": {"max_size": 2},
        "trainer": {"num_workers": 2, "cpus_per_worker": 1},
    },
}

pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("submitted")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    start_params = manifests.start_params(list(written_jobs().values()))
    nodes = NodeProcesses(tmp_path_factory.mktemp("nodes"), start_params=start_params)
    try:
        nodes.add_workers(2)
        yield nodes
    finally:
        nodes.stop()


def written_jobs():
    """The RayJobs of k8s/jobs as they are written, by name; rendering, which changes none of this, needs kubectl."""
    jobs = [yaml.safe_load(path.read_text()) for path in sorted(K8S.glob("jobs/*/rayjob.yaml"))]
    return {job["metadata"]["name"]: job for job in jobs}


def entry_point(job, folder, content):
    """A RayJob's entry point, as it stands there, with the folders of the image and the config map as they are here."""
    words = shlex.split(written_jobs()[job]["spec"]["entrypoint"])
    (config,) = [word for word in words if word.startswith(CONFIG)]
    (folder / config.removeprefix(CONFIG)).write_text(yaml.safe_dump(content))
    return [word.replace(APP, "").replace(CONFIG, f"{folder}/") for word in words]


def wait_for(condition, cluster, job):
    """Until the running job has come so far. Files are looked at often; the dashboard, which is slow, now and then."""
    deadline, asked = time.monotonic() + LIMIT_S, 0.0
    while not condition():
        if time.monotonic() - asked > 5:
            assert cluster.status(job) in ("PENDING", "RUNNING"), cluster.logs(job)
            asked = time.monotonic()
        assert asked < deadline, cluster.logs(job)
        time.sleep(0.05)


def newest_checkpoint(output):
    """Its name; "" without any."""
    return max((path.parent.name for path in output.glob("checkpoints/step_*/state.json")), default="")


def test_nothing_without_the_token(cluster):
    refused = cluster.ray("submit", "--no-wait", "--", "true", token=False)
    assert refused.returncode != 0 and "Authentication" in refused.stderr
    assert cluster.ask("/api/jobs/", token=False) == 401
    assert cluster.ask("/api/jobs/") == []


def test_probes_of_the_manifests_are_answered(cluster):
    paths = {
        (probe["path"], probe["port"])
        for _, pod in pods(list(written_jobs().values()))
        for container in pod["spec"]["containers"]
        for kind in ("startup", "liveness", "readiness")
        if (probe := container.get(f"{kind}Probe", {}).get("httpGet"))
    }
    assert paths == {("/api/healthz", 52365)}
    for agent in cluster.agents.values():
        with urllib.request.urlopen(f"http://127.0.0.1:{agent}/api/healthz", timeout=30) as response:
            assert response.status == 200


def test_the_check_is_green(cluster, folder):
    words = ["--storage", str(folder), "--trainer.num_workers", "2", "--transfer_mb", "16"]
    cluster.submit("check", "python", "cluster/check.py", *words)
    found = cluster.wait("check", LIMIT_S)
    assert found["status"] == "SUCCEEDED", found["logs"]
    for line in (
        r"nodes: 3\n",
        r"head: 0 CPUs",
        r"-> .*: [\d,]+ MB/s\n",
        rf"ok   {folder}\n",
        "all 4 jobs that were asked",
    ):
        assert re.search(line, found["logs"]), found["logs"]
    assert re.search(r"STOP train_70b_explainer \(not asked for\)\n +needs 8 processes", found["logs"])
    assert not list(folder.glob(".tmp-*"))


def test_generation_goes_on_when_a_node_is_lost(cluster, folder):
    content = {**POCKET["generate_dataset"], "output": str(folder / "dataset")}
    cluster.submit("generate", *entry_point("generate-dataset", folder, content))
    wait_for(lambda: list((folder / "dataset" / "shards").glob("shard-*")), cluster, "generate")
    cluster.lose_a_worker()
    found = cluster.wait("generate", LIMIT_S)
    assert found["status"] == "SUCCEEDED", found["logs"]
    assert re.search(r"node \S+ \w{6} \(1 CPUs\) is lost \(.+\); what ran there is tried again", found["logs"])
    assert re.search(r"^generate: .*\d+/\d+ \[", found["logs"], re.M), "progress is lines"
    dataset = open_dataset(str(folder / "dataset"))
    assert dataset.manifest.num_records > 0 and "process_died" not in str(dataset.manifest.counts)


def test_training_is_stopped_and_goes_on_when_a_node_is_lost(cluster, folder):
    content = yaml.safe_load((REPOSITORY / "jobs" / "pocket_70b.yaml").read_text())
    output = folder / "explainer"
    content |= {"datasets": [str(folder / "dataset")], "output": str(output)}
    content["trainer"]["checkpoint_every"] = 2
    content["optimization"]["steps"] = 20
    entry = entry_point("train-70b", folder, content)
    cluster.submit("train", *entry)
    wait_for(lambda: newest_checkpoint(output), cluster, "train")
    cluster.stop_job("train")
    stopped = cluster.wait("train", LIMIT_S)
    assert stopped["status"] == "STOPPED"
    assert stopped["logs"].rstrip().endswith("interrupted; the same command continues"), stopped["logs"]
    assert not (output / "explainer.json").exists()

    before = newest_checkpoint(output)
    cluster.submit("train-again", *entry)
    wait_for(lambda: newest_checkpoint(output) > before, cluster, "train-again")
    cluster.lose_a_worker()
    found = cluster.wait("train-again", LIMIT_S)
    assert found["status"] == "SUCCEEDED", found["logs"]
    assert "is lost (" in found["logs"]
    assert found["logs"].count("goes on from the checkpoint of step") == 2, found["logs"]
    assert (output / "explainer.json").exists()


def test_evaluation_goes_on_when_a_node_is_lost(cluster, folder):
    runs = [{"dataset": str(folder / "dataset"), "explainer": str(folder / "explainer")}]
    content = {**POCKET["evaluate_explainer"], "output": str(folder / "evaluation"), "runs": runs}
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(content))
    cluster.submit("evaluate", "python", "jobs/evaluate_explainer.py", "--config", str(folder / "evaluate.yaml"))
    answers = folder / "evaluation" / "answers" / "activation_patching"
    wait_for((answers / "explainer.json").exists, cluster, "evaluate")
    cluster.lose_a_worker()
    found = cluster.wait("evaluate", LIMIT_S)
    assert found["status"] == "SUCCEEDED", found["logs"]
    assert "is lost (" in found["logs"]
    assert (folder / "evaluation" / "report.html").exists()


def test_rewriting_goes_on_when_a_node_is_lost(cluster, folder):
    output = folder / "rewriting"
    content = {**POCKET["rewrite_transformer"], "output": str(output)}
    cluster.submit("rewrite", *entry_point("rewrite", folder, content))
    wait_for(lambda: list((output / "truth").glob("*")), cluster, "rewrite")
    cluster.lose_a_worker()
    found = cluster.wait("rewrite", LIMIT_S)
    assert found["status"] == "SUCCEEDED", found["logs"]
    assert "is lost (" in found["logs"]
    conditions = json.loads((output / "scores.json").read_text())["conditions"]
    assert conditions["labels @ 0.2"]["coverage"] == 1, "what the lost node was asked for was asked again"


def test_the_quickstart_runs_undisturbed_on_two_nodes(cluster, folder):
    content = {**POCKET["quickstart"], "output": str(folder / "quickstart")}
    cluster.submit("quickstart", *entry_point("quickstart", folder, content))
    found = cluster.wait("quickstart", 2 * LIMIT_S)
    assert found["status"] == "SUCCEEDED", found["logs"]
    assert (folder / "quickstart" / "evaluation" / "report.html").exists()
    assert "is lost" not in found["logs"]


def test_pods_that_are_taken_away_let_go_of_their_nodes(cluster):
    """Every preStop command of k8s/, as it stands there, for a worker: drained, it leaves as nothing runs there."""
    documents = [yaml.safe_load((K8S / "serving" / "rayservice.yaml").read_text()), *written_jobs().values()]
    hooks = manifests.hooks(documents)
    assert len(hooks) == 2
    for hook in hooks:
        (said,) = [word.partition("=")[2] for word in hook if word.startswith("--reason-message")]
        cluster.add_workers(1)
        name = list(cluster.processes)[-1]
        node = cluster.run_hook(name, hook)
        deadline = time.monotonic() + LIMIT_S
        while (why := cluster.why_it_went(node)) == "":
            assert time.monotonic() < deadline, "the node does not go"
        assert why == said
        cluster.take_away(name)
