"""The gate every label passes: what is wrong with a structure, and whether energies and forces have units that fit.

The units detective regresses energy differences of near pairs of conformers on the work of their forces along the way between
them: the slope is about one only where energy, force and length units agree and forces have the right sign.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, FloatArray, Graph, IntArray, compute_formula
from so3krates_dist.units import HARTREE_EV

MIN_DISTANCE: Final = 0.3
"""Å; no two nuclei come this close below some hundred eV"""
_MIN_CELL_SIZE: Final = 0.1
"""Å; least singular value of the repeating cell vectors. Flatter ones have no volume, and a cell list never ends"""
_FINITE: Final = ("positions", "cell", "total_charge", "num_unpaired_electrons")
_FINITE_LABELS: Final = ("energy", "forces", "stress", "dipole", "partial_charges", "hirshfeld_ratios")
SLOPE_BAND: Final = (0.3, 3.0)
"""Separates correct units from every pair of wrong ones on five real sets"""
_MIN_PAIRS: Final = 10
_SAME_SHAPE: Final = 1e-3
"""Å; below it float32 positions are noise"""
_MAX_FRAMES: Final = 200
_MAX_SIZES: Final = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Why a structure must not become a training example."""

    reason: str
    """counted in the provenance, the same words for all structures"""
    rule: str
    """what must hold, as the words after "must" """
    got: str


def find_problem(graph: Graph, max_force: float) -> Problem | None:
    """Return the first thing that is wrong with a labelled structure, or None.

    Args:
        graph: A structure.
        max_force: eV/Å; larger forces than that are taken for a failure.
    """
    for name in (*_FINITE, *_FINITE_LABELS):  # before any distance: vesin dies of nan with a signal
        value = getattr(graph, name)
        if value is not None and not np.all(np.isfinite(value)):
            return Problem(f"{name} not finite", f"have finite {name}", "nan or infinity")
    numbers = graph.atomic_numbers
    if not are_elements(numbers):
        found = "no atoms" if not len(numbers) else f"{numbers.min()} to {numbers.max()}"
        return Problem("unknown element", f"have atomic numbers from 1 to {MAX_ATOMIC_NUMBER}", found)
    if (size := _find_cell_size(graph)) < _MIN_CELL_SIZE:
        return Problem("flat cell", "have a cell that is not flat along its periodic directions", f"{size:.3f} Å")
    if (distance := find_min_distance(graph)) < MIN_DISTANCE:
        return Problem("atoms too close", f"have its atoms at least {MIN_DISTANCE} Å apart", f"{distance:.3f} Å")
    if graph.forces is not None:
        largest = float(np.linalg.norm(graph.forces, axis=1).max())
        if largest > max_force:
            return Problem("force too large", f"have forces of at most {max_force:g} eV/Å", f"{largest:.3g} eV/Å")
    return find_parity_problem(graph)


def are_elements(atomic_numbers: IntArray) -> bool:
    """Return whether there are atoms, and all of them of known elements."""
    known = (atomic_numbers >= 1) & (atomic_numbers <= MAX_ATOMIC_NUMBER)
    return bool(len(atomic_numbers) and np.all(known))


def _find_cell_size(graph: Graph) -> float:
    """Return the least extent of the cell along the directions in which it repeats (Å), infinity for a molecule."""
    if graph.pbc is None or not graph.is_periodic:
        return np.inf
    cell = np.zeros((3, 3)) if graph.cell is None else np.asarray(graph.cell, np.float64)
    return float(np.linalg.svd(cell[np.asarray(graph.pbc, bool)], compute_uv=False).min())


def check_max_force(value: float) -> None:
    """Raise `DataError` where `--max-force` is no limit: nothing is larger than nan, and everything than a negative one."""
    if not (np.isfinite(value) and value > 0):
        raise DataError("--max-force", "be a positive, finite number of eV/Å", value, "Give one like 50")


def find_min_distance(graph: Graph) -> float:
    """Return the shortest distance between two atoms (Å), infinity where none is below 0.3 Å."""
    try:
        near = build_neighbors(graph, MIN_DISTANCE)
    except DataError:
        return 0.0
    if near.pair_first is None or near.pair_second is None or not len(near.pair_first):
        return np.inf
    vectors = graph.positions[near.pair_second].astype(np.float64) - graph.positions[near.pair_first]
    if near.pair_shifts is not None and graph.cell is not None:
        vectors = vectors + near.pair_shifts @ graph.cell
    return float(np.linalg.norm(vectors, axis=1).min())


def find_parity_problem(graph: Graph) -> Problem | None:
    """Return what is wrong with the number of electrons: it must be even or odd as the unpaired ones are."""
    electrons = int(graph.atomic_numbers.sum()) - float(graph.total_charge)
    unpaired = float(graph.num_unpaired_electrons)
    whole = electrons.is_integer() and unpaired.is_integer()  # nan and infinity are none
    if not whole or not 0 <= unpaired <= max(electrons, 0):
        got = f"charge {graph.total_charge:g} and {unpaired:g} unpaired electrons"
        return Problem(
            "charge or spin impossible", "have a whole charge and a possible number of unpaired electrons", got
        )
    if (round(electrons) - round(unpaired)) % 2:
        got = f"{round(electrons)} electrons with {unpaired:g} unpaired at charge {graph.total_charge:g}"
        return Problem("electron parity", "have as many paired electrons as come in pairs", got)
    return None


