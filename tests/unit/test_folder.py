"""The door to a data set: blocks by their number, in any process, with few open files, checked; hashes once a machine."""

import functools
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from analytic import assert_same_graph, make_random_graph, write_graphs

from so3krates_dist import files
from so3krates_dist.data.codec import decode_block
from so3krates_dist.data.folder import check_dataset, open_dataset
from so3krates_dist.data.manifest import Manifest
from so3krates_dist.data.shards import iter_shard
from so3krates_dist.data.storage import HttpStorage, StorageSettings
from so3krates_dist.data.verification import find_marks, verify_once
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

FIXTURE = Path(__file__).parent.parent / "data" / "shards_schema_1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Marks of verified files go to a folder of the test."""
    monkeypatch.setenv("SO3KRATES_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_set(
    folder: Path, num: int = 10, block_size: int = 3, blocks_per_shard: int = 2
) -> tuple[Manifest, list[Graph]]:
    graphs = [make_random_graph(i) for i in range(num)]
    return write_graphs(folder, {"train": graphs}, block_size=block_size, blocks_per_shard=blocks_per_shard), graphs


def test_single_blocks_are_read_by_their_place_in_the_tar(tmp_path: Path) -> None:
    manifest, graphs = write_set(tmp_path / "set")
    with open_dataset(tmp_path / "set") as dataset:
        assert dataset.num_blocks == dataset.table.num_blocks == 4
        assert_same_graph(graphs[-1], dataset.read_block(3).graph(0))
        entry = dataset.block_entry(3)
        assert dataset.where(3) == f"{tmp_path / 'set' / 'train-000001.tar'}:train-000001-000001"
        assert (entry.file, entry.key) == ("train-000001.tar", "train-000001-000001")
        assert (entry.num_conformers, entry.num_atoms) == (1, graphs[-1].num_atoms)
        content = (tmp_path / "set" / entry.file).read_bytes()[entry.offset : entry.offset + entry.size]
        assert_same_graph(graphs[-1], decode_block(content).graph(0))
    by_key = dict(iter_shard(tmp_path / "set" / manifest.shards[-1].file, manifest.shards[-1]))
    assert list(by_key) == ["train-000001-000000", "train-000001-000001"]


def count_open(folder: Path) -> int:
    """Return how many shards of a data set are open in this process."""
    names = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(name.startswith(str(folder)) and name.endswith(".tar") for name in names)


@pytest.mark.parametrize("source", ["set", "schema 1"])
def test_an_open_data_set_travels_to_other_processes(tmp_path: Path, source: str) -> None:
    """Workers of a loader get a copy: without open files, with what was read of schema 1, without what is mapped."""
    folder = FIXTURE if source == "schema 1" else tmp_path / "set"
    if source == "set":
        write_set(folder)
    with open_dataset(folder, verify="sha256") as dataset:
        before = [g.positions.tobytes() for g in dataset.iter_graphs("train")]
        atoms = dataset.index.sample_atoms.tolist()
        text = pickle.dumps(dataset)
    with pickle.loads(text) as copy:
        assert copy._descriptors == {}
        assert copy._table is None or source == "schema 1"
        assert [g.positions.tobytes() for g in copy.iter_graphs("train")] == before
        assert copy.index.sample_atoms.tolist() == atoms
        assert count_open(folder) > 0
    assert count_open(folder) == 0


def test_a_limited_number_of_files_is_open(tmp_path: Path, monkeypatch) -> None:
    """The one that was not used for longest is closed; a data set may have thousands."""
    monkeypatch.setattr("so3krates_dist.data.folder.MAX_OPEN_SHARDS", 3)
    _, graphs = write_set(tmp_path / "set", 10, 1, 1)
    with open_dataset(tmp_path / "set") as dataset:
        for number in (*range(10), *range(10)):
            assert_same_graph(graphs[number], dataset.read_block(number).graph(0))
            assert_same_graph(graphs[0], dataset.read_block(0).graph(0))
            assert count_open(tmp_path / "set") <= 3
            assert 0 in dataset._descriptors


