"""Writing a data set: split and order by hash, same bytes for the same input, nothing half-written or overwritten."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_tools import runs
from data_tools.dataset import Split, describe_source, find_split, write_dataset
from data_tools.split import SplitCounter
from data_tools.workplace import make_workplace
from so3krates_dist.data import shards
from so3krates_dist.data.shards import SPLITS, iter_graphs, load_manifest
from so3krates_dist.errors import DataError


def write(folder: Path, graphs, *, split: str = "0.6,0.2,0.2", seed: int = 0, **others):
    options = {"name": "toy", "level_of_theory": "harmonic", "licence": "MIT", "provenance": {"tool": "test"}} | others
    return write_dataset(folder, graphs, split=split, seed=seed, **options)


def collect(folder: Path) -> dict[str, list[bytes]]:
    manifest = load_manifest(folder)
    return {s: [g.positions.tobytes() for g in iter_graphs(folder, manifest, s)] for s in SPLITS}


def assert_same_folders(first: Path, second: Path) -> None:
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_every_conformer_is_in_one_split_with_its_labels(tmp_path: Path, make_water) -> None:
    graphs = make_water(50)
    manifest = write(tmp_path / "set", graphs)
    stored = {g.positions.tobytes(): g for s in SPLITS for g in iter_graphs(tmp_path / "set", manifest, s)}
    assert len(stored) == 50 == sum(manifest.num_conformers(s) for s in SPLITS)
    for graph in graphs:
        found = stored[graph.positions.astype(np.float32).tobytes()]
        assert found.energy == graph.energy
        np.testing.assert_array_equal(found.forces, graph.forces.astype(np.float32))
    assert manifest.labels == ("energy", "forces")
    assert manifest.groups == {"water": 50}
    assert manifest.splits["num_conformers"] == {s: manifest.num_conformers(s) for s in SPLITS}


def test_same_input_and_seed_give_the_same_bytes_in_any_order(tmp_path: Path, make_water) -> None:
    graphs = make_water(40)
    write(tmp_path / "first", graphs)
    write(tmp_path / "second", graphs[::-1])
    names = sorted(p.name for p in (tmp_path / "first").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    write(tmp_path / "third", graphs, seed=1)
    assert collect(tmp_path / "first")["train"] != collect(tmp_path / "third")["train"]


def test_adding_conformers_moves_none_to_another_split(tmp_path: Path, make_water) -> None:
    graphs = make_water(60)
    write(tmp_path / "small", graphs[:40])
    write(tmp_path / "large", graphs)
    small, large = collect(tmp_path / "small"), collect(tmp_path / "large")
    assert all(set(small[s]) <= set(large[s]) for s in SPLITS)


def test_the_order_within_a_split_is_shuffled(tmp_path: Path, make_water) -> None:
    graphs = make_water(40)
    write(tmp_path / "set", graphs, split="40,0,0")
    stored = collect(tmp_path / "set")["train"]
    index = {g.positions.astype(np.float32).tobytes(): i for i, g in enumerate(graphs)}
    order = [index[p] for p in stored]
    assert sorted(order) == list(range(40))
    assert abs(np.corrcoef(order, np.arange(40))[0, 1]) < 0.5


def test_numbers_are_met_exactly_and_the_rest_is_counted(tmp_path: Path, make_water) -> None:
    manifest = write(tmp_path / "set", make_water(30), split="15,3,7")
    assert [manifest.num_conformers(s) for s in SPLITS] == [15, 3, 7]
    assert manifest.provenance["dropped"] == {"left over by the split": 5}


def test_exact_duplicates_are_dropped_and_equal_geometries_stay_together(tmp_path: Path, make_water) -> None:
    graphs = make_water(30)
    again = make_water(30)
    for graph in again[:10]:
        graph.energy += 0.001  # the same geometry with another label is no duplicate
    manifest = write(tmp_path / "set", graphs + again)
    assert manifest.provenance["dropped"] == {"exact duplicate": 20}
    by_split = collect(tmp_path / "set")
    assert sum(map(len, by_split.values())) == 40
    assert not set(by_split["train"]) & set(by_split["test"])
    assert not set(by_split["train"]) & set(by_split["validation"])


def test_the_manifest_names_no_machine_and_no_date(tmp_path: Path, make_water) -> None:
    write(tmp_path / "set", make_water(20))
    text = (tmp_path / "set" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert content["splits"]["seed"] == 0
    assert content["splits"]["request"] == "0.6,0.2,0.2"


def test_the_folder_is_as_readable_as_any_other(tmp_path: Path, make_water) -> None:
    write(tmp_path / "set", make_water(20))
    (tmp_path / "other").mkdir()
    assert (tmp_path / "set").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "set"], "no temporary folder is left"


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path, make_water) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(
        DataError, match=r"set must not exist yet; got a folder. Choose another --out, or remove it first"
    ):
        write(tmp_path / "set", make_water(20))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert (tmp_path / "set" / "mine").exists()
    with pytest.raises(DataError, match="nowhere must be a folder; got nothing there"):
        write(tmp_path / "nowhere" / "set", make_water(20))


def test_a_failure_leaves_nothing_behind(tmp_path: Path, make_water, monkeypatch) -> None:
    """Other energies reach the disk than were meant to (an encoder with a mistake)."""
    honest = shards.encode_block

    def broken(graphs):
        return honest([dataclasses.replace(g, energy=0.0) for g in graphs])

    monkeypatch.setattr(shards, "encode_block", broken)
    with pytest.raises(
        DataError, match=r"train-000000.tar:train-000000-000000 must be read back as it was written; got something else"
    ):
        write(tmp_path / "set", make_water(20))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path, make_water) -> None:
    left = tmp_path / ".set.tmp"
    (left / "content").mkdir(parents=True)
    (left / "content" / "train-000000.tar").write_bytes(b"half")
    (left / "so3krates.lock").touch()
    write(tmp_path / "set", make_water(20))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert "content" not in {p.name for p in (tmp_path / "set").iterdir()}


def test_a_hidden_folder_of_somebody_else_is_left_alone(tmp_path: Path, make_water) -> None:
    (tmp_path / ".set.tmp").mkdir()
    (tmp_path / ".set.tmp" / "mine").touch()
    with pytest.raises(
        DataError, match=r"\.set\.tmp must be free for a data set while it is written; got mine. Remove"
    ):
        write(tmp_path / "set", make_water(20))
    assert (tmp_path / ".set.tmp" / "mine").exists()
    (tmp_path / ".link.tmp").symlink_to(tmp_path / ".set.tmp")
    with pytest.raises(DataError, match=r"\.link\.tmp must be free for a data set .*; got no folder"):
        write(tmp_path / "link", make_water(20))


def test_two_processes_do_not_write_the_same_data_set(tmp_path: Path, make_water) -> None:
    with make_workplace(tmp_path / "set") as (first, _):
        (first / "a").touch()
        with pytest.raises(DataError, match=r"set must be written by one process at a time; got another one. Wait for"):
            write(tmp_path / "set", make_water(20))
        assert (first / "a").exists()
    assert list(tmp_path.iterdir()) == []


def test_arrays_in_fortran_order_are_stored_right(tmp_path: Path, make_water) -> None:
    graphs = make_water(10)
    expected = {g.energy: g.forces.astype(np.float32) for g in graphs}
    for graph in graphs:
        graph.forces = np.asfortranarray(graph.forces)
    manifest = write(tmp_path / "set", graphs, split="10,0,0")
    for graph in iter_graphs(tmp_path / "set", manifest, "train"):
        np.testing.assert_array_equal(graph.forces, expected[graph.energy])


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("0.8,0.1", "--split must be three numbers, the first above zero; got '0.8,0.1'"),
        ("much,0,0", "--split must be three numbers; got 'much,0,0'. Give train, validation and test as"),
        ("0.0,0.5,0.5", "the first above zero"),
        ("nan,0.5,0.5", "the first above zero"),
        ("10,-1,0", "the first above zero"),
        ("0.8,0.1,0.2", "--split must have fractions that sum to one; got 1.1"),
        ("18,1,2", r"--split must ask for no more conformers than there are \(21\); got 20 different ones. Lower it"),
        ("0.0000001,0.9999999,0", r"--split must leave conformers for training; got none of 20"),
    ],
)
def test_impossible_splits_are_refused(tmp_path: Path, make_water, request_text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "set", make_water(20), split=request_text)
    assert list(tmp_path.iterdir()) == []


def test_labels_must_be_there(tmp_path: Path, make_water) -> None:
    graphs = make_water(5)
    for graph in graphs:
        graph.forces, graph.dipole, graph.energy = None, np.zeros(3), None
    with pytest.raises(DataError, match=r"data set must have energies or forces; got neither"):
        write(tmp_path / "set", graphs)
    with pytest.raises(DataError, match=r"data set must hold structures; got none"):
        write(tmp_path / "set", [])
    assert list(tmp_path.iterdir()) == []


def test_labels_may_be_missing(tmp_path: Path, make_water) -> None:
    graphs = make_water(60)
    for number, graph in enumerate(graphs):
        graph.group = str(number)
        graph.forces = None if number % 3 == 0 else graph.forces
        graph.energy = None if number % 5 == 1 else graph.energy
        graph.dipole = np.full(3, float(number)) if number % 7 == 2 else None
        if number % 11 == 3:
            graph.cell, graph.pbc = 9.0 * np.eye(3), np.array([True, True, False])
    manifest = write(tmp_path / "set", graphs)
    assert manifest.labels == ("energy", "forces", "dipole")
    counted = {label: sum(manifest.label_counts[s][label] for s in SPLITS) for label in manifest.labels}
    assert counted == {"energy": 48, "forces": 40, "dipole": 9}
    for found in (g for s in SPLITS for g in iter_graphs(tmp_path / "set", manifest, s)):
        wanted = graphs[int(found.group)]
        assert found.energy == wanted.energy
        for name in ("forces", "dipole", "cell", "pbc"):
            expected, value = getattr(wanted, name), getattr(found, name)
            assert (expected is None) == (value is None)
            if expected is not None:
                np.testing.assert_array_equal(value, expected.astype(value.dtype))


@pytest.mark.parametrize("split", ["0.5,0.25,0.25", "31,7,11"])
def test_neither_the_runs_nor_the_ranges_show_in_the_result(tmp_path: Path, make_water, monkeypatch, split) -> None:
    graphs = make_water(70) + make_water(70, seed=0)[:9] + make_water(30, seed=1, group="other")
    graphs[3].energy += 1.0  # the same geometry as one of the second set, another label
    write(tmp_path / "once", graphs, split=split)
    for number, (size, num_bytes) in enumerate([(1000, 3000), (16, 2**30), (7, 2000), (1, 900)]):
        monkeypatch.setattr("data_tools.dataset.RUN_CONFORMERS", size)
        monkeypatch.setattr(runs, "RANGE_BYTES", num_bytes)
        write(tmp_path / str(number), graphs, split=split)
        assert_same_folders(tmp_path / str(number), tmp_path / "once")
    monkeypatch.setattr("data_tools.dataset._RUN_ATOMS", 20)
    write(tmp_path / "atoms", graphs, split=split)
    assert_same_folders(tmp_path / "atoms", tmp_path / "once")
    dropped = load_manifest(tmp_path / "once").provenance["dropped"]
    assert dropped["exact duplicate"] == 8


def test_split_bounds() -> None:
    half = SplitCounter(Split.parse("0.5,0.25,0.25"))
    half.add(np.array([5, 2**63 - 1], np.uint64))
    half.add(np.array([2**63, 2**64 - 1], np.uint64))
    assert half.finish() == {"train": 2, "validation": 1, "test": 1}
    assert (half.bounds, half.num_unused) == ([2**63, 2**63 + 2**62, 2**64], 0)
    for pieces in ([[5, 7, 9, 11]], [[5], [7, 9], [11]]):
        numbers = SplitCounter(Split.parse("2,1,0"))
        for piece in pieces:
            numbers.add(np.array(piece, np.uint64))
        assert numbers.finish() == {"train": 2, "validation": 1, "test": 0}
        assert (numbers.bounds, numbers.num_unused) == ([9, 11, 11], 1)
    together = SplitCounter(Split.parse("2,2,0"))
    together.add(np.array([5], np.uint64))
    together.add(np.array([7, 7, 7], np.uint64))
    assert together.finish() == {"train": 1, "validation": 3, "test": 0}, "equal hashes stay together"
    assert [find_split(v, (9, 11, 11)) for v in (5, 9, 11)] == ["train", "validation", None]


def test_sources_are_named_without_their_folders(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert describe_source(tmp_path / "a.xyz") == {"file": "a.xyz", "sha256": digest}
