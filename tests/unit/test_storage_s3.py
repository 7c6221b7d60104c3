"""Files of a data set in an S3 store: a real server on loopback, and one that misbehaves."""

import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator

import loopback
import pytest
from storage_setup import SECRET, SHARD, fetch, list_cache, make_settings

from so3krates_dist.data import storage
from so3krates_dist.data.storage import open_storage
from so3krates_dist.errors import DataError

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def aws(monkeypatch, tmp_path) -> None:
    """Settings of the AWS tools that lead to nobody."""
    pytest.importorskip("s3fs")
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(aws, monkeypatch) -> Iterator[None]:
    """A real S3 server with a bucket that holds the data set, readable with credentials."""
    pytest.importorskip("moto")
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for name, content in {"a.tar": SHARD, "manifest.json": b'{"name": "x"}', "empty.json": b""}.items():
        client.put_object(Bucket="bucket", Key=f"set/{name}", Body=content)
    client.close()
    yield
    server.stop()


def test_s3_delivers(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_S3_CHUNK", 30_000)
    place = open_storage("s3://bucket/set/", make_settings(tmp_path))
    assert place.read_text("manifest.json") == '{"name": "x"}'
    assert place.read_text("empty.json") == ""
    assert fetch(place).read_bytes() == SHARD
    copy = pickle.dumps(place)
    assert SECRET.encode() not in copy
    assert pickle.loads(copy).read_text("manifest.json") == '{"name": "x"}'
    monkeypatch.setattr(storage, "_S3_CHUNK", 13)
    assert place.read_text("manifest.json") == '{"name": "x"}', "as long as one portion"


def test_s3_refuses(bucket, tmp_path):
    settings = make_settings(tmp_path)
    place = open_storage("s3://bucket/set", settings)
    with pytest.raises(
        DataError, match=r"s3://bucket/set/none.tar must exist; got NoSuchKey. Check the bucket and the path"
    ):
        fetch(place, "none.tar")
    with pytest.raises(
        DataError, match=r"s3://no-such-bucket/set/a.tar must exist; got NoSuchBucket. Check the bucket"
    ):
        fetch(open_storage("s3://no-such-bucket/set", settings))
    with pytest.raises(
        DataError, match=r"must have 200001 bytes as the manifest says; got 200000. Copy the file there again"
    ):
        fetch(place, content=SHARD + b"x")
    with pytest.raises(
        DataError, match=r"must have the sha256 .* of the manifest; got .*, twice. Copy the file there again"
    ):
        fetch(place, content=SHARD[::-1])
    assert list_cache(tmp_path) == set()


def test_s3_works_in_forked_and_fresh_processes(bucket, tmp_path):
    """Connections do not survive a fork, so each process has its own."""
    settings = make_settings(tmp_path)
    place = open_storage("s3://bucket/set", settings)
    place.read_text("manifest.json")
    code = f"import os, pickle; place = pickle.loads({pickle.dumps(place)!r})\n" + (
        "place.read_text('manifest.json')\nchild = os.fork()\n"
        "if child == 0:\n    print(place.read_text('manifest.json'), flush=True)\n    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\nprint(place.read_text('manifest.json'))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert (result.stdout, result.stderr) == ('{"name": "x"}\n' * 2, "")


def test_s3_reads_anonymously_without_credentials(aws, server, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.files["/bucket/set/a.tar"] = SHARD
    assert fetch(open_storage("s3://bucket/set", make_settings(tmp_path))).read_bytes() == SHARD


DENIED = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
BAD = b"<Error><Code>InvalidRequest</Code><Message>no</Message></Error>"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
S3_FAULTS = {
    "403": (1, lambda r, b: r.answer(403, DENIED), "must be readable with these credentials; got AccessDenied. Check AWS_P"),
    "400": (1, lambda r, b: r.answer(400, BAD), "must be readable with the AWS settings of this machine; got InvalidRequest."),
    "503": (2, lambda r, b: r.answer(503, SLOW_DOWN), r"must be delivered within 2 attempts; got SlowDown \(HTTP 503\). Look"),
    "stall before the status": (2, loopback.stall(-1), "must be delivered within 2 attempts; got no byte for 0.3 s"),
    "stall in the body": (2, loopback.stall(1000), "must be delivered within 2 attempts; got no byte for 0.3 s"),
    "cut": (2, loopback.cut(1000, with_length=True), "must be delivered within 2 attempts; got "),
}  # fmt: skip


@pytest.mark.parametrize("case", S3_FAULTS)
def test_s3_servers_that_misbehave(aws, server, tmp_path, monkeypatch, case):
    num_requests, fault, message = S3_FAULTS[case]
    settings = make_settings(tmp_path, retries=1, stall_timeout_s=0.3 if "stall" in case else 10.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.files["/bucket/set/a.tar"] = SHARD
    server.faults["/bucket/set/a.tar"] = [fault] * 9
    place = open_storage("s3://bucket/set", settings)
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        fetch(place)
    assert time.monotonic() - start < 8
    assert SECRET not in str(caught.value)
    assert len(server.requests) == num_requests
    if num_requests > 1:
        server.faults["/bucket/set/a.tar"] = [fault]
        assert fetch(place).read_bytes() == SHARD, "the second attempt does it"


def test_s3_without_a_server(aws, tmp_path):
    with pytest.raises(
        DataError, match=r"must be delivered within 2 attempts; got EndpointConnectionError. Look after"
    ):
        fetch(open_storage("s3://bucket/set", make_settings(tmp_path, retries=1)))


def test_s3_needs_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    message = (
        r"s3://bucket/set must be read with s3fs; got an installation without it. Install it with `pip install 'so3kra"
    )
    with pytest.raises(DataError, match=message):
        fetch(open_storage("s3://bucket/set", make_settings(tmp_path)))
