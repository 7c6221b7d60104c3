"""`so3krates convert`: a data set out of an extxyz (or any file that ASE reads) or an npz in the manner of MD17.

Units are given, or recognised by rules that can fail, and then the file is refused: lengths from bond lengths, energies of npz
files from all-electron total energies; ASE's formats are eV and Å by ASE's convention. Whether energies, forces and lengths
fit together is measured on the data either way.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools import gate
from data_tools.console import say
from data_tools.dataset import (
    DEFAULT_SPLIT,
    Split,
    check_output_folder,
    describe_source,
    describe_versions,
    write_dataset,
)
from data_tools.readers import Structures, parse_keys, read_structures
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.units import ENERGY_UNITS, LENGTH_UNITS

DEFAULT_MAX_FORCE: Final = 300.0
"""eV/Å; collected sets hold strained structures, a failed calculation is further off"""
_RECOGNISED_ENERGIES: Final = ("eV", "kcal/mol", "kJ/mol", "Hartree")
_TOTAL_ENERGY_BAND: Final = (0.97, 1.10)
"""Energy over `estimate_total_energy`: 1.009 for ethanol in MD17, 1.09 for H2, where the bond is the largest part"""
_BOND_BAND: Final = (0.7, 1.4)
"""Median distance to the nearest atom over the sum of the covalent radii"""
_FORCE_RMS_BAND: Final = (0.02, 10.0)
"""eV/Å; molecular dynamics at 300 to 1000 K has 0.5 to 2"""
_OUTLIER: Final = 20.0
"""Forces this many times the usual ones are failed calculations"""
_SAMPLE: Final = 200
_EPILOG: Final = """\
Dipoles are taken as e times the length unit; those in Debye have to be converted before. In charged structures their
origin is the centre of mass.
"""


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

    @property
    def factors(self) -> dict[str, float]:
        """Factors that turn the file's numbers into eV, Å and eV/Å."""
        energy, _, length = self.force.rpartition("/")
        force = ENERGY_UNITS[energy] / LENGTH_UNITS[length]
        return {"energy": ENERGY_UNITS[self.energy], "length": LENGTH_UNITS[self.length], "force": force}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates convert`."""
    parser.epilog = _EPILOG
    parser.add_argument("input", type=Path, help="extxyz or any file that ASE reads, or .npz")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="data set to write; must not exist")
    parser.add_argument(
        "--keys", nargs="+", default=[], metavar="LABEL=KEY", help="e.g. energy=REF_energy forces=REF_forces"
    )
    parser.add_argument("--energy-unit", choices=sorted(ENERGY_UNITS), help="default: recognised, eV for ASE's formats")
    parser.add_argument(
        "--length-unit", choices=sorted(LENGTH_UNITS), help="default: recognised, Angstrom for ASE's formats"
    )
    parser.add_argument("--force-unit", metavar="ENERGY/LENGTH", help="default: energy unit over length unit")
    parser.add_argument(
        "--isolated-atoms", type=Path, metavar="FILE", help="single atoms with energies, same keys and units"
    )
    parser.add_argument("--group", help="name that results are grouped by (default: the file's, or the formula)")
    parser.add_argument(
        "--split", default=DEFAULT_SPLIT, help="train,validation,test as fractions or numbers (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    parser.add_argument("--name", help="name of the data set (default: the file's)")
    parser.add_argument("--licence", default="unknown", help="SPDX identifier of the data (%(default)s)")
    parser.add_argument("--level-of-theory", default="unknown", help="e.g. PBE0+MBD (%(default)s)")
    parser.add_argument(
        "--max-force", type=float, default=DEFAULT_MAX_FORCE, help="eV/Å, more is a failure (%(default)s)"
    )
    parser.add_argument("--drop-faulty", action="store_true", help="leave faulty structures out and count them")


def run(arguments: argparse.Namespace) -> int:
    """Convert one file; returns the exit code."""
    check_output_folder(arguments.out)
    Split.parse(arguments.split)
    gate.check_max_force(arguments.max_force)
    keys = parse_keys(arguments.keys)
    structures = read_structures(arguments.input, keys, arguments.group)
    _check_labels(structures, arguments.input)
    units = choose_units(structures, arguments)
    for quantity in ("energy", "length", "force"):
        say(f"{quantity} unit: {getattr(units, quantity)} ({getattr(units, quantity + '_reason')})")
    converted = [apply_units(g, units) for g in structures.graphs]
    check_units(converted, arguments.input, strict=not _units_given(arguments))
    graphs, dropped = _gate(converted, arguments.input, arguments.max_force, arguments.drop_faulty)
    isolated = read_isolated_atoms(arguments.isolated_atoms, keys, units) if arguments.isolated_atoms else None
    manifest = write_dataset(
        arguments.out,
        graphs,
        name=arguments.name or arguments.input.stem,
        level_of_theory=arguments.level_of_theory,
        licence=arguments.licence,
        provenance=_describe(arguments, structures, units, dropped),
        split=arguments.split,
        seed=arguments.seed,
        isolated_atom_energies=isolated,
    )
    counts = ", ".join(f"{manifest.num_conformers(part)} {part}" for part in ("train", "validation", "test"))
    say(f"wrote {arguments.out}: {counts}; dropped: {manifest.provenance['dropped'] or 'nothing'}")
    return 0


def _units_given(arguments: argparse.Namespace) -> bool:
    return arguments.energy_unit is not None and (arguments.length_unit is not None or arguments.force_unit is not None)


def _describe(
    arguments: argparse.Namespace, structures: Structures, units: FileUnits, dropped: Mapping[str, int]
) -> dict[str, Any]:
    files = [arguments.input] + ([arguments.isolated_atoms] if arguments.isolated_atoms else [])
    return {
        "tool": "so3krates convert",
        "sources": [describe_source(path) for path in files],
        "keys": structures.keys,
        "units": {name: getattr(units, name) for name in ("energy", "length", "force")},
        "unit_factors": units.factors,
        "seed": arguments.seed,
        "versions": describe_versions("numpy", "ase"),
        "dropped": dropped,
    }


def _check_labels(structures: Structures, path: Path) -> None:
    if not {"energy", "forces"} & set(structures.keys):
        remedy = "Name the labels' keys with --keys energy=KEY forces=KEY"
        raise DataError(str(path), "have labels (energy, forces)", "none that is known", remedy)


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


def _gate(
    graphs: Sequence[Graph], path: Path, max_force: float, drop_faulty: bool
) -> tuple[list[Graph], dict[str, int]]:
    """Return the structures that pass, and the reasons of the others; raises at the first one unless they shall be dropped."""
    good, dropped = [], Counter[str]()
    for index, graph in enumerate(graphs):
        problem = gate.find_problem(graph, max_force)
        if problem is None:
            good.append(graph)
        elif drop_faulty:
            dropped[problem.reason] += 1
        else:
            spin = "electron parity" in problem.reason or "spin" in problem.reason
            remedy = "Name the keys of charge and spin with --keys, or add" if spin else "Correct it, or add"
            where = f"{path.name}:{index} {gate.describe(graph)}"
            raise DataError(where, problem.rule, problem.got, f"{remedy} --drop-faulty to leave such structures out")
    return good, dict(dropped)


# ------------------------------------------------------------------------------------------------------------ units


def choose_units(structures: Structures, arguments: argparse.Namespace) -> FileUnits:
    """Return the units that were asked for, or recognise them.

    Raises:
        DataError: They cannot be recognised.
    """
    length, length_reason = arguments.length_unit, "given"
    energy, energy_reason = arguments.energy_unit, "given"
    if length is None:
        length, length_reason = _choose_length(structures, arguments.input)
    if energy is None:
        energy, energy_reason = _choose_energy(structures, arguments.input)
    force, force_reason = arguments.force_unit, "given"
    if force is None:
        force, force_reason = f"{energy}/{length}", "energy unit over length unit"
    force_energy, _, force_length = force.rpartition("/")
    if force_energy not in ENERGY_UNITS or force_length not in LENGTH_UNITS:
        remedy = f"Energies are {', '.join(ENERGY_UNITS)}; lengths are {', '.join(LENGTH_UNITS)}"
        raise DataError("--force-unit", "be an energy unit, a slash and a length unit", repr(force), remedy)
    return FileUnits(energy, length, force, energy_reason, length_reason, force_reason)


def _sample(graphs: Sequence[Graph]) -> Sequence[Graph]:
    return graphs[:: max(1, len(graphs) // _SAMPLE)][:_SAMPLE]


def _choose_length(structures: Structures, path: Path) -> tuple[str, str]:
    ratio = measure_bond_ratio(structures.graphs)
    if ratio is None:
        if not structures.is_npz:
            return "Angstrom", "ASE's convention"
        raise DataError(str(path), "have bonds that tell the length unit", "single atoms", "Give --length-unit")
    fits = [u for u in ("Angstrom", "Bohr", "nm") if _BOND_BAND[0] <= ratio * LENGTH_UNITS[u] < _BOND_BAND[1]]
    if fits[:1] == ["Angstrom"]:
        reason = f"nearest atoms are {ratio:.2f} times the sum of covalent radii apart"
        return "Angstrom", reason if structures.is_npz else f"ASE's convention; {reason}"
    guess = f", like {fits[0]}" if fits else ""
    if structures.is_npz and fits:
        return fits[0], f"recognised: bonds have {ratio:.2f} times their length in Å"
    remedy = "Give --length-unit"
    raise DataError(str(path), "have bond lengths in Å", f"{ratio:.2f} times the usual ones{guess}", remedy)


def measure_bond_ratio(graphs: Sequence[Graph]) -> float | None:
    """Return the median over atoms of the least distance, in sums of covalent radii, to another atom; None for single atoms.

    Args:
        graphs: Structures with positions in any unit; periodic images are passed over.
    """
    from ase.data import covalent_radii

    ratios: list[float] = []
    for graph in _sample(graphs):
        if graph.num_atoms < 2:
            continue
        positions = graph.positions[:_SAMPLE]
        radii = covalent_radii[graph.atomic_numbers[:_SAMPLE]]
        distances = np.linalg.norm(positions[:, None] - positions, axis=-1) / (radii[:, None] + radii)
        np.fill_diagonal(distances, np.inf)
        nearest = distances.min(1)
        ratios += nearest[np.isfinite(nearest)].tolist()  # a faulty structure is the gate's business
    return float(np.median(ratios)) if ratios else None


def _choose_energy(structures: Structures, path: Path) -> tuple[str, str]:
    """Return the energy unit and the reason for it.

    ASE's formats are in eV unless the total energies look like those of all electrons in another unit. Energies that look like
    nothing known (of valence electrons, of formation) are believed to be in eV there, and refused in an npz.
    """
    remedy = "Give --energy-unit (and --force-unit where it is not energy over length)"
    ratio = measure_energy_ratio(structures.graphs)
    low, high = _TOTAL_ENERGY_BAND
    shares = {} if ratio is None else {unit: ratio * ENERGY_UNITS[unit] for unit in _RECOGNISED_ENERGIES}
    fits = {unit: share for unit, share in shares.items() if low <= share <= high}
    unit = next(iter(fits), None)
    if structures.is_npz and unit is not None:
        return unit, f"recognised: {fits[unit]:.3f} of the all-electron energy estimated from the composition"
    if not structures.is_npz and unit in ("eV", None):
        return "eV", "ASE's convention"
    if ratio is None:
        raise DataError(str(path), "have energies that tell the energy unit", "none", remedy)
    if unit is not None:
        got = f"total energies that look like {unit} ({fits[unit]:.3f} of the estimate for all electrons)"
        raise DataError(str(path), "have energies in eV (ASE's convention), or a given unit", got, remedy)
    rule = "have total energies of all electrons, from which the unit can be told"
    per_atom = np.nanmedian(
        [np.nan if g.energy is None else g.energy / max(g.num_atoms, 1) for g in _sample(structures.graphs)]
    )
    raise DataError(str(path), rule, f"{per_atom:.4g} per atom, {ratio:.3g} times the estimate in eV", remedy)


def measure_energy_ratio(graphs: Sequence[Graph]) -> float | None:
    """Return the median of the energies over what all electrons are estimated to have in eV; None without energies."""
    estimates = [(g.energy, gate.estimate_total_energy(g.atomic_numbers)) for g in _sample(graphs)]
    ratios = [energy / estimate for energy, estimate in estimates if energy is not None and estimate]
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    return float(np.median(finite)) if finite else None


def check_units(graphs: Sequence[Graph], path: Path, *, strict: bool) -> None:
    """Measure on the data whether energies, forces and lengths fit together, and say what was found.

    Args:
        graphs: Structures in eV and Å.
        path: The file, for messages.
        strict: Refuse what does not fit; else warn only (the user gave the units).

    Raises:
        DataError: They do not fit, and `strict`.
    """
    findings = []
    sound = _leave_out_faulty(graphs)
    rms = [float(np.sqrt(np.mean(np.square(g.forces)))) for g in sound if g.forces is not None]
    if rms and not _FORCE_RMS_BAND[0] <= np.median(rms) <= _FORCE_RMS_BAND[1]:
        findings.append(f"forces with an RMS of {np.median(rms):.3g} eV/Å (usual: 0.1 to 5)")
    if (measured := gate.measure_units_slope(sound)) is not None:
        found = f"slope {measured.slope:.2f} +- {measured.error:.2f} over {measured.num_pairs} near pairs"
        say(f"units check: energies follow forces with {found} (1 when units agree)")
        if not measured.agrees:
            findings.append(measured.explain())
    if findings and strict:
        remedy = "Give --energy-unit, --length-unit and --force-unit"
        raise DataError(str(path), "have energies, forces and lengths in units that agree", "; ".join(findings), remedy)
    for finding in findings:
        say(f"warning: {path.name} has {finding}")


def _leave_out_faulty(graphs: Sequence[Graph]) -> list[Graph]:
    """Return the structures without those that are wrong in themselves: single failures say nothing about units."""
    finite = [g for g in graphs if gate.find_problem(g, np.inf) is None]
    largest = [0.0 if g.forces is None else float(np.abs(g.forces).max()) for g in finite]
    limit = _OUTLIER * float(np.median(largest)) if largest else 0.0
    return [g for g, force in zip(finite, largest, strict=True) if force <= limit]


def read_isolated_atoms(path: Path, keys: Mapping[str, str], units: FileUnits) -> dict[int, float]:
    """Read the energies of single atoms.

    Args:
        path: A file as `read_structures` takes it, each structure one atom with an energy.
        keys: As for the molecules; keys that this file lacks are looked up by their usual names.
        units: Of the molecules' file.

    Returns:
        eV by atomic number.

    Raises:
        DataError: A structure has more than one atom or no energy, or an element is there twice.
    """
    energy_key = {k: v for k, v in keys.items() if k in ("energy", "atomic_numbers", "positions")}
    energies: dict[int, float] = {}
    for index, graph in enumerate(read_structures(path, energy_key).graphs):
        where = f"{path.name}:{index}"
        if graph.num_atoms != 1 or graph.energy is None:
            got = f"{graph.num_atoms} atoms, energy {graph.energy}"
            raise DataError(where, "be one atom with an energy", got, "Give single atoms with --isolated-atoms")
        number = int(graph.atomic_numbers[0])
        if number in energies:
            raise DataError(where, "have each element once", gate.name_elements([number]), "Remove one of the two")
        energies[number] = graph.energy * units.factors["energy"]
    return energies