def damage_shard(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        content = content[:1000]
    if kind == "flipped":
        content[700] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "on_check", "on_read"),
    [
        ("missing", "train-000000.tar must be there, the manifest lists it; got no such", "000.tar must be there, the"),
        ("truncated", r"train-000000.tar must have \d+ bytes; got 1000 bytes", r"000000.tar must have \d+ bytes; got 1000"),
        ("flipped", r"train-000000.tar must have the sha256 .*; got", r"000000-000000 must have the CRC \w{8}; got \w{8}\."),
    ],
)  # fmt: skip
def test_damaged_shards_are_refused_with_their_place(tmp_path: Path, kind: str, on_check: str, on_read: str) -> None:
    write_set(tmp_path / "set")
    damage_shard(tmp_path / "set" / "train-000000.tar", kind)
    with pytest.raises(DataError, match=on_check):
        check_dataset(tmp_path / "set", hashes=True)
    with open_dataset(tmp_path / "set") as dataset, pytest.raises(DataError, match=on_read):
        dataset.read_block(0)
    with open_dataset(tmp_path / "set") as dataset:
        assert len(dataset.read_block(3)) == 1, "the other shard is whole"


def test_a_shard_that_is_cut_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with open_dataset(tmp_path / "set") as dataset:
        dataset.read_block(0)
        os.truncate(tmp_path / "set" / "train-000000.tar", 1000)
        with pytest.raises(DataError, match=r"train-000000-000001 must have \d+ bytes; got 0 bytes"):
            dataset.read_block(1)


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, cache: Path, monkeypatch) -> None:
    """Of a file in another place, or whose times were set back (as copying tools do), nothing is known."""
    manifest, _ = write_set(tmp_path / "set")
    path = tmp_path / "set" / "train-000000.tar"
    with open_dataset(tmp_path / "set", verify="sha256") as dataset:
        dataset.read_block(0)
    assert len(list((cache / "verified").iterdir())) == 2, "the index and one shard"
    with monkeypatch.context() as patch, open_dataset(tmp_path / "set", verify="sha256") as dataset:
        patch.setattr("so3krates_dist.data.verification.hash_file", refuse_to_hash)
        assert len(dataset.read_block(1)) == 3, "not hashed again"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    damage_shard(path, "flipped")
    os.utime(path, ns=times)
    with open_dataset(tmp_path / "set") as dataset, pytest.raises(DataError, match="000000 must have the CRC"):
        dataset.read_block(0)
    with (
        open_dataset(tmp_path / "set", verify="sha256") as dataset,
        pytest.raises(DataError, match=rf"000000.tar must have the sha256 {manifest.shards[0].sha256[:12]}\.\.\.; got"),
    ):
        dataset.read_block(1)


def refuse_to_hash(path: Path) -> str:
    raise AssertionError(f"{path} is hashed again")


def test_a_disk_that_fails_is_one_line(tmp_path: Path, monkeypatch) -> None:
    write_set(tmp_path / "set")
    with open_dataset(tmp_path / "set") as dataset:
        dataset.read_block(0)
        monkeypatch.setattr(os, "pread", fail_to_read)
        with pytest.raises(DataError, match=r"train-000000-000001 must be readable; got Input/output error\. Copy"):
            dataset.read_block(1)


def fail_to_read(*_: int) -> bytes:
    raise OSError(5, os.strerror(5))


def test_a_damaged_file_leaves_no_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    for _ in range(2):
        with pytest.raises(DataError, match=r"name must have the sha256 0{12}\.\.\.; got"):
            verify_once(path, 64 * "0", "name")


@pytest.mark.parametrize("where", ["a file in the way", "no home"])
def test_without_a_cache_folder_every_process_hashes(tmp_path: Path, monkeypatch, cache: Path, where: str) -> None:
    if where == "no home":
        for name in ("SO3KRATES_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", staticmethod(_no_home))
        assert find_marks() is None
    else:
        cache.touch()
    write_set(tmp_path / "set")
    with open_dataset(tmp_path / "set", verify="sha256") as dataset:
        assert len(dataset.read_block(0)) == 3
    damage_shard(tmp_path / "set" / "train-000000.tar", "flipped")
    with (
        open_dataset(tmp_path / "set", verify="sha256") as dataset,
        pytest.raises(DataError, match="must have the sha256"),
    ):
        dataset.read_block(0)


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


