"""The units detective on real data with wrong units and signs, and on what gives it too little to go by."""

import dataclasses
from pathlib import Path

import ase.io
import numpy as np
import pytest

from data_tools import detective
from data_tools.detective import TakenUnits
from so3krates_dist.graph import Graph
from so3krates_dist.units import BOHR_ANGSTROM, HARTREE_EV, KCAL_PER_MOL_EV, KJ_PER_MOL_EV

Factors = tuple[float, float, float]
"""that energies, forces and positions are multiplied with"""

WRONG: list[tuple[Factors, str]] = [
    ((1 / KCAL_PER_MOL_EV, 1, 1), "energies in kcal/mol"),
    ((1 / KJ_PER_MOL_EV, 1, 1), "energies in kJ/mol"),
    ((1 / HARTREE_EV, 1, 1), "energies in Hartree"),
    ((1000, 1, 1), "energies in meV"),
    ((1, 1 / KCAL_PER_MOL_EV, 1), "forces in kcal/mol/Angstrom"),
    ((1, 1 / KJ_PER_MOL_EV, 1), "forces in kJ/mol/Angstrom"),
    ((1, 10 / KJ_PER_MOL_EV, 1), "forces in kJ/mol/nm"),
    ((1, BOHR_ANGSTROM / HARTREE_EV, 1), "forces in Hartree/Bohr"),
    ((1, 1 / HARTREE_EV, 1), "forces in Hartree/Angstrom"),
    ((1, -1, 1), "gradients in place of forces"),
    ((1, -BOHR_ANGSTROM / HARTREE_EV, 1), "gradients in place of forces, forces in Hartree/Bohr"),
    ((1 / KCAL_PER_MOL_EV, 1 / KCAL_PER_MOL_EV, 1), "energies in kcal/mol, forces in kcal/mol/Angstrom"),
    ((1 / HARTREE_EV, 1 / HARTREE_EV, 1), "energies in Hartree, forces in Hartree/Angstrom"),
    ((1 / HARTREE_EV, BOHR_ANGSTROM / HARTREE_EV, 1), "energies in Hartree, forces in Hartree/Bohr"),
    ((1, 1, 1 / BOHR_ANGSTROM), "positions in Bohr"),
    (
        (1 / HARTREE_EV, BOHR_ANGSTROM / HARTREE_EV, 1 / BOHR_ANGSTROM),
        "positions in Bohr, energies in Hartree, forces in Hartree/Bohr",
    ),
]


def scale(graphs: list[Graph], factors: Factors) -> list[Graph]:
    energy, force, length = factors
    return [
        dataclasses.replace(g, energy=g.energy * energy, forces=g.forces * force, positions=g.positions * length)
        for g in graphs
    ]


@pytest.fixture(scope="module")
def real_sets(data_dir: Path) -> dict[str, list[Graph]]:
    """Sets of two molecules, in eV and Å: whole ones, trajectories, scattered and small samples."""
    with np.load(data_dir / "md17" / "ethanol.npz") as content:
        energies, forces = content["E"].ravel() * KCAL_PER_MOL_EV, content["F"] * KCAL_PER_MOL_EV
        rows = zip(content["R"], energies.tolist(), forces, strict=True)
        ethanol = [Graph(atomic_numbers=content["z"], positions=r, energy=e, forces=f) for r, e, f in rows]
    frames = ase.io.read(data_dir / "3bpa" / "train_300K.xyz", ":")
    large = [
        Graph(atomic_numbers=f.numbers, positions=f.positions, energy=f.get_potential_energy(), forces=f.get_forces())
        for f in frames
    ]
    return {
        "ethanol": ethanol[::25],
        "ethanol, 100 steps": ethanol[:100],
        "ethanol, 50 of all": ethanol[3::40],
        "3BPA": large[::4],
        "3BPA, 100": large[200:300],
        "all of ethanol": ethanol,
        "all of 3BPA": large,
    }


