"""Converting: keys, units, faulty structures, and two real sets where they are at hand."""

from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from conversion_files import assert_same_structures, load_all, write_npz, write_xyz

from data_tools import convert, gate
from data_tools.quarantine import iter_quarantine
from data_tools.readers import read_structures
from data_tools.validate import validate
from so3krates_dist.data.shards import SPLITS, load_manifest
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.units import ENERGY_UNITS, KCAL_PER_MOL_EV


def test_names_of_rmd17_are_known(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(30)
    arrays = {
        "nuclear_charges": graphs[0].atomic_numbers,
        "coords": np.stack([g.positions for g in graphs]),
        "energies": np.array([g.energy for g in graphs]) / KCAL_PER_MOL_EV,
        "forces": np.stack([g.forces for g in graphs]) / KCAL_PER_MOL_EV,
        "old_indices": np.arange(30),
    }
    np.savez(tmp_path / "rmd17.npz", **arrays)
    assert run_tool(convert, tmp_path / "rmd17.npz", "--out", tmp_path / "set", "--group", "my-water") == 0
    assert_same_structures(load_all(tmp_path / "set"), graphs)
    assert load_manifest(tmp_path / "set").groups == {"my-water": 30}


def test_padded_and_periodic_npz(tmp_path: Path, make_water) -> None:
    graphs = make_water(2)
    padded = np.array([[8, 1, 1], [8, 1, 0]])
    path = write_npz(tmp_path / "a.npz", graphs, z=padded, unit_cell=9 * np.eye(3), pbc=np.array([True, True, False]))
    first, second = read_structures(path, {}).graphs
    assert (first.num_atoms, second.num_atoms) == (3, 2)
    assert second.forces.shape == (2, 3)
    assert second.cell.tolist() == (9 * np.eye(3)).tolist()
    assert first.pbc.tolist() == [True, True, False]


def test_dipoles_and_hirshfeld_ratios_of_an_npz(tmp_path: Path, make_water, run_tool) -> None:
    graphs, rng = make_water(30), np.random.default_rng(0)
    ratios, dipoles = rng.uniform(0.6, 1.0, (30, 3)), rng.normal(size=(30, 3))
    path = write_npz(tmp_path / "water.npz", graphs, hirshfeld_ratios=ratios, dipole=dipoles)
    assert run_tool(convert, path, "--out", tmp_path / "set") == 0
    assert load_manifest(tmp_path / "set").labels == ("energy", "forces", "dipole", "hirshfeld_ratios")
    by_energy = {round(g.energy, 6): index for index, g in enumerate(graphs)}
    for found in load_all(tmp_path / "set"):
        index = by_energy[round(found.energy, 6)]
        np.testing.assert_allclose(found.hirshfeld_ratios, ratios[index], rtol=1e-6)
        np.testing.assert_allclose(found.dipole, dipoles[index], rtol=1e-6)
    padded = write_npz(tmp_path / "a.npz", graphs[:2], z=np.array([[8, 1, 1], [8, 1, 0]]), hirshfeld_ratios=ratios[:2])
    second = read_structures(padded, {}).graphs[1]
    assert second.hirshfeld_ratios.tolist() == ratios[1, :2].tolist()


def test_hirshfeld_ratios_of_an_extxyz(tmp_path: Path, make_water) -> None:
    frames = []
    for number, graph in enumerate(make_water(2)):
        atoms = ase.Atoms(graph.atomic_numbers, graph.positions, info={"dipole": [0.0, 0.1, number]})
        atoms.arrays["hirshfeld_ratios"] = np.array([0.9, 0.7, 0.1 * number])
        atoms.calc = SinglePointCalculator(atoms, energy=graph.energy, forces=graph.forces)
        frames.append(atoms)
    ase.io.write(tmp_path / "water.xyz", frames, format="extxyz")
    found = read_structures(tmp_path / "water.xyz", {}).graphs
    assert [g.hirshfeld_ratios.tolist() for g in found] == [[0.9, 0.7, 0.0], [0.9, 0.7, 0.1]]
    assert found[1].dipole.tolist() == [0.0, 0.1, 1.0]
    for frame in frames:
        frame.arrays["hirshfeld_ratios"][1] = np.nan
    ase.io.write(tmp_path / "bad.xyz", frames, format="extxyz")
    problem = gate.find_problem(read_structures(tmp_path / "bad.xyz", {}).graphs[0], 50.0)
    assert problem is not None
    assert problem.reason == "hirshfeld_ratios not finite"


@pytest.mark.parametrize("prefix", [None, "REF_", "my_"])
def test_extxyz_with_known_or_named_keys(tmp_path: Path, make_water, run_tool, capsys, prefix) -> None:
    graphs = make_water(30)
    path = write_xyz(tmp_path / "water.xyz", graphs, prefix=prefix)
    keys = ["--keys", "energy=my_energy", "forces=my_forces"] if prefix == "my_" else []
    assert run_tool(convert, path, "--out", tmp_path / "set", *keys) == 0
    assert_same_structures(load_all(tmp_path / "set"), graphs)
    text = capsys.readouterr().out
    assert "energy unit: eV (ASE's convention)" in text
    assert "units check: agrees: energies follow forces with slope 1.0" in text
    assert load_manifest(tmp_path / "set").provenance["keys"]["energy"] == f"{prefix or ''}energy"


def test_stress_cell_charge_and_spin_come_over(tmp_path: Path) -> None:
    atoms = ase.Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], cell=[4, 5, 6], pbc=True)
    atoms.info |= {"charge": 0, "spin": 2, "config_type": "radical"}
    atoms.calc = SinglePointCalculator(
        atoms, energy=-2050.0, forces=np.zeros((2, 3)), stress=np.arange(1.0, 7.0), dipole=[0, 0, 1]
    )
    molecule = ase.Atoms("OH", [[0, 0, 0], [0, 0, 0.98]])
    molecule.info |= {"charge": -1, "spin": 1}
    molecule.calc = SinglePointCalculator(
        molecule, energy=-2051.0, forces=np.zeros((2, 3)), stress=np.zeros(6), dipole=[0, 0, 2.0]
    )
    ase.io.write(tmp_path / "oh.xyz", [atoms, molecule], format="extxyz")
    first, second = read_structures(tmp_path / "oh.xyz", {}).graphs
    assert first.stress.tolist() == [[1, 6, 5], [6, 2, 4], [5, 4, 3]]
    assert first.pbc.all()
    assert (first.num_unpaired_electrons, first.total_charge, first.group) == (1, 0, "radical")
    assert (second.num_unpaired_electrons, second.total_charge, second.group) == (0, -1, "HO")
    assert second.pbc is not None
    assert not second.is_periodic
    assert second.dipole.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("key", "value", "unpaired"),
    [
        ("spin", 3, 2),
        ("spin", 2, 2),
        ("multiplicity", 3, 2),
        ("spin_multiplicity", 1, 0),
        ("uhf", 2, 2),
        ("spin", 0, 0),
    ],
)
def test_what_spin_means_is_told_by_the_parity_of_the_electrons(
    tmp_path: Path, make_water, key, value, unpaired
) -> None:
    path = write_xyz(tmp_path / "water.xyz", make_water(1), info={key: value})
    assert read_structures(path, {}).graphs[0].num_unpaired_electrons == unpaired


