"""Generating: real RDKit, real tblite, on the smallest of cases."""

import argparse
import multiprocessing
import os
import signal
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest

from data_tools import generate, molecules, sampling, xtb
from data_tools.processes import start_pool
from data_tools.sampling import Molecule, Sample, SamplingError, Task, run_task
from data_tools.validate import validate
from data_tools.xtb import Labeller, Labels, XtbError, compute_isolated_atoms
from so3krates_dist.data.shards import SPLITS, iter_graphs, load_manifest
from so3krates_dist.errors import DataError

WATER = Molecule("water", np.array([8, 1, 1]), positions=np.array([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]]))


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return parser.parse_args([str(w) for w in words])


def load_all(folder: Path):
    manifest = load_manifest(folder)
    return manifest, [g for s in SPLITS for g in iter_graphs(folder, manifest, s)]


# ------------------------------------------------------------------------------------------------------------- labels


def test_forces_are_minus_the_gradient_of_the_energy() -> None:
    labeller = Labeller(WATER.atomic_numbers, 0.0, 0.0)
    positions = WATER.positions + 0.03 * np.random.default_rng(0).standard_normal((3, 3))
    forces, step = labeller.label(positions).forces, 1e-3
    for atom, axis in ((0, 2), (1, 1), (2, 0)):
        shift = np.zeros((3, 3))
        shift[atom, axis] = step
        slope = (labeller.label(positions + shift).energy - labeller.label(positions - shift).energy) / (2 * step)
        assert forces[atom, axis] == pytest.approx(-slope, abs=2e-4)


def test_a_label_does_not_depend_on_the_one_before() -> None:
    labeller = Labeller(WATER.atomic_numbers, 0.0, 0.0)
    first = labeller.label(WATER.positions)
    labeller.label(1.1 * WATER.positions)
    again = labeller.label(WATER.positions)
    assert first.energy == again.energy
    assert np.array_equal(first.forces, again.forces)


def test_warm_electrons_round_off_the_cusp_of_a_twisted_double_bond() -> None:
    ethylene = np.array([6, 6, 1, 1, 1, 1])

    def twist(degrees: float) -> np.ndarray:
        x, y = 0.93 * np.cos(np.radians(degrees)), 0.93 * np.sin(np.radians(degrees))
        return np.array([[0, 0, 0], [0, 0, 1.33], [0.93, 0, -0.55], [-0.93, 0, -0.55], [x, y, 1.88], [-x, -y, 1.88]])

    def bend(temperature: float) -> float:
        labeller = Labeller(ethylene, 0.0, 0.0, temperature)
        below, top, above = (labeller.label(twist(degrees)).energy for degrees in (85.0, 90.0, 95.0))
        return top - (below + above) / 2

    assert 0 < 2 * bend(3000.0) < bend(xtb.ELECTRONIC_TEMPERATURE), "a maximum that is rounder"
    default = Labeller(ethylene, 0.0, 0.0).label(twist(80.0)).energy
    calculator = Labeller(ethylene, 0.0, 0.0, xtb.ELECTRONIC_TEMPERATURE + 1e-9)  # told to tblite, unlike the default
    assert calculator.label(twist(80.0)).energy == pytest.approx(default, abs=1e-9)


def test_dipoles_and_charges() -> None:
    water = Labeller(WATER.atomic_numbers, 0.0, 0.0).label(WATER.positions)
    assert water.dipole[2] == pytest.approx(-0.45, abs=0.1), "e Å: 2.2 Debye, from O to the hydrogens"
    assert water.partial_charges[0] < -0.3
    ion = Molecule("hydronium", np.array([8, 1, 1, 1]), 1.0)
    positions = np.array([[0, 0, 0.2], [0.9, 0, 0], [-0.45, 0.78, 0], [-0.45, -0.78, 0.1]])
    here = Labeller(ion.atomic_numbers, 1.0, 0.0).label(positions)
    there = Labeller(ion.atomic_numbers, 1.0, 0.0).label(positions + np.array([10.0, -5.0, 3.0]))
    assert here.partial_charges.sum() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(here.dipole, there.dipole, atol=1e-4, err_msg="the origin is the centre of mass")


def test_unpaired_electrons_are_polarised() -> None:
    """Without spin polarisation GFN2 puts the singlet and the triplet of O2 at the same energy but for occupations."""
    oxygen, positions = np.array([8, 8]), np.array([[0, 0, 0], [0, 0, 1.21]])
    triplet, singlet = Labeller(oxygen, 0, 2).label(positions), Labeller(oxygen, 0, 0).label(positions)
    assert singlet.energy - triplet.energy > 0.3


