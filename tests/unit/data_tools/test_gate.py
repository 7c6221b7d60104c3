"""The gate: what is wrong with a structure, in itself and beside the others."""

import dataclasses
from pathlib import Path

import ase.io
import numpy as np
import pytest

from data_tools import gate
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.units import HARTREE_EV, KCAL_PER_MOL_EV


def test_good_structures_pass(make_water) -> None:
    assert all(gate.find_problem(g, 100.0) is None for g in make_water(10))
    crystal = Graph(atomic_numbers=np.array([14]), positions=np.zeros((1, 3)), cell=3 * np.eye(3), pbc=np.ones(3, bool))
    assert gate.find_problem(crystal, 100.0) is None


@pytest.mark.parametrize(
    ("change", "reason", "got"),
    [
        ({"energy": np.nan}, "energy not finite", "nan or infinity"),
        ({"forces": np.full((3, 3), np.inf)}, "forces not finite", "nan or infinity"),
        ({"positions": np.full((3, 3), np.nan)}, "positions not finite", "nan or infinity"),
        ({"total_charge": np.nan}, "total_charge not finite", "nan or infinity"),
        ({"num_unpaired_electrons": np.inf}, "num_unpaired_electrons not finite", "nan or infinity"),
        ({"cell": np.full((3, 3), np.nan), "pbc": np.ones(3, bool)}, "cell not finite", "nan or infinity"),
        ({"cell": np.zeros((3, 3)), "pbc": np.ones(3, bool)}, "flat cell", "0.000 Å"),
        ({"pbc": np.ones(3, bool)}, "flat cell", "0.000 Å"),
        ({"cell": np.full((3, 3), 5.0) + np.diag([5.0, 0, 0]), "pbc": np.ones(3, bool)}, "flat cell", "0.000 Å"),
        ({"atomic_numbers": np.array([8, 1, 200])}, "unknown element", "1 to 200"),
        ({"atomic_numbers": np.array([8, 1, 0])}, "unknown element", "0 to 8"),
        ({"atomic_numbers": np.zeros(0, int)}, "unknown element", "no atoms"),
        ({"positions": np.array([[0, 0, 0], [0, 0, 0.2], [0, 0, 3.0]])}, "atoms too close", "0.200 Å"),
        ({"positions": np.zeros((3, 3))}, "atoms too close", "0.000 Å"),
        ({"forces": np.full((3, 3), 100.0)}, "force too large", "173 eV/Å"),
        ({"total_charge": 1.0}, "electron parity", "9 electrons with 0 unpaired at charge 1"),
        ({"num_unpaired_electrons": 1.0}, "electron parity", "10 electrons with 1 unpaired at charge 0"),
        ({"total_charge": 0.5}, "charge or spin impossible", "charge 0.5 and 0 unpaired electrons"),
        ({"num_unpaired_electrons": 12.0}, "charge or spin impossible", "charge 0 and 12 unpaired electrons"),
        ({"positions": np.zeros((2, 3))}, "positions of wrong shape", "(2, 3)"),
        ({"atomic_numbers": np.array([[8, 1, 1]])}, "atomic_numbers of wrong shape", "(1, 3)"),
        ({"atomic_numbers": np.array([8.0, 1.0, 1.0])}, "atomic_numbers of wrong type", "float64"),
        ({"positions": None}, "positions of wrong shape", "()"),
        ({"energy": np.array([1.0])}, "energy of wrong shape", "(1,)"),
        ({"energy": "low"}, "energy of wrong type", "<U3"),
        ({"forces": np.zeros((3, 2))}, "forces of wrong shape", "(3, 2)"),
        ({"stress": np.zeros(6)}, "stress of wrong shape", "(6,)"),
        ({"dipole": np.zeros((1, 3))}, "dipole of wrong shape", "(1, 3)"),
        ({"partial_charges": np.zeros(2)}, "partial_charges of wrong shape", "(2,)"),
        ({"hirshfeld_ratios": np.zeros((3, 1))}, "hirshfeld_ratios of wrong shape", "(3, 1)"),
        ({"cell": np.ones(3)}, "cell of wrong shape", "(3,)"),
        ({"pbc": True}, "pbc of wrong shape", "()"),
        ({"pbc": np.ones(3)}, "pbc of wrong type", "float64"),
        ({"dipole": np.array([0, 0, 1e39])}, "dipole not finite", "1e+39"),
        ({"partial_charges": np.array([0, np.nan, 0])}, "partial_charges not finite", "nan or infinity"),
        ({"positions": np.array([[0, 0, 0], [0, 0, 1], [0, 1, 2e4]])}, "positions too far out", "2e+04 Å"),
        ({"cell": np.diag([9, 9, 1e6]), "pbc": np.ones(3, bool)}, "cell too far out", "1e+06 Å"),
        ({"loss_weight": -0.25}, "loss_weight below zero", "-0.25"),
        ({"loss_weight": np.inf}, "loss_weight not finite", "nan or infinity"),
        ({"loss_weight": np.ones(1)}, "loss_weight of wrong shape", "(1,)"),
        ({"stress": np.eye(3)}, "stress without cell", "no cell"),
        (
            {"stress": np.eye(3), "cell": 9 * np.eye(3), "pbc": np.zeros(3, bool)},
            "stress without cell",
            "no periodic direction",
        ),
        (
            {"stress": np.eye(3), "cell": np.diag([9, 9, 0]), "pbc": np.array([1, 1, 0], bool)},
            "stress without cell",
            "a cell that is 0.000 Å thin",
        ),
        (
            {"positions": np.array([[0, 0, 0], [0, 0, 0.35], [0, 0, 3.0]])},
            "clashing atoms",
            "O H at 0.350 Å, 0.36 of it",
        ),
    ],
)
def test_problems_are_found(make_water, change, reason: str, got: str) -> None:
    problem = gate.find_problem(dataclasses.replace(make_water(1)[0], **change), 100.0)
    assert problem is not None
    assert (problem.reason, problem.got) == (reason, got)
    assert problem.rule.startswith("have ")


