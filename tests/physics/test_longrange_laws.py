"""Laws of SO3LR's pair terms: smooth wherever they end, exact derivatives with periodic images, charges that add up.

Two molecules far apart are one structure to this model: how much their energies then fail to add up is documented here.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from structures import (
    check_deviations,
    compare,
    compute,
    from_atoms,
    join,
    make_batch,
    make_crystal,
    make_ion,
    make_molecule,
    make_potential,
    measure,
    move,
)

from so3krates_dist.graph import Graph
from so3krates_dist.inference.interop import import_so3lr
from so3krates_dist.model.longrange import Dispersion, compute_electrostatics
from so3krates_dist.model.potential import Potential, compute_vectors
from so3krates_dist.model.radial import compute_polynomial_cutoff
from so3krates_dist.model.registry import load_model
from so3krates_dist.model.repulsion import NuclearRepulsion

CUTOFF, LONG_RANGE_CUTOFF = 4.5, 12.0
EDGES = {
    "repulsion ends": 1.5,
    "electrostatics starts to be switched": 0.45 * LONG_RANGE_CUTOFF,
    "network ends": CUTOFF,
    "dispersion starts to be switched": LONG_RANGE_CUTOFF - 2,
    "all ends": LONG_RANGE_CUTOFF,
}
FAR = np.array([300.0, 0.0, 0.0])
"""Å"""
STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
"""First derivative from five points, error of fourth order in the step"""


def make_published_sizes(cutoff: float = LONG_RANGE_CUTOFF, **changes: object) -> Potential:
    """Return a small model with random weights and the published cutoffs."""
    return make_potential("so3lr", cutoff=CUTOFF, long_range_cutoff=cutoff, **changes)


def repel(distances: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    repulsion = NuclearRepulsion().double()
    numbers = torch.full(distances.shape, 8), torch.full(distances.shape, 6)
    energies: torch.Tensor = repulsion(*numbers, distances, compute_polynomial_cutoff(distances, CUTOFF))
    return energies


def attract(distances: torch.Tensor, cutoff: float) -> torch.Tensor:
    ratios = torch.full_like(distances, 0.8), torch.full_like(distances, 0.9)
    numbers = torch.full(distances.shape, 8), torch.full(distances.shape, 17)
    energies: torch.Tensor = Dispersion(1.2, cutoff)(numbers, ratios, distances)
    return energies


TERMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repulsion": repel,
    "electrostatics": lambda d: compute_electrostatics(torch.full_like(d, -0.16), d, 4.0, LONG_RANGE_CUTOFF),
    "electrostatics without end": lambda d: compute_electrostatics(torch.full_like(d, -0.16), d, 4.0, float("inf")),
    "dispersion": lambda d: attract(d, LONG_RANGE_CUTOFF),
    "dispersion without end": lambda d: attract(d, float("inf")),
}
terms = pytest.mark.parametrize("term", TERMS)


def differentiate(term: str, distances: torch.Tensor) -> list[torch.Tensor]:
    """Return the energy of pairs and its first two derivatives by the distance."""
    distances = distances.clone().requires_grad_(True)
    energies = TERMS[term](distances)
    (slopes,) = torch.autograd.grad(energies.sum(), distances, create_graph=True)
    (curvatures,) = torch.autograd.grad(slopes.sum(), distances)
    return [energies.detach(), slopes.detach(), curvatures]


@terms
def test_pair_terms_and_two_derivatives_are_finite_everywhere(term: str) -> None:
    """Also far beyond every cutoff, on each edge, next to it, and for atoms almost on top of each other."""
    edges = [edge + offset for edge in (*EDGES.values(), 0.0) for offset in (0.0, 1e-9, 1e-4, -1e-9, -1e-4)]
    points = [0.002, 0.01, 0.1, *np.linspace(0.2, 13, 500), 50.0, 1e3, 1e5, *[e for e in edges if e > 1e-5]]
    for dtype in (torch.float64, torch.float32):
        distances = torch.tensor(points, dtype=torch.float64)
        finite = [bool(v.isfinite().all()) for v in differentiate(term, distances.to(dtype))]
        assert finite == [True] * 3, dtype
    if not term.endswith("end"):
        values = differentiate(term, torch.tensor([LONG_RANGE_CUTOFF, 20.0, 1e4], dtype=torch.float64))
        assert all(bool((v == 0).all()) for v in values)


@terms
def test_slopes_of_pair_terms(term: str) -> None:
    step, distances = (
        1e-3,
        torch.tensor([0.3, 0.7, 1.1, 1.45, 2.0, 4.4, 5.5, 6.0, 9.0, 10.5, 11.5], dtype=torch.float64),
    )
    _, slopes, curvatures = differentiate(term, distances)
    moved = {point: differentiate(term, distances + point * step) for point in STENCIL}
    expected = [sum(w * moved[p][order] for p, w in STENCIL.items()) / step for order in (0, 1)]
    assert float(slopes.abs().max()) > 1e-3
    scale = float(max(1.0, slopes.abs().max()))
    check_deviations(
        {
            "slopes": float((slopes - expected[0]).abs().max()) / scale,
            "curvatures": float((curvatures - expected[1]).abs().max()) / max(1.0, float(curvatures.abs().max())),
        },
        {"slopes": 1e-8, "curvatures": 1e-7},
    )


@pytest.mark.parametrize("edge", EDGES)
@terms
def test_energies_and_forces_of_pairs_are_continuous(term: str, edge: str) -> None:
    """Across an edge both change by no more than over steps of the same length beside it (the curvature is bounded)."""
    width = 1e-6
    at = torch.tensor([EDGES[edge] - width / 2, EDGES[edge] + width / 2], dtype=torch.float64)
    energies, slopes, curvatures = differentiate(term, at)
    bound = float(curvatures.abs().max()) + 1e-6
    steps = {
        "energy": abs(float(energies[1] - energies[0])) / (width * (float(slopes.abs().max()) + 1e-6)),
        "force": abs(float(slopes[1] - slopes[0])) / (width * bound),
    }
    check_deviations(steps, 1.5)


def make_pair_at(distance: float) -> Graph:
    """Return O-C and a hydrogen at the given distance from the oxygen, off the axis."""
    direction = np.array([0.6, 0.0, 0.8])
    positions = np.array([[0.0, 0, 0], [-0.9, 0.8, 0.1], distance * direction])
    return Graph(atomic_numbers=np.array([8, 6, 1]), positions=positions, total_charge=1.0, group="scan")


@pytest.mark.parametrize("edge", EDGES)
def test_the_whole_model_is_smooth_across_the_edges(edge: str) -> None:
    """Energy and forces of a molecule on either side of an edge, 2e-7 Å apart, differ by their slopes and no more."""
    potential, width = make_published_sizes(), 1e-7
    before, after = (compute(potential, make_pair_at(EDGES[edge] + s * width)) for s in (-1, 1))
    assert np.abs(before["forces"][2]).max() > 1e-6 or edge == "all ends"
    step = np.linalg.norm(before["forces"][2]) * 2 * width
    check_deviations(
        {
            "energy": abs(float(after["energy"][0] - before["energy"][0])) - step,
            "forces": measure(after["forces"], before["forces"]),
        },
        {"energy": 1e-11, "forces": 1e-4},
    )


def test_pairs_beyond_the_long_range_cutoff_change_nothing() -> None:
    potential, deviations = make_published_sizes(), {}
    for graph in (make_molecule(), make_crystal()):
        exact, longer = (make_batch([graph], (CUTOFF, reach)) for reach in (LONG_RANGE_CUTOFF, LONG_RANGE_CUTOFF + 3))
        results = [{k: v.numpy() for k, v in potential(b).items()} for b in (longer, exact)]
        deviations |= {f"{graph.group} {k}": v for k, v in compare(*results).items()}
    check_deviations(deviations, 1e-11)


def displace(graph: Graph, atom: int, axis: int, step: float) -> Graph:
    positions = graph.positions.copy()
    positions[atom, axis] += step
    return move(graph, positions)


@pytest.mark.parametrize("cutoff", [LONG_RANGE_CUTOFF, 0.0])
def test_forces_of_an_ion_are_slopes_of_its_energy(cutoff: float) -> None:
    """Charges respond to all atoms, near and far."""
    potential, step = make_published_sizes(cutoff), 2e-4
    graph = join(make_ion(1.0), move(make_molecule("H2O"), make_molecule("H2O").positions + np.array([5.2, 4.1, 3.7])))
    forces = compute(potential, graph)["forces"]
    atoms = (0, 4, graph.num_atoms - 1)
    moved = [displace(graph, atom, axis, p * step) for atom in atoms for axis in range(3) for p in STENCIL]
    energies = compute(potential, *moved)["energy"].reshape(len(atoms), 3, len(STENCIL))
    slopes = energies @ np.array(list(STENCIL.values())) / step
    assert np.abs(forces).max() > 1e-2
    check_deviations({"forces": measure(forces[list(atoms)], -slopes)}, 1e-8)


def strain(graph: Graph, row: int, column: int, step: float) -> Graph:
    assert graph.cell is not None
    deformation = np.eye(3)
    deformation[row, column] += step / 2
    deformation[column, row] += step / 2
    return move(graph, graph.positions @ deformation, graph.cell @ deformation)


@pytest.mark.parametrize("charge", [0.0, -1.0])
def test_stress_of_a_cell_smaller_than_the_cutoff(charge: float) -> None:
    """A triclinic cell, in which every atom sees dozens of its own images."""
    potential, step = make_published_sizes(), 1e-4
    graph = dataclasses.replace(make_crystal("self_images"), total_charge=charge)
    assert graph.cell is not None
    stress = compute(potential, graph, stress=True)["stress"][0]
    strained = [strain(graph, i, j, p * step) for i in range(3) for j in range(3) for p in STENCIL]
    energies = compute(potential, *strained)["energy"].reshape(3, 3, len(STENCIL))
    slopes = energies @ np.array(list(STENCIL.values())) / step / abs(np.linalg.det(graph.cell))
    assert np.abs(stress).max() > 1e-3
    check_deviations({"stress": measure(stress, slopes)}, 1e-8)


def test_supercell_of_a_neutral_cell_has_twice_its_energy() -> None:
    potential, cell = make_published_sizes(), make_crystal()
    atoms = ase.Atoms(cell.atomic_numbers, positions=cell.positions, cell=cell.cell, pbc=True)
    one, two = (compute(potential, from_atoms(a), stress=True) for a in (atoms, atoms * (2, 1, 1)))
    expected = {"energy": 2 * one["energy"], "stress": one["stress"]} | {
        name: np.concatenate([one[name]] * 2) for name in ("forces", "partial_charges", "hirshfeld_ratios")
    }
    check_deviations(compare({name: two[name] for name in expected}, expected), 1e-10)


def list_directed_pairs(graph: Graph, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every atom with every other and every image within reach, its own too: atoms (pairs,) twice, lattice shifts."""
    assert graph.cell is not None
    grid = np.stack(np.meshgrid(*[np.arange(-7, 8)] * 3, indexing="ij"), -1).reshape(-1, 3)
    vectors = graph.positions + (grid @ graph.cell)[:, None, None] - graph.positions[:, None]
    distances = np.linalg.norm(vectors, axis=-1)
    images, first, second = np.nonzero((distances < reach) & (distances > 1e-9))
    return first, second, grid[images]


