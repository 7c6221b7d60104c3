"""Conversions by parts, by processes, interrupted: the bytes of the data set depend on none of that."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools import convert, merge, runs
from data_tools.chunks import Job, convert_chunk, convert_chunks
from data_tools.dataset import Description, merge_runs, write_dataset
from data_tools.file_units import FileUnits
from data_tools.formats import Chunk, open_layout
from data_tools.parts import Part, Settings, find_chunk, find_parts, open_chunk, open_parts
from data_tools.provenance import describe_source, identify_source
from data_tools.quarantine import iter_quarantine
from data_tools.runs import Entry, Facts, Run, write_run
from so3krates_dist.data.shards import SPLITS, load_manifest
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

NUM_RECORDS = 90
WORDS = ("--energy-unit", "eV", "--length-unit", "Angstrom", "--max-bad-share", "0.1", "--chunk-size", "7")


@pytest.fixture
def source(tmp_path: Path, make_water) -> Path:
    """Make an npz with faulty structures, exact duplicates, and geometries that come twice with different labels."""
    graphs = make_water(NUM_RECORDS - 15)
    graphs += graphs[3:8] + graphs[3:8] + make_water(5)
    graphs[-1].energy += 0.5
    graphs[0].energy, graphs[40].forces, graphs[70].energy = np.nan, 1e6 * graphs[40].forces, np.nan
    return write_npz(tmp_path / "water.npz", graphs)


def write_npz(path: Path, graphs: list[Graph]) -> Path:
    arrays = {"z": graphs[0].atomic_numbers, "R": [g.positions for g in graphs], "E": [g.energy for g in graphs]}
    np.savez(path, F=np.stack([g.forces for g in graphs]), **arrays)
    return path


def assert_same_folders(first: Path, second: Path) -> None:
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


# --------------------------------------------------------------------------------------------------- nothing shows


@pytest.fixture
def whole(tmp_path: Path, source: Path, run_tool) -> Path:
    """Convert in one go: one process, one chunk."""
    assert run_tool(convert, source, "--out", tmp_path / "whole", *WORDS[:-1], 1000) == 0
    return tmp_path / "whole"


def test_what_the_whole_is(whole: Path, source: Path) -> None:
    manifest = load_manifest(whole)
    dropped = {"energy not finite": 2, "exact duplicate": 13, "force too large": 1}
    assert manifest.provenance["dropped"] == dropped
    assert sum(manifest.num_conformers(s) for s in SPLITS) == NUM_RECORDS - 16
    assert [b.record for b in iter_quarantine(whole / "quarantine.jsonl")] == [0, 40, 70]


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("split", ["0.8,0.1,0.1", "40,10,12"])
def test_the_size_of_chunks_does_not_show(tmp_path: Path, source: Path, run_tool, monkeypatch, size, split) -> None:
    monkeypatch.setattr(runs, "RANGE_BYTES", 4000)
    for name, chunk_size in (("a", size), ("b", 1000)):
        words = [*WORDS[:-1], chunk_size, "--split", split, "--name", "water"]
        assert run_tool(convert, source, "--out", tmp_path / name, *words) == 0
    assert_same_folders(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_the_number_of_parts_does_not_show(tmp_path: Path, source: Path, run_tool, whole, capsys, num_parts) -> None:
    for number in reversed(range(1, num_parts + 1)):
        out = tmp_path / "parts"
        assert run_tool(convert, source, "--out", out, *WORDS, "--part", f"{number}/{num_parts}") == 0
        assert f"part {number}/{num_parts} is done; `so3krates merge {out}`" in capsys.readouterr().out
        assert not out.exists()
    assert run_tool(merge, tmp_path / "parts") == 0
    assert "merging 13 chunks" in capsys.readouterr().out
    assert_same_folders(tmp_path / "parts", whole)
    assert not find_parts(tmp_path / "parts").exists()


def test_the_number_of_workers_does_not_show(tmp_path: Path, source: Path, run_tool, whole) -> None:
    assert run_tool(convert, source, "--out", tmp_path / "two", *WORDS, "--workers", "2") == 0
    assert_same_folders(tmp_path / "two", whole)


def test_it_is_what_write_dataset_makes_of_the_same_structures(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(60) + make_water(10)
    path = write_npz(tmp_path / "water.npz", graphs)
    assert run_tool(convert, path, "--out", tmp_path / "converted", *WORDS, "--group", "water") == 0
    options = {"name": "water", "level_of_theory": "unknown", "licence": "unknown", "provenance": {}}
    write_dataset(tmp_path / "written", graphs, split="0.8,0.1,0.1", seed=0, **options)
    first, second = load_manifest(tmp_path / "converted"), load_manifest(tmp_path / "written")
    for name in ("shards", "index", "statistics", "splits", "groups", "labels", "label_counts"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.provenance["dropped"] == second.provenance["dropped"] == {"exact duplicate": 10}


# ---------------------------------------------------------------------------------------------------- interruptions


def start(source: Path, out: Path, *words: object) -> subprocess.Popen[bytes]:
    code = "import argparse, sys\nfrom data_tools import convert\nif __name__ == '__main__':\n"
    code += " p = argparse.ArgumentParser(); convert.add_arguments(p); convert.run(p.parse_args(sys.argv[1:]))\n"
    script = out.parent / "convert_for_test.py"
    script.write_text(code)
    command = [sys.executable, script, source, "--out", out, *WORDS, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([str(word) for word in command], env=environment, stdout=subprocess.DEVNULL)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def find_children(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes that a process has started, and those that they have started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {process.pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {process.pid})


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_while_chunks_are_made_and_started_again(tmp_path: Path, make_water, run_tool, capsys, workers) -> None:
    path = write_npz(tmp_path / "water.npz", make_water(1500))
    words = [*WORDS[:-1], "10", "--workers", workers]
    out = tmp_path / "set"
    process = start(path, out, *words)
    wait_for(lambda: len(list(find_parts(out).glob("chunk-*.run"))) >= 5, process)
    children = find_children(process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    made = len(list(find_parts(out).glob("chunk-*.run")))
    assert 5 <= made < 150
    assert not out.exists()
    assert len(children) == (workers if workers > 1 else 0) + (workers > 1), "workers, and multiprocessing's own helper"
    wait_until_gone(children)
    assert run_tool(convert, path, "--out", out, *words[:-2], "--workers", 1) == 0
    assert " of 150 chunks were there already" in capsys.readouterr().out
    assert run_tool(convert, path, "--out", tmp_path / "again", *words[:-3], 1000) == 0
    assert_same_folders(out, tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "convert_for_test.py", "set", "water.npz"]


def wait_until_gone(children: list[int]) -> None:
    """Workers that lost the process that started them end by themselves."""
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.01)


def test_killed_while_the_data_set_is_written_and_started_again(tmp_path: Path, make_water, run_tool) -> None:
    path = write_npz(tmp_path / "water.npz", make_water(1500))
    out, words = tmp_path / "set", [*WORDS[:-1], 1000]
    process = start(path, out, *words)
    wait_for((tmp_path / ".set.tmp" / "content" / "train-000000.tar").exists, process)
    process.kill()
    process.wait()
    assert not out.exists()
    assert run_tool(convert, path, "--out", out, *words) == 0
    assert run_tool(convert, path, "--out", tmp_path / "again", *words) == 0
    assert_same_folders(out, tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "convert_for_test.py", "set", "water.npz"]


def test_an_error_keeps_the_chunks_that_are_done(tmp_path: Path, source: Path, run_tool, whole, capsys) -> None:
    with pytest.raises(DataError, match="--split must ask for no more conformers than there are"):
        run_tool(convert, source, "--out", tmp_path / "set", *WORDS, "--split", "400,1,1")
    assert "13 of 13 chunks are in" in capsys.readouterr().out
    assert run_tool(convert, source, "--out", tmp_path / "set", *WORDS) == 0
    assert "13 of 13 chunks were there already" in capsys.readouterr().out
    assert_same_folders(tmp_path / "set", whole)


def test_chunks_of_other_settings_or_damaged_ones_are_made_anew(
    tmp_path: Path, source: Path, run_tool, whole, capsys
) -> None:
    out = tmp_path / "set"
    for words in (["--seed", "1"], []):  # chunks with another order, then whole ones with the right order
        with pytest.raises(DataError, match="--split must ask for no more conformers"):
            run_tool(convert, source, "--out", out, *WORDS, *words, "--split", "400,1,1")
    assert "were made with other settings: seed 0 where it was 1" in capsys.readouterr().out
    chunks = [find_chunk(find_parts(out), number) for number in range(3)]
    chunks[0].write_bytes(chunks[0].read_bytes()[:-1])
    content = bytearray(chunks[1].read_bytes())
    content[-1] ^= 1
    chunks[1].write_bytes(content)
    shutil.copy(chunks[3 - 1], find_chunk(find_parts(out), 5))  # a chunk under the name of another
    assert run_tool(convert, source, "--out", out, *WORDS) == 0
    assert "10 of 13 chunks were there already" in capsys.readouterr().out
    assert_same_folders(out, whole)


def test_too_many_bad_structures_end_it_early(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(100)
    for graph in graphs[:10]:
        graph.energy = np.nan
    path = write_npz(tmp_path / "water.npz", graphs)
    with pytest.raises(DataError, match=r"at most 5.00% bad structures; got 6 of 6 .*set.quarantine.jsonl and correct"):
        run_tool(convert, path, "--out", tmp_path / "set", *WORDS[:4], "--max-bad-share", "0.05", "--chunk-size", "3")
    assert [b.record for b in iter_quarantine(tmp_path / "set.quarantine.jsonl")] == list(range(6))
    assert not (tmp_path / "set").exists()


def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path: Path, source: Path) -> None:
    with pytest.raises(
        DataError, match=r"worker process, after \d+ of 2 chunks, must live until its work is done; got"
    ):
        list(convert_chunks(Job(Deadly(), *[None] * 5), [None, None], 2))  # type: ignore[arg-type]  # never looked at


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, source: Path) -> None:
    file = open_layout(source)
    units = FileUnits("eV", "Angstrom", "eV/Angstrom", "", "", "")
    job = Job(file, units, 300.0, 0, "f", tmp_path)
    with pytest.raises(
        DataError, match=r"water.npz:89 must be the last of 20 records; got 10 of them. Is the file being"
    ):
        convert_chunk(job, Chunk(0, 0, 80, 100))


class Deadly:
    """Kills the process that it arrives in."""

    def __reduce__(self) -> tuple[Callable[[int, int], None], tuple[int, int]]:
        return _kill_worker, (os.getpid(), signal.SIGKILL)


def _kill_worker(parent: int, number: int) -> None:
    assert os.getpid() != parent
    os.kill(os.getpid(), number)


# -------------------------------------------------------------------------------------------------------- refusals


def test_two_processes_do_not_make_the_same_data_set(tmp_path: Path, source: Path, run_tool, whole) -> None:
    out = tmp_path / "set"
    message = r"set must be written by one process at a time; got another one. Wait for it, or choose another --out"
    with open_parts(out, None):
        for words in ([], ["--part", "1/2"]):
            with pytest.raises(DataError, match=message):
                run_tool(convert, source, "--out", out, *WORDS, *words)
        with pytest.raises(DataError, match=message):
            run_tool(merge, out)
    with open_parts(out, Part(1, 2)):
        for words in ([], ["--part", "1/2"]):
            with pytest.raises(DataError, match=message):
                run_tool(convert, source, "--out", out, *WORDS, *words)
        assert run_tool(convert, source, "--out", out, *WORDS, "--part", "2/2") == 0, "another part may go on"
    assert run_tool(convert, source, "--out", out, *WORDS) == 0, "one process may finish what parts began"
    assert_same_folders(out, whole)


def test_missing_chunks_are_named(tmp_path: Path, source: Path, run_tool) -> None:
    out = tmp_path / "set"
    run_tool(convert, source, "--out", out, *WORDS, "--part", "2/3")
    rule = (
        r"\.set\.parts must hold all 13 chunks; got 4 of them, without 0, 2, 3, 5, 6, 8, 9, 11, 12. "
        r"Convert what is missing: --part K/3 with K = 1, 3."
    )
    with pytest.raises(DataError, match=rule):
        run_tool(merge, out)
    run_tool(convert, source, "--out", out, *WORDS, "--part", "1/2")
    with pytest.raises(DataError, match=r"without 3, 5, 9, 11. Convert what is missing: chunk C belongs to part C % N"):
        run_tool(merge, out)
    with pytest.raises(DataError, match=r"other must have parts to be merged; got no folder for them. Convert first"):
        run_tool(merge, tmp_path / "other")


def test_parts_of_other_settings_are_refused(tmp_path: Path, source: Path, run_tool, capsys) -> None:
    out = tmp_path / "set"
    run_tool(convert, source, "--out", out, *WORDS, "--part", "1/2")
    for words, difference in (
        (["--seed", "1"], "seed 1 where it was 0"),
        (["--max-force", "50"], "max_force 50.0 where it was 300.0"),
        (["--split", "0.6,0.2,0.2"], 'split "0.6,0.2,0.2" where it was "0.8,0.1,0.1"'),
        (["--name", "w"], 'name "w" where it was "water"'),
    ):
        with pytest.raises(
            DataError, match=rf"parts must be made with the same settings by all parts; got {difference}"
        ):
            run_tool(convert, source, "--out", out, *WORDS, *words, "--part", "2/2")
    with pytest.raises(
        DataError, match=r"same settings by all parts; got seed 1 where it was 0\. Give the same options"
    ):
        run_tool(convert, source, "--out", out, *WORDS, "--seed", "1")
    run_tool(convert, source, "--out", out, *WORDS, "--part", "2/2")
    run_tool(convert, source, "--out", tmp_path / "b", *WORDS, "--seed", "1", "--part", "1/1")
    for number in (2, 7):
        shutil.copy(find_chunk(find_parts(tmp_path / "b"), number), find_chunk(find_parts(out), number))
    rule = r"\.set\.parts must hold chunks that were made with the settings in settings\.json; got others: 2, 7. Remove"
    with pytest.raises(DataError, match=rule):
        run_tool(merge, out)
    for number in (2, 7):
        find_chunk(find_parts(out), number).unlink()
    run_tool(convert, source, "--out", out, *WORDS, "--part", "1/1")
    chunk = find_chunk(find_parts(out), 4)
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(DataError, match=r"chunk-000004.run must have the sha256 .*Remove it: the same command"):
        run_tool(merge, out)
    fingerprint = Settings.load(find_parts(out) / "settings.json").fingerprint
    assert open_chunk(find_parts(out), 3, fingerprint) is not None
    for number, mark in ((3, "other"), (4, fingerprint), (99, fingerprint)):
        assert open_chunk(find_parts(out), number, mark) is None
    assert not out.exists()


def test_merge_may_allow_more_bad_structures(tmp_path: Path, source: Path, run_tool, whole) -> None:
    out = tmp_path / "set"
    words = ["--max-bad-share", "0.034", "--chunk-size", "7", "--split", "400,1,1"]
    run_tool(convert, source, "--out", out, *WORDS[:4], *words[:-2], "--part", "1/1")
    with pytest.raises(DataError, match="--max-bad-share must be a share from 0 to 1; got 7"):
        run_tool(merge, out, "--max-bad-share", "7")
    with pytest.raises(DataError, match=r"at most 0.10% bad structures; got 3 of 90"):
        run_tool(merge, out, "--max-bad-share", "0.001")
    assert run_tool(merge, out) == 0
    assert_same_folders(out, whole)


def test_settings_that_cannot_be_read(tmp_path: Path, source: Path, run_tool) -> None:
    out = tmp_path / "set"
    run_tool(convert, source, "--out", out, *WORDS, "--part", "1/1")
    path = find_parts(out) / "settings.json"
    text = path.read_text()
    path.write_text(text[:-9])
    for words in ([merge, out], [convert, source, "--out", out, *WORDS, "--part", "1/1"]):
        with pytest.raises(DataError, match=r"settings.json must be the settings of a conversion; got JSONDecodeError"):
            run_tool(*words)
    path.write_text(text.replace('"version": "', '"version": "0.0.'))
    with pytest.raises(DataError, match=r"settings.json must be made by so3krates-dist .*; got 0\.0\..* Install that"):
        run_tool(merge, out)
    assert run_tool(convert, source, "--out", out, *WORDS) == 0, "one process alone starts anew"
    with pytest.raises(DataError, match=r"settings.json must be the settings of a conversion; got FileNotFoundError"):
        Settings.load(path)


def test_chunks_beside_the_data_set_they_became(tmp_path: Path, source: Path, run_tool) -> None:
    """What a process leaves that is killed when the data set has its name already."""
    out = tmp_path / "set"
    run_tool(convert, source, "--out", out, *WORDS, "--part", "1/1")
    shutil.copytree(find_parts(out), tmp_path / "copy")
    run_tool(merge, out)
    (tmp_path / "copy").rename(find_parts(out))
    for words in ([merge, out], [convert, source, "--out", out, *WORDS]):
        with pytest.raises(
            DataError, match=r"set must not exist yet; got a folder, and chunks in .*\.set\.parts. If the"
        ):
            run_tool(*words)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, source: Path, run_tool) -> None:
    (tmp_path / ".set.parts").mkdir()
    (tmp_path / ".set.parts" / "mine").touch()
    with pytest.raises(DataError, match=r"\.set\.parts must be free for the parts of a data set; got mine. Remove it"):
        run_tool(convert, source, "--out", tmp_path / "set", *WORDS)
    assert [p.name for p in (tmp_path / ".set.parts").iterdir()] == ["mine"]


# ------------------------------------------------------------------------------------------------------------ bounds


@contextlib.contextmanager
def few_descriptors(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_runs(folder: Path, graphs: list[Graph], size: int) -> list[Run]:
    folder.mkdir()
    for number, first in enumerate(range(0, len(graphs), size)):
        entries = [Entry(g, record=first + i) for i, g in enumerate(graphs[first : first + size])]
        write_run(folder / f"{number:04d}", entries, 0, Facts(number=number, num_records=len(entries)))
    return [Run.open(path) for path in sorted(folder.iterdir())]


def describe() -> Description:
    return Description(
        name="toy", level_of_theory="none", licence="MIT", provenance={}, split="0.8,0.1,0.1", seed=0, sources=("a",),
        max_energy_mads=50.0,
    )  # fmt: skip


def test_hundreds_of_runs_do_not_need_hundreds_of_files(tmp_path: Path, make_water) -> None:
    graphs = make_water(400)
    written = write_runs(tmp_path / "runs", graphs, 1)
    with few_descriptors(20):
        merge_runs(tmp_path / "set", written, describe())
    merge_runs(tmp_path / "one", write_runs(tmp_path / "run", graphs, 400), describe())
    assert_same_folders(tmp_path / "set", tmp_path / "one")


def test_memory_does_not_grow_with_the_data(tmp_path: Path, make_water, monkeypatch) -> None:
    monkeypatch.setattr(runs, "RANGE_BYTES", 50_000)
    monkeypatch.setattr("so3krates_dist.data.statistics.MAX_FIT_CONFORMERS", 100)
    monkeypatch.setattr("so3krates_dist.data.statistics.MIN_FIT_CONFORMERS", 100)
    peaks = []
    for number in (1400, 4200):  # full blocks and groups in both
        written = write_runs(tmp_path / f"runs{number}", make_water(number), 350)
        tracemalloc.start()
        merge_runs(tmp_path / f"set{number}", written, describe())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_very_large_files_are_known_by_samples(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(bytes(range(256)) * 40)
    assert identify_source(path, describe_source(path)) == describe_source(path)
    monkeypatch.setattr("data_tools.provenance.WHOLE_HASH_BYTES", 1000)
    monkeypatch.setattr("data_tools.provenance._SAMPLE_BYTES", 100)
    found = describe_source(path)
    assert found.keys() == {"file", "size", "sha256_of_samples"}
    assert identify_source(path, found) == found | {"mtime_ns": path.stat().st_mtime_ns}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert describe_source(path)["sha256_of_samples"] != found["sha256_of_samples"]
