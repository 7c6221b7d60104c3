"""What a model needs to know about its training conformers before it starts: baselines, scales, neighbour counts.

Energy baselines are one energy per element, fitted so that their sum over a structure is close to its energy. The fit is
robust (Huber) because one wrong label in a hundred is normal in collected data, and it is pulled towards the energies of
isolated atoms where they are known, because molecules of one composition cannot tell their elements apart.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import FloatArray, Graph

NEIGHBOR_CUTOFFS: Final = tuple(np.arange(3.0, 10.01, 0.5).tolist())
"""Å; the cutoffs whose mean neighbour counts are kept"""

_MAX_NEIGHBOR_CONFORMERS: Final = 256
_MAX_NEIGHBOR_ATOMS: Final = 20_000
_HUBER: Final = 1.345
"""Huber's threshold in standard deviations: 95 % efficient on Gaussian noise (Huber and Ronchetti, Robust Statistics, 2009)"""
_MAD_TO_STD: Final = 1.4826
_MIN_SCALE: Final = 1e-4
"""eV/atom; below it residuals count as noise, also where all of them are zero"""
_PRIOR_STD_ATOMS: Final = 10.0
"""eV; how far an element's baseline may lie from its isolated atom: a few bonds"""
_PRIOR_STD_NONE: Final = 1e4
"""eV; without isolated atoms the prior only decides what the data leave open"""
_MAX_ITERATIONS: Final = 100
_CHUNK: Final = 65_536


def hash_geometry(graph: Graph, seed: int) -> int:
    """Return 64 bits that depend on seed, elements and positions alone.

    Positions enter as float32, as they are stored, so that the hash of what is read equals the hash of what was written.

    Args:
        graph: A structure.
        seed: Changes all hashes.
    """
    digest = hashlib.blake2b(str(seed).encode() + b"|", digest_size=8)
    digest.update(np.ascontiguousarray(graph.atomic_numbers, "<u1").tobytes())
    digest.update(np.ascontiguousarray(graph.positions, "<f4").tobytes())
    return int.from_bytes(digest.digest(), "big")


def compute_statistics(graphs: Sequence[Graph], isolated_atom_energies: Mapping[int, float] | None) -> dict[str, Any]:
    """Compute the statistics of the training split.

    Args:
        graphs: Training conformers.
        isolated_atom_energies: eV by atomic number, at the level of theory of the labels; may lack elements. None if unknown.

    Returns:
        Plain numbers under string keys (they go to `manifest.json`), of which `energy_baselines` (eV by atomic number),
        `energy_residual_std_per_atom` (eV/atom, gross outliers clipped), `force_rms` (eV/Å, over all components),
        `force_rms_per_element`, `max_force` (eV/Å, largest norm) and `mean_neighbors` (directed edges per atom, averaged over
        conformers, by cutoff in Å) are used in training. Without energies the baselines are the isolated atoms'
        energies or zero; without forces their entries are None.

    Raises:
        DataError: There are no conformers.
    """
    if not graphs:
        raise DataError("training split", "hold conformers", 0, "Give the split `train` a larger share")
    elements, inverse = np.unique(np.concatenate([g.atomic_numbers for g in graphs]), return_inverse=True)
    counts = np.array([g.num_atoms for g in graphs])
    baselines, residual_std = fit_baselines(graphs, isolated_atom_energies)
    content = {
        "elements": elements.tolist(),
        "element_counts": {str(z): n for z, n in zip(elements, np.bincount(inverse).tolist(), strict=True)},
        "energy_baselines": {str(z): e for z, e in baselines.items()},
        "isolated_atom_energies": None
        if isolated_atom_energies is None
        else {str(z): float(e) for z, e in sorted(isolated_atom_energies.items())},
        "energy_residual_std_per_atom": residual_std,
        "num_atoms": {"min": int(counts.min()), "mean": float(counts.mean()), "max": int(counts.max())},
        "mean_neighbors": count_neighbors(graphs),
        "total_charges": dict(sorted(Counter(f"{g.total_charge:g}" for g in graphs).items())),
        "num_unpaired_electrons": dict(sorted(Counter(f"{g.num_unpaired_electrons:g}" for g in graphs).items())),
        "num_periodic": sum(g.is_periodic for g in graphs),
    }
    rounded: dict[str, Any] = _round(content | _force_statistics(graphs))
    return rounded