@pytest.mark.parametrize(
    ("key", "value", "unpaired"), [("uhf", 2, 2), ("uhf", 1, 1), ("multiplicity", 3, 2), ("spin", 3, 2), ("spin", 2, 2)]
)
def test_spin_in_an_npz_means_what_its_key_says(tmp_path: Path, make_water, key, value, unpaired) -> None:
    path = write_npz(tmp_path / "water.npz", make_water(1), **{key: np.array([value])})
    assert read_structures(path, {}).graphs[0].num_unpaired_electrons == unpaired


def test_isolated_atoms_reach_the_statistics(tmp_path: Path, make_water, run_tool) -> None:
    path = write_npz(tmp_path / "water.npz", make_water(20))
    atoms = {"z": np.array([[1], [8]]), "R": np.zeros((2, 1, 3)), "E": np.array([-313.0, -47000.0])}
    np.savez(tmp_path / "atoms.npz", **atoms)
    assert run_tool(convert, path, "--out", tmp_path / "set", "--isolated-atoms", tmp_path / "atoms.npz") == 0
    manifest = load_manifest(tmp_path / "set")
    expected = {"1": -313.0 * KCAL_PER_MOL_EV, "8": -47000.0 * KCAL_PER_MOL_EV}
    assert manifest.statistics["isolated_atom_energies"] == pytest.approx(expected)
    assert [s["file"] for s in manifest.provenance["sources"]] == ["water.npz", "atoms.npz"]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([[1, 1]], r"atoms.npz:0 must be one atom with an energy; got 2 atoms"),
        ([[1], [1]], r"atoms.npz:1 must have each element once; got H"),
    ],
)
def test_isolated_atoms_that_are_none_are_refused(tmp_path: Path, make_water, run_tool, numbers, message: str) -> None:
    path = write_npz(tmp_path / "water.npz", make_water(20))
    z = np.array(numbers)
    np.savez(tmp_path / "atoms.npz", z=z, R=np.arange(z.size * 3.0).reshape(*z.shape, 3), E=np.full(len(z), -13.6))
    with pytest.raises(DataError, match=message):
        run_tool(convert, path, "--out", tmp_path / "set", "--isolated-atoms", tmp_path / "atoms.npz")


