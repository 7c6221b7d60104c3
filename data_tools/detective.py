"""The units detective: do energies, forces and lengths of a data set fit together, and if not, which unit or sign is wrong?

It regresses energy differences of near pairs of conformers on the work of their forces along the way between them: the slope is
about one only where energy, force and length units agree and forces have the right sign. The slope cannot see energies and
forces that are wrong by the same factor, so bond lengths and the size of the forces are looked at too.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from data_tools import gate
from so3krates_dist.graph import FloatArray, Graph, IntArray
from so3krates_dist.units import ENERGY_UNITS, LENGTH_UNITS

SLOPE_BAND: Final = (0.3, 3.0)
"""Separates correct units from every pair of wrong ones on five real sets"""
BOND_BAND: Final = (0.7, 1.4)
"""Median distance to the nearest atom over the sum of the covalent radii"""
FORCE_RMS_BAND: Final = (0.05, 10.0)
"""eV/Å; molecular dynamics at 300 to 1000 K has 0.5 to 2, which are 0.02 to 0.07 Hartree/Å"""
_MIN_PAIRS: Final = 10
_NEAR: Final = 0.4
"""Å per atom (root mean square); beyond it the way between two conformers is no straight line any more"""
_SAME_SHAPE: Final = 1e-3
"""Å; below it float32 positions are noise"""
_SURE: Final = 4.0
"""standard errors of the slope, out of the band"""
_TOLD: Final = 3.0
"""standard errors, away from zero"""
_MAX_FRAMES: Final = 200
_MAX_PAIR_ATOMS: Final = 2_000_000
"""Atoms in all pairs of frames, some 300 MB: so large structures are compared in fewer frames"""
_MAX_SIZES: Final = 8
_TUKEY: Final = 4.685 * 1.4826
"""median absolute deviations; 95 % efficient on Gaussian noise"""
_ITERATIONS: Final = 20
_SAMPLE: Final = 200
_OUTLIER: Final = 20.0
"""Forces this many times the usual ones, energies this many median deviations off are failed calculations"""

_MAX_USUAL_FORCE: Final = 10.0
"""eV/Å; smaller ones are no outliers, where most structures are relaxed"""
_HAS_PLACES: Final = (*gate.ELECTRON_REASONS, *gate.DISTANCE_REASONS)

_USUAL_SLOPE: Final = (0.9, 0.2)
"""Slope of correct data, and the scatter of its logarithm: the way is a little longer than the straight line"""
_USUAL_FORCE_RMS: Final = (0.8, 1.0)
"""eV/Å, and the scatter of its logarithm"""
_FORCE_LENGTHS: Final[dict[str, tuple[str, ...]]] = {
    "eV": ("Angstrom",),
    "meV": ("Angstrom",),
    "kcal/mol": ("Angstrom",),
    "kJ/mol": ("Angstrom", "nm"),
    "Hartree": ("Bohr", "Angstrom"),
    "Rydberg": ("Bohr",),
}
"""Units of energy, and the units of length that programs give forces in with each"""
_RARE_ENERGIES: Final = ("meV", "Rydberg")
_RARE: Final = 1.0
_TWO_FAULTS: Final = 2.0
"""What the second wrong unit costs, in squares of standard deviations: energies and forces of one program share their unit"""
_AS_GOOD: Final = 4.0
_NO_EXPLANATION: Final = 16.0

GRADIENTS: Final = "gradients in place of forces"
Kind = Literal["agrees", "disagrees", "undecided"]


@dataclasses.dataclass(frozen=True, slots=True)
class TakenUnits:
    """The units that the numbers of a file were taken for when they were converted to eV and Å."""

    energy: str = "eV"
    length: str = "Angstrom"
    force: str = "eV/Angstrom"


OURS: Final = TakenUnits()


@dataclasses.dataclass(frozen=True, slots=True)
class UnitsSlope:
    """How much energies change per work of the forces: one where units agree, negative where the forces' sign is wrong."""

    slope: float
    error: float
    """standard error of the slope"""
    num_pairs: int

    @property
    def kind(self) -> Kind:
        """What the slope says: in `SLOPE_BAND` by more than noise, out of it by more than noise, or too noisy to tell."""
        low, high = SLOPE_BAND
        if self.slope > _TOLD * self.error:
            factor = math.exp(_SURE * self.error / self.slope)  # errors scale with wrong units as slopes do
            if self.slope / factor > high or self.slope * factor < low:
                return "disagrees"
            return "agrees" if low <= self.slope <= high else "undecided"
        return "disagrees" if self.slope + _SURE * self.error < low else "undecided"

    @property
    def has_wrong_sign(self) -> bool:
        """Whether energies fall where forces say that they rise, by more than noise."""
        return self.slope < -_TOLD * self.error

    def explain(self) -> str:
        """Return in words what a slope outside of the band means."""
        if self.has_wrong_sign:
            return f"energies that fall where the forces say they rise (slope {self.slope:.2g})"
        return f"energies that change {self.slope:.2g} times as much as the forces say"