def test_labels_that_single_precision_does_not_hold_are_none(make_water) -> None:
    """They are stored in it; energies are not."""
    graph = make_water(1)[0]
    assert gate.find_problem(dataclasses.replace(graph, energy=-1e39), 100.0) is None
    problem = gate.find_problem(dataclasses.replace(graph, forces=np.full((3, 3), 1e39)), np.inf)
    assert problem == gate.Problem("forces not finite", "have forces that single precision holds", "1e+39")


def test_a_whole_structure_with_all_labels_passes(make_water) -> None:
    labels = {"stress": np.eye(3), "dipole": np.ones(3), "partial_charges": np.zeros(3), "hirshfeld_ratios": np.ones(3)}
    graph = dataclasses.replace(make_water(1)[0], cell=9 * np.eye(3), pbc=np.ones(3, bool), **labels)
    assert gate.find_problem(graph, 100.0) is None
    assert gate.find_doubts(graph) == []


@pytest.mark.parametrize(
    ("numbers", "distance", "is_fine"),
    [
        ([1, 1], 0.31, True),
        ([6, 6], 0.62, True),
        ([6, 6], 0.59, False),
        ([55, 55], 2.0, True),
        ([55, 55], 1.9, False),
    ],
)
def test_how_close_atoms_may_be_depends_on_their_radii(numbers: list[int], distance: float, is_fine: bool) -> None:
    graph = Graph(atomic_numbers=np.array(numbers), positions=np.array([[0, 0, 0], [0, 0, distance]]))
    assert (gate.find_problem(graph, 100.0) is None) is is_fine


@pytest.mark.parametrize(("total_charge", "is_fine"), [(1.0, True), (0.0, False)])
def test_partial_charges_that_do_not_add_up_are_doubtful_but_no_problem(
    make_water, total_charge: float, is_fine
) -> None:
    charges = np.array([-0.2, 0.6, 0.64])
    graph = dataclasses.replace(
        make_water(1)[0], total_charge=total_charge, num_unpaired_electrons=total_charge, partial_charges=charges
    )
    assert gate.find_problem(graph, 100.0) is None
    doubts = gate.find_doubts(graph)
    assert (not doubts) is is_fine
    if doubts:
        rule = "have partial charges that add up to its total charge, 0 e"
        assert doubts == [gate.Problem("partial charges do not add up", rule, "1.040 e")]


