"""Neighbour pairs: numpy, vesin and a loop over images agree, in molecules and in cells smaller than the cutoff."""

import dataclasses
import itertools
import math
import re

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


# ------------------------------------------------------------------------------------------------------------ short and long pairs


def compute_distances(graph: Graph) -> np.ndarray:
    vectors = graph.positions[graph.pair_second] - graph.positions[graph.pair_first]
    if graph.pair_shifts is not None:
        vectors = vectors + graph.pair_shifts @ graph.cell
    return np.linalg.norm(vectors, axis=1)


def take_pairs(graph: Graph, start: int, end: int | None) -> Graph:
    shifts = None if graph.pair_shifts is None else graph.pair_shifts[start:end]
    return dataclasses.replace(
        graph, pair_first=graph.pair_first[start:end], pair_second=graph.pair_second[start:end], pair_shifts=shifts
    )


def make_small_cell() -> Graph:
    """Two atoms in a triclinic cell whose shortest translation is 2.5 Å."""
    graph = make_molecule(2, 2.0)
    graph.cell, graph.pbc = np.array([[2.5, 0.0, 0.0], [0.9, 2.8, 0.0], [0.3, -0.7, 3.1]]), np.ones(3, bool)
    return graph


@pytest.mark.parametrize("reach", [4.5, 6.0, math.inf])
@pytest.mark.parametrize("limit", [0, neighbors.MAX_ATOMS_ALL_PAIRS])
def test_short_pairs_of_molecules_come_first(reach: float, limit: int, monkeypatch) -> None:
    monkeypatch.setattr(neighbors, "MAX_ATOMS_ALL_PAIRS", limit)
    molecule = make_molecule(25, 7.0)
    found = build_neighbors(molecule, 3.0, reach)
    distances = compute_distances(found)
    assert 0 < found.num_short_pairs < len(distances)
    assert (distances[: found.num_short_pairs] < 3.0).all()
    assert ((distances[found.num_short_pairs :] >= 3.0) & (distances[found.num_short_pairs :] < reach)).all()
    assert to_directed(found) == loop_over_images(molecule, reach, 0)
    assert found.pair_shifts is None
    assert to_directed(take_pairs(found, 0, found.num_short_pairs)) == to_directed(build_neighbors(molecule, 3.0))


def test_an_infinite_reach_gives_all_pairs_however_far_and_many() -> None:
    num_atoms = neighbors.MAX_ATOMS_ALL_PAIRS + 3
    molecule = make_molecule(num_atoms, 1e4)
    found = build_neighbors(molecule, 5.0, math.inf)
    assert len(found.pair_first) == len(to_directed(found)) // 2 == num_atoms * (num_atoms - 1) // 2
    assert found.num_short_pairs == 0


def test_long_pairs_in_a_small_cell_are_those_of_a_loop_over_images() -> None:
    """At 12 Å an atom of a small cell pairs with dozens of its own images."""
    crystal = make_small_cell()
    found = build_neighbors(crystal, 4.0, 12.0)
    expected = loop_over_images(crystal, 12.0, 7)
    assert max(abs(k) for *_, a, b, c in expected for k in (a, b, c)) < 7, "the loop must go farther"
    assert to_directed(found) == expected
    assert to_directed(take_pairs(found, 0, found.num_short_pairs)) == loop_over_images(crystal, 4.0, 4)
    own = found.pair_first == found.pair_second
    assert np.count_nonzero(own[: found.num_short_pairs]) > 0
    assert np.count_nonzero(own[found.num_short_pairs :]) > 50
    distances = compute_distances(found)
    assert (distances[: found.num_short_pairs] < 4.0).all()
    assert (distances[found.num_short_pairs :] >= 4.0).all()
    assert distances.max() < 12.0


def test_long_pairs_of_a_wire_go_along_the_wire_only() -> None:
    wire = make_small_cell()
    wire.pbc = np.array([True, False, False])
    found = build_neighbors(wire, 3.0, 9.0)
    assert to_directed(found) == loop_over_images(wire, 9.0, 5)
    assert np.abs(found.pair_shifts[:, 1:]).max() == 0 < np.abs(found.pair_shifts[:, 0]).max()


@pytest.mark.parametrize("reach", [None, 2.0, 3.0])
def test_without_a_longer_reach_all_pairs_are_short(reach: float | None) -> None:
    for graph in (make_molecule(20, 6.0), make_small_cell()):
        found = build_neighbors(graph, 3.0, reach)
        assert found.num_short_pairs == len(found.pair_first) > 0
        assert to_directed(found) == loop_over_images(graph, 3.0, 4)


def test_the_reach_is_left_out_like_the_cutoff() -> None:
    graph = Graph(atomic_numbers=np.ones(2, int), positions=np.array([[0.0, 0, 0], [0, 0, 3.0]]))
    assert len(build_neighbors(graph, 2.0, 3.0).pair_first) == 0
    just_beyond = build_neighbors(graph, 2.0, np.nextafter(3.0, 4.0))
    assert (len(just_beyond.pair_first), just_beyond.num_short_pairs) == (1, 0)
    at_the_cutoff = build_neighbors(graph, 3.0, 5.0)
    assert (len(at_the_cutoff.pair_first), at_the_cutoff.num_short_pairs) == (1, 0)