@dataclasses.dataclass(frozen=True, slots=True)
class UnitsVerdict:
    """What was found out about units, taken for eV and Å."""

    kind: Kind
    """`undecided` without ten near pairs of conformers or with too much scatter; `findings` may hold doubts even then"""
    findings: tuple[str, ...]
    """what does not fit, in words that follow "has" or "got" """
    probable: tuple[str, ...]
    """wrong units or signs that would explain it, the likeliest first"""
    slope: UnitsSlope | None
    """None without ten near pairs"""
    bond_ratio: float | None
    """median distance to the nearest atom over the sum of the covalent radii"""
    force_rms: float | None
    """eV/Å, median over the structures; where it is very small, the upper quartile: most may be relaxed"""

    def explain(self) -> str:
        """Return what does not fit and what is probably wrong, as one text; empty where all is well."""
        text = "; ".join(self.findings)
        return f"{text}: probably {' or '.join(self.probable)}" if self.probable else text

    def __str__(self) -> str:
        """One line for people: the verdict, what it rests on and what does not fit."""
        return f"{self.describe()}; {self.explain()}" if self.findings else self.describe()

    def describe(self) -> str:
        """Return the verdict and what it rests on."""
        rests = []
        if self.slope is not None:
            error, pairs = f"{self.slope.error:.2g}", f"over {self.slope.num_pairs} near pairs"
            rests.append(
                f"energies follow forces with slope {self.slope.slope:.2f} +- {error} {pairs} (1 when units agree)"
            )
        if self.bond_ratio is not None:
            rests.append(f"nearest atoms are {self.bond_ratio:.2f} times the sum of covalent radii apart")
        if self.force_rms is not None:
            rests.append(f"forces have an RMS of {self.force_rms:.3g} eV/Å")
        if self.slope is None:
            few = f"undecided, fewer than {_MIN_PAIRS} near pairs of conformers with energies and forces"
            return f"{few}; only bond lengths and force RMS were looked at: {', '.join(rests) or 'there are none'}"
        return f"{self.kind}{', too much scatter' if self.kind == 'undecided' else ''}: {', '.join(rests)}"


def judge_units(graphs: Sequence[Graph], taken: TakenUnits = OURS) -> UnitsVerdict:
    """Find out whether energies, forces and lengths have units that fit together.

    Args:
        graphs: Structures in eV and Å as far as one knows, some thousand are plenty; faulty ones are passed over.
        taken: The units that numbers were converted from; what is probably wrong is named in place of these.
    """
    sound, placed = _sort_out(graphs)
    bond_ratio = measure_bond_ratio(placed)
    rms = [float(np.sqrt(np.mean(np.square(g.forces)))) for g in sound if g.forces is not None]
    force_rms = float(np.median(rms)) if rms else None
    if force_rms is not None and force_rms < FORCE_RMS_BAND[0]:
        force_rms = float(np.quantile(rms, 0.75))  # most may be relaxed
    slope = measure_units_slope(sound, max(1.0, bond_ratio or 1.0))
    kind: Kind = "undecided" if slope is None else slope.kind
    findings = []
    if slope is not None and kind == "disagrees":
        findings.append(slope.explain())
    if bond_ratio is not None and not BOND_BAND[0] <= bond_ratio <= BOND_BAND[1]:
        findings.append(f"bonds of {bond_ratio:.2f} times their usual lengths")
    if force_rms is not None and not FORCE_RMS_BAND[0] <= force_rms <= FORCE_RMS_BAND[1]:
        findings.append(f"forces with an RMS of {force_rms:.3g} eV/Å (usual: 0.1 to 5)")
    if findings and kind == "agrees":
        kind = "disagrees"
    probable = _name_probable(slope, bond_ratio, force_rms, taken) if findings else ()
    return UnitsVerdict(kind, tuple(findings), probable, slope, bond_ratio, force_rms)


