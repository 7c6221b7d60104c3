"""Neighbour pairs: numpy, vesin and a loop over images agree, in molecules and in cells smaller than the cutoff."""

import itertools

import numpy as np
import pytest

from so3krates_dist.data import neighbors
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

Pairs = set[tuple[int, int, int, int, int]]


def to_directed(graph: Graph) -> Pairs:
    """Both directions of every pair, as (centre, neighbour, shift): comparable however each pair was oriented."""
    shifts = np.zeros((len(graph.pair_first), 3), int) if graph.pair_shifts is None else graph.pair_shifts
    rows = list(zip(graph.pair_first.tolist(), graph.pair_second.tolist(), shifts.tolist(), strict=True))
    forward = {(i, j, *s) for i, j, s in rows}
    backward = {(j, i, *(-k for k in s)) for i, j, s in rows}
    assert len(forward) == len(rows), "a pair is there twice"
    assert not forward & backward, "a pair is there in both directions"
    return forward | backward


def loop_over_images(graph: Graph, cutoff: float, reach: int) -> Pairs:
    cell = np.zeros((3, 3)) if graph.cell is None else graph.cell
    ranges = [range(-reach, reach + 1) if p else [0] for p in (graph.pbc if graph.pbc is not None else [False] * 3)]
    found = set()
    for shift in itertools.product(*ranges):
        for i, j in itertools.product(range(graph.num_atoms), repeat=2):
            if i == j and shift == (0, 0, 0):
                continue
            if np.linalg.norm(graph.positions[j] + np.array(shift) @ cell - graph.positions[i]) < cutoff:
                found.add((i, j, *shift))
    return found


def make_molecule(num_atoms: int, size: float, seed: int = 0) -> Graph:
    positions = np.random.default_rng(seed).uniform(0, size, (num_atoms, 3))
    return Graph(atomic_numbers=np.full(num_atoms, 6), positions=positions)


@pytest.mark.parametrize(("num_atoms", "cutoff"), [(1, 5.0), (2, 0.5), (20, 3.0), (40, 100.0)])
def test_numpy_and_vesin_and_a_loop_agree_for_molecules(num_atoms: int, cutoff: float, monkeypatch) -> None:
    molecule = make_molecule(num_atoms, 6.0)
    by_numpy = to_directed(build_neighbors(molecule, cutoff))
    monkeypatch.setattr(neighbors, "MAX_ATOMS_ALL_PAIRS", 0)
    by_vesin = build_neighbors(molecule, cutoff)
    assert by_vesin.pair_shifts is None
    assert by_numpy == to_directed(by_vesin) == loop_over_images(molecule, cutoff, 0)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, True)])
@pytest.mark.parametrize("triclinic", [False, True])
def test_vesin_and_a_loop_agree_in_a_cell_smaller_than_the_cutoff(pbc, triclinic: bool) -> None:
    cell = np.array([[2.5, 0.0, 0.0], [0.9, 2.8, 0.0], [0.3, -0.7, 3.1]]) if triclinic else np.diag([2.5, 2.8, 3.1])
    graph = make_molecule(3, 2.4)
    graph.cell, graph.pbc = cell, np.array(pbc)
    assert to_directed(build_neighbors(graph, 4.0)) == loop_over_images(graph, 4.0, 4)


def test_an_atom_pairs_with_its_own_images_once_for_each_direction_and_its_opposite() -> None:
    graph = Graph(atomic_numbers=np.array([29]), positions=np.zeros((1, 3)), cell=2 * np.eye(3), pbc=np.ones(3, bool))
    found = build_neighbors(graph, 2.5)
    assert len(found.pair_first) == 3
    assert len(to_directed(found)) == 6


def test_a_large_molecule_goes_through_the_cell_list() -> None:
    molecule = make_molecule(neighbors.MAX_ATOMS_ALL_PAIRS + 10, 12.0)
    assert to_directed(build_neighbors(molecule, 3.0)) == loop_over_images(molecule, 3.0, 0)


def test_pairs_at_the_cutoff_are_left_out() -> None:
    graph = Graph(atomic_numbers=np.ones(2, int), positions=np.array([[0.0, 0, 0], [0, 0, 3.0]]))
    assert len(build_neighbors(graph, 3.0).pair_first) == 0
    assert len(build_neighbors(graph, np.nextafter(3.0, 4.0)).pair_first) == 1


@pytest.mark.parametrize("periodic", [False, True])
def test_coinciding_atoms_are_refused(periodic: bool) -> None:
    graph = Graph(atomic_numbers=np.ones(2, int), positions=np.zeros((2, 3)), group="collapsed")
    if periodic:
        graph.cell, graph.pbc = 5 * np.eye(3), np.ones(3, bool)
    with pytest.raises(DataError, match=r"collapsed must have its atoms at least 0.001 Å apart; got 0"):
        build_neighbors(graph, 3.0)
