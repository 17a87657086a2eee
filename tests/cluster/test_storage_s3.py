"""Datasets on S3: a real S3-speaking server on loopback, asked through s3fs, by this process and by Ray's actors."""

import os
from pathlib import Path

import boto3
import pytest
from fake_task import FakeTask, fake_config, fake_target, make_dataset
from s3_server import closed_port, reader, s3_environment, s3_server, using
from training_helpers import train_config, write_dataset

from introspect_ray.config import SourceConfig
from introspect_ray.data.cluster import connect
from introspect_ray.data.dataset import canonical_dump, open_dataset
from introspect_ray.data.generate import generate_dataset
from introspect_ray.data.inspect import inspect_dataset
from introspect_ray.data.inspection_page import write_inspection
from introspect_ray.data.manifest import MANIFEST_NAME
from introspect_ray.data.prepare import begin, prepare
from introspect_ray.data.sources import load_source
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.training.run import prepare as prepare_training

TESTS = Path(__file__).parents[1]
QUESTIONS = ["skip me", "raise 1", "nan 1", *(f"question {number}" for number in range(21))]
BUCKET = "records"


@pytest.fixture(scope="module")
def server():
    with s3_server(BUCKET) as url:
        yield url


@pytest.fixture(scope="module")
def cluster(server):  # noqa: ARG001 - the actors inherit the environment
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        with connect():
            yield


def test_a_folder_in_a_bucket_works_like_a_local_one(server):  # noqa: ARG001
    folder = Folder(f"s3://{BUCKET}/folder")
    assert (folder.names(), folder.size("a/x")) == ([], None)
    folder.write("a/x", b"old")
    folder.write("a/x", b"newer")
    assert (folder.names(), folder.size("a/x"), folder.read("a/x")) == (["a"], 5, b"newer")
    with folder.open("a/x") as file:
        file.seek(3)
        assert file.read() == b"er"
    folder.remove("a/x")
    folder.remove("a/x")
    assert folder.names() == []
    with pytest.raises(FileNotFoundError):
        folder.read("a/x")


def test_a_generated_dataset_comes_back_and_a_lost_shard_is_made_again(cluster, tmp_path):  # noqa: ARG001
    local = fake_config(tmp_path, QUESTIONS)
    make_dataset(local)
    expected = canonical_dump(open_dataset(local.output))
    config = fake_config(tmp_path, QUESTIONS, output=f"s3://{BUCKET}/generated")

    def run():
        return generate_dataset(config, lambda _: None, FakeTask(), fake_target)

    assert run().shards_written == 6
    assert canonical_dump(open_dataset(config.output)) == expected
    manifest = open_dataset(config.output).manifest
    Folder(config.output).remove(manifest.shards[2].name)
    with pytest.raises(UserError, match=r"shard-00002.parquet is missing"):
        open_dataset(config.output)
    Folder(config.output).remove(MANIFEST_NAME)
    with pytest.raises(UserError, match=r"has no dataset.json: it was not finished"):
        open_dataset(config.output)
    assert run().shards_written == 1
    assert run().shards_written == 0
    assert canonical_dump(open_dataset(config.output)) == expected
    inspection = inspect_dataset(config.output, 2, FakeTask())
    assert inspection.problems == []
    assert write_inspection(inspection, None) == f"s3://{BUCKET}/generated/inspection.html"
    assert run().shards_written == 0, "the page beside the dataset disturbs nothing"


def test_sources_are_read_from_a_bucket(server, tmp_path):  # noqa: ARG001
    config = fake_config(tmp_path, QUESTIONS)
    content = Path(config.source.path).read_bytes()
    Folder(f"s3://{BUCKET}/sources").write("questions.jsonl", content)
    there = load_source(SourceConfig(path=f"s3://{BUCKET}/sources/questions.jsonl"), "fake", ("mmlu",))
    assert there.rows == load_source(config.source, "fake", ("mmlu",)).rows


def test_training_reads_a_dataset_in_a_bucket(server, tmp_path):  # noqa: ARG001
    folder = write_dataset(tmp_path / "made")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        Folder(f"s3://{BUCKET}/training").write(str(path.relative_to(folder)), path.read_bytes())
    config = train_config(tmp_path, datasets=[f"s3://{BUCKET}/training"])
    run = prepare_training(config)
    local = prepare_training(train_config(tmp_path, datasets=[str(folder)]))
    assert (run.num_examples, run.run_key) == (24, local.run_key)
    assert canonical_dump(open_dataset(config.datasets[0])) == canonical_dump(open_dataset(str(folder)))


def one_line(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_misspelt_bucket_is_refused_and_not_created(server, tmp_path):  # noqa: ARG001
    config = fake_config(tmp_path, QUESTIONS, output="s3://recrods/new")
    prepared = prepare(config, FakeTask())
    line = one_line(lambda: begin(prepared, prepared.orders))
    assert line == "s3://recrods/new/config.json cannot be written: The specified bucket does not exist"
    assert "recrods" not in [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]
    assert "has no dataset.json" in one_line(lambda: open_dataset("s3://recrods/new"))
    source = SourceConfig(path="s3://recrods/x.jsonl")
    assert "s3://recrods/x.jsonl does not exist" in one_line(lambda: load_source(source, "fake", ("mmlu",)))


def test_no_permission_to_write(server, tmp_path):
    with reader(server) as environment, using(environment):
        prepared = prepare(fake_config(tmp_path, QUESTIONS, output=f"s3://{BUCKET}/forbidden"), FakeTask())
        line = one_line(lambda: begin(prepared, prepared.orders))
    assert line == f"s3://{BUCKET}/forbidden/config.json cannot be written: Access Denied"


def test_keys_that_the_server_does_not_know(server, tmp_path):
    config = fake_config(tmp_path, QUESTIONS, output=f"s3://{BUCKET}/new")
    source = SourceConfig(path=f"s3://{BUCKET}/questions.jsonl")
    with reader(server), using(s3_environment(server, "nobody", "nothing")):
        assert f"s3://{BUCKET}/new cannot be listed: " in one_line(lambda: prepare(config, FakeTask()))
        assert "dataset.json cannot be read: " in one_line(lambda: open_dataset(f"s3://{BUCKET}/generated"))
        assert "questions.jsonl cannot be read: " in one_line(lambda: load_source(source, "fake", ("mmlu",)))


def test_no_keys_at_all(server, tmp_path):
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    with using(s3_environment(server) | nowhere) as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        line = one_line(Folder(f"s3://{BUCKET}/new").names)
    assert line.endswith("cannot be listed: Unable to locate credentials")


def test_a_server_that_does_not_answer(server, tmp_path):  # noqa: ARG001 - the environment is put back to it
    config = fake_config(tmp_path, QUESTIONS, output=f"s3://{BUCKET}/new")
    source = SourceConfig(path=f"s3://{BUCKET}/questions.jsonl")
    with using(s3_environment(f"http://127.0.0.1:{closed_port()}")):
        line = one_line(lambda: prepare(config, FakeTask()))
        assert line.startswith(f"s3://{BUCKET}/new cannot be listed: Could not connect to the endpoint URL")
        assert "cannot be read: Could not connect" in one_line(lambda: load_source(source, "fake", ("mmlu",)))