def _sort_out(graphs: Sequence[Graph]) -> tuple[list[Graph], list[Graph]]:
    """Return the structures that are sound, and those whose bonds can be measured: single failures say nothing about units.

    A wrong charge is no failure here, it has no unit; nor are atoms that are too close where bonds are measured.
    """
    problems = [(graph, gate.find_problem(graph, np.inf)) for graph in graphs]
    sound = [g for g, problem in problems if problem is None or problem.reason in gate.ELECTRON_REASONS]
    placed = [g for g, problem in problems if problem is None or problem.reason in _HAS_PLACES]
    largest = [float(np.abs(g.forces).max()) for g in sound if g.forces is not None]
    limit = max(_OUTLIER * float(np.median(largest)), _MAX_USUAL_FORCE) if largest else 0.0
    return [g for g in sound if g.forces is None or float(np.abs(g.forces).max()) <= limit], placed


# ----------------------------------------------------------------------------------------------------- what is measured


def measure_bond_ratio(graphs: Sequence[Graph]) -> float | None:
    """Return the median over atoms of the least distance, in sums of covalent radii, to another atom; None for single atoms.

    Args:
        graphs: Structures with positions in any unit, cells in the same; some two hundred of them are looked at.
    """
    radii_of = gate.load_covalent_radii()
    ratios: list[float] = []
    for graph in graphs[:: max(1, len(graphs) // _SAMPLE)][:_SAMPLE]:
        if graph.num_atoms < 2 or not gate.are_elements(graph.atomic_numbers[:_SAMPLE]):
            continue
        positions = np.asarray(graph.positions[:_SAMPLE], np.float64)
        radii = radii_of[graph.atomic_numbers[:_SAMPLE]]
        vectors = _to_nearest_images(positions[:, None] - positions, graph)
        distances = np.linalg.norm(vectors, axis=-1) / (radii[:, None] + radii)
        np.fill_diagonal(distances, np.inf)
        nearest = distances.min(1)
        ratios += nearest[np.isfinite(nearest)].tolist()  # a faulty structure is the gate's business
    return float(np.median(ratios)) if ratios else None


def _to_nearest_images(vectors: FloatArray, graph: Graph) -> FloatArray:
    """Return vectors between atoms of a periodic structure, shortened by lattice vectors."""
    if graph.cell is None or graph.pbc is None or not np.all(np.isfinite(graph.cell)):
        return vectors
    repeating = np.asarray(graph.cell, np.float64)[np.asarray(graph.pbc, bool)]
    if not len(repeating):
        return vectors
    return np.asarray(vectors - np.round(vectors @ np.linalg.pinv(repeating)) @ repeating)


def measure_units_slope(graphs: Sequence[Graph], length: float = 1.0) -> UnitsSlope | None:
    """Regress energy differences of near pairs of conformers on the work of the mean force between them.

    The error of the work is of third order in the distance, so pairs weigh as its sixth power: the nearest decide, the ten
    nearest alike.

    Args:
        graphs: Sound structures, in eV and Å as far as one knows; those without energy or forces are passed over.
        length: How many times too long bonds seem to be; what is near is as much further off.

    Returns:
        The slope, or None where fewer than ten near pairs exist.
    """
    by_state: dict[tuple[object, ...], list[Graph]] = defaultdict(list)
    for graph in graphs:
        if graph.energy is not None and graph.forces is not None and graph.num_atoms > 1:
            by_state[_name_state(graph)].append(graph)
    groups = sorted(by_state.values(), key=len, reverse=True)[:_MAX_SIZES]
    pairs = [_compare_near_pairs(group, _NEAR * length) for group in groups]
    change, work, distance = np.concatenate(pairs, axis=1) if pairs else np.zeros((3, 0))
    if len(change) < _MIN_PAIRS or not np.any(work):
        return None
    return _regress(change, work, np.maximum(distance, np.sort(distance)[_MIN_PAIRS - 1]) ** 3)


def _regress(change: FloatArray, work: FloatArray, scatter: FloatArray) -> UnitsSlope:
    """Fit change = slope * work so that a few conformers with wrong energies or forces do not decide.

    From the median of the ratios on, by Tukey's biweight (Huber and Ronchetti, Robust Statistics, 2009, 4.8): what is far off the
    line counts for nothing, which wrong forces are even where they make the most work.

    Args:
        change: (num_pairs,) eV.
        work: (num_pairs,) eV.
        scatter: (num_pairs,) what the errors of each pair are proportional to.
    """
    x, y = work / scatter, change / scatter
    x, y = x[x != 0], y[x != 0]
    ratios, influence = y / x, np.minimum(np.abs(x), np.median(np.abs(x)))
    slope, weights = _find_median(ratios, influence), np.ones_like(x)
    spread = _find_median(np.abs(ratios - slope), influence)
    for _ in range(_ITERATIONS):
        residuals = y - slope * x
        limit = _TUKEY * float(np.median(np.abs(residuals)))
        if limit:
            weights = np.square(np.maximum(1 - np.square(residuals / limit), 0.0))
        slope = float(np.sum(weights * x * y) / np.sum(weights * x * x))
    error = float(np.linalg.norm(weights * x * (y - slope * x)) / np.sum(weights * x * x))
    # What lies beside the line by chance seems wrong: the spread of all ratios, and how few pairs there are, count too.
    error = max(error, 1.4826 * 1.25 * spread * float(np.linalg.norm(influence) / np.sum(influence)))
    return UnitsSlope(slope, error * (1 + _MIN_PAIRS / len(x)), len(x))


def _find_median(values: FloatArray, weights: FloatArray) -> float:
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(sums, 0.5 * sums[-1])]])


