"""Runs: conformers come back as they are stored, sorted and without duplicates, and damage is seen."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_tools import runs
from data_tools.runs import Entry, Facts, Run, hash_content, iter_ranges, store, write_run
from so3krates_dist.data.codec import encode_block
from so3krates_dist.data.index import count_pairs
from so3krates_dist.data.statistics import hash_geometry
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph


@pytest.fixture
def graphs(make_water) -> list[Graph]:
    """Molecules and crystals with all kinds of labels, some of them missing."""
    made = make_water(24)
    generator = np.random.default_rng(5)
    for number, graph in enumerate(made):
        graph.group = f"ä{number % 3}" * (number % 4)
        graph.total_charge, graph.num_unpaired_electrons = float(number % 3 - 1), float(number % 2)
        if number % 2:
            graph.dipole, graph.partial_charges = generator.normal(size=3), generator.normal(size=3)
        if number % 5 == 0:
            graph.hirshfeld_ratios, graph.forces = generator.uniform(size=3), np.asfortranarray(graph.forces)
        if number % 7 == 0:
            graph.cell, graph.pbc = generator.normal(size=(3, 3)), np.array([True, False, number > 7])
            graph.stress, graph.energy = generator.normal(size=(3, 3)), None
    return made


def write(folder: Path, pieces: list[list[Graph]]) -> list[Run]:
    for number, piece in enumerate(pieces):
        entries = [Entry(g, source=number, record=i) for i, g in enumerate(piece)]
        write_run(folder / f"{number}.run", entries, 0, Facts(number=number))
    return [Run.open(folder / f"{number}.run") for number in range(len(pieces))]


def collect(written: list[Run]) -> list[Graph]:
    return [rows.graph(row) for rows in iter_ranges(written) for row in rows.order]


def test_conformers_come_back_as_blocks_store_them(tmp_path: Path, graphs) -> None:
    pieces = [graphs[:1], graphs[1:9], graphs[9:]]
    found = collect(write(tmp_path, pieces))
    expected = sorted((store(g) for g in graphs), key=lambda g: (hash_geometry(g, 0), hash_content(g)))
    assert (
        encode_block(found) == encode_block(expected) == encode_block(sorted(graphs, key=lambda g: hash_geometry(g, 0)))
    )
    assert [hash_content(g) for g in found] == [hash_content(g) for g in expected]


def test_hashes_ascend_and_pairs_are_those_of_the_structures(tmp_path: Path, graphs, monkeypatch) -> None:
    monkeypatch.setattr(runs, "RANGE_BYTES", 500)
    written = write(tmp_path, [graphs[:10], graphs[10:]])
    hashes, num_ranges = [], 0
    for rows in iter_ranges(written):
        num_ranges += 1
        hashes += rows.columns["hash"][rows.order].view(np.uint64).tolist()
        for row in rows.order:
            assert rows.columns["pairs"][row].tolist() == count_pairs(rows.graph(row)).tolist()
    assert hashes == sorted(hash_geometry(g, 0) for g in graphs)
    assert num_ranges > 5


def test_exact_duplicates_go_and_the_first_record_stays(tmp_path: Path, graphs) -> None:
    other = dataclasses.replace(graphs[4], energy=1.0)
    written = write(tmp_path, [[graphs[4], graphs[4], graphs[5]], [graphs[5], other, graphs[4]]])
    assert [(r.num_rows, r.facts.num_conformers) for r in written] == [(2, 3), (3, 3)]
    for order in (written, written[::-1]):
        places = [
            (int(rows.columns["source"][row]), int(rows.columns["record"][row]))
            for rows in iter_ranges(order)
            for row in rows.order
        ]
        assert sorted(places) == [(0, 0), (0, 2), (1, 1)]


def test_content_tells_structures_apart(graphs) -> None:
    changes = [
        {}, {"group": "x"}, {"energy": None}, {"energy": 0.0}, {"forces": None}, {"forces": np.zeros((3, 3))},
        {"total_charge": 1.0}, {"num_unpaired_electrons": 3.0}, {"dipole": np.zeros(3)}, {"stress": np.zeros((3, 3))},
        {"cell": np.eye(3)}, {"cell": np.eye(3) * (1 + 1e-12)}, {"pbc": np.ones(3, bool)}, {"partial_charges": np.zeros(3)},
        {"hirshfeld_ratios": np.zeros(3)}, {"loss_weight": 0.0}, {"loss_weight": 0.5},
        {"atomic_numbers": np.array([8, 1, 2])}, {"positions": np.ones((3, 3))},
    ]  # fmt: skip
    base = dataclasses.replace(graphs[1], dipole=None, partial_charges=None)
    found = {hash_content(dataclasses.replace(base, **change)) for change in changes}
    assert len(found) == len(changes)
    noise = dataclasses.replace(base, positions=base.positions * (1 + 1e-12))
    assert hash_content(noise) == hash_content(base), "beyond single precision nothing is stored"


def test_a_run_without_conformers_still_has_its_quarantine(tmp_path: Path, graphs) -> None:
    facts = Facts(number=3, fingerprint="f", num_records=2, bad={"faulty": 2}, left_out={"none": 1})
    write_run(tmp_path / "a.run", [], 0, facts, "zwei\nZeilen ü\n")
    run = Run.open(tmp_path / "a.run")
    run.verify()
    assert (run.facts, run.num_rows) == (facts, 0)
    assert run.read_quarantine().decode() == "zwei\nZeilen ü\n"
    (other,) = write(tmp_path, [graphs])
    assert len(collect([run, other])) == len(graphs)
    assert list(iter_ranges([run])) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.run", "a.run"], "no temporary file is left"


def test_every_damage_is_seen(tmp_path: Path, graphs) -> None:
    (run,) = write(tmp_path, [graphs])
    whole = run.path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 61):
        run.path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(
            DataError, match=r"0\.run must (be a run|have the sha256 \w+\.\.\.); got .* Remove it: the same"
        ):
            Run.open(run.path).verify()
        refused += 1
    assert refused > 100
    for size in (0, 5, 200, len(whole) - 1):
        run.path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"0\.run must be a run; got"):
            Run.open(run.path)
    with pytest.raises(DataError, match=r"none\.run must be a run; got FileNotFoundError"):
        Run.open(tmp_path / "none.run")


def test_a_run_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, graphs) -> None:
    (run,) = write(tmp_path, [graphs])
    run.path.write_bytes(run.path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"0\.run must have \d+ more bytes of `\w+`; got \d+ bytes"):
        collect([run])