def test_real_data_in_right_and_wrong_units(real_sets) -> None:
    """All of 82 wrong sets are named for what they are, and none of the seven right ones is doubted."""
    failures = []
    for name, graphs in real_sets.items():
        if (verdict := detective.judge_units(graphs)).kind != "agrees" or verdict.findings:
            failures.append(f"{name}, clean: {verdict}")
        for factors, cause in WRONG if not name.startswith("all") else WRONG[:1]:
            verdict = detective.judge_units(scale(graphs, factors))
            if verdict.kind != "disagrees" or verdict.probable[:1] != (cause,):
                failures.append(f"{name}, {cause}: {verdict}")
    assert not failures, "\n".join(failures)


def test_no_sample_of_real_data_is_called_wrong_and_few_wrong_ones_right(real_sets) -> None:
    generator = np.random.default_rng(0)
    sure = 0
    for graphs in (real_sets["all of ethanol"], real_sets["all of 3BPA"]):
        for size in (12, 15, 20, 30) * 3:
            sample = [graphs[i] for i in generator.choice(len(graphs), size, replace=False)]
            verdict = detective.judge_units(sample)
            assert verdict.kind != "disagrees", verdict
            sure += verdict.kind == "agrees"
            assert detective.judge_units(scale(sample, (1 / KCAL_PER_MOL_EV, 1, 1))).kind != "agrees"
    assert sure >= 8


@pytest.mark.parametrize(
    ("factors", "taken", "cause"),
    [
        (  # kcal/mol and kcal/mol/Å, forces taken for Hartree/Bohr
            (1, 1 / KCAL_PER_MOL_EV * HARTREE_EV / BOHR_ANGSTROM, 1),
            TakenUnits("kcal/mol", "Angstrom", "Hartree/Bohr"), "forces in kcal/mol/Angstrom",
        ),
        ((KCAL_PER_MOL_EV, KCAL_PER_MOL_EV, 1), TakenUnits("kcal/mol", "Angstrom", "kcal/mol/Angstrom"),
            "energies in eV, forces in eV/Angstrom"),
        ((1, 1, BOHR_ANGSTROM), TakenUnits("eV", "Bohr", "eV/Angstrom"), "positions in Angstrom"),
    ],
)  # fmt: skip
def test_wrong_units_are_named_as_the_file_has_them(real_sets, factors: Factors, taken, cause: str) -> None:
    verdict = detective.judge_units(scale(real_sets["ethanol, 100 steps"], factors), taken)
    assert verdict.kind != "agrees"
    assert verdict.probable[:1] == (cause,)


def test_positions_in_nm_are_known_by_their_bonds(real_sets) -> None:
    """All atoms are too close there: no near pairs are left, but bonds are."""
    verdict = detective.judge_units(scale(real_sets["ethanol, 100 steps"], (1, 1, 0.1)))
    assert verdict.kind == "undecided"
    assert verdict.explain() == "bonds of 0.10 times their usual lengths: probably positions in nm"


def test_failed_calculations_among_them_change_nothing(real_sets) -> None:
    graphs = list(real_sets["ethanol, 50 of all"])
    for index in range(0, 50, 10):
        graphs[index] = dataclasses.replace(graphs[index], energy=graphs[index].energy + 500.0)
        graphs[index + 1] = dataclasses.replace(graphs[index + 1], forces=graphs[index + 1].forces * 1000.0)
        graphs[index + 2] = dataclasses.replace(graphs[index + 2], forces=np.full((9, 3), np.nan))
        graphs[index + 3] = dataclasses.replace(graphs[index + 3], positions=np.zeros((9, 3)))
    verdict = detective.judge_units(graphs)
    assert (verdict.kind, verdict.findings) == ("agrees", ())


@pytest.mark.parametrize(
    ("factors", "finding"),
    [
        ((1, 1, 1), ""),
        (
            (1 / KCAL_PER_MOL_EV, 1, 1),
            "energies that change 23 times as much as the forces say: probably energies in kcal/mol",
        ),
        (
            (1, -1, 1),
            "energies that fall where the forces say they rise (slope -1): probably gradients in place of forces",
        ),
    ],
)
def test_what_is_said(make_water, factors: Factors, finding: str) -> None:
    verdict = detective.judge_units(scale(make_water(60), factors))
    assert verdict.explain() == finding
    text = str(verdict)
    assert text.startswith(f"{verdict.kind}: energies follow forces with slope ")
    assert " near pairs (1 when units agree), nearest atoms are 0.9" in text
    assert " times the sum of covalent radii apart, forces have an RMS of " in text
    assert text.endswith(f" eV/Å; {finding}" if finding else " eV/Å")


