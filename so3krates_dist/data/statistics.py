"""What a model needs to know about its training conformers before it starts: baselines, scales, neighbour counts.

Energy baselines are one energy per element, fitted so that their sum over a structure is close to its energy. The fit is
robust (Huber) because one wrong label in a hundred is normal in collected data, and it is pulled towards the energies of
isolated atoms where they are known, because molecules of one composition cannot tell their elements apart.

Conformers go by one at a time, in the order of the data set, and little of them is kept: sums are added up in groups of a fixed
number of conformers, so that the result depends on the order alone, and baselines are fitted to the first of them.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, FloatArray, Graph, IntArray

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
MAX_FIT_CONFORMERS: Final = 200_000
"""with energies, the first ones; baselines are known to a meV long before"""
MIN_FIT_CONFORMERS: Final = 1000
"""of each element; those of rare ones are looked for beyond `MAX_FIT_CONFORMERS`"""
_GROUP: Final = 1024
"""conformers whose sums are taken at once; another number changes the last digits"""
_NUM_ELEMENTS: Final = MAX_ATOMIC_NUMBER + 1


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
    builder = StatisticsBuilder(isolated_atom_energies)
    for graph in graphs:
        builder.add(graph)
    return builder.finish()


class StatisticsBuilder:
    """Adds up the statistics of conformers that go by one after another; `finish` gives what `compute_statistics` describes.

    Args:
        isolated_atom_energies: eV by atomic number, at the level of theory of the labels; may lack elements. None if unknown.
    """

    def __init__(self, isolated_atom_energies: Mapping[int, float] | None = None) -> None:
        self._isolated = isolated_atom_energies
        self._fit = BaselineSample()
        self._neighbors = _NeighborSample()
        self._forces = _ForceSums()
        self._waiting: list[Graph] = []
        self._element_counts = np.zeros(_NUM_ELEMENTS, np.int64)
        self._sizes = Counter[int]()
        self._charges = Counter[str]()
        self._unpaired = Counter[str]()
        self._num_periodic = 0

    def add(self, graph: Graph) -> None:
        """Count one conformer; the order of calls is the order of the data set."""
        if graph.energy is not None:
            self._fit.add(graph.atomic_numbers, graph.energy, graph.total_charge)
        self._neighbors.add(graph)
        self._sizes[graph.num_atoms] += 1
        self._charges[f"{graph.total_charge:g}"] += 1
        self._unpaired[f"{graph.num_unpaired_electrons:g}"] += 1
        self._num_periodic += graph.is_periodic
        self._waiting.append(graph)
        if len(self._waiting) == _GROUP:
            self._add_group()

    def _add_group(self) -> None:
        """Add the atoms that wait to the sums."""
        if self._waiting:
            numbers = np.concatenate([g.atomic_numbers for g in self._waiting])
            self._element_counts += np.bincount(numbers, minlength=_NUM_ELEMENTS)
            self._forces.add([g for g in self._waiting if g.forces is not None])
        self._waiting = []

    def finish(self) -> dict[str, Any]:
        """Return the statistics of all conformers so far.

        Raises:
            DataError: There were none.
        """
        self._add_group()
        num_conformers = self._sizes.total()
        if not num_conformers:
            raise DataError("training split", "hold conformers", 0, "Give the split `train` a larger share")
        elements = np.flatnonzero(self._element_counts).tolist()
        baselines, residual_std = self._fit.fit(self._isolated, elements)
        content = {
            "elements": elements,
            "element_counts": {str(z): int(self._element_counts[z]) for z in elements},
            "energy_baselines": {str(z): e for z, e in baselines.items()},
            "isolated_atom_energies": None
            if self._isolated is None
            else {str(z): float(e) for z, e in sorted(self._isolated.items())},
            "energy_residual_std_per_atom": residual_std,
            "num_atoms": {
                "min": min(self._sizes),
                "mean": sum(size * n for size, n in self._sizes.items()) / num_conformers,
                "max": max(self._sizes),
            },
            "mean_neighbors": self._neighbors.average(),
            "total_charges": dict(sorted(self._charges.items())),
            "num_unpaired_electrons": dict(sorted(self._unpaired.items())),
            "num_periodic": self._num_periodic,
        }
        rounded: dict[str, Any] = _round(content | self._forces.average())
        return rounded


def _round(value: Any) -> Any:
    """Keep twelve digits: the order in which a BLAS adds numbers depends on its threads and must not show in the manifest."""
    if isinstance(value, dict):
        return {k: _round(v) for k, v in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


class _ForceSums:
    """Sums of squared forces (eV²/Å²), of all atoms and of each element."""

    def __init__(self) -> None:
        self._total, self._largest = 0.0, 0.0
        self._sums: dict[int, float] = {}
        self._counts: Counter[int] = Counter()

    def add(self, graphs: Sequence[Graph]) -> None:
        if not graphs:
            return
        numbers = np.concatenate([g.atomic_numbers for g in graphs])
        forces = np.concatenate([np.asarray(g.forces, np.float64) for g in graphs])
        squared = np.einsum("nk,nk->n", forces, forces)
        self._total += float(squared.sum())
        self._largest = max(self._largest, float(squared.max()))
        for z in np.unique(numbers).tolist():
            own = squared[numbers == z]
            self._sums[z] = self._sums.get(z, 0.0) + float(own.sum())
            self._counts[z] += len(own)

    def average(self) -> dict[str, Any]:
        if not self._counts:
            return {"force_rms": None, "force_rms_per_element": None, "max_force": None}
        per_element = {str(z): float(np.sqrt(s / self._counts[z] / 3)) for z, s in sorted(self._sums.items())}
        return {
            "force_rms": float(np.sqrt(self._total / self._counts.total() / 3)),
            "force_rms_per_element": per_element,
            "max_force": float(np.sqrt(self._largest)),
        }


class _NeighborSample:
    """The few hundred conformers with the least hashes, on which neighbours are counted."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Graph]] = []
        self._added = 0

    def add(self, graph: Graph) -> None:
        place = (-hash_geometry(graph, 0), -self._added)  # the first one goes first where hashes are equal
        self._added += 1
        if len(self._heap) < _MAX_NEIGHBOR_CONFORMERS:
            heapq.heappush(self._heap, (*place, _copy_geometry(graph)))
        elif place > self._heap[0][:2]:
            heapq.heapreplace(self._heap, (*place, _copy_geometry(graph)))

    def average(self) -> dict[str, float]:
        per_graph: list[FloatArray] = []
        num_atoms = 0
        for _, _, graph in sorted(self._heap, key=lambda item: (-item[0], -item[1])):
            per_graph.append(2 * _count_pairs(graph) / graph.num_atoms)
            num_atoms += graph.num_atoms
            if num_atoms > _MAX_NEIGHBOR_ATOMS:
                break
        means = np.mean(per_graph, axis=0)
        return {f"{cutoff:.1f}": float(mean) for cutoff, mean in zip(NEIGHBOR_CUTOFFS, means, strict=True)}


