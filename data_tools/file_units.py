"""The units of a file: documented by its layout, given by the user, or recognised by rules that can fail, and then it is refused.

Lengths are recognised from bond lengths, energies from all-electron total energies; ASE's formats are eV and Å by ASE's convention,
unless the numbers say otherwise. Whether energies, forces and lengths fit together is measured on the data either way.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from data_tools import detective, gate
from data_tools.console import say
from data_tools.formats import Chunk, OpenFile, Units
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.units import ENERGY_UNITS, LENGTH_UNITS

_RECOGNISED_ENERGIES: Final = ("eV", "kcal/mol", "kJ/mol", "Hartree")
_TOTAL_ENERGY_BAND: Final = (0.97, 1.10)
"""Energy over `estimate_total_energy`: 1.009 for ethanol in MD17, 1.09 for H2, where the bond is the largest part"""
_SAMPLE_CHUNK: Final = 512
_SAMPLE_CHUNKS: Final = 16
_MAX_RATIOS: Final = 200
_OPTIONS: Final = {
    "energies in ": "--energy-unit ",
    "positions in ": "--length-unit ",
    "forces in ": "--force-unit ",
    detective.GRADIENTS: "--gradients",
}
"""What the detective says, and the option that puts it right"""


@dataclasses.dataclass(frozen=True, slots=True)
class FileUnits:
    """The units of a file and why they were taken."""

    energy: str
    length: str
    force: str
    """an energy unit, a slash, a length unit"""
    energy_reason: str
    length_reason: str
    force_reason: str
    gradients: bool = False
    """the file has gradients in place of forces"""

    @property
    def factors(self) -> dict[str, float]:
        """Factors that turn the file's numbers into eV, Å and eV/Å."""
        energy, _, length = self.force.rpartition("/")
        force = ENERGY_UNITS[energy] / LENGTH_UNITS[length]
        sign = -1.0 if self.gradients else 1.0
        return {"energy": ENERGY_UNITS[self.energy], "length": LENGTH_UNITS[self.length], "force": sign * force}

    @property
    def names(self) -> dict[str, str]:
        """Energy, length and force unit by their names."""
        return {"energy": self.energy, "length": self.length, "force": self.force}


def apply_units(graph: Graph, units: FileUnits) -> Graph:
    """Return the structure in eV and Å."""
    factors = units.factors
    changes: dict[str, Any] = {"positions": graph.positions * factors["length"]}
    powers = {"cell": factors["length"], "energy": factors["energy"], "forces": factors["force"]}
    powers |= {"stress": factors["energy"] / factors["length"] ** 3, "dipole": factors["length"]}
    for name, factor in powers.items():
        value = getattr(graph, name)
        if value is not None:
            changes[name] = value * factor
    return dataclasses.replace(graph, **changes)


def read_sample(file: OpenFile) -> list[Graph]:
    """Return structures from all over a file, the same ones whoever asks; all of them where they are few.

    Raises:
        DataError: None of them can be read; the error is that of the first.
    """
    graphs, errors = [], []
    for chunk in _choose_chunks(file.chunks(_SAMPLE_CHUNK)):
        for _, item in file.read_records(chunk):
            if isinstance(item, DataError):
                errors.append(item)
            else:
                graphs.append(item)
    if errors and not graphs:
        raise errors[0]
    return graphs


