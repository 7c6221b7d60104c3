"""The gate every label passes: what is wrong with a structure in itself, and whether its energy is like those of the others.

It looks at one structure at a time and refuses what can be no training example. Whether energies, forces and lengths have units
that fit each other shows only in many structures: detective.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, FloatArray, Graph, IntArray, compute_formula
from so3krates_dist.units import HARTREE_EV

MIN_DISTANCE: Final = 0.3
"""Å; no two nuclei come this close below some hundred eV"""
MIN_RADII: Final = 0.4
"""Sums of covalent radii; C and C at 0.6 Å are some fifty eV above their bond, and H and H come under `MIN_DISTANCE` first"""
_MAX_COORDINATE: Final = 1e4
"""Å; beyond it single precision knows places to 0.001 Å only"""
_MIN_CELL_SIZE: Final = 0.1
"""Å; least singular value of the repeating cell vectors. Flatter ones have no volume, and a cell list never ends"""
MAX_CHARGE_ERROR: Final = 0.05
"""e; partial charges that add up to the total charge up to the error of their grid are closer than that"""
OUTLIER_MADS: Final = 20.0
"""Energies this many median absolute deviations off are faulty: thermal ones stay below ten"""
_MIN_MAD: Final = 5e-3
"""eV/atom; twenty of them are what 800 K more make. In sets of relaxed structures a warm one is no fault"""
_MIN_ENERGIES: Final = 10
_FREE_ATOMS: Final = 2
"""Structures of so few atoms may be unbound, ..."""
_BINDING: Final = 10.0
"""eV/atom; ... which is less than this off the baselines of bound atoms"""
_IONISATION: Final = 20.0
"""eV per charge; baselines are of neutral atoms. More than the first three electrons of any metal cost on average"""

ELECTRON_REASONS: Final = ("charge or spin impossible", "electron parity")
"""What is wrong with the number of electrons, which depends on charge and spin"""
DISTANCE_REASONS: Final = ("atoms too close", "clashing atoms")
_SHAPES: Final[dict[str, tuple[int | str, ...]]] = {
    "atomic_numbers": ("num_atoms",),
    "positions": ("num_atoms", 3),
    "cell": (3, 3),
    "pbc": (3,),
    "total_charge": (),
    "num_unpaired_electrons": (),
    "energy": (),
    "forces": ("num_atoms", 3),
    "stress": (3, 3),
    "dipole": (3,),
    "partial_charges": ("num_atoms",),
    "hirshfeld_ratios": ("num_atoms",),
    "loss_weight": (),
}
_KINDS: Final = {"atomic_numbers": "iu", "pbc": "b"}
"""numpy's kinds of number that a field may have; the others hold real numbers"""
_DOUBLE: Final = ("energy", "cell")
"""stored in double precision, the others in single"""
_LARGEST_SINGLE: Final = float(np.finfo(np.float32).max)


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
        graph: A structure; its arrays may have any shapes.
        max_force: eV/Å; larger forces than that are taken for a failure.
    """
    checks: tuple[Callable[[Graph], Problem | None], ...] = (
        _find_shape_problem,
        _find_value_problem,  # before any distance: vesin dies of nan with a signal
        _find_element_problem,
        _find_place_problem,
        _find_cell_problem,
        _find_distance_problem,
        functools.partial(_find_force_problem, max_force=max_force),
        find_parity_problem,
        _find_weight_problem,
    )
    return next((problem for check in checks if (problem := check(graph)) is not None), None)


def _find_shape_problem(graph: Graph) -> Problem | None:
    num_atoms = np.asarray(graph.atomic_numbers).size
    if not num_atoms:
        return _refuse_elements("no atoms")
    for name, symbols in _SHAPES.items():
        value = getattr(graph, name)
        if value is None and name not in ("atomic_numbers", "positions", "total_charge", "num_unpaired_electrons"):
            continue
        array = np.asarray(value)
        shape = tuple(num_atoms if s == "num_atoms" else s for s in symbols)
        if array.shape != shape:
            return Problem(f"{name} of wrong shape", f"have {name} of shape {shape}", str(array.shape))
        if array.dtype.kind not in _KINDS.get(name, "fiu"):
            return Problem(f"{name} of wrong type", f"have numbers for {name}", str(array.dtype))
    return None


def _find_value_problem(graph: Graph) -> Problem | None:
    for name in _SHAPES:
        if name in _KINDS or (value := getattr(graph, name)) is None:
            continue
        if not np.all(np.isfinite(value)):
            return Problem(f"{name} not finite", f"have finite {name}", "nan or infinity")
        largest = float(np.abs(value).max(initial=0.0))
        if name not in _DOUBLE and largest > _LARGEST_SINGLE:
            return Problem(f"{name} not finite", f"have {name} that single precision holds", f"{largest:.3g}")
    return None


def _find_element_problem(graph: Graph) -> Problem | None:
    numbers = graph.atomic_numbers
    if are_elements(numbers):
        return None
    return _refuse_elements(f"{numbers.min()} to {numbers.max()}")


def _refuse_elements(got: str) -> Problem:
    return Problem("unknown element", f"have atomic numbers from 1 to {MAX_ATOMIC_NUMBER}", got)


def are_elements(atomic_numbers: IntArray) -> bool:
    """Return whether there are atoms, and all of them of known elements."""
    known = (atomic_numbers >= 1) & (atomic_numbers <= MAX_ATOMIC_NUMBER)
    return bool(len(atomic_numbers) and np.all(known))


def _find_place_problem(graph: Graph) -> Problem | None:
    for name in ("positions", "cell"):
        value = getattr(graph, name)
        largest = 0.0 if value is None else float(np.abs(value).max())
        if largest > _MAX_COORDINATE:
            return Problem(f"{name} too far out", f"have {name} within {_MAX_COORDINATE:g} Å", f"{largest:.3g} Å")
    return None


def _find_cell_problem(graph: Graph) -> Problem | None:
    if (size := _find_cell_size(graph)) < _MIN_CELL_SIZE:
        return Problem("flat cell", "have a cell that is not flat along its periodic directions", f"{size:.3f} Å")
    if graph.stress is None:
        return None
    rule = "have a periodic cell with a volume where it has a stress"
    if graph.cell is None or not graph.is_periodic:
        return Problem("stress without cell", rule, "no cell" if graph.cell is None else "no periodic direction")
    whole = dataclasses.replace(graph, pbc=np.ones(3, bool))
    if (size := _find_cell_size(whole)) < _MIN_CELL_SIZE:
        return Problem("stress without cell", rule, f"a cell that is {size:.3f} Å thin")
    return None


def _find_cell_size(graph: Graph) -> float:
    """Return the least extent of the cell along the directions in which it repeats (Å), infinity for a molecule."""
    if graph.pbc is None or not graph.is_periodic:
        return np.inf
    cell = np.zeros((3, 3)) if graph.cell is None else np.asarray(graph.cell, np.float64)
    return float(np.linalg.svd(cell[np.asarray(graph.pbc, bool)], compute_uv=False).min())


def _find_distance_problem(graph: Graph) -> Problem | None:
    radii = load_covalent_radii()[graph.atomic_numbers]
    near = find_close_pairs(graph, max(MIN_DISTANCE, 2 * MIN_RADII * float(radii.max())))
    if not len(near.distances):
        return None
    closest = int(near.distances.argmin())
    if (distance := near.distances[closest]) < MIN_DISTANCE:
        return Problem(DISTANCE_REASONS[0], f"have its atoms at least {MIN_DISTANCE} Å apart", f"{distance:.3f} Å")
    shares = near.distances / (radii[near.first] + radii[near.second])
    worst = int(shares.argmin())
    if shares[worst] >= MIN_RADII:
        return None
    pair = name_elements([int(graph.atomic_numbers[side[worst]]) for side in (near.first, near.second)])
    rule = f"have no atoms closer than {MIN_RADII:g} of the sum of their covalent radii"
    return Problem(DISTANCE_REASONS[1], rule, f"{pair} at {near.distances[worst]:.3f} Å, {shares[worst]:.2f} of it")


@functools.cache
def load_covalent_radii() -> FloatArray:
    """Return (119,) covalent radii by atomic number in Å (Cordero et al., Dalton Trans. 2008, 2832), as ASE has them."""
    from ase.data import covalent_radii

    return np.asarray(covalent_radii, np.float64)


@dataclasses.dataclass(frozen=True, slots=True)
class ClosePairs:
    """Pairs of atoms that are close to each other."""

    first: IntArray
    second: IntArray
    distances: FloatArray
    """(num_pairs,) Å"""


def find_close_pairs(graph: Graph, cutoff: float) -> ClosePairs:
    """Return all pairs of atoms, periodic images too, that are closer than a distance.

    Args:
        graph: A structure with finite positions and a cell that is not flat.
        cutoff: Å.

    Returns:
        The pairs. Where atoms coincide, which no neighbour list takes, only that one pair of distance zero (of the first atom).
    """
    try:
        near = build_neighbors(graph, cutoff)
    except DataError:
        zero = np.zeros(1, np.int64)
        return ClosePairs(zero, zero, np.zeros(1))
    first, second = np.asarray(near.pair_first), np.asarray(near.pair_second)
    vectors = graph.positions[second].astype(np.float64) - graph.positions[first]
    if near.pair_shifts is not None and graph.cell is not None:
        vectors = vectors + near.pair_shifts @ graph.cell
    return ClosePairs(first, second, np.linalg.norm(vectors, axis=1))


def find_min_distance(graph: Graph) -> float:
    """Return the shortest distance between two atoms (Å), infinity where none is below 0.3 Å."""
    return float(find_close_pairs(graph, MIN_DISTANCE).distances.min(initial=np.inf))


def _find_force_problem(graph: Graph, max_force: float) -> Problem | None:
    if graph.forces is None or (largest := float(np.linalg.norm(graph.forces, axis=1).max())) <= max_force:
        return None
    return Problem("force too large", f"have forces of at most {max_force:g} eV/Å", f"{largest:.3g} eV/Å")


def check_max_force(value: float) -> None:
    """Raise `DataError` where `--max-force` is no limit: nothing is larger than nan, and everything than a negative one."""
    if not (np.isfinite(value) and value > 0):
        raise DataError("--max-force", "be a positive, finite number of eV/Å", value, "Give one like 50")


def find_parity_problem(graph: Graph) -> Problem | None:
    """Return what is wrong with the number of electrons: it must be even or odd as the unpaired ones are."""
    electrons = int(graph.atomic_numbers.sum()) - float(graph.total_charge)
    unpaired = float(graph.num_unpaired_electrons)
    whole = electrons.is_integer() and unpaired.is_integer()  # nan and infinity are none
    if not whole or not 0 <= unpaired <= max(electrons, 0):
        got = f"charge {graph.total_charge:g} and {unpaired:g} unpaired electrons"
        return Problem(ELECTRON_REASONS[0], "have a whole charge and a possible number of unpaired electrons", got)
    if (round(electrons) - round(unpaired)) % 2:
        got = f"{round(electrons)} electrons with {unpaired:g} unpaired at charge {graph.total_charge:g}"
        return Problem(ELECTRON_REASONS[1], "have as many paired electrons as come in pairs", got)
    return None


def _find_weight_problem(graph: Graph) -> Problem | None:
    if graph.loss_weight >= 0:
        return None
    return Problem("loss_weight below zero", "have a loss_weight of zero or more", f"{graph.loss_weight:g}")


def find_doubts(graph: Graph) -> list[Problem]:
    """Return what a person should look at in a sound structure: nothing that has to be left out.

    Args:
        graph: A structure without a problem.
    """
    if graph.partial_charges is None:
        return []
    total = float(np.sum(graph.partial_charges, dtype=np.float64))
    if abs(total - graph.total_charge) <= MAX_CHARGE_ERROR:
        return []
    rule = f"have partial charges that add up to its total charge, {graph.total_charge:g} e"
    return [Problem("partial charges do not add up", rule, f"{total:.3f} e")]


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


def name_elements(numbers: Sequence[int]) -> str:
    """Return element symbols with spaces between them; numbers that are no element's stay numbers."""
    return " ".join(ELEMENT_SYMBOLS[z] if 0 <= z <= MAX_ATOMIC_NUMBER else str(z) for z in numbers)