def test_energies_off_the_baselines_are_found_however_many_there_are() -> None:
    generator = np.random.default_rng(0)
    residuals = generator.normal(0.3, 0.02, 1000)
    residuals[:400] += generator.uniform(5, 50, 400)
    residuals[400:410] = np.nan
    band = gate.measure_energy_band(residuals)
    assert band is not None
    found = np.array([band.find_problem(r, 9) is not None for r in residuals[~np.isnan(residuals)]])
    assert found[:400].all()
    assert not found[400:].any()


def test_clean_energies_with_heavy_tails_pass() -> None:
    generator = np.random.default_rng(0)
    residuals = generator.gamma(4.0, 0.02, 100_000)  # thermal energies: twelve median deviations at most
    band = gate.measure_energy_band(residuals)
    assert band is not None
    assert not any(band.find_problem(r, 9) for r in residuals)


def test_free_atoms_and_ions_may_be_further_off_the_baselines() -> None:
    band = gate.measure_energy_band(np.random.default_rng(0).normal(0, 0.02, 100))
    assert band is not None
    assert band.find_problem(None, 9) is None
    assert band.find_problem(5.0, 1) is None, "an atom without its bonds"
    assert band.find_problem(12.0, 9, 1.0) is not None
    assert band.find_problem(12.0 / 9, 9, -1.0) is None, "twelve eV for an electron"
    problem = band.find_problem(5.0, 9)
    assert problem is not None
    assert problem.reason == "energy off the baselines"
    assert problem.rule.startswith("have an energy within 0.")
    assert "eV/atom off, " in problem.got


def test_energies_of_relaxed_structures_do_not_make_warm_ones_faulty() -> None:
    band = gate.measure_energy_band(np.full(100, 0.2))
    assert band is not None
    assert band.find_problem(0.29, 50) is None
    assert band.find_problem(0.31, 50) is not None


def test_too_few_energies_make_no_band() -> None:
    assert gate.measure_energy_band(np.full(9, 0.2)) is None
    assert gate.measure_energy_band(np.array([0.2] * 9 + [np.nan])) is None


def test_residuals(make_water) -> None:
    graph = make_water(1)[0]
    graph.energy = -100.0
    assert gate.compute_residual(graph, {"1": -10.0, "8": -74.0}) == pytest.approx(-2.0)
    assert gate.compute_residual(graph, {"1": -10.0}) is None
    graph.energy = None
    assert gate.compute_residual(graph, {"1": -10.0, "8": -74.0}) is None


def test_atoms_on_top_of_each_other_are_one_close_pair(make_water) -> None:
    graph = dataclasses.replace(make_water(1)[0], positions=np.zeros((3, 3)))
    assert gate.find_close_pairs(graph, 1.0).distances.tolist() == [0.0]


def test_a_cell_may_be_flat_where_it_does_not_repeat(make_water) -> None:
    slab = dataclasses.replace(make_water(1)[0], cell=np.diag([9.0, 9.0, 0.0]), pbc=np.array([True, True, False]))
    assert gate.find_problem(slab, 100.0) is None


@pytest.mark.parametrize("change", [{"total_charge": np.nan}, {"num_unpaired_electrons": np.inf}])
def test_charge_and_spin_that_are_not_finite_are_impossible(make_water, change) -> None:
    problem = gate.find_parity_problem(dataclasses.replace(make_water(1)[0], **change))
    assert problem is not None
    assert problem.reason == "charge or spin impossible"


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_limits_of_forces_that_are_none_are_refused(value: float) -> None:
    gate.check_max_force(1e-9)
    with pytest.raises(DataError, match=r"--max-force must be a positive, finite number of eV/Å; got .*. Give one"):
        gate.check_max_force(value)


def test_periodic_images_that_are_too_close_are_found() -> None:
    positions = np.array([[0.05, 0, 0], [3.95, 0, 0]])
    graph = Graph(atomic_numbers=np.array([1, 1]), positions=positions, cell=4 * np.eye(3), pbc=np.ones(3, bool))
    assert gate.find_min_distance(graph) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("numbers", "hartree"),
    [([6], -37.8), ([8], -75.1), ([17], -460.1), ([6, 6, 8] + 6 * [1], -155.0), ([1, 1], -1.17)],
)
def test_total_energies_are_estimated_within_a_tenth(numbers: list[int], hartree: float) -> None:
    assert gate.estimate_total_energy(np.array(numbers)) / HARTREE_EV == pytest.approx(hartree, rel=0.09)