def _round(value: Any) -> Any:
    """Keep twelve digits: the order in which a BLAS adds numbers depends on its threads and must not show in the manifest."""
    if isinstance(value, dict):
        return {k: _round(v) for k, v in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _force_statistics(graphs: Sequence[Graph]) -> dict[str, Any]:
    pairs = [(g.atomic_numbers, np.asarray(g.forces, np.float64)) for g in graphs if g.forces is not None]
    if not pairs:
        return {"force_rms": None, "force_rms_per_element": None, "max_force": None}
    numbers, forces = np.concatenate([z for z, _ in pairs]), np.concatenate([f for _, f in pairs])
    squared = np.einsum("nk,nk->n", forces, forces)
    per_element = {str(z): float(np.sqrt(squared[numbers == z].mean() / 3)) for z in np.unique(numbers)}
    return {
        "force_rms": float(np.sqrt(squared.mean() / 3)),
        "force_rms_per_element": per_element,
        "max_force": float(np.sqrt(squared.max())),
    }


def count_neighbors(graphs: Sequence[Graph]) -> dict[str, float]:
    """Return the mean number of neighbours per atom for each of `NEIGHBOR_CUTOFFS`.

    The mean over conformers of each conformer's directed edges per atom (two for each pair), on at most a few hundred
    conformers that a hash chooses.

    Args:
        graphs: At least one conformer.
    """
    per_graph: list[FloatArray] = []
    num_atoms = 0
    hashes = np.array([hash_geometry(g, 0) for g in graphs], np.uint64)
    for index in np.argsort(hashes, kind="stable")[:_MAX_NEIGHBOR_CONFORMERS]:
        graph = graphs[index]
        per_graph.append(2 * _count_pairs(graph) / graph.num_atoms)
        num_atoms += graph.num_atoms
        if num_atoms > _MAX_NEIGHBOR_ATOMS:
            break
    means = np.mean(per_graph, axis=0)
    return {f"{cutoff:.1f}": float(mean) for cutoff, mean in zip(NEIGHBOR_CUTOFFS, means, strict=True)}


def _count_pairs(graph: Graph) -> FloatArray:
    """Return the number of undirected pairs closer than each of `NEIGHBOR_CUTOFFS`."""
    graph = build_neighbors(graph, NEIGHBOR_CUTOFFS[-1])
    positions = graph.positions.astype(np.float64)
    vectors = positions[graph.pair_second] - positions[graph.pair_first]
    if graph.pair_shifts is not None and graph.cell is not None:
        vectors = vectors + graph.pair_shifts @ np.asarray(graph.cell, np.float64)
    distances = np.sort(np.linalg.norm(vectors, axis=1))
    return np.searchsorted(distances, NEIGHBOR_CUTOFFS).astype(np.float64)


def compute_compositions(graphs: Sequence[Graph], elements: Sequence[int]) -> FloatArray:
    """Return (num_graphs, num_elements) how many atoms of each element every structure has."""
    elements_array = np.asarray(elements)
    return np.stack([(g.atomic_numbers[:, None] == elements_array).sum(0) for g in graphs]).astype(np.float64)


def fit_baselines(
    graphs: Sequence[Graph], isolated_atom_energies: Mapping[int, float] | None
) -> tuple[dict[int, float], float | None]:
    """Fit one energy per element to the total energies, robustly.

    Minimises the sum of Huber's function of the residual per atom, plus a ridge towards the isolated atoms' energies (the
    median energy per atom where an element's is unknown), by iteratively reweighted normal equations A = sum w n n^T.
    Charged structures are left out but for those that hold an element which no neutral one has: the electron that is
    missing would be shared out among the elements.

    Args:
        graphs: Structures; those without an energy are passed over.
        isolated_atom_energies: eV by atomic number, or None.

    Returns:
        eV by atomic number for all elements of the structures, and the standard deviation of the residuals (eV/atom; those
        beyond ten robust standard deviations count as ten), None without energies.
    """
    elements = np.unique(np.concatenate([g.atomic_numbers for g in graphs])).tolist()
    known = isolated_atom_energies or {}
    labelled = [g for g in graphs if g.energy is not None]
    if not labelled:
        return {z: float(known.get(z, 0.0)) for z in elements}, None
    compositions = compute_compositions(labelled, elements)
    num_atoms = compositions.sum(1)
    fractions = compositions / num_atoms[:, None]
    energies = np.array([g.energy for g in labelled], np.float64) / num_atoms
    used = _choose_for_fit(compositions, np.array([g.total_charge for g in labelled]))
    prior = np.array([known.get(z, np.median(energies[used])) for z in elements])
    prior_std = np.array([_PRIOR_STD_ATOMS if z in known else _PRIOR_STD_NONE for z in elements])
    solution = _fit_huber(fractions[used], energies[used], prior, prior_std)
    residuals = energies - fractions @ solution
    limit = 10 * _robust_std(residuals[used])
    return dict(zip(elements, solution.tolist(), strict=True)), float(np.std(np.clip(residuals, -limit, limit)))


def _choose_for_fit(compositions: FloatArray, charges: FloatArray) -> np.ndarray:
    """Return (num_graphs,) bool: the neutral ones, and those with elements that no neutral one has."""
    neutral = charges == 0
    unseen = ~(compositions[neutral] > 0).any(0)
    return np.asarray(neutral | (compositions[:, unseen] > 0).any(1))


def _fit_huber(fractions: FloatArray, energies: FloatArray, prior: FloatArray, prior_std: FloatArray) -> FloatArray:
    """Return (num_elements,) eV; `energies` are per atom, `fractions` (num_graphs, num_elements) sum to one."""
    solution = prior
    targets = energies - fractions @ prior
    weights = np.ones_like(targets)
    for _ in range(_MAX_ITERATIONS):
        scale = _robust_std(energies - fractions @ solution)
        matrix, vector = _normal_equations(fractions, targets, weights)
        floor = 1e-12 * np.trace(matrix)  # keeps the matrix positive where the prior is weak
        matrix += np.diag(np.square(scale / prior_std) + floor)
        new = prior + np.linalg.solve(matrix, vector)
        converged = np.abs(fractions @ (new - solution)).max() < 1e-3 * _MIN_SCALE
        solution = new
        residuals = np.abs(energies - fractions @ solution)
        limit = _HUBER * _robust_std(residuals)
        weights = np.minimum(1.0, limit / np.maximum(residuals, limit))
        if converged:
            break
    return solution


def _normal_equations(rows: FloatArray, targets: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return A = sum w n n^T and b = sum w n y, added up in pieces that fit into the cache."""
    size = rows.shape[1]
    matrix, vector = np.zeros((size, size)), np.zeros(size)
    for first in range(0, len(rows), _CHUNK):
        piece = slice(first, first + _CHUNK)
        weighted = rows[piece] * weights[piece, None]
        matrix += weighted.T @ rows[piece]
        vector += weighted.T @ targets[piece]
    return matrix, vector


def _robust_std(residuals: FloatArray) -> float:
    return max(_MAD_TO_STD * float(np.median(np.abs(residuals))), _MIN_SCALE)
