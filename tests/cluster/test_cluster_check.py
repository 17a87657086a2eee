"""What would stop a job, worked out from facts that are made up; and what is said of nodes that come and go.

On node processes the check runs in test_job_submit.py.
"""

import runpy
from pathlib import Path

import pytest

from introspect_ray.config import CheckConfig
from introspect_ray.data import probe
from introspect_ray.data.nodes import changes
from introspect_ray.data.probe import PACKAGES, NodeFacts, open_model, read_gpus
from introspect_ray.errors import RunFailed
from introspect_ray.training import cluster_check
from introspect_ray.training.cluster_verdicts import Findings, Node, Transfer, needs, report, room, verdicts

H100 = "NVIDIA H100 80GB HBM3"


def facts(gpus=0, memory=79.6, driver="570.1", cuda_problem="", **versions):
    packages = dict.fromkeys(PACKAGES, "1.0") | {
        name: version for name, version in versions.items() if name != "python"
    }
    return NodeFacts(
        python=versions.get("python", "3.11.7"),
        packages=packages,
        gpus=(H100,) * gpus,
        gpu_memory_gib=memory if gpus else 0.0,
        driver=driver if gpus else "",
        cuda_problem=cuda_problem,
        disk_free_gib=100.0,
        shm_gib=16.0,
    )


def node(name="a", cpus=8.0, gpus=0.0, **of_facts):
    return Node(name, False, cpus, gpus, facts(int(gpus), **of_facts))


def of(*nodes, places=None, **config):
    return verdicts(CheckConfig.model_validate(config), Findings(nodes, places=places or {}))


def test_a_node_of_eight_gpus_runs_every_job():
    head = Node("head", True, 0, 0, facts())
    found = of(head, node(cpus=64, gpus=8), places={"s3://bucket": ""})
    assert set(found) == set(needs(CheckConfig())) and not any(found.values())


def test_processes_are_counted_node_by_node():
    """Seven CPUs on two nodes are no room for four processes of two."""
    config = {"trainer": {"num_workers": 4, "cpus_per_worker": 2}}
    stopped = of(node("a", 3), node("b", 4), **config)["train_explainer"]
    assert stopped == ["needs 4 processes with 2 CPUs and 0 GPUs each, the nodes that are there have room for 3"]
    assert of(node("a", 4), node("b", 4), **config)["train_explainer"] == []
    shrinking = {"trainer": {"num_workers": 4, "min_workers": 3, "cpus_per_worker": 2}}
    assert of(node("a", 3), node("b", 4), **shrinking)["train_explainer"] == []


def test_fractions_of_gpus_are_shared():
    need = needs(CheckConfig.model_validate({"actors": {"num_gpus": 0.1, "num_cpus": 0.1, "min_size": 1}}))
    assert room(need["generate_dataset"], [node(cpus=1, gpus=1)]) == 10


def test_small_gpus_stop_the_large_jobs_alone():
    found = of(node(cpus=64, gpus=8, memory=44.5))
    assert "needs 8 processes with 4 CPUs and 1 GPUs of 77 GiB each" in found["train_70b_explainer"][0]
    assert found["train_explainer"] == []


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"cuda_problem": "torch is a build for CPUs"}, "node a: torch is a build for CPUs"),
        ({"torch": "2.0", "python": "3.11.7"}, "torch is 2.0 on a, 1.0 on b"),
        ({"python": "3.12.1"}, "python is 3.12.1 on a, 3.11.7 on b"),
        ({"peft": "missing"}, "peft is missing on a, 1.0 on b"),
    ],
)
def test_what_nodes_say_stops_jobs(broken, reason):
    found = of(node("a", 64, 8, **broken), node("b", 64, 8))
    assert reason in found["train_70b_explainer"]
    assert (reason in found["generate_dataset"]) == ("CPUs" not in reason), "only GPU jobs need the GPU"


def test_gpus_without_a_driver_and_nodes_without_an_answer():
    silent = Node("b", False, 8, 0, None, "No module named 'introspect_ray'")
    bare = Node("a", False, 64, 8, facts())
    found = of(bare, silent, places={"s3://bucket": "on node a: Access Denied"})
    assert "node b: No module named 'introspect_ray'" in found["generate_dataset"]
    assert "s3://bucket: on node a: Access Denied" in found["evaluate_explainer"]
    assert "node a: Ray has GPUs to give, but there is no NVIDIA driver" in found["train_8b_explainer"]
    lines = report(Findings((bare, silent), places={"s3://bucket": "on node a: Access Denied"}))
    assert "  STOP s3://bucket" in lines and "         No module named 'introspect_ray'" in lines


