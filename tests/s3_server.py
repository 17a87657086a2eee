"""A real S3-speaking server on loopback (moto's), and keys with which it may be asked."""

import json
import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

_READ_ONLY = {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"}


def s3_environment(endpoint: str, key: str = "everything", secret: str = "allowed") -> dict[str, str]:
    """What a user's environment says about S3."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }


@contextmanager
def using(environment: dict[str, str]) -> Iterator[pytest.MonkeyPatch]:
    """These variables are set inside the block; s3fs forgets the connections that it made in another environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield patch
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """A server with one empty bucket, its URL. Inside the block the environment has keys that may do everything."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with using(s3_environment(f"http://{host}:{port}")):
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"http://{host}:{port}"
    running.stop()


@contextmanager
def reader(server: str) -> Iterator[dict[str, str]]:
    """The environment of a user who may list and read; inside the block the server checks the keys of every request."""
    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [_READ_ONLY]})
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    before = _check_requests(server, "0")
    try:
        yield s3_environment(server, key["AccessKeyId"], key["SecretAccessKey"])
    finally:
        _check_requests(server, before)
        iam.delete_user_policy(UserName="reader", PolicyName="read")
        iam.delete_access_key(UserName="reader", AccessKeyId=key["AccessKeyId"])
        iam.delete_user(UserName="reader")


def closed_port() -> int:
    """A port of this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_requests(server: str, after: str) -> str:
    """Let the server check keys after so many more requests; what was set before."""
    request = urllib.request.Request(f"{server}/moto-api/reset-auth", after.encode(), {"Content-Type": "text/plain"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read())["PREVIOUS_INITIAL_NO_AUTH_ACTION_COUNT"]