def describe(graph: Graph) -> str:
    """Return a short name of a structure for messages: group and formula."""
    if not are_elements(graph.atomic_numbers):
        return graph.group or "structure"
    formula = compute_formula(graph.atomic_numbers)
    return formula if graph.group in ("", formula) else f"{graph.group} ({formula})"


def estimate_total_energy(atomic_numbers: np.ndarray) -> float:
    """Estimate the all-electron total energy of a structure (eV) to about three per cent.

    The sum of the neutral atoms' energies -0.768745 Z^(7/3) + Z^2/2 - 0.2699 Z^(5/3) Hartree: the Thomas-Fermi model with
    Scott's and Schwinger's corrections (Schwinger, Phys. Rev. A 24, 2353 (1981)). Bonds are below one per cent of it,
    but for hydrogen.
    """
    z = atomic_numbers.astype(np.float64)
    return HARTREE_EV * float(np.sum(-0.768745 * z ** (7 / 3) + z**2 / 2 - 0.2699 * z ** (5 / 3)))


@dataclasses.dataclass(frozen=True, slots=True)
class UnitsSlope:
    """How much energies change per work of the forces: one where units agree, negative where the forces' sign is wrong."""

    slope: float
    error: float
    """standard error of the slope"""
    num_pairs: int

    @property
    def agrees(self) -> bool:
        """Whether the slope is in `SLOPE_BAND` or its error is too large to tell."""
        return SLOPE_BAND[0] - 4 * self.error <= self.slope <= SLOPE_BAND[1] + 4 * self.error

    def explain(self) -> str:
        """Return in words what a slope outside of the band means."""
        if self.slope < -4 * self.error:
            return (
                f"energies that fall where the forces say they rise (slope {self.slope:.2g}: are the forces gradients?)"
            )
        return f"energies that change {self.slope:.2g} times as much as the forces say"


def measure_units_slope(graphs: Sequence[Graph]) -> UnitsSlope | None:
    """Regress energy differences of near pairs of conformers on the work of the mean force between them.

    The error of the work is of third order in the distance, so pairs weigh as its sixth power: the nearest decide.

    Args:
        graphs: Structures with energies and forces, in eV and Å as far as one knows.

    Returns:
        The slope, or None where fewer than ten near pairs exist.
    """
    by_atoms: dict[bytes, list[Graph]] = defaultdict(list)
    for graph in graphs:
        if graph.energy is not None and graph.forces is not None and graph.num_atoms > 1:
            by_atoms[np.asarray(graph.atomic_numbers, np.uint8).tobytes()].append(graph)
    pairs = []
    for group in sorted(by_atoms.values(), key=len, reverse=True)[:_MAX_SIZES]:
        stride = max(1, len(group) // _MAX_FRAMES)
        pairs.append(_compare_near_pairs(group[::stride][:_MAX_FRAMES]))
    change, work, distance = np.concatenate(pairs, axis=1) if pairs else np.zeros((3, 0))
    if len(change) < _MIN_PAIRS or not np.any(work):
        return None
    weights = (distance / distance.min()) ** -6
    norm = float(np.sum(weights * work * work))
    slope = float(np.sum(weights * change * work)) / norm
    residual = weights * work * (change - slope * work)
    return UnitsSlope(slope, float(np.linalg.norm(residual)) / norm, len(change))


def _compare_near_pairs(graphs: Sequence[Graph]) -> FloatArray:
    """Return (3, num_pairs) energy change (eV), work (eV), distance (Å) of the nearest tenth of all pairs of different shape."""
    if len(graphs) < 2:
        return np.zeros((3, 0))
    positions = np.stack([g.positions for g in graphs]).astype(np.float64)
    positions -= positions.mean(1, keepdims=True)
    forces = np.stack([np.asarray(g.forces) for g in graphs]).astype(np.float64)
    energies = np.array([g.energy for g in graphs], np.float64)
    first, second = np.triu_indices(len(graphs), k=1)
    rotations = _align(positions[second], positions[first])
    steps = np.einsum("pij,pnj->pni", rotations, positions[second]) - positions[first]
    distances = np.sqrt(np.einsum("pni,pni->p", steps, steps) / positions.shape[1])
    near = np.argsort(distances, kind="stable")[: min(len(graphs), max(_MIN_PAIRS, len(first) // 10))]
    near = near[distances[near] > _SAME_SHAPE]
    turned = np.einsum("pij,pnj->pni", rotations[near], forces[second[near]])
    work = -0.5 * np.einsum("pni,pni->p", forces[first[near]] + turned, steps[near])
    return np.stack([energies[second[near]] - energies[first[near]], work, distances[near]])


def _align(moving: FloatArray, fixed: FloatArray) -> FloatArray:
    """Return (num_pairs, 3, 3) rotations that turn `moving` onto `fixed` (Kabsch, Acta Cryst. A32, 922 (1976))."""
    left, _, right = np.linalg.svd(np.einsum("pni,pnj->pij", fixed, moving))
    left[:, :, 2] *= np.sign(np.linalg.det(left @ right))[:, None]
    return np.asarray(left @ right)


def name_elements(numbers: Sequence[int]) -> str:
    """Return element symbols with spaces between them; numbers that are no element's stay numbers."""
    return " ".join(ELEMENT_SYMBOLS[z] if 0 <= z <= MAX_ATOMIC_NUMBER else str(z) for z in numbers)