# ------------------------------------------------------------------------------------------------- what a user can do wrong


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"E": None, "F": None}, [], r"water.npz must have labels \(energy, forces\); got none that is known. Name"),
        ({"E": None}, [], "water.npz must have energies that tell the energy unit; got none. Give --energy-unit"),
        ({"E": np.linspace(-9, -8, 20)}, [], "water.npz must have total energies of all electrons, .*; got -2.8.* per atom"),
        ({"energy": np.zeros(20)}, [], "water.npz must have one key for energy; got energy and E. Choose with --keys energy=KEY"),
        ({}, ["--keys", "energy=U"], "water.npz must have the key `U` for energy; got E, F, R, z. Correct --keys"),
        ({}, ["--keys", "enery=E"], "--keys enery=E must map a label to a key of the file; got 'enery=E'"),
        ({}, ["--keys", "energy"], "--keys energy must map a label to a key of the file"),
        ({"z": None}, [], "water.npz must have atomic_numbers; got E, F, R. Name its key with --keys"),
        ({"R": np.zeros((20, 9))}, [], r"water.npz positions must have shape \(conformers, atoms, 3\); got \(20, 9\)"),
        ({"z": np.array([8.0, np.nan, 1.0])}, [], r"whole atomic numbers from 1 to 118 \(0 is padding\); got nan"),
        ({"z": np.array([[8, 1, 1]] * 7 + [[8, 1, -1]] + [[8, 1, 1]] * 12)}, [], "water.npz:7 must have whole atomic .*; got -1"),
        ({"z": np.array([6.5, 1, 1])}, [], "water.npz:0 must have whole atomic numbers .*; got 6.5"),
        ({"z": np.array([200, 1, 1])}, [], "water.npz:0 must have whole atomic numbers .*; got 200. Correct the file or --keys"),
        ({"z": np.array([0, 0, 0])}, ["--energy-unit", "eV", "--length-unit", "Angstrom"], "npz:0 must have atomic numbers"),
        ({"uhf": np.ones(20)}, [], "water.npz:0 H2O must have as many paired .*; got 10 electrons with 1 unpaired at charge 0"),
        ({"Q": np.full(20, np.nan)}, [], "water.npz:0 H2O must have finite total_charge; got nan or infinity"),
        ({"cell": np.full((3, 3), np.nan)}, [], "water.npz:0 H2O must have finite cell; got nan or infinity"),
        ({"cell": np.zeros((3, 3))}, [], "water.npz:0 H2O must have a cell that is not flat along its .*; got 0.000 Å"),
        ({"E": np.full(20, np.nan)}, [], "water.npz must have energies that tell the energy unit; got none"),
        ({}, ["--max-force", "nan"], "--max-force must be a positive, finite number of eV/Å; got nan. Give one like 50"),
        ({}, ["--max-force", "-1"], "--max-force must be a positive, finite number of eV/Å; got -1.0"),
        ({"E": np.zeros(7)}, [], r"water.npz energy must have 20 rows like positions; got \(7,\)"),
        ({"F": np.zeros((20, 2, 3))}, [], r"water.npz:0 forces must have shape \(3, 3\); got \(2, 3\)"),
        ({"E": np.array(["low"] * 20)}, [], "water.npz:0 energy must be numbers; got"),
        ({}, ["--max-force", "1e-9"], "water.npz:0 H2O must have forces of at most 1e-09 eV/Å; got"),
        ({"Q": np.ones(20)}, [], r"water.npz:0 H2O must have as many paired .*; got 9 electrons with 0 unpaired at charge 1"),
        ({"R": np.zeros((20, 3, 3))}, ["--energy-unit", "kcal/mol", "--length-unit", "Angstrom"], "H2O must have its atoms at"),
        ({"R": np.zeros((20, 3, 3))}, [], "water.npz must have bond lengths in Å; got 0.00 times the usual ones. Give"),
        ({}, ["--force-unit", "kcal"], "--force-unit must be an energy unit, a slash and a length unit; got 'kcal'"),
        ({}, ["--force-unit", "Hartree/Bohr"], "lengths in units that agree; got .*forces with an RMS of 1.81e.03"),
        ({}, ["--split", "1,2"], "--split must be three numbers"),
        ({}, ["--max-bad-share", "2"], "--max-bad-share must be a share from 0 to 1; got 2.0. Give one like 0.01"),
        ({}, ["--max-energy-mads", "nan"], "--max-energy-mads must be above zero; got nan. Give one like 50, or inf"),
        ({}, ["--workers", "0"], "--workers must be at least 1; got 0. Give a larger number"),
        ({}, ["--chunk-size", "0"], "--chunk-size must be at least 1; got 0. Give a larger number"),
        ({}, ["--part", "0/3"], "--part must be K/N with K from 1 to N; got '0/3'. Give one like 3/8"),
        ({}, ["--part", "x"], "--part must be K/N with K from 1 to N; got 'x'"),
        ({}, ["--layout", "csv"], "--layout csv must be one of extxyz, .*; got 'csv'"),
    ],
)  # fmt: skip
def test_bad_npz_files_and_options(tmp_path: Path, make_water, run_tool, change, words, message: str) -> None:
    path = write_npz(tmp_path / "water.npz", make_water(20), **change)
    with pytest.raises(DataError, match=message) as caught:
        run_tool(convert, path, "--out", tmp_path / "set", *words)
    listed = ["set.quarantine.jsonl"] if " must have at most 1.00% bad structures; got " in str(caught.value) else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [*listed, "water.npz"]


