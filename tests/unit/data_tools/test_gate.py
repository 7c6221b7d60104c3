"""The gate: what is wrong with a structure, and the units detective on wrong units and signs."""

import dataclasses

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
    ],
)
def test_problems_are_found(make_water, change, reason: str, got: str) -> None:
    problem = gate.find_problem(dataclasses.replace(make_water(1)[0], **change), 100.0)
    assert problem is not None
    assert (problem.reason, problem.got) == (reason, got)


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
    ("energy_factor", "force_factor", "verdict"),
    [
        (1, 1, None),
        (1 / KCAL_PER_MOL_EV, 1, "energies that change 23 times as much"),
        (1 / HARTREE_EV, 1, "energies that change 0.037 times as much"),
        (1, 1 / KCAL_PER_MOL_EV, "energies that change 0.043 times as much"),
        (1, -1, "energies that fall where the forces say they rise (slope -1"),
    ],
)
def test_the_detective_sees_wrong_units_and_signs(make_water, energy_factor, force_factor, verdict) -> None:
    graphs = make_water(60)
    for graph in graphs:
        graph.energy *= energy_factor
        graph.forces = graph.forces * force_factor
    measured = gate.measure_units_slope(graphs)
    assert measured is not None
    assert measured.agrees == (verdict is None)
    if verdict is None:
        assert measured.slope == pytest.approx(1.0, abs=0.02)
    else:
        assert verdict in measured.explain()


def test_the_detective_sees_forces_that_belong_to_other_atoms(make_water) -> None:
    graphs = make_water(100)
    for graph in graphs:
        graph.forces = np.roll(graph.forces, 1, axis=0)
    measured = gate.measure_units_slope(graphs)
    assert measured is not None
    assert not measured.agrees


def test_turned_and_moved_conformers_are_compared_in_one_frame(make_water) -> None:
    graphs = make_water(60)
    generator = np.random.default_rng(1)
    for graph in graphs:
        rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        rotation *= np.sign(np.linalg.det(rotation))
        graph.positions = graph.positions @ rotation.T + generator.normal(size=3)
        graph.forces = graph.forces @ rotation.T
    measured = gate.measure_units_slope(graphs)
    assert measured is not None
    assert measured.slope == pytest.approx(1.0, abs=0.02)


def test_too_few_pairs_give_no_verdict(make_water) -> None:
    assert gate.measure_units_slope([]) is None
    assert gate.measure_units_slope(make_water(4)) is None
    assert gate.measure_units_slope(make_water(1)) is None
    assert gate.measure_units_slope(make_water(1) * 30) is None, "the same structure thirty times"


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
