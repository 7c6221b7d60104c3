"""Neighbour pairs of one structure: undirected, each once, those within the cutoff before those of long-range terms.

Small molecules are done with numpy (all pairs, then a mask: faster below about 150 atoms), anything periodic or larger with
vesin's cell list. Refuses atoms on top of each other: their direction is undefined and its derivatives are not finite. Refuses
structures with more pairs than memory is likely to hold, before it looks for them.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from so3krates_dist.errors import DataError
from so3krates_dist.graph import FloatArray, Graph, IntArray

MAX_ATOMS_ALL_PAIRS = 150
MIN_DISTANCE = 1e-3
"""Å; pairs closer than this are refused"""
MAX_PAIRS = 100_000_000
"""Pairs of one structure; two indices, three translations and a distance, and a copy while they are put in order: some 10 GB"""
MAX_EXTENT = 10_000.0
"""Reaches; structures that are longer end the process in the cell list, which counts its cells in 32 bits"""
MIN_THICKNESS = 0.1
"""Å; least singular value of the lattice vectors that repeat. Flatter ones have no volume, and a cell list never ends"""


@functools.lru_cache(maxsize=2 * MAX_ATOMS_ALL_PAIRS)
def _all_pairs(num_atoms: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return first and second atoms of all pairs, and how many pairs each atom is the first of."""
    first, second = np.triu_indices(num_atoms, k=1)
    return first.astype(np.int64), second.astype(np.int64), np.arange(num_atoms - 1, -1, -1)


class NeighborPairs(NamedTuple):
    """Pairs of one structure, those within the cutoff first."""

    first: IntArray
    """(num_pairs,) int64"""
    second: IntArray
    """(num_pairs,) int64"""
    shifts: IntArray | None
    """(num_pairs, 3) lattice translations; None for a molecule"""
    num_short: int
    """pairs within the cutoff"""

    def select(self, part: slice) -> "NeighborPairs":
        """Return some of the pairs; views."""
        shifts = None if self.shifts is None else self.shifts[part]
        return NeighborPairs(self.first[part], self.second[part], shifts, len(self.first[part]))


Pairs = tuple[IntArray, IntArray, IntArray | None, FloatArray]
"""first and second atoms, lattice translations, squared distances in Å²"""


def _pairs_of_molecule(positions: FloatArray) -> Pairs:
    """Return all pairs of a molecule; coordinates lie one after another, so that numpy goes through them without strides."""
    num_atoms = len(positions)
    small = num_atoms <= MAX_ATOMS_ALL_PAIRS  # the tables of large ones are not worth keeping
    first, second, counts = (_all_pairs if small else _all_pairs.__wrapped__)(num_atoms)
    coordinates = positions.T.astype(np.float64)
    vectors = coordinates.take(second, axis=1)
    vectors -= coordinates.repeat(counts, axis=1)  # that is take(first), which is sorted
    vectors *= vectors
    squared: FloatArray = vectors[0]
    squared += vectors[1]
    squared += vectors[2]
    return first, second, None, squared


def _pairs_from_cell_list(graph: Graph, reach: float) -> Pairs:
    import vesin

    periodic = graph.is_periodic
    first, second, shifts, distances = vesin.NeighborList(cutoff=reach, full_list=False, n_threads=1).compute(
        points=np.ascontiguousarray(graph.positions, np.float64),
        box=np.zeros((3, 3)) if graph.cell is None or not periodic else np.ascontiguousarray(graph.cell, np.float64),
        periodic=np.zeros(3, bool) if graph.pbc is None else np.asarray(graph.pbc, bool),
        quantities="ijSd",
    )
    return first.astype(np.int64), second.astype(np.int64), shifts.astype(np.int64) if periodic else None, distances**2


def _check_distances(squared: FloatArray, where: str) -> None:
    if len(squared) and not squared.min() >= MIN_DISTANCE**2:  # nor is nan
        raise DataError(
            where,
            f"have its atoms at least {MIN_DISTANCE} Å apart",
            f"{np.sqrt(squared.min()):.2g} Å",
            "Remove atoms that lie on top of each other",
        )


def _estimate_pairs(graph: Graph, reach: float) -> float:
    """Return about how many pairs there are: 2/3 pi reach^3 N^2 / V for a mean density N / V.

    Directions that do not repeat count with the structure's extent, or, where the reach is longer, with 4/3 of the reach: slabs and
    wires then have the pairs of a disc and (within a fifth) of a line.
    """
    num_pairs = graph.num_atoms * (graph.num_atoms - 1) / 2
    if math.isinf(reach):
        return num_pairs
    vectors = _find_vectors(graph)
    open_axes = np.linalg.svd(vectors)[2][len(vectors) :] if len(vectors) < 3 else vectors[:0]
    extents = np.maximum(np.ptp(graph.positions @ open_axes.T, axis=0), 4 / 3 * reach)
    volume = math.sqrt(max(np.linalg.det(vectors @ vectors.T), MIN_DISTANCE**6)) * float(extents.prod())
    within_reach = 2 / 3 * math.pi * reach**3 * graph.num_atoms**2 / volume
    return within_reach if len(vectors) else min(num_pairs, within_reach)


def _find_vectors(graph: Graph) -> FloatArray:
    """Return the lattice vectors that repeat, (num_periodic, 3) in Å."""
    if graph.cell is None or graph.pbc is None:
        return np.zeros((0, 3))
    vectors: FloatArray = np.asarray(graph.cell, np.float64)[np.asarray(graph.pbc, bool)]
    return vectors