def test_labels_that_only_some_frames_have_are_left_out(tmp_path: Path, capsys) -> None:
    frames = []
    for dipole in ({"dipole": [0.0, 0.0, 1.0]}, {}):
        atoms = ase.Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], info={"charge": -1})
        atoms.calc = SinglePointCalculator(atoms, energy=-2050.0, forces=np.zeros((2, 3)), **dipole)
        frames.append(atoms)
    ase.io.write(tmp_path / "oh.xyz", frames, format="extxyz")
    structures = read_structures(tmp_path / "oh.xyz", {})
    assert all(g.dipole is None and g.forces is not None for g in structures.graphs)
    assert set(structures.keys) == {"energy", "forces", "total_charge"}
    assert capsys.readouterr().out == "oh.xyz: dipole is left out, only 1 of 2 structures have `dipole`\n"


def test_faulty_structures_are_refused_or_dropped_and_counted(tmp_path: Path, make_water, run_tool, capsys) -> None:
    graphs = make_water(30)
    graphs[7].energy = float("nan")
    graphs[9].forces = 1e4 * graphs[9].forces
    path = write_npz(tmp_path / "water.npz", graphs)
    words = ["--energy-unit", "kcal/mol", "--length-unit", "Angstrom"]
    message = r"water.npz must have at most 1.00% bad structures; got 2 of 30 .*; the first one: water.npz:7 H2O must have finite e"
    with pytest.raises(DataError, match=message) as caught:
        run_tool(convert, path, "--out", tmp_path / "set", *words)
    listed = tmp_path / "set.quarantine.jsonl"
    assert str(listed) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.quarantine.jsonl", "water.npz"]
    assert [(b.source, b.record, b.reason) for b in iter_quarantine(listed)] == [
        ("water.npz", 7, "energy not finite"),
        ("water.npz", 9, "force too large"),
    ]
    assert run_tool(convert, path, "--out", tmp_path / "allowed", *words, "--max-bad-share", "0.1") == 0
    assert (tmp_path / "allowed" / "quarantine.jsonl").read_bytes() == listed.read_bytes()
    assert "faulty structures: 2 of 30 (6.67%): 1 for energy not finite" in capsys.readouterr().out
    assert run_tool(convert, path, "--out", tmp_path / "set", *words, "--drop-faulty") == 0
    assert run_tool(convert, path, "--out", tmp_path / "recognised", "--drop-faulty") == 0, "nan tells no unit"
    assert load_manifest(tmp_path / "set").provenance["dropped"] == {"energy not finite": 1, "force too large": 1}
    assert "dropped: 1 for energy not finite, 1 for force too large\n" in capsys.readouterr().out
    assert run_tool(convert, write_npz(tmp_path / "good.npz", make_water(30)), "--out", tmp_path / "good") == 0
    assert not (tmp_path / "good" / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"PK not a zip", "a.npz", r"a.npz must be a readable npz archive; got"),
        (b"", "a.npz", r"a.npz must hold structures; got an empty file. Copy or download it again"),
        (b"\n<!DOCTYPE html><html>404", "a.h5", r"a.h5 must hold structures; got a web page \(HTML\). Download it again"),
        (b"<html>404</html>", "a.npz", r"a.npz must hold structures; got a web page \(HTML\). Download it again"),
        (b"1\nenergy=-1\nH 0 0 0\n2\n\nH 0 0 0\n", "a.xyz", "got record 1 of 2 atoms cut short. Copy it again, or remove"),
        (b"3\nnonsense\nO 0 0\n", "a.xyz", r"a.xyz must be readable by ASE; got"),
        (b"?", "a.unknown", r"a.unknown must be readable by ASE; got a format that neither content nor name tell"),
        (b"2\nlabel=-1.0\nH 0 0 0\nH 0 0 0.7\n", "a.xyz", r"a.xyz must have labels \(energy, forces\); got none"),
        (b"2\nenergy=-1.0 REF_energy=-2.0\nH 0 0 0\nH 0 0 0.7\n", "a.xyz", "one key for energy; got energy and REF_energy"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, run_tool, content: bytes, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run_tool(convert, tmp_path / name, "--out", tmp_path / "set")


def test_frames_without_labels_are_left_out_and_counted(tmp_path: Path, run_tool, capsys) -> None:
    frames = [f"2\nenergy={-31.7 - z}\nH 0 0 0\nH 0 0 {0.7 + z}\n" for z in (0.0, 0.1, 0.2)]
    (tmp_path / "a.xyz").write_text("".join([*frames, "2\nx=1\nH 0 0 0\nH 0 0 0.8\n"]))
    assert run_tool(convert, tmp_path / "a.xyz", "--out", tmp_path / "set", "--split", "3,0,0") == 0
    assert load_manifest(tmp_path / "set").provenance["dropped"] == {"no energy and no forces": 1}
    assert not (tmp_path / "set" / "quarantine.jsonl").exists(), "a structure without labels is no bad one"


def test_an_xyz_without_structures_is_refused(tmp_path: Path, run_tool) -> None:
    (tmp_path / "empty.json").write_text('{"ids": [], "nextid": 1}')
    with pytest.raises(DataError, match=r"empty.json must (hold structures|be readable by ASE); got"):
        run_tool(convert, tmp_path / "empty.json", "--out", tmp_path / "set")


def test_pickled_arrays_are_refused(tmp_path: Path, run_tool) -> None:
    np.savez(tmp_path / "a.npz", z=np.array([8, 1, 1]), R=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"a.npz must be a readable npz archive; got Object arrays cannot be loaded"):
        run_tool(convert, tmp_path / "a.npz", "--out", tmp_path / "set")


def make_molecules(num: int) -> list[Graph]:
    """Make chains of helium atoms with energies that baselines explain up to 10 meV/atom."""
    generator = np.random.default_rng(3)
    graphs = []
    for _ in range(num):
        size = int(generator.integers(1, 6))
        positions = np.cumsum(generator.uniform(0.3, 0.4, (size, 3)), axis=0)
        energy = -79.0 * size + 0.01 * size * float(generator.standard_normal())
        forces = 0.1 * generator.standard_normal((size, 3))
        graphs.append(Graph(atomic_numbers=np.full(size, 2), positions=positions, energy=energy, forces=forces))
    return graphs


def test_energies_far_off_the_baselines_go_to_quarantine(tmp_path: Path, run_tool) -> None:
    graphs = make_molecules(400)
    sizes = [g.num_atoms for g in graphs]
    large, small, single = sizes.index(5), sizes.index(4), sizes.index(1)
    graphs[large].energy += 25.0
    graphs[small].energy += 3.0  # 0.75 eV/atom, 75 deviations: strange, but not impossible
    graphs[single].energy += 8.0  # free atoms are not bound
    path = write_xyz(tmp_path / "he.xyz", graphs)
    assert run_tool(convert, path, "--out", tmp_path / "set", "--chunk-size", "50") == 0
    assert load_manifest(tmp_path / "set").provenance["dropped"] == {"energy off the baselines": 1}
    (bad,) = iter_quarantine(tmp_path / "set" / "quarantine.jsonl")
    assert (bad.source, bad.record, bad.num_atoms) == ("he.xyz", large, 5)
    assert bad.rule == "have an energy within 1 eV/atom of the usual"
    assert bad.got.startswith("5.01 eV/atom off, 6")
    assert run_tool(convert, path, "--out", tmp_path / "all", "--max-energy-mads", "inf") == 0
    assert load_manifest(tmp_path / "all").provenance["dropped"] == {}
    with pytest.raises(
        DataError, match=r"he.xyz must have at most 0.00% bad .*; got 1 of 400 .*: 1 for energy off the baselines"
    ):
        run_tool(convert, path, "--out", tmp_path / "none", "--max-bad-share", "0")
    assert sum(1 for _ in iter_quarantine(tmp_path / "none.quarantine.jsonl")) == 1
    assert not (tmp_path / "none").exists()


def test_several_files_are_one_input(tmp_path: Path, make_water, run_tool) -> None:
    first, second = make_water(20), make_water(15, seed=1)
    second[4].forces = 1e5 * second[4].forces
    (tmp_path / "in").mkdir()
    paths = [write_xyz(tmp_path / "in" / n, g) for n, g in (("a.xyz", first), ("b.xyz", second))]
    for name, inputs in (("files", paths), ("folder", [tmp_path / "in"])):
        words = ["--out", tmp_path / name, "--name", "water", "--max-bad-share", "0.1"]
        assert run_tool(convert, *inputs, *words) == 0
        (bad,) = iter_quarantine(tmp_path / name / "quarantine.jsonl")
        assert (bad.source, bad.record) == ("b.xyz", 4)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("files", "folder")]
    assert manifests[0] == manifests[1]
    assert [s["file"] for s in load_manifest(tmp_path / "files").provenance["sources"]] == ["a.xyz", "b.xyz"]