def _name_state(graph: Graph) -> tuple[object, ...]:
    """Return what must be equal for energies to differ by the forces' work alone: atoms in their order, electrons, cell."""
    cell = np.round(graph.cell, 2).tobytes() if graph.cell is not None and graph.is_periodic else b""
    pbc = np.asarray(graph.pbc, bool).tobytes() if graph.is_periodic else b""
    numbers = np.asarray(graph.atomic_numbers, np.uint8).tobytes()
    return numbers, float(graph.total_charge), float(graph.num_unpaired_electrons), pbc, cell


def _compare_near_pairs(graphs: Sequence[Graph], limit: float) -> FloatArray:
    """Return (3, num_pairs) energy change (eV), work (eV), distance (Å) of the nearest tenth of all pairs of different shape."""
    frames = min(_MAX_FRAMES, max(2, math.isqrt(2 * _MAX_PAIR_ATOMS // graphs[0].num_atoms)))
    graphs = _leave_out_energies(graphs[:: max(1, len(graphs) // frames)][:frames])
    if len(graphs) < 2:
        return np.zeros((3, 0))
    positions = np.stack([g.positions for g in graphs]).astype(np.float64)
    forces = np.stack([np.asarray(g.forces) for g in graphs]).astype(np.float64)
    energies = np.array([g.energy for g in graphs], np.float64)
    first, second = np.triu_indices(len(graphs), k=1)
    steps, turned = _find_ways(positions, forces, first, second, graphs[0])
    distances = np.sqrt(np.einsum("pni,pni->p", steps, steps) / positions.shape[1])
    different = np.flatnonzero((distances > _SAME_SHAPE) & (distances < limit))
    nearest = different[np.argsort(distances[different], kind="stable")]
    near = nearest[: min(len(graphs), max(_MIN_PAIRS, len(first) // 10))]
    work = -0.5 * np.einsum("pni,pni->p", forces[first[near]] + turned[near], steps[near])
    return np.stack([energies[second[near]] - energies[first[near]], work, distances[near]])


def _leave_out_energies(graphs: Sequence[Graph]) -> list[Graph]:
    """Return structures of one composition without those whose energies are far from all others'."""
    energies = np.array([g.energy for g in graphs], np.float64)
    off = np.abs(energies - np.median(energies))
    limit = _OUTLIER * float(np.median(off)) or np.inf
    return [graph for graph, value in zip(graphs, off, strict=True) if value <= limit]


def _find_ways(
    positions: FloatArray, forces: FloatArray, first: IntArray, second: IntArray, like: Graph
) -> tuple[FloatArray, FloatArray]:
    """Return (num_pairs, num_atoms, 3) ways from first to second conformers in one frame, and the second ones' forces there."""
    if like.is_periodic:  # the cell holds the frame but for a shift
        steps = _to_nearest_images(positions[second] - positions[first], like)
        return steps - steps.mean(1, keepdims=True), forces[second]
    positions = positions - positions.mean(1, keepdims=True)
    rotations = _align(positions[second], positions[first])
    steps = np.einsum("pij,pnj->pni", rotations, positions[second]) - positions[first]
    return steps, np.einsum("pij,pnj->pni", rotations, forces[second])


def _align(moving: FloatArray, fixed: FloatArray) -> FloatArray:
    """Return (num_pairs, 3, 3) rotations that turn `moving` onto `fixed` (Kabsch, Acta Cryst. A32, 922 (1976))."""
    left, _, right = np.linalg.svd(np.einsum("pni,pnj->pij", fixed, moving))
    left[:, :, 2] *= np.sign(np.linalg.det(left @ right))[:, None]
    return np.asarray(left @ right)


# ---------------------------------------------------------------------------------------------------- what it may mean


def _name_probable(
    slope: UnitsSlope | None, bond_ratio: float | None, force_rms: float | None, taken: TakenUnits
) -> tuple[str, ...]:
    """Return the wrong units or signs that explain the measurements best, in words; none where they explain nothing."""
    length = _name_length(bond_ratio, taken.length)
    told = slope if slope is not None and abs(slope.slope) > _TOLD * slope.error else None
    if length is None or (slope is not None and told is None):
        return ()
    parts = [f"positions in {length}"] * (length != taken.length)
    if told is not None and told.slope < 0:
        parts.append(GRADIENTS)
    if told is None and force_rms is None:
        return tuple(parts)
    wrong_length = LENGTH_UNITS[length] / LENGTH_UNITS[taken.length]
    ranked = sorted(
        (cost + _rate(*_find_factors(energy, force, taken), wrong_length, told, force_rms), energy, force)
        for energy, force, cost in _list_faults(taken)
    )
    limit = min(ranked[0][0] + _AS_GOOD, _NO_EXPLANATION)
    causes = []
    for rate, energy, force in ranked[:2]:
        wrong = [f"energies in {energy}"] * (energy != taken.energy) + [f"forces in {force}"] * (force != taken.force)
        causes += [", ".join([*parts, *wrong])] * (rate < limit)
        if told is not None and parts and not wrong:
            break  # that explains all of it; more faults at a time are no rival
    return tuple(filter(None, causes))


def _name_length(bond_ratio: float | None, taken: str) -> str | None:
    """Return the unit of positions that bonds speak for; None where it is none that is known."""
    if not bond_ratio:  # all atoms of most structures are in one place
        return taken if bond_ratio is None else None
    low, high = (limit * LENGTH_UNITS[taken] / bond_ratio for limit in BOND_BAND)
    return next((unit for unit in (taken, "Angstrom", "Bohr", "nm") if low <= LENGTH_UNITS[unit] < high), None)


def _list_faults(taken: TakenUnits) -> list[tuple[str, str, float]]:
    """Return the units that energies and forces may have in truth, and what each fault costs: none, one wrong, both."""
    faults = [(taken.energy, taken.force, 0.0)]
    for energy, lengths in _FORCE_LENGTHS.items():
        cost = _RARE * (energy in _RARE_ENERGIES)
        forces = [force for length in lengths if (force := f"{energy}/{length}") != taken.force]
        faults += [(taken.energy, force, cost) for force in forces]
        if energy != taken.energy:
            faults.append((energy, taken.force, cost))
            faults += [(energy, force, cost + _TWO_FAULTS) for force in forces]
    return faults


def _find_factors(energy: str, force: str, taken: TakenUnits) -> tuple[float, float]:
    """Return how many times larger energies and forces have to be if these are their units and not those that were taken."""

    def measure(unit: str) -> float:
        numerator, _, denominator = unit.rpartition("/")
        return ENERGY_UNITS[numerator] / LENGTH_UNITS[denominator]

    return ENERGY_UNITS[energy] / ENERGY_UNITS[taken.energy], measure(force) / measure(taken.force)


def _rate(energy: float, force: float, length: float, slope: UnitsSlope | None, force_rms: float | None) -> float:
    """Return how badly factors explain what was measured, in squares of standard deviations."""
    rate = 0.0
    if slope is not None:
        expected, scatter = _USUAL_SLOPE
        expected *= force * length / energy
        rate += math.log(abs(slope.slope) / expected) ** 2 / (scatter**2 + (slope.error / slope.slope) ** 2)
    if force_rms:
        expected, scatter = _USUAL_FORCE_RMS
        rate += (math.log(force_rms * force / expected) / scatter) ** 2
    return rate