def test_nodes_that_do_not_reach_each_other():
    findings = Findings((node("a"), node("b")), (Transfer("a", "b", 0.0), Transfer("b", "a", 100.0)))
    assert verdicts(CheckConfig(), findings)["train_explainer"] == ["b cannot fetch from a"]
    assert "  b -> a: 100 MB/s" in report(findings)


def test_lines_of_nvidia_smi():
    assert read_gpus(f"{H100}, 81559, 570.86.15\nA, B, [N/A], 1\n") == [
        (H100, 81559 / 1024, "570.86.15"),
        ("A, B", 0.0, "1"),
    ]
    assert read_gpus("") == []


def test_marks_tell_whether_a_folder_is_shared(tmp_path):
    url = str(tmp_path)
    probe.mark(url, "run", "driver")
    assert probe.see_mark(url, "run", "driver") == ""
    assert "the folder is not shared" in probe.see_mark(str(tmp_path / "other"), "run", "driver")
    next(tmp_path.iterdir()).write_text("something else")
    assert "reads differently" in probe.see_mark(url, "run", "driver")
    probe.remove_mark(url, "run", "driver")
    assert not list(tmp_path.iterdir())


def test_models_are_opened_without_their_weights():
    assert open_model("pocket:target_a") == ""
    assert "does not exist" in open_model("/nowhere/at/all")


def test_nodes_that_come_and_go():
    def seen(alive, reason=0, message="", cpus=1.0):
        return {
            "NodeID": "abcdef99",
            "NodeManagerAddress": "10.0.0.7",
            "Alive": alive,
            "DeathReason": reason,
            "DeathReasonMessage": message,
            "Resources": {"CPU": cpus, "GPU": 2.0} if alive else {},
        }

    here = {"abcdef99": seen(True)}
    name = "node 10.0.0.7 abcdef (1 CPUs, 2 GPUs)"
    assert changes({}, here) == [f"{name} has joined"]
    assert changes(here, here) == []
    assert changes({}, {"abcdef99": seen(False)}) == [], "it was gone before anybody looked"
    assert changes(here, {"abcdef99": seen(False, 4)}) == [f"{name} has left: it was idle"]
    assert changes(here, {"abcdef99": seen(False, 2, "missed\n heartbeats")}) == [
        f"{name} is lost (missed heartbeats); what ran there is tried again"
    ]


def test_the_autoscaler_is_asked_for_the_largest_job_and_released(monkeypatch):
    asked, said = [], []
    waves = iter([[], [node(cpus=4, gpus=1)], [node(cpus=4, gpus=1)] * 2])
    monkeypatch.setattr(cluster_check, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(cluster_check, "_alive_nodes", lambda: next(waves))
    monkeypatch.setattr(cluster_check, "POLL_S", 0.0)
    trainer = {"num_workers": 2, "cpus_per_worker": 4, "gpus_per_worker": 1}
    config = CheckConfig.model_validate({"trainer": trainer, "scale_up_s": 600})
    with cluster_check._scaled_up(config, said.append):
        assert asked == [[{"CPU": 4, "GPU": 1}] * 2]
    assert asked[1:] == [[]]
    assert said == ["asked the autoscaler for 2 x {'CPU': 4.0, 'GPU': 1.0}: room for 2"]


def test_the_job_fails_for_what_was_asked_for_alone(monkeypatch, capsys):
    main = runpy.run_path(str(Path(__file__).parents[2] / "cluster" / "check.py"))["main"]
    found = {"generate_dataset": [], "train_explainer": ["no room"], "train_70b_explainer": ["no GPU"]}
    monkeypatch.setattr(cluster_check, "check_cluster", lambda *_: found)
    main(CheckConfig(jobs=("generate_dataset",)))
    assert capsys.readouterr().out == "all 1 jobs that were asked for can run here\n"
    with pytest.raises(RunFailed, match=r"^1 of 2 jobs cannot run here: train_explainer; reasons above$"):
        main(CheckConfig(jobs=("generate_dataset", "train_explainer")))