def _copy_geometry(graph: Graph) -> Graph:
    """Return a structure without labels that keeps no memory of others alive: arrays are views of whole blocks elsewhere."""
    cell = None if graph.cell is None else np.array(graph.cell)
    pbc = None if graph.pbc is None else np.array(graph.pbc)
    return Graph(atomic_numbers=graph.atomic_numbers.copy(), positions=graph.positions.copy(), cell=cell, pbc=pbc)


def count_neighbors(graphs: Sequence[Graph]) -> dict[str, float]:
    """Return the mean number of neighbours per atom for each of `NEIGHBOR_CUTOFFS`.

    The mean over conformers of each conformer's directed edges per atom (two for each pair), on at most a few hundred
    conformers that a hash chooses.

    Args:
        graphs: At least one conformer.
    """
    sample = _NeighborSample()
    for graph in graphs:
        sample.add(graph)
    return sample.average()


def _count_pairs(graph: Graph) -> FloatArray:
    """Return the number of undirected pairs closer than each of `NEIGHBOR_CUTOFFS`."""
    graph = build_neighbors(graph, NEIGHBOR_CUTOFFS[-1])
    positions = graph.positions.astype(np.float64)
    vectors = positions[graph.pair_second] - positions[graph.pair_first]
    if graph.pair_shifts is not None and graph.cell is not None:
        vectors = vectors + graph.pair_shifts @ np.asarray(graph.cell, np.float64)
    distances = np.sort(np.linalg.norm(vectors, axis=1))
    return np.searchsorted(distances, NEIGHBOR_CUTOFFS).astype(np.float64)


