"""Laws of symmetry: what rotating, inverting, moving, renumbering and repeating a structure may change, and what not."""

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation
from structures import (
    OPTIONS,
    PER_ATOM,
    PERIODIC,
    check_deviations,
    compare,
    compute,
    from_atoms,
    make_crystal,
    make_molecule,
    make_potential,
    make_structures,
    measure,
    move,
    pick,
)

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph

options = pytest.mark.parametrize("options", OPTIONS)


def transform(graph: Graph, matrix: np.ndarray) -> Graph:
    """Apply an orthogonal matrix to positions and cell."""
    return move(graph, graph.positions @ matrix.T, None if graph.cell is None else graph.cell @ matrix.T)


def check_orthogonal(options: str, matrix: np.ndarray) -> None:
    potential = make_potential(options)
    deviations = {}
    for name, graph in make_structures(options).items():
        before = compute(potential, graph, stress=graph.is_periodic)
        after = compute(potential, transform(graph, matrix), stress=graph.is_periodic)
        expected = before | {k: v @ matrix.T for k, v in before.items() if k in ("forces", "dipole")}
        if graph.is_periodic:
            expected["stress"] = matrix @ before["stress"] @ matrix.T
        assert np.abs(before["forces"]).max() > 1e-2, name  # a potential that is zero keeps every law
        deviations |= {f"{name} {field}": value for field, value in compare(after, expected).items()}
    check_deviations(deviations, 1e-10)


@options
def test_rotation(options: str) -> None:
    """Outputs without direction stay, vectors (forces, dipoles) and tensors (stress) turn along."""
    check_orthogonal(options, Rotation.from_rotvec([0.7, -1.1, 2.0]).as_matrix())


@options
def test_inversion(options: str) -> None:
    check_orthogonal(options, -np.eye(3))


def test_reflection() -> None:
    check_orthogonal("backbone", np.diag([1.0, 1.0, -1.0]) @ Rotation.from_rotvec([0.3, 0.2, -0.9]).as_matrix())


@options
def test_translation(options: str) -> None:
    """Only the dipole of a charged structure depends on the origin: by charge times translation."""
    potential, shift = make_potential(options), np.array([3.1, -17.3, 8.9])
    deviations = {}
    for name, graph in make_structures(options).items():
        before = compute(potential, graph)
        if "dipole" in before:
            before["dipole"] = before["dipole"] + graph.total_charge * shift
        after = compute(potential, move(graph, graph.positions + shift))
        deviations |= {f"{name} {field}": value for field, value in compare(after, before).items()}
    check_deviations(deviations, 1e-10)


@pytest.mark.parametrize("options", PERIODIC)
def test_atoms_may_leave_the_cell_one_by_one(options: str) -> None:
    potential, deviations = make_potential(options), {}
    for name in ("triclinic", "self_images"):
        graph = make_crystal(name)
        assert graph.cell is not None
        shifts = np.random.default_rng(0).integers(-2, 3, (graph.num_atoms, 3))
        before = pick(compute(potential, graph, stress=True))
        after = pick(compute(potential, move(graph, graph.positions + shifts @ graph.cell), stress=True))
        deviations |= {f"{name} {field}": value for field, value in compare(after, before).items()}
    check_deviations(deviations, 1e-10)


@options
def test_permutation(options: str) -> None:
    potential = make_potential(options)
    deviations = {}
    for name, graph in make_structures(options).items():
        order = np.random.default_rng(1).permutation(graph.num_atoms)
        before = compute(potential, graph)
        permuted = dataclasses.replace(
            graph, atomic_numbers=graph.atomic_numbers[order], positions=graph.positions[order]
        )
        expected = before | {k: v[order] for k, v in before.items() if k in PER_ATOM}
        deviations |= {f"{name} {k}": v for k, v in compare(compute(potential, permuted), expected).items()}
    check_deviations(deviations, 1e-10)


def shuffle_pairs(graph: Graph, rng: np.random.Generator) -> Graph:
    """Return the structure with its short pairs and its long ones in another order, and half of all the other way round."""
    assert graph.pair_first is not None
    assert graph.pair_second is not None
    num_pairs, num_short = len(graph.pair_first), graph.num_short_pairs
    order = np.concatenate([rng.permutation(num_short), num_short + rng.permutation(num_pairs - num_short)])
    swap = rng.random(num_pairs) < 0.5
    first, second, shifts = graph.pair_first, graph.pair_second, graph.pair_shifts
    return dataclasses.replace(
        graph,
        pair_first=np.where(swap, second, first)[order],
        pair_second=np.where(swap, first, second)[order],
        pair_shifts=None if shifts is None else np.where(swap[:, None], -shifts, shifts)[order],
    )


@options
def test_order_and_direction_of_pairs(options: str) -> None:
    """Pairs are undirected: which atom is the first, and which pair comes first, is nobody's business."""
    potential, rng, deviations = make_potential(options), np.random.default_rng(2), {}
    for name, structure in make_structures(options).items():
        graph = build_neighbors(structure, *potential.cutoffs)
        before, after = (compute(potential, g, stress=g.is_periodic) for g in (graph, shuffle_pairs(graph, rng)))
        deviations |= {f"{name} {field}": value for field, value in compare(after, before).items()}
    check_deviations(deviations, 1e-11)