def test_missing_input_and_existing_output(tmp_path: Path, make_water, run_tool) -> None:
    with pytest.raises(DataError, match=r"nothing.npz must be a file; got nothing there"):
        run_tool(convert, tmp_path / "nothing.npz", "--out", tmp_path / "set")
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"set must not exist yet; got a folder"):
        run_tool(convert, tmp_path / "nothing.npz", "--out", tmp_path / "set")


# ----------------------------------------------------------------------------------------------------------------- real data


def test_md17_ethanol(data_dir: Path, tmp_path: Path, run_tool, capsys) -> None:
    words = ["--split", "950,50,1000", "--group", "ethanol"]
    assert run_tool(convert, data_dir / "md17" / "ethanol.npz", "--out", tmp_path / "set", *words) == 0
    assert "energy unit: kcal/mol (recognised: 1.009" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "set")
    assert [manifest.num_conformers(s) for s in SPLITS] == [950, 50, 1000]
    assert manifest.statistics["force_rms"] == pytest.approx(0.94, abs=0.02)
    report = validate(tmp_path / "set")
    assert (report.errors, report.warnings) == ([], [])


def test_3bpa(data_dir: Path, tmp_path: Path, run_tool, capsys) -> None:
    isolated = data_dir / "3bpa" / "iso_atoms.xyz"
    words = ["--isolated-atoms", isolated, "--group", "3bpa"]
    assert run_tool(convert, data_dir / "3bpa" / "train_300K.xyz", "--out", tmp_path / "set", *words) == 0
    assert "energy unit: eV (ASE's convention)" in capsys.readouterr().out
    statistics = load_manifest(tmp_path / "set").statistics
    assert statistics["isolated_atom_energies"]["8"] == pytest.approx(-2041.98, abs=0.01)
    assert all(-10 < statistics["energy_baselines"][z] - e < 0 for z, e in statistics["isolated_atom_energies"].items())
    raw = {
        g.positions.astype(np.float32).tobytes(): g
        for g in read_structures(data_dir / "3bpa" / "train_300K.xyz", {}).graphs
    }
    for graph in load_all(tmp_path / "set"):
        np.testing.assert_allclose(graph.forces, raw[graph.positions.tobytes()].forces, atol=1e-6)
    report = validate(tmp_path / "set")
    assert (report.errors, report.warnings) == ([], [])