def test_names() -> None:
    graph = Graph(atomic_numbers=np.array([6, 1, 1, 1, 1]), positions=np.zeros((5, 3)), group="methane")
    assert gate.describe(graph) == "methane (CH4)"
    assert gate.describe(dataclasses.replace(graph, group="CH4")) == "CH4"
    assert gate.describe(dataclasses.replace(graph, atomic_numbers=np.array([200]))) == "methane"
    assert gate.name_elements([1, 6, 200]) == "H C 200"


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.fixture(scope="module")
def real_sets(data_dir: Path) -> dict[str, list[Graph]]:
    """All conformers of two molecules in eV and Å."""
    with np.load(data_dir / "md17" / "ethanol.npz") as content:
        energies, forces = content["E"].ravel() * KCAL_PER_MOL_EV, content["F"] * KCAL_PER_MOL_EV
        rows = zip(content["R"], energies.tolist(), forces, strict=True)
        ethanol = [Graph(atomic_numbers=content["z"], positions=r, energy=e, forces=f) for r, e, f in rows]
    large = [
        Graph(atomic_numbers=f.numbers, positions=f.positions, energy=f.get_potential_energy(), forces=f.get_forces())
        for f in ase.io.read(data_dir / "3bpa" / "train_300K.xyz", ":")
    ]
    return {"ethanol": ethanol, "3BPA": large}


EDITS = {
    "nan energy": lambda g: {"energy": np.nan},
    "infinite energy": lambda g: {"energy": -np.inf},
    "nan force": lambda g: {"forces": np.where(np.arange(3) == 1, np.nan, g.forces)},
    "infinite position": lambda g: {"positions": np.where(np.arange(3) == 1, np.inf, g.positions)},
    "1e4 eV/Å": lambda g: {"forces": g.forces + np.array([0, 0, 1e4])},
    "zero distance": lambda g: {"positions": np.concatenate([g.positions[:1], g.positions[:1], g.positions[2:]])},
    "clash": lambda g: {"positions": np.concatenate([g.positions[:1], g.positions[:1] + np.array([0, 0.35, 0]), g.positions[2:]])},
    "unknown element": lambda g: {"atomic_numbers": np.where(np.arange(g.num_atoms) == 0, 119, g.atomic_numbers)},
    "element lost": lambda g: {"atomic_numbers": g.atomic_numbers - 1},
    "atom lost": lambda g: {"positions": g.positions[1:]},
    "force lost": lambda g: {"forces": g.forces[1:]},
    "flat forces": lambda g: {"forces": g.forces.ravel()},
    "electron lost": lambda g: {"total_charge": 1.0},
    "half an electron": lambda g: {"total_charge": 0.5},
    "spin without electron": lambda g: {"num_unpaired_electrons": 1.0},
    "stress without cell": lambda g: {"stress": np.zeros((3, 3))},
    "flat cell": lambda g: {"cell": np.diag([9.0, 9.0, 0.0]), "pbc": np.ones(3, bool)},
    "nm": lambda g: {"positions": g.positions * 0.1},
}  # fmt: skip


def test_real_data_pass_and_every_edit_of_them_is_found(real_sets, capsys) -> None:
    edited = missed = 0
    for name, graphs in real_sets.items():
        assert not [problem for g in graphs if (problem := gate.find_problem(g, 300.0)) is not None], name
        for edit, change in EDITS.items():
            for graph in graphs[::100]:
                edited += 1
                if gate.find_problem(dataclasses.replace(graph, **change(graph)), 300.0) is None:
                    missed += 1
                    print(f"{name}: {edit} is missed")
    with capsys.disabled():
        print(f" {edited - missed}/{edited} edits found, 0/{sum(map(len, real_sets.values()))} clean refused", end="")
    assert missed == 0


def test_wrong_energies_among_real_ones_are_off_and_no_real_one_is(real_sets) -> None:
    for name, graphs in real_sets.items():
        energies = np.array([g.energy for g in graphs])
        num_atoms = graphs[0].num_atoms
        residuals = (energies - np.median(energies)) / num_atoms
        wrong = residuals.copy()
        wrong[::50] += np.resize([500.0, -30.0, 25.0], len(wrong[::50])) / num_atoms
        band = gate.measure_energy_band(wrong)
        assert band is not None
        assert not [r for r in residuals if band.find_problem(r, num_atoms)], name
        assert all(band.find_problem(r, num_atoms) for r in wrong[::50]), name