def test_forces_that_belong_to_other_atoms_are_seen_and_no_unit_is_blamed(make_water) -> None:
    graphs = make_water(100)
    for graph in graphs:
        graph.forces = np.roll(graph.forces, 1, axis=0)
    verdict = detective.judge_units(graphs)
    assert verdict.kind == "disagrees"
    other = [
        dataclasses.replace(g, forces=h.forces) for g, h in zip(make_water(100), make_water(100, seed=1), strict=True)
    ]
    verdict = detective.judge_units(other)
    assert (verdict.kind, verdict.probable) == ("undecided", ()), "forces like noise"


def test_turned_and_moved_conformers_are_compared_in_one_frame(make_water) -> None:
    graphs = make_water(60)
    generator = np.random.default_rng(1)
    for graph in graphs:
        rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        rotation *= np.sign(np.linalg.det(rotation))
        graph.positions = graph.positions @ rotation.T + generator.normal(size=3)
        graph.forces = graph.forces @ rotation.T
    measured = detective.measure_units_slope(graphs)
    assert measured is not None
    assert measured.slope == pytest.approx(1.0, abs=0.02)


def test_crystals_are_compared_across_their_faces(make_water) -> None:
    graphs = make_water(60)
    generator = np.random.default_rng(1)
    cell = np.array([[5.0, 0, 0], [1.0, 6.0, 0], [0, 0, 7.0]])
    for graph in graphs:
        graph.positions = graph.positions + generator.normal(size=3) + generator.integers(-1, 2, (3, 3)) @ cell
        graph.cell, graph.pbc = cell, np.ones(3, bool)
    verdict = detective.judge_units(graphs)
    assert verdict.slope is not None
    assert verdict.slope.slope == pytest.approx(1.0, abs=0.02)
    assert verdict.bond_ratio == pytest.approx(0.93, abs=0.1)


def test_what_differs_in_charge_or_cell_is_not_compared(make_water) -> None:
    """An electron costs ten eV that no force knows of."""
    graphs = make_water(60)
    for index, graph in enumerate(graphs):
        graph.total_charge = float(index)
        graph.energy += 10.0 * index
    assert detective.measure_units_slope(graphs) is None
    for index, graph in enumerate(graphs):
        graph.total_charge = 0.0
        graph.cell, graph.pbc = (5 + 0.1 * index) * np.eye(3), np.ones(3, bool)
    assert detective.measure_units_slope(graphs) is None


@pytest.mark.parametrize("num", [0, 1, 4])
def test_too_few_pairs_give_no_verdict_and_say_so(make_water, num: int) -> None:
    verdict = detective.judge_units(make_water(num))
    assert (verdict.kind, verdict.slope, verdict.findings) == ("undecided", None, ())
    assert "undecided, fewer than 10 near pairs of conformers with energies and forces; only bond lengths" in str(
        verdict
    )
    assert str(verdict).endswith("looked at: there are none") == (num == 0)


def test_what_has_no_near_pairs_is_judged_by_bonds_and_forces_alone(make_water) -> None:
    water = make_water(4)
    wrong = detective.judge_units(scale(water, (1, 1 / KCAL_PER_MOL_EV, 1)))
    assert wrong.kind == "undecided"
    assert wrong.findings[0].startswith("forces with an RMS of ")
    assert wrong.probable[0] == "forces in kcal/mol/Angstrom"
    assert detective.judge_units(make_water(1) * 30).slope is None, "the same structure thirty times"
    far = [dataclasses.replace(g, positions=g.positions * [1, 1 + 0.9 * k, 1]) for k, g in enumerate(make_water(12))]
    assert detective.measure_units_slope(far) is None, "one long way from each to the next"
    no_energy = [dataclasses.replace(g, energy=None) for g in make_water(60)]
    assert detective.judge_units(no_energy).kind == "undecided"
    no_forces = [dataclasses.replace(g, forces=None) for g in make_water(60)]
    assert detective.judge_units(no_forces).force_rms is None