def test_isolated_atoms_are_above_their_molecule() -> None:
    atoms = compute_isolated_atoms((1, 6, 8))
    assert list(atoms) == [1, 6, 8]
    assert atoms[1] == pytest.approx(-11.68, abs=0.1), "spin-polarised GFN2, eV"
    water = Labeller(WATER.atomic_numbers, 0.0, 0.0).label(WATER.positions).energy
    assert -20 < water - 2 * atoms[1] - atoms[8] < -5
    counts = xtb._GROUND_STATE_UNPAIRED
    assert len(counts) == xtb.MAX_ELEMENT
    lanthanides = range(57, 72)
    assert all((z - int(n)) % 2 == 0 for z, n in enumerate(counts, start=1) if z not in lanthanides)


def test_failures_are_reported_and_isolated_atoms_that_fail_are_left_out(monkeypatch) -> None:
    with pytest.raises(XtbError, match="Too close interatomic distances"):
        Labeller(np.array([1, 1]), 0.0, 0.0).label(np.zeros((2, 3)))
    monkeypatch.setattr(xtb, "MAX_ITERATIONS", 1)
    with pytest.raises(XtbError, match="SCF not converged in 1 cycles"):
        Labeller(WATER.atomic_numbers, 0.0, 0.0).label(WATER.positions)
    assert compute_isolated_atoms((8,)) == {}


# ----------------------------------------------------------------------------------------------------------- sampling


def test_force_field_gives_the_gradient_of_these_positions() -> None:
    """RDKit gives a stale gradient where the energy of the same positions was not computed just before."""
    field = sampling._ForceField("CCO", 1)
    generator, step = np.random.default_rng(0), 1e-4
    field.compute_forces(field.positions + 0.1 * generator.standard_normal(field.positions.shape))
    positions = field.positions + 0.05 * generator.standard_normal(field.positions.shape)
    shift = np.zeros_like(positions)
    shift[2, 1] = step
    energies = [field._field.CalcEnergy((positions + s).ravel().tolist()) for s in (shift, -shift)]
    slope = (energies[0] - energies[1]) / (2 * step) * 0.0433641
    assert field.compute_forces(positions)[2, 1] == pytest.approx(-slope, rel=1e-3)


def test_dynamics_have_the_temperature_they_were_asked_for() -> None:
    """Potential energy of nearly harmonic methane: 9 of 15 degrees of freedom vibrate, kT/2 each."""
    molecule = Molecule("methane", np.array([6, 1, 1, 1, 1]), smiles="C")
    field = sampling._ForceField("C", 1)
    rest = field._field.CalcEnergy()
    means = {}
    for level in (100.0, 400.0):
        frames = [sampling._run_langevin(Task(molecule, "langevin", level, n, 50, 0)) for n in range(2)]
        means[level] = np.mean([field._field.CalcEnergy(x.ravel().tolist()) for x in np.concatenate(frames)]) - rest
    boltzmann = 0.0019872  # kcal/mol/K
    for level, mean in means.items():
        assert mean == pytest.approx(9 * boltzmann * level / 2, rel=0.3)


def test_samples_depend_on_seed_molecule_level_and_trajectory_alone() -> None:
    task = Task(WATER, "rattle", 0.02, 0, 3, 0)
    again, other = run_task(task), run_task(Task(WATER, "rattle", 0.02, 1, 3, 0))
    assert [s.labels.energy for s in run_task(task)] == [s.labels.energy for s in again]
    assert not {s.labels.energy for s in again} & {s.labels.energy for s in other}
    displacement = np.stack([s.positions for s in run_task(Task(WATER, "rattle", 0.05, 0, 50, 0))]) - WATER.positions
    assert displacement.std() == pytest.approx(0.05, rel=0.15)


def test_molecules_without_a_conformer_are_named() -> None:
    with pytest.raises(SamplingError, match="ETKDG found no conformer of"):
        sampling._ForceField("[C@]12(C[C@H]1C2)(F)", 1)
    with pytest.raises(SamplingError, match="MMFF94 has no parameters for B"):
        sampling._ForceField("B", 1)