@pytest.mark.parametrize("name", ["triclinic", "self_images"])
def test_the_full_list_at_half_weight_gives_the_same_energies(name: str) -> None:
    """Every pair counted from both of its atoms, as SO3LR's authors do, an atom's own images too; of each term and atom."""
    potential, graph = make_published_sizes(), make_crystal(name)
    network, half = potential.network, make_batch([graph], potential.cutoffs)
    first, second, shifts = (torch.from_numpy(v) for v in list_directed_pairs(graph, LONG_RANGE_CUTOFF))
    full = dataclasses.replace(half, pair_first=first, pair_second=second, pair_shifts=shifts.double())
    assert len(first) == 2 * len(half.pair_first)
    assert ((first == second) & (shifts != 0).any(1)).any()
    charges, ratios = torch.tensor([0.4, -0.7, 0.2, 0.1]).double(), torch.tensor([0.8, 0.9, 1.1, 0.7]).double()
    settings = {
        "both": (True, network.dispersion),
        "electrostatics": (True, None),
        "dispersion": (False, network.dispersion),
    }
    deviations = {}
    for term, (network.cuts_electrostatics, network.dispersion) in settings.items():
        found, expected = (
            network._compute_long_range(b, compute_vectors(b), charges[: graph.num_atoms], ratios[: graph.num_atoms])
            for b in (full, half)
        )
        assert float(expected.abs().min()) > 1e-4
        deviations[term] = measure(found.numpy() / 2, expected.numpy())
    check_deviations(deviations, 1e-12)


