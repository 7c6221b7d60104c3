"""Neighbour pairs of one structure: undirected, each once, shorter than the cutoff.

Small molecules are done with numpy (all pairs, then a mask: faster below about 150 atoms), anything periodic or larger with
vesin's cell list. Refuses atoms on top of each other: their direction is undefined and its derivatives are not finite.
"""

import dataclasses
import functools

import numpy as np

from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, IntArray

MAX_ATOMS_ALL_PAIRS = 150
MIN_DISTANCE = 1e-3
"""Å; pairs closer than this are refused"""


@functools.lru_cache(maxsize=2 * MAX_ATOMS_ALL_PAIRS)
def _all_pairs(num_atoms: int) -> tuple[IntArray, IntArray]:
    first, second = np.triu_indices(num_atoms, k=1)
    return first.astype(np.int64), second.astype(np.int64)


def _pairs_of_molecule(graph: Graph, cutoff: float) -> tuple[IntArray, IntArray, IntArray | None]:
    first, second = _all_pairs(graph.num_atoms)
    positions = graph.positions.astype(np.float64)
    vectors = positions.take(second, axis=0) - positions.take(first, axis=0)
    squared = np.einsum("pk,pk->p", vectors, vectors)
    _check_distances(graph, squared)
    within = squared < cutoff * cutoff
    return (first, second, None) if within.all() else (first[within], second[within], None)


def _pairs_from_cell_list(graph: Graph, cutoff: float) -> tuple[IntArray, IntArray, IntArray | None]:
    import vesin

    periodic = graph.is_periodic
    first, second, shifts, distances = vesin.NeighborList(cutoff=cutoff, full_list=False, n_threads=1).compute(
        points=np.ascontiguousarray(graph.positions, np.float64),
        box=np.zeros((3, 3)) if graph.cell is None or not periodic else np.ascontiguousarray(graph.cell, np.float64),
        periodic=np.zeros(3, bool) if graph.pbc is None else np.asarray(graph.pbc, bool),
        quantities="ijSd",
    )
    _check_distances(graph, np.square(distances))
    return first.astype(np.int64), second.astype(np.int64), shifts.astype(np.int64) if periodic else None


def _check_distances(graph: Graph, squared: np.ndarray) -> None:
    if len(squared) and squared.min() < MIN_DISTANCE**2:
        raise DataError(
            graph.group or "structure",
            f"have its atoms at least {MIN_DISTANCE} Å apart",
            f"{np.sqrt(squared.min()):.2g} Å",
            "Remove atoms that lie on top of each other",
        )


def build_neighbors(graph: Graph, cutoff: float) -> Graph:
    """Return the structure with its neighbour pairs.

    Args:
        graph: A structure.
        cutoff: Å; pairs at this distance or beyond are left out.

    Returns:
        The same structure with `pair_first`, `pair_second` and, where it is periodic, `pair_shifts`. A pair of an atom with
        its own periodic image is there once for each direction and its opposite together, like any other pair.

    Raises:
        DataError: Two atoms coincide.
    """
    small_molecule = not graph.is_periodic and graph.num_atoms <= MAX_ATOMS_ALL_PAIRS
    pairs = (_pairs_of_molecule if small_molecule else _pairs_from_cell_list)(graph, cutoff)
    return dataclasses.replace(graph, pair_first=pairs[0], pair_second=pairs[1], pair_shifts=pairs[2])