def spans_box(graph: Graph) -> bool:
    """Return whether the lattice vectors of a periodic structure are there, finite and at least `MIN_THICKNESS` apart."""
    vectors = _find_vectors(graph)
    thick = (
        len(vectors) and np.isfinite(vectors).all() and np.linalg.svd(vectors, compute_uv=False).min() >= MIN_THICKNESS
    )
    return bool(thick)


def _check_box(graph: Graph, reach: float) -> None:
    """Refuse what the cell list, which is compiled code, would end the process for, or never end with."""
    where = graph.group or "structure"
    positions, vectors = np.asarray(graph.positions, np.float64), _find_vectors(graph)
    if graph.is_periodic and not spans_box(graph):
        rule, got = "have lattice vectors that span a box where it is periodic", "none, or flat ones"
        raise DataError(where, rule, got, "Give its cell, or make it a molecule")
    extents = [*np.ptp(positions, axis=0), *np.linalg.norm(vectors, axis=1)]
    if math.isfinite(reach) and not max(extents) <= MAX_EXTENT * reach:
        rule = f"be at most {MAX_EXTENT * reach:g} Å long, {MAX_EXTENT:g} times as far as the model looks"
        raise DataError(where, rule, f"{max(extents):.3g} Å", "Check its positions and its cell")


def _check_number(graph: Graph, reach: float) -> None:
    _check_box(graph, reach)
    estimate = _estimate_pairs(graph, reach)
    if estimate > MAX_PAIRS:
        far = "any distance" if math.isinf(reach) else f"{reach:g} Å"
        raise DataError(
            graph.group or "structure",
            f"have at most {MAX_PAIRS:.0e} pairs of atoms up to {far}",
            f"about {estimate:.1e}",
            "Set a shorter long-range cutoff, or take a smaller structure",
        )


def build_neighbors(graph: Graph, cutoff: float, reach: float | None = None) -> Graph:
    """Return the structure with its neighbour pairs.

    Args:
        graph: A structure.
        cutoff: Å; pairs shorter than this are the short ones, which come first.
        reach: Å; pairs at this distance or beyond are left out. None: the cutoff; infinite: all pairs of a molecule.

    Returns:
        The same structure with `pair_first`, `pair_second`, `num_short_pairs` and, where it is periodic, `pair_shifts`. A pair
        of an atom with its own periodic image is there once for each direction and its opposite together, like any other pair.

    Raises:
        DataError: Two atoms coincide, there are too many pairs, a periodic structure has no cell or a flat one, it is longer
            than `MAX_EXTENT` allows, or all pairs of a periodic structure are asked for.
    """
    reach = cutoff if reach is None else max(reach, cutoff)
    where = graph.group or "structure"
    if math.isinf(reach) and graph.is_periodic:
        raise DataError(
            where,
            "be a molecule where a model looks at all pairs of atoms",
            "a periodic structure",
            "Set a long-range cutoff, or take a model with one",
        )
    if not graph.is_periodic and graph.num_atoms <= MAX_ATOMS_ALL_PAIRS:
        pairs = find_pairs_of_molecule(graph.positions, cutoff, reach, where)
    else:
        _check_number(graph, reach)
        # The cell list takes as long as the reach is, cubed, also where there are no more atoms to find.
        all_pairs = not graph.is_periodic and reach >= np.linalg.norm(np.ptp(graph.positions, axis=0))
        found = _pairs_of_molecule(graph.positions) if all_pairs else _pairs_from_cell_list(graph, reach)
        pairs = _select_pairs(found, cutoff, reach, where)
    return dataclasses.replace(
        graph,
        pair_first=pairs.first,
        pair_second=pairs.second,
        pair_shifts=pairs.shifts,
        num_short_pairs=pairs.num_short,
    )


def find_pairs_of_molecule(positions: FloatArray, cutoff: float, reach: float, where: str) -> NeighborPairs:
    """Return the pairs of a molecule by looking at all of them: what `build_neighbors` does up to `MAX_ATOMS_ALL_PAIRS` atoms.

    Args:
        positions: (num_atoms, 3) Å.
        cutoff: Å; pairs shorter than this come first.
        reach: Å, at least the cutoff; pairs at this distance or beyond are left out.
        where: Name of the structure, for the message.

    Raises:
        DataError: Two atoms coincide.
    """
    return _select_pairs(_pairs_of_molecule(positions), cutoff, reach, where)


def find_squared_distances(graph: Graph, reach: float) -> FloatArray:
    """Return the squared distances in Å² of the pairs up to a reach, for counting; those of small molecules go beyond it.

    Atoms on top of each other are counted like any others.

    Raises:
        DataError: There are too many pairs, a cell is flat, or the structure is longer than `MAX_EXTENT` allows.
    """
    if not graph.is_periodic and graph.num_atoms <= MAX_ATOMS_ALL_PAIRS:
        return _pairs_of_molecule(graph.positions)[3]
    _check_number(graph, reach)
    return _pairs_from_cell_list(graph, reach)[3]


def _select_pairs(found: Pairs, cutoff: float, reach: float, where: str) -> NeighborPairs:
    """Return the pairs within the reach, short ones first, both in the order in which they were found."""
    first, second, shifts, squared = found
    _check_distances(squared, where)
    short = squared < cutoff * cutoff
    num_short = int(np.count_nonzero(short))
    if num_short == len(squared):
        return NeighborPairs(first, second, shifts, num_short)
    order = short.nonzero()[0]
    if reach > cutoff:
        order = np.concatenate([order, (~short & (squared < reach * reach)).nonzero()[0]])
    return NeighborPairs(
        first.take(order), second.take(order), None if shifts is None else shifts.take(order, axis=0), num_short
    )
