"""Data sets on servers: the same conformers, block by block, as from a folder, whatever the server does meanwhile."""

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import loopback
import numpy as np
import pytest
from analytic import label, make_cluster, make_morse, write_dataset
from loopback import Loopback
from training_setup import find_differences, make_settings, read_state, run_processes, train

from so3krates_dist.data import storage
from so3krates_dist.data.folder import DataFolder, open_dataset
from so3krates_dist.data.storage import StorageSettings
from so3krates_dist.errors import EXIT_DATA, EXIT_DONE, DataError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Three shards of 12, 12 and 8 conformers for training, and one for validation."""
    potential = make_morse()
    graphs = [label(make_cluster(seed, num_atoms=4 + seed % 6), potential) for seed in range(36)]
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": graphs[4:], "validation": graphs[:4]})


@pytest.fixture
def server(dataset, monkeypatch) -> Iterator[Loopback]:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    with loopback.serve() as state:
        state.add_folder(dataset)
        yield state


def limit(tmp_path: Path, **changes: float) -> StorageSettings:
    return StorageSettings(cache=tmp_path / "cache", stall_timeout_s=10, connect_timeout_s=10, retries=2, **changes)


def assert_equal(remote: DataFolder, local: DataFolder) -> None:
    """Compare every field of every conformer, and the index."""
    assert remote.manifest == local.manifest
    assert remote.manifest.fingerprint == local.manifest.fingerprint
    np.testing.assert_array_equal(remote.index.sample_atoms, local.index.sample_atoms)
    np.testing.assert_array_equal(remote.index.sample_pairs, local.index.sample_pairs)
    for split in ("train", "validation"):
        for one, two in zip(remote.iter_blocks(split), local.iter_blocks(split), strict=True):
            assert one.groups == two.groups
            assert one.columns.keys() == two.columns.keys()
            for name in one.columns:
                np.testing.assert_array_equal(one.columns[name], two.columns[name], err_msg=name)


def test_a_data_set_on_a_web_server(server, dataset, tmp_path):
    with open_dataset(dataset) as local, open_dataset(f"{server.url}/set", storage=limit(tmp_path)) as remote:
        assert_equal(remote, local)
        assert_equal(pickle.loads(pickle.dumps(remote)), local)
    names = [path for path, _ in server.requests]
    assert sorted(names) == sorted(f"/set/{p.name}" for p in dataset.iterdir()), "each file once"
    assert remote.where(0).startswith(f"{server.url}/set/train-000000.tar:train-000000")


def test_a_server_with_faults_and_a_cache_of_one_shard(server, dataset, tmp_path):
    largest = max(p.stat().st_size for p in dataset.iterdir())
    server.faults["/set/manifest.json"] = [loopback.status(503), loopback.cut(100, with_length=True)]
    server.faults["/set/index.safetensors"] = [loopback.redirect("/set/index.safetensors")]
    server.faults["/set/train-000000.tar"] = [loopback.cut(3000, with_length=False), loopback.status(429)]
    server.faults["/set/train-000001.tar"] = [
        loopback.serve_instead(bytes((dataset / "train-000001.tar").stat().st_size))
    ]
    server.faults["/set/train-000002.tar"] = [loopback.cut(3000, with_length=True), loopback.ignore_range]
    settings = limit(tmp_path, cache_bytes=largest)
    with open_dataset(dataset) as local, open_dataset(f"{server.url}/set", storage=settings) as remote:
        assert_equal(remote, local)
        kept = [p for p in (tmp_path / "cache" / "shards").glob("*/*") if p.parent.name != "locks"]
        assert sum(p.stat().st_size for p in kept) <= largest
    assert not any(server.faults.values()), "all faults have happened"


def test_what_is_wrong_with_a_data_set_is_said_in_one_line(server, dataset, tmp_path):
    with pytest.raises(DataError, match=r"none/manifest.json must exist; got HTTP 404 Not Found. Check the address."):
        open_dataset(f"{server.url}/none", storage=limit(tmp_path))
    server.files["/set/train-000001.tar"] = server.files["/set/train-000001.tar"].replace(
        b"safetensors", b"safetensorz", 1
    )
    with (
        open_dataset(f"{server.url}/set", storage=limit(tmp_path)) as remote,
        pytest.raises(
            DataError, match=r"set/train-000001.tar must have the sha256 .*; got .*, twice. Copy the file there ag"
        ),
    ):
        list(remote.iter_graphs("train"))
    server.files["/set/manifest.json"] = b"<html>Welcome</html>"
    with pytest.raises(
        DataError, match=r"set/manifest.json must be a file of a data set; got an HTML page. Give the address"
    ):
        open_dataset(f"{server.url}/set", storage=limit(tmp_path))


def test_a_copy_that_was_altered_on_this_machine(server, dataset, tmp_path):
    """Its length is compared when it is opened, and the CRC32 of each block when that is read."""
    address, settings = f"{server.url}/set", limit(tmp_path)
    with open_dataset(address, storage=settings) as remote:
        num_train = len(list(remote.iter_graphs("train")))
    (copy,) = (tmp_path / "cache" / "shards").glob("*/train-000001.tar")
    content = copy.read_bytes()
    copy.write_bytes(content[:2000])
    with open_dataset(address, storage=settings) as remote:
        assert len(list(remote.iter_graphs("train"))) == num_train
        assert copy.read_bytes() == content
        entry = next(e for e in map(remote.block_entry, range(remote.num_blocks)) if e.file == "train-000001.tar")
    place = entry.offset + entry.size // 2
    copy.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with (
        open_dataset(address, storage=settings) as remote,
        pytest.raises(DataError, match=rf"{address}/train-000001.tar:train-000001-\w+ must have the CRC"),
    ):
        list(remote.iter_graphs("train"))


SHORT = ("train.num_steps=8", "train.save_every=8", "train.validate_every=8", "data.num_workers=1")


def test_training_on_a_web_server_is_training_on_a_folder(server, dataset, tmp_path):
    """Two processes and their workers, one cache, faults: the same bits in the end, and each file delivered once."""
    local = run_processes(tmp_path / "log", 2, train, make_settings(dataset, tmp_path / "local", *SHORT))
    assert local.codes == (EXIT_DONE, EXIT_DONE), str(local)
    server.faults["/set/train-000000.tar"] = [loopback.status(503)]
    server.faults["/set/train-000001.tar"] = [loopback.cut(3000, with_length=False)]
    remote_settings = (*SHORT, f"data.cache={tmp_path / 'cache'}", "data.cache_gb=1", "data.stall_timeout=10")
    words = make_settings(f"{server.url}/set", tmp_path / "remote", *remote_settings)
    remote = run_processes(tmp_path / "log", 2, train, words)
    assert remote.codes == (EXIT_DONE, EXIT_DONE), str(remote)
    assert find_differences(read_state(tmp_path / "local", 8), read_state(tmp_path / "remote", 8)) == {}
    paths = [path for path, _ in server.requests if path != "/set/manifest.json"]
    expected = {f"/set/{name}": 1 for name in ("train-000002.tar", "validation-000000.tar", "index.safetensors")}
    expected |= {"/set/train-000000.tar": 2, "/set/train-000001.tar": 2}
    assert {path: paths.count(path) for path in paths} == expected
    copies = {p.name for p in (tmp_path / "cache" / "shards").glob("*/*") if p.parent.name != "locks"}
    assert copies == {path.removeprefix("/set/") for path in expected}


def test_training_without_its_server_ends_in_one_line(tmp_path, free_port):
    words = make_settings(f"http://127.0.0.1:{free_port}/set", tmp_path / "run", *SHORT, "data.retries=0")
    outcome = run_processes(tmp_path / "log", 2, train, words)
    assert outcome.codes == (EXIT_DATA, EXIT_DATA), str(outcome)
    message = (
        f"so3krates: http://127.0.0.1:{free_port}/set/manifest.json must be delivered within 1 attempt; got Connection"
    )
    assert message in outcome.outputs[0]
    assert "Traceback" not in outcome.outputs[0]


def test_a_data_set_in_an_s3_store(dataset, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    import boto3
    from moto.server import ThreadedMotoServer

    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in dataset.iterdir():
        client.upload_file(str(path), "bucket", f"data/set/{path.name}")
    client.close()
    settings = limit(tmp_path)
    with open_dataset(dataset) as local, open_dataset("s3://bucket/data/set", storage=settings) as remote:
        assert_equal(remote, local)
    server.stop()
