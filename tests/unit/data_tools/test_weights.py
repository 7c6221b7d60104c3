"""Weights in the loss, from files into data sets: where they stand, what is refused, and who says what they are."""

import argparse
import dataclasses
import json
from pathlib import Path

import ase
import ase.db
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from conversion_files import load_all, write_npz
from format_files import write_ani1x, write_qm7x, write_spice

from data_tools import convert, inspect, report, runs, validate
from data_tools.dataset import write_dataset
from data_tools.formats import open_layout
from data_tools.quarantine import iter_quarantine
from data_tools.readers import read_structures
from so3krates_dist.data.shards import SPLITS, load_manifest, open_dataset
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

WEIGHTS = [0.25 * (number % 8) for number in range(32)]


def weigh(graphs: list[Graph]) -> list[Graph]:
    return [dataclasses.replace(g, loss_weight=w) for g, w in zip(graphs, WEIGHTS, strict=True)]


def to_atoms(graph: Graph, **info: object) -> ase.Atoms:
    atoms = ase.Atoms(graph.atomic_numbers, graph.positions, info=info)
    atoms.calc = SinglePointCalculator(atoms, energy=graph.energy, forces=graph.forces)
    return atoms


def write_file(path: Path, graphs: list[Graph], key: str) -> Path:
    """Write structures with their weights in the layout that the ending of the name stands for."""
    if path.suffix == ".xyz":
        ase.io.write(path, [to_atoms(g, **{key: g.loss_weight}) for g in graphs], format="extxyz")
    elif path.suffix == ".npz":
        write_npz(path, graphs, units=("eV", "Angstrom"), **{key: np.array([g.loss_weight for g in graphs])})
    else:
        with ase.db.connect(path, type="db") as database:
            for graph in graphs:
                database.write(to_atoms(graph), data={key: graph.loss_weight})
    return path


def assert_weights(found: list[Graph], expected: list[Graph]) -> None:
    by_energy = {round(g.energy, 5): g.loss_weight for g in found if g.energy is not None}
    assert len(by_energy) == len(expected)
    for graph in expected:
        assert by_energy[round(graph.energy, 5)] == pytest.approx(graph.loss_weight, abs=1e-7)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("key", ["loss_weight", "config_weight"])
@pytest.mark.parametrize("name", ["a.xyz", "a.npz", "a.db"])
def test_they_come_over_under_their_name_or_another_one(
    tmp_path: Path, make_water, run_tool, capsys, name: str, key: str
) -> None:
    graphs = weigh(make_water(32))
    path = write_file(tmp_path / name, graphs, key)
    words = ["--out", tmp_path / "set", "--energy-unit", "eV", "--length-unit", "Angstrom", "--split", "24,4,4"]
    assert run_tool(convert, path, *words, "--keys", f"loss_weight={key}") == 0
    assert f"loss_weight={key}" in capsys.readouterr().out
    assert_weights(load_all(tmp_path / "set"), graphs)
    manifest = load_manifest(tmp_path / "set")
    assert manifest.schema == 3
    assert manifest.provenance["keys"]["loss_weight"] == key
    assert validate.validate(tmp_path / "set").errors == []
    unasked = {g.loss_weight for g in read_structures(path, {}).graphs}
    assert unasked == (set(WEIGHTS) if key == "loss_weight" else {1.0}), "of another name they have to be named"


def test_structures_without_one_have_one(tmp_path: Path, make_water) -> None:
    first, second = make_water(2)
    ase.io.write(tmp_path / "a.xyz", [to_atoms(first), to_atoms(second, loss_weight=3)], format="extxyz")
    assert [g.loss_weight for g in read_structures(tmp_path / "a.xyz", {}).graphs] == [1.0, 3.0]


@pytest.mark.parametrize("padded", [False, True])
def test_one_for_all_conformers_of_an_npz(tmp_path: Path, make_water, padded: bool) -> None:
    numbers = np.array([[8, 1, 1], [8, 1, 0]]) if padded else np.array([8, 1, 1])
    path = write_npz(tmp_path / "a.npz", make_water(2), z=numbers, loss_weight=np.array(0.125))
    assert [g.loss_weight for g in read_structures(path, {}).graphs] == [0.125, 0.125]