@pytest.mark.parametrize("wild", [np.nan, 1e200])
def test_dynamics_that_diverge_are_counted_and_not_labelled(monkeypatch, wild: float) -> None:
    """From the third sample on the force field gives nonsense (a monkeypatched one stands for it)."""
    honest, calls = sampling._ForceField.compute_forces, []

    def diverge(self, positions):
        calls.append(1)
        sane = len(calls) <= sampling.EQUILIBRATION_STEPS + 2 * sampling.STEPS_PER_SAMPLE + 1
        return honest(self, positions) if sane else np.full_like(positions, wild) * np.arange(len(positions))[:, None]

    monkeypatch.setattr(sampling._ForceField, "compute_forces", diverge)
    molecule = Molecule("methane", np.array([6, 1, 1, 1, 1]), smiles="C")
    task = Task(molecule, "langevin", 300.0, 0, 5, 0)
    samples = run_task(task)
    assert [s.labels is None for s in samples] == [False, False, True, True, True]
    graphs, dropped = generate.sort_out([task], [samples], max_force=20.0)
    assert len(graphs) == 2
    assert dropped == {"methane: dynamics diverged": 3}


# ---------------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def smiles_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smiles") / "two.smi"
    path.write_text("# two molecules\nCCO ethanol\n\nC[NH3+]  methyl ammonium\n")
    return path


@pytest.fixture(scope="module")
def generated(tmp_path_factory, smiles_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "set"
    words = ("--smiles", smiles_file, "--num-conformers", 21, "--split", "15,3,3", "--processes", 1, "--licence", "MIT")
    assert generate.run(parse("--out", folder, *words)) == 0
    return folder


def test_generated_data_are_valid_and_complete(generated: Path) -> None:
    manifest, graphs = load_all(generated)
    report = validate(generated)
    assert (report.errors, report.warnings) == ([], [])
    assert manifest.groups == {"ethanol": 11, "methyl ammonium": 10}
    assert manifest.labels == ("energy", "forces", "dipole", "partial_charges")
    assert manifest.level_of_theory == "GFN2-xTB"
    assert {g.total_charge for g in graphs if g.group == "methyl ammonium"} == {1.0}
    assert set(manifest.statistics["isolated_atom_energies"]) == {"1", "6", "7", "8"}
    assert 0.3 < manifest.statistics["force_rms"] < 2.0
    assert max(np.abs(np.asarray(g.forces).sum(0)).max() for g in graphs) < 1e-3


def test_provenance_says_how_it_was_made(generated: Path) -> None:
    provenance = load_manifest(generated).provenance
    assert provenance["sampling"]["smiles"] == {"ethanol": "CCO", "methyl ammonium": "C[NH3+]"}
    assert provenance["sampling"]["temperatures_K"] == [300.0, 500.0]
    assert set(provenance["versions"]) == {"so3krates-dist", "numpy", "ase", "tblite", "rdkit"}
    assert provenance["sources"][0]["file"] == "two.smi"
    assert provenance["dropped"] == {}
    assert "processes" not in provenance


def test_bytes_do_not_depend_on_the_number_of_processes(generated: Path, smiles_file: Path, tmp_path: Path) -> None:
    words = ("--smiles", smiles_file, "--num-conformers", 21, "--split", "15,3,3", "--processes", 2, "--licence", "MIT")
    assert generate.run(parse("--out", tmp_path / "set", *words)) == 0
    for path in generated.iterdir():
        assert path.read_bytes() == (tmp_path / "set" / path.name).read_bytes(), path.name


def test_given_geometries_are_labelled_as_they_are(tmp_path: Path, capsys) -> None:
    water = ase.Atoms(WATER.atomic_numbers, WATER.positions)
    water.info["energy"] = water.info["REF_energy"] = 0.0  # labels that are there already do not matter
    oxygen = ase.Atoms("O2", [[0, 0, 0], [0, 0, 1.2]], info={"multiplicity": 3})
    hydroxide = ase.Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], info={"charge": -1})
    ase.io.write(tmp_path / "three.xyz", [water, oxygen, hydroxide], format="extxyz")
    words = ("--geometries", tmp_path / "three.xyz", "--split", "3,0,0", "--out", tmp_path / "set")
    assert generate.run(parse(*words)) == 0
    _, graphs = load_all(tmp_path / "set")
    by_name = {g.group: g for g in graphs}
    np.testing.assert_array_equal(by_name["H2O"].positions, WATER.positions.astype(np.float32))
    assert by_name["O2"].num_unpaired_electrons == 2
    assert by_name["HO"].total_charge == -1
    assert "labelling 3 conformers of 3 molecules" in capsys.readouterr().out