def test_stress_may_be_nine_numbers(tmp_path: Path) -> None:
    lattice = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3'
    (tmp_path / "a.xyz").write_text(f'1\n{lattice} energy=-1 REF_stress="1 2 3 2 5 6 3 6 9"\nHe 0 0 0\n')
    assert read_structures(tmp_path / "a.xyz", {}).graphs[0].stress.tolist() == [[1, 2, 3], [2, 5, 6], [3, 6, 9]]


def test_labels_that_only_some_structures_have_are_converted(tmp_path: Path, make_water, run_tool, capsys) -> None:
    h5py = pytest.importorskip("h5py")
    graphs = make_water(60)
    hartree = ENERGY_UNITS["Hartree"]
    energies = np.array([g.energy for g in graphs]) / hartree
    forces = np.stack([g.forces for g in graphs]) / hartree
    energies[:6], forces[3:20] = np.nan, np.nan
    with h5py.File(tmp_path / "ani1x.h5", "w") as file:
        group = file.create_group("H2O")
        group["atomic_numbers"], group["coordinates"] = (
            graphs[0].atomic_numbers,
            np.stack([g.positions for g in graphs]),
        )
        group["wb97x_dz.energy"], group["wb97x_dz.forces"] = energies, forces
    words = ["--out", tmp_path / "set", "--split", "40,10,7", "--chunk-size", "25"]
    assert run_tool(convert, tmp_path / "ani1x.h5", *words) == 0
    assert "energy unit: Hartree (ANI-1x's documentation)" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "set")
    assert manifest.labels == ("energy", "forces")
    counts = {label: sum(manifest.label_counts[s][label] for s in SPLITS) for label in manifest.labels}
    assert counts == {"energy": 54, "forces": 43}
    assert manifest.provenance["dropped"] == {"no energy and no forces": 3}
    found = {g.positions.tobytes(): g for g in load_all(tmp_path / "set")}
    for number, graph in enumerate(graphs):
        if not 3 <= number < 6:
            stored = found[graph.positions.astype(np.float32).tobytes()]
            assert (stored.energy is None, stored.forces is None) == (number < 6, 3 <= number < 20)
            assert stored.energy is None or stored.energy == pytest.approx(graph.energy)