_VERIFY = """
import pathlib, sys
from so3krates_dist.data.storage import StorageSettings
from so3krates_dist.data.verification import verify_once
read = lambda: int(pathlib.Path("/proc/self/io").read_text().split()[1])
sys.stdin.readline()
before = read()
verify_once(pathlib.Path(sys.argv[1]), sys.argv[2], "shard")
print(read() - before)
"""


def test_processes_that_start_together_hash_a_file_once(tmp_path: Path) -> None:
    size = 50_000_000
    path = tmp_path / "shard"
    path.write_bytes(bytes(size))
    sha256 = files.hash_file(path)
    command = [sys.executable, "-c", _VERIFY, str(path), sha256]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    read = sorted(int(process.communicate(timeout=60)[0]) for process in processes)
    assert read[1] < 100_000 < size <= read[2], read


def test_marks_do_not_pile_up(tmp_path: Path, monkeypatch, cache: Path) -> None:
    monkeypatch.setattr("so3krates_dist.data.verification.MAX_MARKS", 10)
    for number in range(40):
        path = tmp_path / str(number)
        path.write_bytes(path.name.encode())
        verify_once(path, files.hash_file(path), "name")
    assert 5 <= len(list((cache / "verified").iterdir())) <= 10


# ------------------------------------------------------------------------------------------------------------ on servers


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves the test's folder at an address."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_data_set_on_a_server_is_read_like_one_in_a_folder(tmp_path: Path, server: str) -> None:
    _, graphs = write_set(tmp_path / "set")
    settings = StorageSettings(cache=tmp_path / "copies", retries=0)
    with open_dataset(f"{server}/set", storage=settings) as dataset:
        assert dataset.location == f"{server}/set"
        assert dataset.where(3) == f"{server}/set/train-000001.tar:train-000001-000001"
        assert dataset.index.num_conformers == 10
        for before, after in zip(graphs, dataset.iter_graphs("train"), strict=True):
            assert_same_graph(before, after)
        text = pickle.dumps(dataset)
        with pytest.raises(
            DataError, match=r"/set must be a folder of this machine; got an address. Copy the data set"
        ):
            _ = dataset.folder
    shutil.rmtree(tmp_path / "set")
    with pickle.loads(text) as copy:
        assert len(copy.read_block(3)) == 1, "from the copies"


def test_an_index_that_a_small_cache_drops_meanwhile_is_fetched_again(tmp_path: Path, server: str, monkeypatch) -> None:
    """Other processes may need the room between fetching and opening, and after it."""
    write_set(tmp_path / "set")
    dropped = []

    def fetch_and_drop(storage: HttpStorage, name: str, **expected: object) -> Path:
        path = fetch(storage, name, **expected)
        if len(dropped) < 2:
            path.unlink()
            dropped.append(path)
        return path

    fetch = HttpStorage.fetch
    monkeypatch.setattr(HttpStorage, "fetch", fetch_and_drop)
    with open_dataset(f"{server}/set", storage=StorageSettings(cache=tmp_path / "copies", retries=0)) as dataset:
        index = dataset.index
        dropped[0].unlink()
        assert index.sample_atoms.all()
        assert index.read_samples([0, 1]).atoms.all()
    assert len(dropped) == 2


def test_who_reads_folders_only_says_so() -> None:
    rule = (
        r"http://127\.0\.0\.1/set must be a folder of this machine; got an address of the kind `http:`\. Copy the data"
    )
    with pytest.raises(DataError, match=rule):
        check_dataset(Path("http://127.0.0.1/set"))


def test_a_damaged_shard_on_a_server_is_refused(tmp_path: Path, server: str) -> None:
    write_set(tmp_path / "set")
    damage_shard(tmp_path / "set" / "train-000000.tar", "flipped")
    settings = StorageSettings(cache=tmp_path / "copies", retries=0)
    with (
        open_dataset(f"{server}/set", storage=settings) as dataset,
        pytest.raises(
            DataError, match=r"/set/train-000000\.tar must have the sha256 \w{12}\.\.\. of the manifest; got"
        ),
    ):
        dataset.read_block(0)
    (tmp_path / "set" / "manifest.json").write_text("{")
    with pytest.raises(
        DataError, match=r"http://127\.0\.0\.1:\d+/set/manifest\.json must be a manifest; got JSONDecodeError"
    ):
        open_dataset(f"{server}/set", storage=settings)