def _choose_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the first chunk and others evenly spaced."""
    numbers = {number * max(len(chunks) - 1, 0) // (_SAMPLE_CHUNKS - 1) for number in range(_SAMPLE_CHUNKS)}
    return [chunks[number] for number in sorted(numbers) if number < len(chunks)]


def choose_units(graphs: Sequence[Graph], known: Units | None, arguments: argparse.Namespace, where: str) -> FileUnits:
    """Return the units that were asked for or that the layout has, or recognise them.

    Args:
        graphs: Some structures in the units of the file.
        known: What the layout says.
        arguments: With `energy_unit`, `length_unit` and `force_unit`, each None unless it was given, and `gradients`.
        where: Name of the file, for messages.

    Raises:
        DataError: They cannot be recognised, or are none.
    """
    documented = known if known is not None and not known.is_convention else None
    length, length_reason = arguments.length_unit, "given"
    energy, energy_reason = arguments.energy_unit, "given"
    force, force_reason = arguments.force_unit, "given"
    if documented is not None:
        if force is None and length is None and energy is None:
            force, force_reason = documented.force, documented.reason
        length, length_reason = (length, "given") if length else (documented.length, documented.reason)
        energy, energy_reason = (energy, "given") if energy else (documented.energy, documented.reason)
    if length is None:
        length, length_reason = _choose_length(graphs, known, where)
    if energy is None:
        energy, energy_reason = _choose_energy(graphs, known, where)
    if force is None:
        force, force_reason = f"{energy}/{length}", "energy unit over length unit"
    force_energy, _, force_length = force.rpartition("/")
    if force_energy not in ENERGY_UNITS or force_length not in LENGTH_UNITS:
        remedy = f"Energies are {', '.join(ENERGY_UNITS)}; lengths are {', '.join(LENGTH_UNITS)}"
        raise DataError("--force-unit", "be an energy unit, a slash and a length unit", repr(force), remedy)
    return FileUnits(energy, length, force, energy_reason, length_reason, force_reason, arguments.gradients)


def _choose_length(graphs: Sequence[Graph], known: Units | None, where: str) -> tuple[str, str]:
    ratio = detective.measure_bond_ratio(graphs)
    if ratio is None:
        if known is not None:
            return known.length, known.reason
        raise DataError(where, "have bonds that tell the length unit", "single atoms", "Give --length-unit")
    low, high = detective.BOND_BAND
    fits = [u for u in ("Angstrom", "Bohr", "nm") if low <= ratio * LENGTH_UNITS[u] < high]
    if fits[:1] == ["Angstrom"]:
        reason = f"nearest atoms are {ratio:.2f} times the sum of covalent radii apart"
        return "Angstrom", reason if known is None else f"{known.reason}; {reason}"
    guess = f", like {fits[0]}" if fits else ""
    if known is None and fits:
        return fits[0], f"recognised: bonds have {ratio:.2f} times their length in Å"
    rule, remedy = "have bond lengths in Å", "Give --length-unit"
    raise DataError(where, rule, f"{ratio:.2f} times the usual ones{guess}", remedy)


def _choose_energy(graphs: Sequence[Graph], known: Units | None, where: str) -> tuple[str, str]:
    """Return the energy unit and the reason for it.

    ASE's formats are in eV unless the total energies look like those of all electrons in another unit. Energies that look like
    nothing known (of valence electrons, of formation) are believed to be in eV there, and refused in files without a convention.
    """
    remedy = "Give --energy-unit (and --force-unit where it is not energy over length)"
    ratio = measure_energy_ratio(graphs)
    low, high = _TOTAL_ENERGY_BAND
    shares = {} if ratio is None else {unit: ratio * ENERGY_UNITS[unit] for unit in _RECOGNISED_ENERGIES}
    fits = {unit: share for unit, share in shares.items() if low <= share <= high}
    unit = next(iter(fits), None)
    if known is None and unit is not None:
        return unit, f"recognised: {fits[unit]:.3f} of the all-electron energy estimated from the composition"
    if known is not None and unit in (known.energy, None):
        return known.energy, known.reason
    if ratio is None:
        raise DataError(where, "have energies that tell the energy unit", "none", remedy)
    if unit is not None:
        got = f"total energies that look like {unit} ({fits[unit]:.3f} of the estimate for all electrons)"
        raise DataError(where, "have energies in eV (ASE's convention), or a given unit", got, remedy)
    rule = "have total energies of all electrons, from which the unit can be told"
    per_atom = np.median([g.energy / max(g.num_atoms, 1) for g in _thin(graphs) if g.energy is not None])
    raise DataError(where, rule, f"{per_atom:.4g} per atom, {ratio:.3g} times the estimate in eV", remedy)


def measure_energy_ratio(graphs: Sequence[Graph]) -> float | None:
    """Return the median of the energies over what all electrons are estimated to have in eV; None without energies."""
    estimates = [(g.energy, gate.estimate_total_energy(g.atomic_numbers)) for g in _thin(graphs)]
    ratios = [energy / estimate for energy, estimate in estimates if energy is not None and estimate]
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    return float(np.median(finite)) if finite else None


def _thin(graphs: Sequence[Graph]) -> Sequence[Graph]:
    """Return some of the structures whose energy is a number, evenly spaced among these: every second one may have none."""
    labelled = [g for g in graphs if g.energy is not None and np.isfinite(g.energy)]
    return labelled[:: max(1, len(labelled) // _MAX_RATIOS)][:_MAX_RATIOS]


def check_units(graphs: Sequence[Graph], where: str, units: FileUnits, *, strict: bool) -> None:
    """Measure on the data whether energies, forces and lengths fit together, and say what was found.

    Args:
        graphs: Structures in eV and Å.
        where: Name of the file, for messages.
        units: That the numbers were taken for.
        strict: Refuse what does not fit; else warn only (the user gave the units). A wrong sign is no unit: it is refused always.

    Raises:
        DataError: They do not fit, and `strict`, or forces have the wrong sign.
    """
    verdict = detective.judge_units(graphs, detective.TakenUnits(units.energy, units.length, units.force))
    say(f"units check: {verdict.describe()}")
    has_wrong_sign = verdict.slope is not None and verdict.slope.has_wrong_sign
    if verdict.findings and (strict or has_wrong_sign):
        rule = "have energies, forces and lengths in units that agree"
        raise DataError(where, rule, verdict.explain(), _find_remedy(verdict, units))
    if verdict.findings:
        say(f"warning: {where} has {verdict.explain()}")


def _find_remedy(verdict: detective.UnitsVerdict, units: FileUnits) -> str:
    """Return what to do about units that do not fit: the options for what is probably wrong, if anything is."""
    if units.gradients and verdict.slope is not None and verdict.slope.has_wrong_sign:
        return "Leave --gradients out"
    options = verdict.probable[0] if verdict.probable else ""
    for words, option in _OPTIONS.items():
        options = options.replace(words, option)
    if options:
        return f"If that is so, give {options.replace(', ', ' ')}"
    return "Look up what the file has, and give --energy-unit, --length-unit and --force-unit"