class BaselineSample:
    """The structures that energy baselines are fitted to: compositions, energies and charges of some of those that go by.

    Kept are the first `MAX_FIT_CONFORMERS` with an energy, and later ones that have an element of which fewer than
    `MIN_FIT_CONFORMERS` were kept before.
    """

    def __init__(self) -> None:
        self._compositions: list[IntArray] = []
        self._energies: list[float] = []
        self._charges: list[float] = []
        self._kept = np.zeros(_NUM_ELEMENTS, np.int64)

    def __len__(self) -> int:
        return len(self._energies)

    @property
    def elements(self) -> list[int]:
        """Atomic numbers of the structures kept, ascending."""
        return np.flatnonzero(self._kept).tolist()

    def add(self, atomic_numbers: IntArray, energy: float, charge: float) -> None:
        """Keep a structure if it is needed.

        Args:
            atomic_numbers: (num_atoms,).
            energy: eV.
            charge: e, of the whole structure.
        """
        if len(self) >= MAX_FIT_CONFORMERS and self._kept[atomic_numbers].min() >= MIN_FIT_CONFORMERS:
            return
        counts = np.bincount(atomic_numbers, minlength=_NUM_ELEMENTS)
        self._kept += counts > 0
        row = np.flatnonzero(counts)
        self._compositions.append(np.stack([row, counts[row]]).astype(np.int32))
        self._energies.append(energy)
        self._charges.append(charge)

    def fit(
        self, isolated_atom_energies: Mapping[int, float] | None, elements: Sequence[int]
    ) -> tuple[dict[int, float], float | None]:
        """Fit as `fit_baselines` says; elements that no kept structure has get their isolated atom's energy.

        Args:
            isolated_atom_energies: eV by atomic number, or None.
            elements: Atomic numbers, ascending, at least those of the structures kept.
        """
        known = isolated_atom_energies or {}
        if not self._energies:
            return {z: float(known.get(z, 0.0)) for z in elements}, None
        compositions = self._expand(elements)
        num_atoms = compositions.sum(1)
        energies = np.array(self._energies, np.float64) / num_atoms
        used = _choose_for_fit(compositions, np.array(self._charges))
        fractions = np.divide(compositions, num_atoms[:, None], out=compositions)
        prior = np.array([known.get(z, np.median(energies[used])) for z in elements])
        prior_std = np.array([_PRIOR_STD_ATOMS if z in known else _PRIOR_STD_NONE for z in elements])
        solution = _fit_huber(fractions[used], energies[used], prior, prior_std)
        residuals = energies - fractions @ solution
        limit = 10 * _robust_std(residuals[used])
        return dict(zip(elements, solution.tolist(), strict=True)), float(np.std(np.clip(residuals, -limit, limit)))

    def compute_residuals(self, baselines: Mapping[int, float]) -> FloatArray:
        """Return energies less baselines (eV/atom) of the structures that baselines are fitted to.

        Args:
            baselines: eV by atomic number, of all elements of the structures kept.
        """
        elements = sorted(baselines)
        compositions = self._expand(elements)
        used = _choose_for_fit(compositions, np.array(self._charges))
        off = np.array(self._energies) - compositions @ np.array([baselines[z] for z in elements])
        return np.asarray((off / compositions.sum(1))[used])

    def _expand(self, elements: Sequence[int]) -> FloatArray:
        """Return (num_structures, num_elements) how many atoms of each element every structure has."""
        place = np.zeros(_NUM_ELEMENTS, np.int64)
        place[list(elements)] = np.arange(len(elements))
        compositions = np.zeros((len(self), len(elements)))
        for row, (numbers, counts) in zip(compositions, self._compositions, strict=True):
            row[place[numbers]] = counts
        return compositions


def fit_baselines(
    graphs: Sequence[Graph], isolated_atom_energies: Mapping[int, float] | None
) -> tuple[dict[int, float], float | None]:
    """Fit one energy per element to the total energies, robustly.

    Minimises the sum of Huber's function of the residual per atom, plus a ridge towards the isolated atoms' energies (the
    median energy per atom where an element's is unknown), by iteratively reweighted normal equations A = sum w n n^T.
    Charged structures are left out but for those that hold an element which no neutral one has: the electron that is
    missing would be shared out among the elements.

    Args:
        graphs: Structures; those without an energy are passed over, and of very many only some are taken (`BaselineSample`).
        isolated_atom_energies: eV by atomic number, or None.

    Returns:
        eV by atomic number for all elements of the structures, and the standard deviation of the residuals (eV/atom; those
        beyond ten robust standard deviations count as ten), None without energies.
    """
    sample = BaselineSample()
    for graph in graphs:
        if graph.energy is not None:
            sample.add(graph.atomic_numbers, graph.energy, graph.total_charge)
    elements = np.unique(np.concatenate([g.atomic_numbers for g in graphs])).tolist()
    return sample.fit(isolated_atom_energies, elements)


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