def test_where_most_structures_have_no_forces_or_small_ones_the_others_are_judged(make_water) -> None:
    graphs = make_water(120)
    for graph in graphs[40:]:
        graph.forces = None
    assert detective.judge_units(graphs).kind == "agrees"
    rest = {"positions": np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]]), "energy": -2078.0}
    relaxed = [dataclasses.replace(graphs[0], forces=np.full((3, 3), 1e-9), **rest) for _ in range(60)]
    assert detective.judge_units([*relaxed, *graphs[:40]]).kind == "agrees"


def test_whatever_is_wrong_with_structures_there_is_a_verdict(make_water) -> None:
    graphs = make_water(6)
    changes = [
        {"positions": np.full((3, 3), np.nan)}, {"positions": np.zeros((2, 3))}, {"atomic_numbers": np.zeros(3, int)},
        {"forces": np.zeros(3)}, {"atomic_numbers": np.zeros(0, int)}, {"positions": None},
    ]  # fmt: skip
    verdict = detective.judge_units([dataclasses.replace(g, **c) for g, c in zip(graphs, changes, strict=True)])
    assert (verdict.kind, verdict.bond_ratio, verdict.findings) == ("undecided", None, ())


@pytest.mark.parametrize(
    ("slope", "error", "kind"),
    [
        (1.0, 0.3, "agrees"), (1.0, 0.34, "undecided"), (0.31, 0.05, "agrees"), (0.25, 0.05, "undecided"),
        (0.2, 0.01, "disagrees"), (0.0, 0.01, "disagrees"), (0.0, 0.1, "undecided"), (-1.0, 0.3, "disagrees"),
        (-1.0, 0.4, "undecided"), (4.0, 0.3, "undecided"), (5.0, 0.3, "disagrees"), (23.0, 4.0, "disagrees"),
    ],
)  # fmt: skip
def test_slopes_that_scatter_too_much_are_no_verdict(slope: float, error: float, kind: str) -> None:
    assert detective.UnitsSlope(slope, error, 10).kind == kind


def test_too_much_scatter_is_said() -> None:
    verdict = detective.UnitsVerdict("undecided", (), (), detective.UnitsSlope(1.0, 0.4, 10), None, None)
    assert str(verdict).startswith("undecided, too much scatter: energies follow forces with slope 1.00 +- 0.4 over 10")


def test_energies_that_have_nothing_to_do_with_forces_are_not_explained_by_a_unit() -> None:
    """One distance, and noise: near pairs that are not near enough have the most weight."""
    generator = np.random.default_rng(3)
    graphs = []
    for _ in range(400):
        positions = np.cumsum(generator.uniform(0.3, 0.4, (5, 3)), axis=0)
        energy, forces = 0.05 * generator.standard_normal(), 0.1 * generator.standard_normal((5, 3))
        graphs.append(Graph(atomic_numbers=np.full(5, 2), positions=positions, energy=energy, forces=forces))
    assert detective.judge_units(graphs).kind == "undecided"


def test_large_structures_are_compared_in_fewer_frames_and_without_the_memory_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    rest = 3.0 * np.indices((20, 20, 10)).reshape(3, -1).T
    graphs = []
    for _ in range(40):
        steps = 0.02 * generator.standard_normal(rest.shape)
        energy = 15.0 * float(np.sum(np.square(steps)))
        graphs.append(
            Graph(atomic_numbers=np.full(4000, 14), positions=rest + steps, energy=energy, forces=-30.0 * steps)
        )
    measured = detective.measure_units_slope(graphs)
    assert measured is not None
    assert measured.num_pairs <= 31, "31 frames of 4000 atoms"
    assert measured.slope == pytest.approx(1.0, abs=0.1)