@pytest.mark.parametrize("charge", [0.0, 1.0, -2.0])
def test_charges_add_up(charge: float) -> None:
    potential = make_published_sizes()
    graphs = [dataclasses.replace(g, total_charge=charge) for g in (make_molecule(), make_crystal())]
    outputs = compute(potential, *graphs)
    sums = [part.sum() for part in np.split(outputs["partial_charges"], [graphs[0].num_atoms])]
    check_deviations({"sums": measure(np.array(sums), np.full(2, charge))}, 1e-12)
    dipole = outputs["partial_charges"][: graphs[0].num_atoms] @ graphs[0].positions
    check_deviations({"dipole": measure(outputs["dipole"][0], dipole)}, 1e-12)


def test_dipoles_of_neutral_molecules_turn_and_do_not_shift() -> None:
    potential, graph = make_published_sizes(), make_molecule()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    moved = compute(potential, move(graph, graph.positions @ turn.T + [100.0, -50.0, 7.0]))
    expected = compute(potential, graph)["dipole"] @ turn.T
    assert np.abs(expected).max() > 1e-2
    check_deviations({"dipole": measure(moved["dipole"], expected)}, 1e-10)


def test_distant_molecules_share_the_correction_of_their_charges() -> None:
    """What makes the charges add up is spread over all atoms of a structure, so they know how many there are, however far."""
    potential = make_published_sizes()
    first, second = make_molecule(), make_molecule("H2O")
    together = compute(potential, join(first, move(second, second.positions + FAR)))["partial_charges"]
    alone = np.concatenate([compute(potential, g)["partial_charges"] for g in (first, second)])
    shift = together - alone
    counts = np.array([first.num_atoms, second.num_atoms])
    parts = np.split(shift, [counts[0]])
    check_deviations({"within a molecule": float(max(np.ptp(p) for p in parts)), "net": abs(float(shift.sum()))}, 1e-12)
    assert min(abs(float(p.mean())) for p in parts) > 1e-3


