"""`so3krates generate`: conformers of molecules with GFN2-xTB energies, forces, dipoles and charges.

Molecule -> ETKDG conformer -> Langevin dynamics on MMFF94 -> GFN2-xTB, in one process per core with one thread each. The bytes
of the data set depend on the arguments, the machine and the versions, not on the number of processes.

Splits are by conformer: conformers that are held out for validation and test are other frames of the trajectories that are
trained on. The manifest takes its name from --name, or from the folder.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from data_tools import gate, molecules, sampling, xtb
from data_tools.console import Progress, say
from data_tools.dataset import (
    DEFAULT_SPLIT,
    Split,
    check_output_folder,
    describe_source,
    describe_versions,
    write_dataset,
)
from data_tools.processes import start_pool
from data_tools.quarantine import list_counts
from data_tools.sampling import Molecule, Sample, Task
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

DEFAULT_NUM_CONFORMERS: Final = 2000
DEFAULT_TEMPERATURES: Final = (300.0, 500.0)
"""K"""
DEFAULT_MAX_FORCE: Final = 20.0
"""eV/Å; MMFF94 at 1000 K stays below 8, so that more is a structure gone astray"""
RATTLES: Final = (0.02, 0.05)
"""Å; more gives forces that no dynamics meets"""
_MAX_REASONS: Final = 10
_EPILOG: Final = """\
Splits are by conformer: what is held out for validation and test are other frames of
the trajectories that are trained on, not other molecules. The name in the manifest
is that of --name, or the folder's.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates generate`."""
    parser.epilog = _EPILOG
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="data set to write; must not exist")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--builtin", action="store_true", help="ten small organic molecules (default)")
    source.add_argument("--smiles", type=Path, metavar="FILE", help="one `SMILES [name]` per line")
    source.add_argument("--g2", action="store_true", help="ASE's g2 molecules, displaced at random")
    source.add_argument("--s22", action="store_true", help="ASE's s22 dimers, displaced at random")
    source.add_argument("--geometries", type=Path, metavar="FILE", help="label these structures as they are")
    parser.add_argument("--num-conformers", type=int, help=f"in total ({DEFAULT_NUM_CONFORMERS}), not for --geometries")
    default = " ".join(f"{t:g}" for t in DEFAULT_TEMPERATURES)
    parser.add_argument(
        "--temperatures", type=float, nargs="+", metavar="K", help=f"of the dynamics, where there are any ({default})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and split (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="one per core (%(default)s)"
    )
    parser.add_argument(
        "--max-force", type=float, default=DEFAULT_MAX_FORCE, help="eV/Å, more is dropped (%(default)s)"
    )
    parser.add_argument(
        "--split", default=DEFAULT_SPLIT, help="train,validation,test as fractions or numbers (%(default)s)"
    )
    parser.add_argument("--name", help="name of the data set (default: the folder's)")
    parser.add_argument("--licence", default="unknown", help="SPDX identifier you give the data (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Generate one data set; returns the exit code."""
    _check_arguments(arguments)
    source, found = _load_molecules(arguments)
    tasks = plan_tasks(found, arguments)
    total = sum(task.count for task in tasks)
    say(
        f"labelling {total} conformers of {len({m.name for m in found})} molecules with {arguments.processes} processes"
    )
    with Progress("labelled", total) as progress:
        samples, isolated = label(tasks, molecules.find_elements(found), arguments.processes, progress.advance)
    graphs, dropped = sort_out(tasks, samples, arguments.max_force)
    manifest = write_dataset(
        arguments.out,
        graphs,
        name=arguments.name or arguments.out.name,
        level_of_theory=xtb.METHOD,
        licence=arguments.licence,
        provenance=_describe(arguments, source, found, tasks) | {"dropped": dropped},
        split=arguments.split,
        seed=arguments.seed,
        isolated_atom_energies=isolated,
    )
    counts = ", ".join(f"{manifest.num_conformers(part)} {part}" for part in ("train", "validation", "test"))
    say(f"wrote {arguments.out}: {counts}; dropped: {list_counts(manifest.provenance['dropped']) or 'nothing'}")
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_output_folder(arguments.out)
    Split.parse(arguments.split)
    gate.check_max_force(arguments.max_force)
    _refuse_unused(arguments)
    for option, number in (("--num-conformers", _num_conformers(arguments)), ("--processes", arguments.processes)):
        if number < 1:
            raise DataError(option, "be at least 1", number, "Give a larger number")
    temperatures = _temperatures(arguments)
    if not all(np.isfinite(t) and t > 0 for t in temperatures):
        raise DataError("--temperatures", "be above 0 K", temperatures, "Give positive temperatures")
    if len(set(temperatures)) != len(temperatures):
        raise DataError("--temperatures", "be different", temperatures, "Name each once")
    molecules.check_installed("tblite")


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect on the molecules that were asked for."""
    still = next((name for name in ("geometries", "g2", "s22") if getattr(arguments, name)), None)
    if still == "geometries" and arguments.num_conformers is not None:
        rule, remedy = "not be given with --geometries, where each is labelled once", "Leave it out"
        raise DataError("--num-conformers", rule, arguments.num_conformers, remedy)
    if still is not None and arguments.temperatures is not None:
        rule = f"not be given with --{still}, where no dynamics are run"
        raise DataError("--temperatures", rule, arguments.temperatures, "Leave it out")


def _num_conformers(arguments: argparse.Namespace) -> int:
    return DEFAULT_NUM_CONFORMERS if arguments.num_conformers is None else int(arguments.num_conformers)


def _temperatures(arguments: argparse.Namespace) -> list[float]:
    return list(DEFAULT_TEMPERATURES if arguments.temperatures is None else arguments.temperatures)


def _load_molecules(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Molecule]]:
    if arguments.smiles is not None:
        found = molecules.load_smiles(arguments.smiles)
        return describe_source(arguments.smiles), found
    if arguments.geometries is not None:
        found = molecules.load_geometries(arguments.geometries)
        return describe_source(arguments.geometries), found
    if arguments.g2:
        return {"collection": "g2 of ASE"}, molecules.load_g2()
    if arguments.s22:
        return {"collection": "s22 of ASE"}, molecules.load_s22()
    found = molecules.load_builtin()
    if found[0].smiles is None:
        unused = "" if arguments.temperatures is None else "; --temperatures has no effect"
        say(f"RDKit is not installed: the built-in molecules come from ASE's g2 set, displaced at random{unused}")
    return {"collection": "builtin"}, found


def plan_tasks(found: Sequence[Molecule], arguments: argparse.Namespace) -> list[Task]:
    """Share the conformers out over molecules and temperatures, and cut them into trajectories.

    Args:
        found: Molecules.
        arguments: With `num_conformers`, `temperatures`, `seed` and `geometries`.

    Returns:
        Tasks in the order in which their results are collected.
    """
    if arguments.geometries is not None:
        return [Task(m, "given", 0.0, number, 1, arguments.seed) for number, m in enumerate(found)]
    kind: Literal["langevin", "rattle"] = "rattle" if found[0].smiles is None else "langevin"
    levels = _temperatures(arguments) if kind == "langevin" else RATTLES
    series = [(molecule, level) for level in levels for molecule in found]
    base, more = divmod(_num_conformers(arguments), len(series))
    tasks = []
    for index, (molecule, level) in enumerate(series):
        wanted = base + (index < more)
        size = sampling.TRAJECTORY_SAMPLES
        for number, first in enumerate(range(0, wanted, size)):
            tasks.append(Task(molecule, kind, level, number, min(size, wanted - first), arguments.seed))
    return tasks


def label(
    tasks: Sequence[Task], elements: tuple[int, ...], processes: int, advance: Callable[[int], None]
) -> tuple[list[list[Sample]], dict[int, float]]:
    """Run all tasks in worker processes.

    Args:
        tasks: What to sample and label.
        elements: Atomic numbers whose isolated atoms are computed too.
        processes: How many to start.
        advance: Called with the number of geometries done, in this process.

    Returns:
        The samples of each task, and the isolated atoms' energies (eV).

    Raises:
        DataError: A worker process died.
    """
    samples = []
    try:
        with start_pool(processes, len(tasks)) as pool:
            isolated = pool.submit(xtb.compute_isolated_atoms, elements)
            for result in pool.map(sampling.run_task, tasks, chunksize=max(1, min(16, len(tasks) // (8 * processes)))):
                samples.append(result)
                advance(len(result))
            return samples, isolated.result()
    except BrokenProcessPool as error:
        where = f"worker process, after {len(samples)} of {len(tasks)} tasks,"
        raise DataError(where, "live until its work is done", error, "Look for lack of memory; try again") from error


def sort_out(
    tasks: Sequence[Task], samples: Sequence[Sequence[Sample]], max_force: float
) -> tuple[list[Graph], dict[str, int]]:
    """Return the labelled structures, and how many of which molecule were dropped for which reason.

    Raises:
        DataError: Nothing is left.
    """
    graphs, dropped = [], Counter[str]()
    for task, results in zip(tasks, samples, strict=True):
        for sample in results:
            graph = _to_graph(task.molecule, sample)
            problem = None if sample.labels is None else gate.find_problem(graph, max_force)
            if sample.labels is not None and problem is None:
                graphs.append(graph)
            else:
                dropped[f"{task.molecule.name}: {sample.failure if problem is None else problem.reason}"] += 1
    if not graphs:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in dropped.most_common(_MAX_REASONS))
        more = f"; and {len(dropped) - _MAX_REASONS} more reasons" if len(dropped) > _MAX_REASONS else ""
        raise DataError("labelling", "leave at least one conformer", reasons + more, "Correct or replace the molecules")
    return graphs, dict(dropped)


def _to_graph(molecule: Molecule, sample: Sample) -> Graph:
    labels = sample.labels
    return Graph(
        atomic_numbers=molecule.atomic_numbers,
        positions=sample.positions,
        total_charge=molecule.total_charge,
        num_unpaired_electrons=molecule.num_unpaired_electrons,
        energy=None if labels is None else labels.energy,
        forces=None if labels is None else labels.forces,
        dipole=None if labels is None else labels.dipole,
        partial_charges=None if labels is None else labels.partial_charges,
        group=molecule.name,
    )


def _describe(
    arguments: argparse.Namespace, source: Mapping[str, Any], found: Sequence[Molecule], tasks: Sequence[Task]
) -> dict[str, Any]:
    kind = tasks[0].kind
    packages = ["numpy", "ase", "tblite"] + (["rdkit"] if kind == "langevin" else [])
    settings: dict[str, Any] = {"kind": kind}
    if kind == "langevin":
        settings |= {
            "force_field": "MMFF94",
            "temperatures_K": _temperatures(arguments),
            "timestep_fs": sampling.TIMESTEP_FS,
            "friction_per_fs": sampling.FRICTION_PER_FS,
            "steps_per_sample": sampling.STEPS_PER_SAMPLE,
            "equilibration_steps": sampling.EQUILIBRATION_STEPS,
            "smiles": {m.name: m.smiles for m in found},
        }
    elif kind == "rattle":
        settings["displacements_angstrom"] = list(RATTLES)
    return {
        "tool": "so3krates generate",
        "sources": [dict(source)],
        "sampling": settings,
        "labels": {"method": xtb.METHOD, "accuracy": xtb.ACCURACY, "spin_polarization": "where electrons are unpaired"},
        "max_force": arguments.max_force,
        "seed": arguments.seed,
        "versions": describe_versions(*packages),
    }