@options
def test_net_force_and_net_torque_are_zero(options: str) -> None:
    potential = make_potential(options)
    deviations = {}
    for name, graph in make_structures(options).items():
        forces = compute(potential, graph)["forces"]
        scale = np.abs(forces).max()
        deviations[f"{name} net force"] = float(np.abs(forces.sum(0)).max() / scale)
        if not graph.is_periodic:
            torque = np.cross(graph.positions, forces).sum(0)
            deviations[f"{name} net torque"] = float(np.abs(torque).max() / scale)
    check_deviations(deviations, 1e-11)


def test_stress_is_symmetric() -> None:
    stress = compute(make_potential(), make_crystal(), stress=True)["stress"]
    check_deviations({"stress": measure(stress, stress.transpose(0, 2, 1))}, 1e-14)


def test_a_different_element_gives_a_different_energy() -> None:
    """Not only through the baselines: forces change too."""
    potential, graph = make_potential(), make_molecule()
    changed = dataclasses.replace(graph, atomic_numbers=np.where(graph.atomic_numbers == 8, 7, graph.atomic_numbers))
    assert np.abs(compute(potential, changed)["forces"] - compute(potential, graph)["forces"]).max() > 1e-3


@options
def test_mirror_images_have_one_energy_but_conformers_do_not(options: str) -> None:
    """A chiral molecule against its enantiomer, and against another conformer."""
    positions = np.array([[0, 0, 0], [1.1, 0, 0], [-0.4, 1.3, 0], [-0.5, -0.6, 1.1], [-0.5, -0.5, -0.9]])
    left = Graph(atomic_numbers=np.array([6, 1, 7, 8, 6]), positions=positions.astype(float))
    right = move(left, left.positions * [1, 1, -1])
    other = move(left, left.positions + np.eye(5, 3) * 0.3)
    energies = compute(make_potential(options), left, right, other)["energy"]
    check_deviations({"enantiomers": measure(energies[1], energies[0])}, 1e-10)
    assert abs(energies[2] - energies[0]) > 1e-4


@pytest.mark.parametrize("options", PERIODIC)
def test_supercell_has_the_energy_of_its_cells(options: str) -> None:
    potential, deviations = make_potential(options), {}
    for name, repeats in (("triclinic", (2, 2, 2)), ("self_images", (2, 2, 2)), ("self_images", (1, 3, 2))):
        cell = make_crystal(name)
        atoms = Atoms(cell.atomic_numbers, positions=cell.positions, cell=cell.cell, pbc=True)
        count = int(np.prod(repeats))
        one, many = (pick(compute(potential, g, stress=True)) for g in (cell, from_atoms(atoms * repeats)))
        expected = {k: np.concatenate([v] * count) if k in PER_ATOM else v for k, v in one.items()}
        expected["energy"] = one["energy"] * count
        deviations |= {f"{name} {repeats} {k}": v for k, v in compare(many, expected).items()}
    check_deviations(deviations, 1e-10)


@pytest.mark.parametrize("options", PERIODIC)
def test_another_choice_of_the_same_lattice(options: str) -> None:
    """Cell vectors a, b + 2a, c - b span the same lattice."""
    potential, graph = make_potential(options), make_crystal("self_images")
    assert graph.cell is not None
    other = move(graph, graph.positions, np.array([[1, 0, 0], [2, 1, 0], [0, -1, 1]]) @ graph.cell)
    check_deviations(compare(compute(potential, other, stress=True), compute(potential, graph, stress=True)), 1e-10)


@pytest.mark.parametrize("options", PERIODIC)
def test_a_molecule_in_a_huge_box_is_a_molecule(options: str) -> None:
    """But for dipoles that interact with all their images, as one over the volume (test_ewald_laws.py)."""
    potential, molecule = make_potential(options), make_molecule()
    box = np.array([[60.0, 0, 0], [7.0, 55.0, 0], [-4.0, 3.0, 70.0]])
    boxed = dataclasses.replace(molecule, cell=box, pbc=np.ones(3, bool))
    deviations = compare(compute(potential, boxed), compute(potential, molecule))
    of_images = ("energy", "forces") if OPTIONS[options].image_density else ()
    check_deviations(deviations, {name: 1e-3 if name in of_images else 1e-12 for name in deviations})


@pytest.mark.parametrize("pbc", [(True, True, False), (False, False, True)])
def test_a_slab_and_a_wire_do_not_see_their_images_across_the_open_sides(pbc: tuple[bool, bool, bool]) -> None:
    """With vacuum along the open directions a structure periodic everywhere is the same."""
    potential, graph = make_potential(), make_crystal()
    assert graph.cell is not None
    cell = np.where(np.array(pbc)[:, None], graph.cell, 40.0 * np.eye(3))
    partly = dataclasses.replace(graph, cell=cell, pbc=np.array(pbc))
    closed = dataclasses.replace(graph, cell=cell, pbc=np.ones(3, bool))
    deviations = compare(compute(potential, partly), compute(potential, closed))
    check_deviations(deviations, 1e-12)
    assert measure(compute(potential, partly)["energy"], compute(potential, graph)["energy"]) > 1e-3


def test_atoms_that_symmetry_makes_equal_feel_equal_forces() -> None:
    forces = compute(make_potential(), make_molecule("CH4", None))["forces"]
    lengths = np.linalg.norm(forces[1:], axis=1)
    check_deviations(
        {"hydrogens": measure(lengths, np.full(4, lengths.mean())), "carbon": float(np.abs(forces[0]).max())}, 1e-12
    )
    assert lengths.min() > 1e-3


def test_random_state_of_torch_is_not_touched() -> None:
    potential = make_potential()
    before = torch.get_rng_state()
    compute(potential, make_molecule())
    assert torch.equal(torch.get_rng_state(), before)
