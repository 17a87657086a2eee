"""cluster/: launcher configs pass Ray's own validation, and what scripts and images name is there."""

import copy
import logging
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from manifests import REPOSITORY
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

CLUSTER = REPOSITORY / "cluster"


@pytest.fixture(params=["aws", "gcp"])
def launcher(request):
    return yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text())


def check(content):
    validate_config(prepare_config(copy.deepcopy(content)))


def test_ray_accepts_the_launcher_configs(launcher):
    check(launcher)


@pytest.mark.parametrize("path", [("max_worker",), ("docker", "imge"), ("available_node_types", "head", "resource")])
def test_ray_refuses_planted_mistakes(launcher, path):
    place = launcher
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = {}
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        check(launcher)


def test_launchers_authenticate_and_keep_drivers_off_gpus(launcher):
    for role in ("head", "worker"):
        (start,) = [line for line in launcher[f"{role}_start_ray_commands"] if "ray start" in line]
        assert "RAY_AUTH_MODE=token" in start
    assert "--num-cpus=0" in launcher["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert "auth_token" in str(launcher["file_mounts"])
    types = launcher["available_node_types"]
    assert types[launcher["head_node_type"]]["resources"]["CPU"] == 0
    workers = {name: one for name, one in types.items() if name != launcher["head_node_type"]}
    assert all(one["min_workers"] == 0 for one in workers.values()), "no work, no machines"
    assert sum(one["max_workers"] for one in workers.values()) == launcher["max_workers"]
    assert list(workers) == ["gpu-spot", "gpu-on-demand"], "of types that would do, the first is taken"
    assert "SPOT" in str(workers["gpu-spot"]["node_config"]).upper()
    images = [re.search(r"'(?:ImageId|sourceImage)': '([^']+)'", str(one["node_config"]))[1] for one in types.values()]
    assert len(set(images)) == 1, "without one Ray takes an old one, whose driver does not know the image's CUDA"


def test_runtime_environment_is_one_that_ray_knows():
    content = yaml.safe_load((CLUSTER / "runtime-env.yaml").read_text())
    assert content.keys() <= RuntimeEnv.known_fields
    assert RuntimeEnv(**content)["env_vars"] == content["env_vars"]


def test_what_is_uploaded_is_what_jobs_need():
    """Of the tracked files; by Ray's own reading of the ignore files."""
    ignores = get_excludes_from_ignore_files(REPOSITORY, include_gitignore=True, logger=logging.getLogger())

    def exclude(path):
        return any(ignore(path) for ignore in ignores)

    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = [REPOSITORY / name for name in listed.stdout.splitlines()]
    sent = [path for path in files if not exclude(path)]
    tops = {path.relative_to(REPOSITORY).parts[0] for path in sent}
    assert tops == {".dockerignore", ".gitignore", "LICENSE", "cluster", "introspect_ray", "jobs", "pyproject.toml"}
    assert sum(path.stat().st_size for path in sent) < 20e6


def test_the_image_gets_what_its_definition_names():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)", dockerfile, re.M) for word in line.split()[:-1]]
    kept = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(kept)
    assert all((REPOSITORY / name).exists() for name in copied)
    (packages,) = re.findall(r"apt-get install --yes --no-install-recommends (.*) \\\n", dockerfile)
    assert {"openssh-client", "rsync"} <= set(packages.split()), "with which the head's container sets up new nodes"
    assert dockerfile.rindex("USER 1000") > dockerfile.rindex("RUN "), "nothing runs as root afterwards"


def test_start_script_says_what_is_missing(tmp_path):
    for arguments, expected in (
        ([], "cluster/start.sh head"),
        (["worker"], "cluster/start.sh head"),
        (["worker", "nowhere:1"], "error: no token in RAY_AUTH_TOKEN or"),
    ):
        done = subprocess.run(
            [CLUSTER / "start.sh", *arguments],
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and expected in done.stderr, done.stderr


@pytest.fixture
def fake_ray(tmp_path):
    """Runs cluster/start.sh with a `ray` that says how it was called; health checks fail for an address without it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ray").write_text(
        '#!/bin/sh\n[ "$1 $3" = "health-check nowhere:1" ] && exit 1\necho "$RAY_AUTH_MODE: $*"\n'
    )
    (folder / "ray").chmod(0o755)

    def start(*words):
        path = f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin"
        return subprocess.run(
            [CLUSTER / "start.sh", *words],
            env={"PATH": path, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    return start


def test_start_script_makes_one_token_for_its_owner_alone(fake_ray, tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    first = fake_ray("head", "--port=7000")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == (
        "token: start --head --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1 --port=7000"
    )
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    before = token.read_text()
    assert "wrote a new token" in first.stdout and before not in first.stdout
    assert "wrote a new token" not in fake_ray("head").stdout and token.read_text() == before
    worker = fake_ray("worker", "10.0.0.1:6379", "--num-gpus=8")
    assert worker.stdout.splitlines()[-1] == "token: start --address=10.0.0.1:6379 --num-gpus=8"
    nobody = fake_ray("worker", "nowhere:1")
    assert nobody.returncode == 2 and "no Ray head that takes this token answers at nowhere:1" in nobody.stderr


def test_secrets_are_made_once_and_of_what_the_environment_says(tmp_path):
    """With a `kubectl` that keeps secrets as files: their names, and what they would be made of."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "kubectl"
    command.write_text(
        '#!/bin/bash\n[ "$1 $2" = "--namespace introspect" ] || exit 3\nshift 2\n'
        f'case "$1 $2" in\n"get secret") [ -f "{tmp_path}/$3" ] ;;\n'
        f'"create secret") printf "%s\\n" "${{@:5}}" > "{tmp_path}/$4" ;;\n*) exit 3 ;;\nesac\n'
    )
    command.chmod(0o755)

    def run(**environment):
        path = f"{command.parent}:/usr/bin:/bin"
        script = REPOSITORY / "k8s" / "secrets.sh"
        done = subprocess.run([script], env={"PATH": path} | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}

    _, made = run()
    assert set(made) == {"introspect-ray-token", "introspect-serving-token", "introspect-redis"}
    tokens = {re.fullmatch(r"--from-literal=\w+=([0-9a-f]{64})\n", text)[1] for text in made.values()}
    assert len(tokens) == 3, "whoever has one has not the others"
    said, again = run(HF_TOKEN="hf_x", RAY_AUTH_TOKEN="other")
    assert "secret/introspect-ray-token is there already" in said
    assert again == made | {"introspect-credentials": "--from-literal=HF_TOKEN=hf_x\n"}