def test_all_pairs_of_a_crystal_are_refused() -> None:
    crystal = make_small_cell()
    crystal.group = "salt"
    message = (
        r"^salt must be a molecule where a model looks at all pairs of atoms; got a periodic structure\. "
        r"Set a long-range cutoff, or take a model with one\.$"
    )
    with pytest.raises(DataError, match=message):
        build_neighbors(crystal, 4.0, math.inf)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (True, False, False)])
def test_more_pairs_than_memory_holds_are_refused_before_they_are_listed(pbc, monkeypatch) -> None:
    crystal = make_small_cell()
    crystal.group, crystal.pbc = "salt", np.array(pbc)
    reach = {3: 1000.0, 2: 2e5, 1: 1e9}[sum(pbc)]
    monkeypatch.setattr(neighbors, "_pairs_from_cell_list", None)  # it would take forever
    message = (
        rf"^salt must have at most 1e\+08 pairs of atoms up to {re.escape(f'{reach:g}')} Å; got about [\d.]+e\+\d+\. "
        r"Set a shorter long-range cutoff, or take a smaller structure\.$"
    )
    with pytest.raises(DataError, match=message):
        build_neighbors(crystal, 4.0, reach)


def test_all_pairs_of_a_huge_molecule_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"structure must have at most 1e\+08 pairs of atoms up to any distance; got about 2.0e\+08"
    ):
        build_neighbors(make_molecule(20_000, 1e4), 5.0, math.inf)


def test_a_reach_far_beyond_a_molecule_takes_no_longer_than_all_pairs(monkeypatch) -> None:
    monkeypatch.setattr(neighbors, "MAX_PAIRS", 20_000)
    molecule = make_molecule(200, 50.0)
    assert len(build_neighbors(molecule, 5.0, 1e6).pair_first) == 19_900


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("reach", [6.0, 15.0, 40.0])
def test_the_number_of_pairs_is_estimated_well(pbc, reach: float) -> None:
    """Disordered structures of one density, larger and smaller than the reach: within a tenth, or a factor where edges count."""
    graph = make_molecule(300, 13.0)
    graph.pbc, graph.cell = np.array(pbc), 13.0 * np.eye(3) + np.array([[0, 2.0, -1.0], [0, 0, 3.0], [0, 0, 0]])
    if not any(pbc):
        graph.pbc = graph.cell = None
    share = neighbors._estimate_pairs(graph, reach) / len(build_neighbors(graph, 3.0, reach).pair_first)
    assert (0.9 < share < 1.1) if all(pbc) else (0.9 < share < 2.5)


def test_building_again_with_another_reach_starts_anew() -> None:
    crystal = make_small_cell()
    again = build_neighbors(build_neighbors(crystal, 4.0, 8.0), 3.0)
    assert again.num_short_pairs == len(again.pair_first)
    assert to_directed(again) == loop_over_images(crystal, 3.0, 3)


@pytest.mark.parametrize("reach", [None, 9.0, math.inf])
def test_an_atom_alone_has_no_pairs(reach: float | None) -> None:
    found = build_neighbors(make_molecule(1, 1.0), 5.0, reach)
    assert (len(found.pair_first), found.num_short_pairs) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": None}, r"here must have lattice vectors that span a box where it is periodic; got none, or flat ones\. Give"),
        ({"cell": np.zeros((3, 3))}, r"here must have lattice vectors that span a box"),
        ({"cell": np.full((3, 3), np.nan)}, r"here must have lattice vectors that span a box"),
        ({"cell": np.full((3, 3), np.inf)}, r"here must have lattice vectors that span a box"),
        ({"cell": np.diag([0.001, 1000.0, 1000.0])}, r"here must have lattice vectors that span a box"),
        ({"cell": np.diag([9.0, 9.0, 1e6])}, r"here must be at most 50000 Å long, 10000 times as far .*; got 1e\+06 Å\. Check"),
        ({"positions": np.full((200, 3), np.nan)}, r"here must be at most 50000 Å long, .*; got nan Å"),
        ({"positions": np.arange(600).reshape(200, 3) * 1e5, "pbc": None}, r"must be at most 50000 Å long, .*; got 5\.97e\+07 Å"),
        ({"positions": np.full((2, 3), np.nan), "atomic_numbers": np.full(2, 6, np.uint8), "pbc": None}, r"apart; got nan Å"),
    ],
)  # fmt: skip
def test_what_would_end_the_process_in_the_cell_list_is_refused(change, message: str) -> None:
    """It divides by zero, or goes on for ever, for cells without a volume and for atoms very far from all others."""
    positions = np.random.default_rng(0).uniform(0, 30, (200, 3))
    fields = {"positions": positions, "cell": np.eye(3) * 30, "pbc": np.ones(3, bool)} | change
    graph = Graph(atomic_numbers=fields.pop("atomic_numbers", np.full(200, 6, np.uint8)), group="here", **fields)
    with pytest.raises(DataError, match=message):
        build_neighbors(graph, 5.0)