# ------------------------------------------------------------------------------------- energies far off the baselines


def compute_residual(graph: Graph, baselines: Mapping[str, Any]) -> float | None:
    """Return the energy less the baselines per atom (eV/atom), None without an energy or one of the baselines.

    Args:
        graph: A structure.
        baselines: eV by atomic number, as a text, as the manifest has them.
    """
    numbers = graph.atomic_numbers.tolist()
    if graph.energy is None or not all(str(z) in baselines for z in set(numbers)):
        return None
    return float(graph.energy - sum(baselines[str(z)] for z in numbers)) / len(numbers)


@dataclasses.dataclass(frozen=True, slots=True)
class EnergyBand:
    """Where the energies of one level of theory lie, less their baselines; made by `measure_energy_band`."""

    median: float
    """eV/atom"""
    mad: float
    """eV/atom, median absolute deviation, at least the noise of relaxed structures"""

    def count_mads(self, residual: float) -> float:
        """Return how many median absolute deviations a residual (eV/atom) is off."""
        return abs(residual - self.median) / self.mad

    def find_limit(self, num_atoms: int, total_charge: float) -> float:
        """Return how far off a residual may be (eV/atom); free atoms and ions may be further off than molecules."""
        binding = _BINDING if num_atoms <= _FREE_ATOMS else 0.0
        return max(OUTLIER_MADS * self.mad, binding) + _IONISATION * abs(total_charge) / num_atoms

    def find_problem(self, residual: float | None, num_atoms: int, total_charge: float = 0.0) -> Problem | None:
        """Return what is wrong with an energy, or None.

        Args:
            residual: eV/atom, energy less baselines; None, where there is none, is fine.
            num_atoms: Of the structure.
            total_charge: e.
        """
        limit = self.find_limit(num_atoms, total_charge)
        if residual is None or abs(residual - self.median) <= limit:
            return None
        off = f"{residual - self.median:.3g} eV/atom off, {self.count_mads(residual):.0f} median deviations"
        return Problem("energy off the baselines", f"have an energy within {limit:.3g} eV/atom of the usual", off)


def measure_energy_band(residuals: FloatArray) -> EnergyBand | None:
    """Return where most energies lie, however wrong up to nearly half of them are.

    Args:
        residuals: (num_structures,) eV/atom, energies less baselines of one level of theory: of all, or of a fair sample.
            What is not finite is passed over.

    Returns:
        The band, or None for less than ten energies.
    """
    finite = residuals[np.isfinite(residuals)]
    if len(finite) < _MIN_ENERGIES:
        return None
    median = float(np.median(finite))
    return EnergyBand(median, max(float(np.median(np.abs(finite - median))), _MIN_MAD))
