"""Copies of remote files: made once, bounded, whole, whoever asks for them at the same time or dies meanwhile."""

import concurrent.futures
import hashlib
import multiprocessing
import os
import random
import time
from pathlib import Path

import loopback
import pytest
from loopback import Loopback
from storage_setup import SHARD, fetch, list_cache, make_settings

from so3krates_dist.data import cache
from so3krates_dist.data.storage import StorageSettings, open_storage
from so3krates_dist.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("short_waits")


def make_files(server: Loopback, names: str, size: int = 100) -> dict[str, bytes]:
    files = {f"{name}.tar": (name * size)[:size].encode() for name in names}
    server.files |= {f"/set/{name}": content for name, content in files.items()}
    return files


def test_what_was_not_used_for_longest_goes_first(server, tmp_path):
    files = make_files(server, "abcd")
    place = open_storage(f"{server.url}/set", make_settings(tmp_path, cache_bytes=250))
    stranger = tmp_path / "cache" / "shards" / "notes" / "mine.txt"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(bytes(1000))
    descriptor = -1
    for step, (name, expected) in enumerate(
        [("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("a", "ac"), ("d", "ad")]
    ):
        path = fetch(place, f"{name}.tar", files[f"{name}.tar"])
        descriptor = os.open(path, os.O_RDONLY) if step == 1 else descriptor
        assert list_cache(tmp_path) == {f"{n}.tar" for n in expected} | {"mine.txt"}
    assert os.read(descriptor, 1000) == files["b.tar"], "whoever has it open keeps it"
    os.close(descriptor)
    assert stranger.is_file(), "what others have put there is not touched"
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 4, (
        "no empty folders are left: two copies, locks, notes"
    )


def test_a_file_larger_than_the_cache(server, tmp_path):
    place = open_storage(f"{server.url}/set", make_settings(tmp_path, cache_bytes=199_999))
    message = r"data.cache_gb must hold the largest file of the data set \(a.tar, 0.0002 GB\); got 0.0002. Raise it."
    with pytest.raises(ConfigError, match=message):
        fetch(place)
    assert server.requests == []


def test_equal_content_is_one_copy_and_changed_content_another(server, tmp_path):
    settings = make_settings(tmp_path)
    server.files["/other/a.tar"] = SHARD
    first = fetch(open_storage(f"{server.url}/set", settings))
    assert fetch(open_storage(f"{server.url}/other", settings)) == first
    server.files["/set/a.tar"] = SHARD[::-1]
    second = fetch(open_storage(f"{server.url}/set", settings), content=SHARD[::-1])
    assert second != first
    assert second.read_bytes() == SHARD[::-1]
    with pytest.raises(DataError, match=r"a.tar must have a sha256 of 64 hexadecimal digits; got '../x'. Make"):
        open_storage(f"{server.url}/set", settings).fetch("a.tar", size=1, sha256="../x")


def test_folders_that_cannot_be_a_cache(server, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    place = open_storage(f"{server.url}/set", make_settings(tmp_path))
    with pytest.raises(
        DataError, match=r"shards must take copies of remote shards; got Not a directory. Set data.cache"
    ):
        fetch(place)
    (tmp_path / "cache").unlink()
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    (tmp_path / "cache" / "shards").chmod(0o777)
    planted = tmp_path / "cache" / "shards" / hashlib.sha256(SHARD).hexdigest() / "a.tar"
    planted.parent.mkdir()
    planted.write_bytes(bytes(len(SHARD)))
    with pytest.raises(
        DataError, match=r"shards must be a folder that not everyone can write to; got one that everyone can"
    ):
        fetch(place)
    full = open_storage(f"{server.url}/set", make_settings(tmp_path / "new"))
    monkeypatch.setattr(os, "fsync", raise_no_space)
    (tmp_path / "new").mkdir()
    with pytest.raises(
        DataError, match=r"must take copies of remote shards; got No space left on device. Set data.cache"
    ):
        fetch(full)
    assert list_cache(tmp_path / "new") == set()


def raise_no_space(_: int) -> None:
    raise OSError(28, os.strerror(28))


def test_the_cache_of_a_user(monkeypatch, tmp_path):
    monkeypatch.setenv("SO3KRATES_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.find_cache_folder() == tmp_path / "own"
    monkeypatch.setenv("SO3KRATES_CACHE_DIR", "")
    assert cache.find_cache_folder() == tmp_path / "so3krates-dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.find_cache_folder() == Path("/home/me/.cache/so3krates-dist")
    monkeypatch.setattr(Path, "home", raise_no_home)
    with pytest.raises(
        ConfigError, match=r"data.cache must name a folder; got none, and no home folder. Set data.cache"
    ):
        cache.find_cache_folder()


def raise_no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


SPAWN = multiprocessing.get_context("spawn")


def fetch_all(url: str, settings: StorageSettings, names: list[str], files: dict[str, bytes]) -> list[bytes]:
    place = open_storage(url, settings)
    contents = []
    for name in names:
        content = files[name]
        descriptor = place.open_file(name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        with os.fdopen(descriptor, "rb") as file:
            contents.append(file.read())
    return contents


def test_processes_and_threads_download_once(server, tmp_path):
    files = make_files(server, "ab", size=5000)
    for name in files:
        server.faults[f"/set/{name}"] = [loopback.slow(10, 0.05)]
    words = (f"{server.url}/set", make_settings(tmp_path), list(files), files)
    with (
        concurrent.futures.ProcessPoolExecutor(3, SPAWN) as processes,
        concurrent.futures.ThreadPoolExecutor(3) as threads,
    ):
        jobs = [pool.submit(fetch_all, *words) for pool in (processes, threads) for _ in range(3)]
        assert [job.result() for job in jobs] == [list(files.values())] * 6
    assert sorted(p for p, _ in server.requests) == ["/set/a.tar", "/set/b.tar"]


def test_a_cache_that_is_too_small_for_all_at_a_time(server, tmp_path):
    """Whoever finds it filled with what others are fetching waits; nobody finds a file gone that it has asked for."""
    files = make_files(server, "abcdef", size=1000)
    settings = make_settings(tmp_path, cache_bytes=2100)
    orders = [random.Random(seed).choices(list(files), k=12) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(fetch_all, f"{server.url}/set", settings, order, files) for order in orders]
        for order, job in zip(orders, jobs, strict=True):
            assert job.result() == [files[name] for name in order]
    sizes = [p.stat().st_size for p in (tmp_path / "cache" / "shards").glob("*/*.tar*")]
    assert sum(sizes) <= 2100
    assert len(sizes) == 2


def test_leavings_of_a_process_that_was_killed(server, tmp_path):
    files = make_files(server, "ab", size=5000)
    server.faults["/set/a.tar"] = [loopback.stall(10)]
    settings = make_settings(tmp_path, stall_timeout_s=30, cache_bytes=9000)
    process = SPAWN.Process(target=fetch_all, args=(f"{server.url}/set", settings, ["a.tar"], files))
    process.start()
    while not list_cache(tmp_path):
        assert process.is_alive()
        time.sleep(0.01)
    assert list_cache(tmp_path) == {"a.tar.part"}
    process.kill()
    process.join()
    process.close()
    fetch_all(f"{server.url}/set", settings, ["b.tar"], files)
    assert list_cache(tmp_path) == {"b.tar"}, "cleared when room was looked for"
    server.faults["/set/a.tar"] = [loopback.slow(2, 0.2)]
    fetch_all(f"{server.url}/set", settings, ["a.tar"], files)
    assert list_cache(tmp_path) == {"a.tar"}, "no lock is left either"