def test_the_built_in_molecules_come_from_g2_where_rdkit_is_missing(tmp_path: Path, monkeypatch, capsys) -> None:
    assert [m.smiles for m in molecules.load_builtin()] == [smiles for smiles, _ in molecules.BUILTIN.values()]
    with_rdkit = {m.name: sorted(m.atomic_numbers.tolist()) for m in molecules.load_builtin()}
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    without = {m.name: sorted(m.atomic_numbers.tolist()) for m in molecules.load_builtin()}
    assert with_rdkit == without
    assert len(without) == 10
    assert "ethanol" in without
    assert all(5 <= len(n) <= 12 and set(n) <= {1, 6, 7, 8} for n in without.values())
    words = ("--num-conformers", 20, "--split", "20,0,0", "--temperatures", 300)
    assert generate.run(parse("--out", tmp_path / "set", *words)) == 0
    text = capsys.readouterr().out
    assert "RDKit is not installed: the built-in molecules come from ASE's g2 set" in text
    assert "; --temperatures has no effect\n" in text
    assert load_manifest(tmp_path / "set").provenance["sampling"]["displacements_angstrom"] == [0.02, 0.05]


def test_collections_of_ase_have_charge_and_spin_that_fit() -> None:
    g2, s22 = molecules.load_g2(), molecules.load_s22()
    assert len(s22) == 22
    assert len(g2) > 140
    assert next(m for m in g2 if m.name == "O2").num_unpaired_electrons == 2
    assert all((int(m.atomic_numbers.sum()) - m.num_unpaired_electrons) % 2 == 0 for m in (*g2, *s22))
    for words, source in ((["--g2"], "g2 of ASE"), (["--s22"], "s22 of ASE")):
        found = generate._load_molecules(parse("--out", "x", *words))
        assert found[0] == {"collection": source}


def test_conformers_are_shared_out_evenly() -> None:
    found = [molecules._from_smiles(s, n, n) for n, s in (("a", "C"), ("b", "O"), ("c", "N"))]
    tasks = generate.plan_tasks(found, parse("--out", "x", "--num-conformers", 400, "--temperatures", 300, 600))
    assert sum(t.count for t in tasks) == 400
    per_series = {(t.molecule.name, t.level): 0 for t in tasks}
    for task in tasks:
        per_series[task.molecule.name, task.level] += task.count
        assert task.count <= sampling.TRAJECTORY_SAMPLES
    assert sorted(per_series.values()) == [66, 66, 67, 67, 67, 67]
    assert len({(t.molecule.name, t.level, t.number) for t in tasks}) == len(tasks)


def test_failures_and_structures_gone_astray_are_counted_by_name_and_never_written() -> None:
    labels = Labels(-100.0, np.zeros((3, 3)), np.zeros(3), np.zeros(3))
    wild = Labels(-100.0, np.full((3, 3), 50.0), np.zeros(3), np.zeros(3))
    close = np.array([[0, 0, 0], [0, 0, 0.1], [0, 0, 2.0]])
    samples = [
        Sample(WATER.positions, labels),
        Sample(WATER.positions, None, "SCF not converged in 250 cycles"),
        Sample(WATER.positions, None, "SCF not converged in 250 cycles"),
        Sample(WATER.positions, wild),
        Sample(close, labels),
    ]
    graphs, dropped = generate.sort_out([Task(WATER, "given", 0, 0, 5, 0)], [samples], max_force=20.0)
    assert [g.energy for g in graphs] == [-100.0]
    assert dropped == {
        "water: SCF not converged in 250 cycles": 2,
        "water: force too large": 1,
        "water: atoms too close": 1,
    }


