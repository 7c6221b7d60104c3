"""The ASE calculator gives what the model gives, refuses what it cannot, and keeps nothing stale."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import label, make_cluster, make_morse, make_run, write_dataset
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import CheckpointError, ConfigError, DataError
from so3krates_dist.graph import collate
from so3krates_dist.inference.calculator import So3kratesCalculator, make_graph, read_electrons
from so3krates_dist.model.potential import Potential


@pytest.fixture
def morse() -> Potential:
    return make_morse()


def make_molecule(seed: int = 0) -> Atoms:
    graph = make_cluster(seed)
    return Atoms(numbers=graph.atomic_numbers, positions=graph.positions)


def make_crystal(seed: int = 0) -> Atoms:
    atoms = bulk("Ar", "fcc", a=4.0, cubic=True)
    atoms.set_cell(
        atoms.cell[:] @ (np.eye(3) + 0.05 * np.random.default_rng(seed).normal(size=(3, 3))), scale_atoms=True
    )
    atoms.rattle(0.1, seed=seed)
    return atoms


def make_slab() -> Atoms:
    slab = fcc111("Ar", size=(2, 2, 2), a=4.0)  # no third cell vector
    add_adsorbate(slab, "Ne", 2.5, "ontop")
    slab.rattle(0.05, seed=1)
    assert slab.pbc.tolist() == [True, True, False]
    assert slab.cell.rank == 2
    return slab


@pytest.mark.parametrize("make", [make_molecule, make_crystal, make_slab])
def test_forces_are_the_derivative_of_the_energy(morse: Potential, make: Callable[[], Atoms]) -> None:
    atoms = make()
    atoms.calc = So3kratesCalculator(morse, dtype="float64")
    numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=range(3))
    assert np.abs(atoms.get_forces()).max() > 0.05
    np.testing.assert_allclose(atoms.get_forces()[:3], numerical, atol=2e-6)


def test_stress_is_the_derivative_by_strain(morse: Potential) -> None:
    atoms = make_crystal()
    atoms.calc = So3kratesCalculator(morse, dtype="float64")
    stress = atoms.get_stress()
    assert stress.shape == (6,)
    assert np.abs(stress).min() > 1e-5
    np.testing.assert_allclose(stress, calculate_numerical_stress(atoms, eps=1e-5), atol=1e-8)


def test_stress_of_a_slab_in_a_box(morse: Potential) -> None:
    atoms = make_slab()
    atoms.center(vacuum=8.0, axis=2)
    atoms.calc = So3kratesCalculator(morse, dtype="float64")
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), atol=1e-8)


@pytest.mark.parametrize("make", [make_molecule, make_slab])
def test_stress_without_a_volume_is_refused(morse: Potential, make: Callable[[], Atoms]) -> None:
    atoms = make()
    atoms.calc = So3kratesCalculator(morse)
    atoms.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="stress needs a periodic structure with three cell vectors"):
        atoms.get_stress()
    assert np.isfinite(atoms.get_potential_energy())


def test_energy_is_that_of_the_model(morse: Potential) -> None:
    atoms = make_molecule()
    atoms.calc = So3kratesCalculator(morse, dtype="float64")
    graph = build_neighbors(make_graph(atoms), *morse.cutoffs)
    output = morse(collate([graph], torch.float64))
    assert atoms.get_potential_energy() == pytest.approx(float(output["energy"]), abs=1e-9)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert atoms.get_potential_energy() < -20_000
    np.testing.assert_allclose(atoms.get_forces(), output["forces"].numpy(), atol=1e-9)


def test_float32_is_near_float64_even_far_from_the_origin(morse: Potential) -> None:
    atoms = make_molecule()
    atoms.calc = So3kratesCalculator(morse, dtype="float64")
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.positions += 1e5
    atoms.calc = So3kratesCalculator(morse)
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=2e-6)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-5)
    assert atoms.get_forces().dtype == np.float64


@pytest.mark.parametrize("make", [make_crystal, make_slab])
def test_lattice_translations_of_single_atoms_change_nothing(morse: Potential, make: Callable[[], Atoms]) -> None:
    atoms = make()
    atoms.calc = So3kratesCalculator(morse, dtype="float64")
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.positions[1] += 2 * atoms.cell[0] - 3 * atoms.cell[1]
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-8)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-9)


def test_nothing_is_stale(morse: Potential) -> None:
    calculator = So3kratesCalculator(morse, dtype="float64")
    fresh = lambda a: So3kratesCalculator(morse, dtype="float64").get_potential_energy(a)  # noqa: E731
    atoms = make_crystal()
    atoms.calc = calculator
    energies = [atoms.get_potential_energy()]
    for change in (
        lambda: atoms.positions.__iadd__(0.1 * np.eye(4, 3)),
        lambda: atoms.set_cell(1.01 * atoms.cell[:]),
        lambda: atoms.set_pbc([True, False, True]),
        lambda: atoms.numbers.__setitem__(0, 10),
        atoms.pop,
    ):
        change()
        energies.append(atoms.get_potential_energy())
        assert energies[-1] == pytest.approx(fresh(atoms), abs=1e-10)
        assert energies[-1] != pytest.approx(energies[-2], abs=1e-4)
    assert calculator.get_potential_energy(make_molecule()) == pytest.approx(fresh(make_molecule()), abs=1e-10)


def count_calls(potential: Potential) -> list[int]:
    calls: list[int] = []
    potential.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_results_are_used_again_only_where_nothing_changed(morse: Potential) -> None:
    atoms = make_crystal()
    morse.network.sees = frozenset({"cell", "total_charge", "num_unpaired_electrons"})  # else it would warn
    morse.statistics = dataclasses.replace(morse.statistics, has_unpaired_electrons=True)
    atoms.calc = So3kratesCalculator(morse)
    calls = count_calls(atoms.calc.potential)
    atoms.get_potential_energy()
    atoms.get_forces()
    atoms.set_initial_charges([1.0, 0, 0, 0])
    atoms.set_initial_magnetic_moments([1.0, 0, 0, 0])
    atoms.get_forces()
    assert len(calls) == 1
    atoms.info["charge"] = 1
    atoms.get_forces()
    assert len(calls) == 2
    atoms.info["spin"] = 4
    atoms.get_forces()
    assert len(calls) == 3
    atoms.get_stress()
    atoms.get_stress()
    atoms.get_forces()
    assert len(calls) == 4


def test_charge_and_spin_reach_the_model(morse: Potential) -> None:
    atoms = make_molecule()
    atoms.info.update(charge=-1, spin=2)
    graph = make_graph(atoms)
    assert (graph.total_charge, graph.num_unpaired_electrons) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, (0, 0)),
        ({"charge": None, "spin": None}, (0, 0)),
        ({"charge": 1}, (1, 1)),
        ({"charge": -2.0}, (-2, 0)),
        ({"spin": 1}, (0, 0)),  # singlet as a multiplicity
        ({"spin": 0}, (0, 0)),  # as unpaired electrons
        ({"spin": 3}, (0, 2)),  # triplet
        ({"spin": 2}, (0, 2)),
        ({"charge": 1, "spin": 2}, (1, 1)),  # doublet
        ({"charge": 1, "spin": 1}, (1, 1)),
        ({"charge": 1, "spin": 0}, (1, 0)),  # no multiplicity is zero
        ({"charge": np.int64(1), "spin": np.float64(4)}, (1, 3)),
        ({"charge": 1, "total_charge": 1, "spin": 2, "multiplicity": 2, "uhf": 1.0, "Q": [1, 2]}, (1, 1)),  # they agree
    ],
)
def test_parity_tells_multiplicity_from_unpaired_electrons(info: dict, expected: tuple[int, int]) -> None:
    assert read_electrons(Atoms("ArNe", info=info)) == expected


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({"charge": 0.5}, r'atoms\.info\["charge"\] must be a whole number; got 0\.5'),
        ({"charge": "plus"}, r'atoms\.info\["charge"\] must be a whole number; got \'plus\''),
        ({"charge": float("nan")}, r'atoms\.info\["charge"\] must be a whole number; got nan'),
        ({"spin": -1}, r'atoms\.info\["spin"\] must be a whole number, zero or greater; got -1'),
        ({"total_charge": 1}, r'atoms\.info\["total_charge"\] must agree with the charge that is taken'),
        ({"charge": 1, "Q": np.int64(-1)}, r'atoms\.info\["Q"\] must agree with the charge'),
        (
            {"multiplicity": 3},
            r'atoms\.info\["multiplicity"\] must agree with the spin .* State it as "spin", or remove',
        ),
        ({"spin_multiplicity": 2, "charge": 1, "spin": 4}, r'atoms\.info\["spin_multiplicity"\] must agree'),
        ({"uhf": 2}, r'atoms\.info\["uhf"\] must agree with the spin'),
        ({"spin": [1]}, r'atoms\.info\["spin"\] must be a whole number, zero or greater'),
    ],
)
def test_impossible_charge_or_spin(info: dict, text: str) -> None:
    with pytest.raises(DataError, match=text):
        read_electrons(Atoms("Ar", info=info))


@pytest.mark.parametrize("device", ["foo", "cuda:63"])
def test_a_device_that_is_not_there(morse: Potential, device: str) -> None:
    with pytest.raises(ConfigError, match=r"^device must be .*; got .*\. Take cpu"):
        So3kratesCalculator(morse, device=device)


def test_single_atom_has_its_own_energy(morse: Potential) -> None:
    atoms = Atoms("Ar", calculator=So3kratesCalculator(morse))
    assert atoms.get_potential_energy() == pytest.approx(-14354.5, abs=1e-9)
    assert not atoms.get_forces().any()


def test_bad_structures_are_refused(morse: Potential) -> None:
    def compute(atoms: Atoms) -> None:
        So3kratesCalculator(morse).get_potential_energy(atoms)

    with pytest.raises(DataError, match=r"Kr2 must have only elements the model was trained on \(Ne, Ar\); got Kr"):
        compute(Atoms("Kr2", positions=[[0, 0, 0], [0, 0, 3]]))
    with pytest.raises(DataError, match="atoms must hold at least one atom; got 0"):
        compute(Atoms())
    with pytest.raises(DataError, match=r"atoms\.positions must be finite; got 1 atoms at nan or infinity"):
        compute(Atoms("Ar2", positions=[[0, 0, 0], [0, np.nan, 3]]))
    with pytest.raises(DataError, match=r"ArNe must have its atoms at least 0\.001 Å apart; got 0 Å"):
        compute(Atoms("ArNe"))
    for cell in ([[3, 0, 0], [0, 3, 0], [0, 0, 0]], [[3, 0, 0], [0, 3, 0], [3, 3, 0]]):
        with pytest.raises(DataError, match=r"atoms\.cell must have independent vectors along its periodic directions"):
            compute(Atoms("Ar", cell=cell, pbc=True))


def test_unknown_dtype_is_refused(morse: Potential) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of float32, float64; got float16"):
        So3kratesCalculator(morse, dtype="float16")


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold config\.json and model\.safetensors"):
        So3kratesCalculator(tmp_path)


def test_model_of_the_caller_stays_as_it_is(morse: Potential) -> None:
    morse.train().requires_grad_(True)
    atoms = make_molecule()
    atoms.calc = So3kratesCalculator(morse, dtype="float64")
    atoms.get_forces()
    assert morse.training
    assert all(p.requires_grad and p.dtype == torch.float32 and p.grad is None for p in morse.parameters())
    assert atoms.calc.potential.energy_baselines.dtype == torch.float64
    assert So3kratesCalculator(morse).potential.energy_baselines.dtype == torch.float64


def test_run_folder_is_loaded(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [label(make_cluster(s)) for s in range(8)]})
    run = make_run(tmp_path / "run", data)
    energies = {}
    for dtype in ("float32", "float64"):
        atoms = make_molecule()
        atoms.calc = So3kratesCalculator(str(run), dtype=dtype)
        energies[dtype] = atoms.get_potential_energy()
        if dtype == "float64":
            numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=[0])
            np.testing.assert_allclose(atoms.get_forces()[:1], numerical, atol=1e-6)
    assert energies["float32"] == pytest.approx(energies["float64"], abs=1e-4)


def test_calculator_copies_to_other_processes(morse: Potential) -> None:
    atoms = make_molecule()
    calculator = So3kratesCalculator(morse)
    copied = pickle.loads(pickle.dumps(calculator))
    assert copied.get_potential_energy(atoms) == calculator.get_potential_energy(atoms)