@pytest.mark.parametrize("key", ["loss_weight", "w"])
def test_arrays_of_published_sets(tmp_path: Path, rng, key: str) -> None:
    """Added to the file by whoever prepared it; nan is no missing weight, in ANI-1x either."""
    h5py = pytest.importorskip("h5py")
    keys = {} if key == "loss_weight" else {"loss_weight": key}
    for write in (write_ani1x, write_spice):
        path = tmp_path / f"{write.__name__}.h5"
        write(path, rng)
        with h5py.File(path, "a") as file:
            for group in file.values():
                count = next(d.shape[0] for n, d in group.items() if n in ("coordinates", "conformations"))
                group[key] = np.where(np.arange(count) == 1, np.nan, np.arange(count))
        with open_layout(path, keys) as file:
            assert file.keys["loss_weight"] == key
            found = [g.loss_weight for _, g in file.read_records(file.chunks(100)[0])]
        assert found[0] == 0
        assert np.isnan(found[1])
    write_qm7x(tmp_path / "a.hdf5", rng)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        for molecule in file.values():
            for number, conformer in enumerate(molecule.values()):
                conformer[key] = [0.5 * number]
    with open_layout(tmp_path / "a.hdf5", keys) as file:
        assert [g.loss_weight for g in file.read(file.chunks(5)[0])] == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_those_that_are_none_go_to_quarantine(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(32)
    graphs[3].loss_weight, graphs[7].loss_weight, graphs[9].loss_weight = -1.0, float("nan"), 1e300
    path = write_file(tmp_path / "a.xyz", graphs, "loss_weight")
    with pytest.raises(
        DataError, match=r"a\.xyz must have at most 1\.00% bad structures; got .*loss_weight.* not finite"
    ):
        run_tool(convert, path, "--out", tmp_path / "set")
    assert run_tool(convert, path, "--out", tmp_path / "set", "--drop-faulty", "--split", "21,4,4") == 0
    bad = [(b.record, b.reason, b.got) for b in iter_quarantine(tmp_path / "set" / "quarantine.jsonl")]
    assert bad == [
        (3, "loss_weight below zero", "-1"),
        (7, "loss_weight not finite", "nan or infinity"),
        (9, "loss_weight not finite", "1e+300"),
    ]
    assert load_manifest(tmp_path / "set").schema == 2, "all that are left are 1"


def test_texts_are_no_weights(tmp_path: Path, make_water) -> None:
    ase.io.write(tmp_path / "a.xyz", [to_atoms(make_water(1)[0], loss_weight="much")], format="extxyz")
    with pytest.raises(
        DataError, match=r"a\.xyz:0 loss_weight must be numbers; got 'much'\. Correct the file or --keys"
    ):
        read_structures(tmp_path / "a.xyz", {})


def test_all_of_zero_are_refused(tmp_path: Path, make_water, run_tool) -> None:
    graphs = [dataclasses.replace(g, loss_weight=0.0) for g in make_water(32)]
    path = write_file(tmp_path / "a.xyz", graphs, "loss_weight")
    with pytest.raises(
        DataError, match=r"a must have a loss_weight above zero in its training split; got zero for all"
    ):
        run_tool(convert, path, "--out", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_help_names_the_key() -> None:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    assert "loss_weight=config_weight" in text
    assert "`loss_weight` of each structure" in text


# ------------------------------------------------------------------------------------------------------------- data sets


def write(folder: Path, graphs: list[Graph]) -> Path:
    options = {"name": "toy", "level_of_theory": "springs", "licence": "MIT", "seed": 0, "split": "20,6,6"}
    write_dataset(folder, graphs, provenance={"tool": "test"}, **options)  # type: ignore[arg-type]
    return folder


def test_they_change_neither_splits_nor_order_nor_statistics(tmp_path: Path, make_water) -> None:
    plain, weighted = (write(tmp_path / n, g) for n, g in (("a", make_water(32)), ("b", weigh(make_water(32)))))
    one, other = load_manifest(plain), load_manifest(weighted)
    assert (one.schema, other.schema) == (2, 3)
    assert (one.statistics, one.splits, one.label_counts) == (other.statistics, other.splits, other.label_counts)
    assert (plain / "index.safetensors").stat().st_size == (weighted / "index.safetensors").stat().st_size
    with open_dataset(plain) as first, open_dataset(weighted) as second:
        for split in SPLITS:
            energies = [[g.energy for g in dataset.iter_graphs(split)] for dataset in (first, second)]
            assert energies[0] == energies[1]


def test_the_hash_of_what_has_no_weight_is_what_it_was() -> None:
    """The order of conformers with one geometry goes by it, and a data set that is made again must be the same."""
    graph = Graph(
        atomic_numbers=np.array([8, 1, 1]), positions=np.arange(9.0).reshape(3, 3), energy=-1.5, forces=np.ones((3, 3)),
        group="water",
    )  # fmt: skip
    assert runs.hash_content(graph).hex() == "639308de3662b99317219d2f6de7e3a4"
    assert len({runs.hash_content(dataclasses.replace(graph, loss_weight=w)) for w in (1.0, 0.0, 0.5)}) == 3


def test_structures_that_differ_in_them_alone_are_no_duplicates(tmp_path: Path, make_water) -> None:
    graphs = weigh(make_water(32))
    twins = [dataclasses.replace(graphs[5], loss_weight=9.0), graphs[5]]
    written = load_manifest(write(tmp_path / "set", graphs[:-1] + twins[:1]))
    assert sum(written.num_conformers(s) for s in SPLITS) == 32
    assert sum(g.loss_weight == 9.0 for g in load_all(tmp_path / "set")) == 1


def test_inspect_and_reports_say_what_they_are(tmp_path: Path, make_water, run_tool, capsys) -> None:
    folder = write(tmp_path / "set", weigh(make_water(32)))
    assert run_tool(inspect, folder) == 0
    found = load_manifest(folder).loss_weights["train"]
    line = f"loss weights: train 0 to 1.75, mean {found['mean']:.4g}, not 1 for {found['num_other']} of 20; "
    assert line in capsys.readouterr().out
    report.write_report(folder, tmp_path / "a.html")
    assert f"L{line[1:-2]}" in (tmp_path / "a.html").read_text()
    assert run_tool(inspect, write(tmp_path / "plain", make_water(32))) == 0
    assert "loss weights" not in capsys.readouterr().out


def test_a_manifest_that_says_something_else_is_found(tmp_path: Path, make_water) -> None:
    folder = write(tmp_path / "set", weigh(make_water(32)))
    assert validate.validate(folder).errors == []
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    for change in ({"max": 2.0}, {"mean": 1.0}, {"num_other": 1}):
        weights = {**whole["loss_weights"], "train": {**whole["loss_weights"]["train"], **change}}
        path.write_text(json.dumps(whole | {"loss_weights": weights}))
        (line,) = validate.validate(folder).errors
        assert f"{path} must say of the loss weights {{'train': {{'num_other': " in line
    whole.pop("loss_weights")
    path.write_text(json.dumps(whole))
    (line,) = validate.validate(folder).errors
    assert "must say of the loss weights" in line
    assert "got {}" in line


def test_validate_finds_a_set_of_zeros(tmp_path: Path, make_water, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tool without the check of `write_index_and_manifest` would write it."""
    monkeypatch.setattr("so3krates_dist.data.shards.check_not_all_zero", lambda *_: None)
    folder = write(tmp_path / "set", [dataclasses.replace(g, loss_weight=0.0) for g in make_water(32)])
    (line,) = validate.validate(folder).errors
    assert line.startswith(
        f"{folder / 'manifest.json'} must have a loss_weight above zero in its training split; got zero"
    )