def test_worker_processes_have_one_thread_and_the_environment_is_restored(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with start_pool(1, 1) as pool:
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_help_says_what_held_out_means() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.add_arguments(parser)
    assert "what is held out for validation and test are other frames of" in parser.format_help()


# ------------------------------------------------------------------------------------------------- what a user can do wrong


def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    tasks = [Task(WATER, "rattle", 0.02, n, 40, 0) for n in range(40)]

    def kill(_: int) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(
        DataError, match=r"worker process, after \d+ of 40 tasks, must live until its work is done; got"
    ):
        generate.label(tasks, (1,), 1, kill)


def test_a_molecule_without_conformer_is_counted_and_the_others_go_on() -> None:
    borane = Task(Molecule("borane", np.array([5, 1, 1, 1]), smiles="B"), "langevin", 300.0, 0, 2, 0)
    tasks, done = [borane, Task(WATER, "rattle", 0.02, 0, 1, 0)], []
    samples, _ = generate.label(tasks, (1,), 1, done.append)
    assert done == [2, 1]
    graphs, dropped = generate.sort_out(tasks, samples, max_force=20.0)
    assert [g.group for g in graphs] == ["water"]
    assert dropped == {"borane: MMFF94 has no parameters for B": 2}


def test_no_labels_at_all_are_an_error_with_the_reasons() -> None:
    tasks = [Task(Molecule(f"m{n}", np.array([2]), smiles="[He]"), "langevin", 300.0, 0, n + 1, 0) for n in range(12)]
    samples = [[Sample(np.zeros((1, 3)), None, "SCF")] * task.count for task in tasks]
    message = r"labelling must leave at least one conformer; got 12 times m11: SCF; 11 times m10: SCF; .*; and 2 more"
    with pytest.raises(DataError, match=message):
        generate.sort_out(tasks, samples, max_force=20.0)
    with pytest.raises(DataError, match=r"got 1 times m0: SCF. Correct or replace the molecules"):
        generate.sort_out(tasks[:1], samples[:1], max_force=20.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-conformers", "0"], "--num-conformers must be at least 1; got 0"),
        (["--processes", "0"], "--processes must be at least 1; got 0"),
        (["--temperatures", "300", "-5"], r"--temperatures must be above 0 K; got \[300.0, -5.0\]"),
        (["--temperatures", "nan"], r"--temperatures must be above 0 K; got \[nan\]"),
        (["--temperatures", "300", "300"], "--temperatures must be different"),
        (["--max-force", "nan"], "--max-force must be a positive, finite number of eV/Å; got nan"),
        (["--max-force", "-3"], "--max-force must be a positive, finite number of eV/Å; got -3.0"),
        (["--geometries", "a.xyz", "--num-conformers", "5"], "--num-conformers must not be given with --geom.*; got 5. Leave"),
        (["--geometries", "a.xyz", "--temperatures", "300"], r"--temperatures must not be given with --geom.*; got \[300.0\]"),
        (["--g2", "--temperatures", "300"], "--temperatures must not be given with --g2, where no dynamics are run"),
        (["--s22", "--temperatures", "300"], "--temperatures must not be given with --s22, where no dynamics are run"),
        (["--split", "1,1"], "--split must be three numbers"),
        (["--smiles", "nothing.smi"], "nothing.smi must be a file of SMILES; got nothing there"),
        (["--geometries", "nothing.xyz"], "nothing.xyz must be a file; got nothing there"),
    ],
)  # fmt: skip
def test_bad_options(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate.run(parse("--out", tmp_path / "set", *words))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must not exist yet; got a folder. Choose another --out"):
        generate.run(parse("--out", tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CC(C broken", r"a.smi:1 must be a SMILES that RDKit reads; got 'CC\(C'"),
        ("C\nO.O pair", "a.smi:2 must be one molecule; got O.O with a dot"),
        ("B borane", "a.smi:1 B must have MMFF94 parameters; got an atom without. Give it as --geometries"),
        ("[U] heavy", r"a.smi:1 must have elements that GFN2-xTB knows \(H to Rn\); got U"),
        ("C same\nO same", "a.smi must name each molecule once; got same"),
        ("# nothing\n", "a.smi must hold molecules; got none"),
    ],
)
def test_bad_smiles(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.smi").write_text(text)
    with pytest.raises(DataError, match=message):
        molecules.load_smiles(tmp_path / "a.smi")


def test_files_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_bytes("C méthane".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.smi must be text in UTF-8; got 'utf-8' codec can't decode .*. Save it as"):
        molecules.load_smiles(tmp_path / "a.smi")


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (ase.Atoms("CH", [[0, 0, 0], [0, 0, 1.1]]), r"a.xyz:0 CH CH must have as many paired electrons .*; got 7 electrons with 0"),
        (ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.1]]), r"a.xyz:0 H2 must have its atoms at least 0.3 Å apart; got 0.100 Å"),
        (ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=[5, 5, 5], pbc=True), "a.xyz:0 H2 must be a molecule; got a periodic"),
        (ase.Atoms("CeF3", 2.1 * np.array([[0, 0, 0], [1, 0, 0], [-0.5, 0.87, 0], [-0.5, -0.87, 0]])),
         "a.xyz:0 CeF3 must have no lanthanide from Ce to Lu; got Ce. Remove it: GFN2-xTB has 4f electrons in the core"),
        (ase.Atoms("U", [[0, 0, 0]]), r"a.xyz:0 U must have elements that GFN2-xTB knows \(H to Rn\); got U"),
    ],
)  # fmt: skip
def test_bad_geometries(tmp_path: Path, atoms: ase.Atoms, message: str) -> None:
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    with pytest.raises(DataError, match=message):
        molecules.load_geometries(tmp_path / "a.xyz")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch) -> None:
    for name in ("tblite", "rdkit"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(DataError, match=r"tblite must be installed; got no such package. Install it with `pip install"):
        generate.run(parse("--out", tmp_path / "set"))
    with pytest.raises(DataError, match="rdkit must be installed"):
        molecules.load_smiles(tmp_path / "a.smi")