@pytest.mark.skipif(
    "SO3KRATES_REFERENCE_DIR" not in os.environ, reason="SO3KRATES_REFERENCE_DIR is not set: no published weights"
)
def test_how_much_the_published_model_is_not_size_consistent(tmp_path: Path) -> None:
    """Ethanol and water 300 Å apart: 0.2 meV where both are neutral; -0.40 eV where the ethanol is a cation.

    A cation's charge is embedded in the water too, and both share the correction of their partial charges.
    """
    source = Path(os.environ["SO3KRATES_REFERENCE_DIR"]) / "so3lr" / "params.pkl"
    potential = load_model(import_so3lr(source, tmp_path), dtype=torch.float64)
    ethanol, water = make_molecule(seed=None), make_molecule("H2O", None)
    cation = dataclasses.replace(ethanol, total_charge=1.0)
    gaps = {}
    for name, molecule in (("neutral", ethanol), ("cation", cation)):
        both = join(molecule, move(water, water.positions + FAR))
        alone = sum(float(compute(potential, g)["energy"][0]) for g in (molecule, water))
        gaps[name] = float(compute(potential, both)["energy"][0]) - alone
    assert gaps == pytest.approx({"neutral": 1.58e-4, "cation": -0.4005}, rel=0.01)


def test_second_derivatives_of_a_weight_that_only_charges_know() -> None:
    """Training differentiates forces: finite for atoms 0.1 Å apart, on an edge, and with pairs beyond the cutoff."""
    potential = make_published_sizes().train()
    for distance in (0.1, 1.5, 5.4, 10.0, 12.0, 30.0):
        outputs = potential(make_batch([make_pair_at(distance)], potential.cutoffs))
        potential.zero_grad()
        (outputs["forces"].square().sum() + outputs["energy"].square().sum()).backward()
        gradients = {n: p.grad for n, p in potential.named_parameters() if p.grad is not None}
        assert all(bool(g.isfinite().all()) for g in gradients.values()), distance
        assert float(gradients["network.charge_head.output.weight"].abs().max()) > 0
