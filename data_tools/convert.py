"""`so3krates convert`: a data set out of files with labels, in any layout that `formats` knows.

The input is read in chunks, each of which becomes a run (`runs.py`) in a hidden folder: by one process or many, on one machine or
as parts of a job array, now or after an interruption. What is in the data set in the end depends on none of that. Structures that
are wrong in themselves go to a quarantine file with the reason; too many of them are an error.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools import gate, quarantine
from data_tools.chunks import Done, Job, convert_chunks, name_sources
from data_tools.console import Progress, say
from data_tools.dataset import DEFAULT_MAX_ENERGY_MADS, Description, merge_runs, refuse_bad_share
from data_tools.file_units import FileUnits, apply_units, check_units, choose_units, read_sample
from data_tools.formats import LAYOUTS, Chunk, OpenFile, open_layout
from data_tools.formats.labels import parse_keys
from data_tools.parts import Part, Settings, agree_on_settings, check_no_leftovers, open_all, open_chunk, open_parts
from data_tools.provenance import describe_source, describe_versions, identify_source
from data_tools.readers import read_structures
from data_tools.runs import RUN_CONFORMERS
from data_tools.split import DEFAULT_SPLIT, Split
from data_tools.workplace import check_output_folder
from so3krates_dist.data.shards import SPLITS, Manifest
from so3krates_dist.errors import DataError
from so3krates_dist.units import ENERGY_UNITS, LENGTH_UNITS

DEFAULT_MAX_FORCE: Final = 300.0
"""eV/Å; collected sets hold strained structures, a failed calculation is further off"""
_EPILOG: Final = """\
Labels are energy, forces, stress, dipole, partial_charges and hirshfeld_ratios. A number `loss_weight` of each
structure (in the comment of extxyz, an array over conformers in npz and HDF5; 1 where there is none) is the factor
of its errors in the training loss, zero or greater.

Dipoles are taken as e times the length unit; those in Debye have to be converted before. In charged structures their
origin is the centre of mass.

An interrupted conversion goes on where it was when the same command is given again. Large inputs can be shared out:
  so3krates convert big.h5 --out DIR --part 3/8      in a job array, each part on its own, in any order
  so3krates merge DIR                                when all parts are done
The data set does not depend on the number of parts or workers.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates convert`."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "input", type=Path, nargs="+", metavar="FILE", help="files of one layout, or a folder of them; before --keys"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="data set to write; must not exist")
    parser.add_argument("--layout", metavar="NAME", help=f"default: recognised; one of {', '.join(LAYOUTS)}")
    parser.add_argument(
        "--keys", nargs="+", default=[], metavar="LABEL=KEY",
        help="e.g. energy=REF_energy forces=REF_forces loss_weight=config_weight",
    )  # fmt: skip
    _add_units(parser)
    parser.add_argument(
        "--isolated-atoms", type=Path, metavar="FILE", help="single atoms with energies, same keys and units"
    )
    parser.add_argument("--group", help="name that results are grouped by (default: the file's, or the formula)")
    parser.add_argument(
        "--split", default=DEFAULT_SPLIT, help="train,validation,test as fractions or numbers (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    parser.add_argument("--name", help="name of the data set (default: the first file's)")
    parser.add_argument("--licence", help="SPDX identifier of the data (default: the layout's, or unknown)")
    parser.add_argument("--level-of-theory", help="e.g. PBE0+MBD (default: the layout's, or unknown)")
    _add_limits(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes (%(default)s)")
    parser.add_argument("--part", metavar="K/N", help="convert the K-th of N parts only; `so3krates merge` finishes")
    parser.add_argument(
        "--chunk-size", type=int, default=RUN_CONFORMERS, metavar="N", help="records that are in memory (%(default)s)"
    )


def _add_units(parser: argparse.ArgumentParser) -> None:
    recognised = "default: the layout's, or recognised; eV and Angstrom for ASE's formats"
    parser.add_argument("--energy-unit", choices=sorted(ENERGY_UNITS), help=recognised)
    parser.add_argument("--length-unit", choices=sorted(LENGTH_UNITS), help="likewise")
    parser.add_argument("--force-unit", metavar="ENERGY/LENGTH", help="default: energy unit over length unit")
    parser.add_argument(
        "--gradients", action="store_true", help="what the file has as forces are gradients: turn the sign"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-force", type=float, default=DEFAULT_MAX_FORCE, help="eV/Å, more is a failure (%(default)s)"
    )
    parser.add_argument(
        "--max-energy-mads",
        type=float,
        default=DEFAULT_MAX_ENERGY_MADS,
        metavar="M",
        help="energies further off the baselines, in median deviations, are failures; inf: none is (%(default)s)",
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--max-bad-share",
        type=float,
        default=quarantine.DEFAULT_MAX_BAD_SHARE,
        metavar="SHARE",
        help="faulty structures go to a quarantine file; a larger share of them is an error (%(default)s)",
    )
    share.add_argument(
        "--drop-faulty", dest="max_bad_share", action="store_const", const=1.0, help="the same as --max-bad-share 1"
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert files, or a part of them; returns the exit code."""
    part = _check_arguments(arguments)
    keys = parse_keys(arguments.keys)
    with open_layout(arguments.input, keys, arguments.group, layout=arguments.layout) as file:
        _check_labels(file)
        _print_file(file)
        units = _find_units(file, arguments)
        settings = _build_settings(file, units, arguments, by_parts=part is not None)
        with open_parts(arguments.out, part) as parts:
            settings = agree_on_settings(parts, settings)
            job = Job(file, units, arguments.max_force, arguments.seed, settings.fingerprint, parts)
            chunks = file.chunks(arguments.chunk_size)
            with _keep_chunks(parts, settings):
                _convert(job, chunks if part is None else chunks[part.number - 1 :: part.total], settings, arguments)
                if part is None:
                    finish(parts, arguments.out, settings, verify=False)
    if part is not None:
        say(f"part {part} is done; `so3krates merge {arguments.out}` makes the data set when all are")
    return 0


def _check_arguments(arguments: argparse.Namespace) -> Part | None:
    check_no_leftovers(arguments.out)
    check_output_folder(arguments.out)
    Split.parse(arguments.split)
    gate.check_max_force(arguments.max_force)
    quarantine.check_max_bad_share(arguments.max_bad_share)
    check_max_energy_mads(arguments.max_energy_mads)
    for option, number in (("--workers", arguments.workers), ("--chunk-size", arguments.chunk_size)):
        if number < 1:
            raise DataError(option, "be at least 1", number, "Give a larger number")
    return None if arguments.part is None else Part.parse(arguments.part)


def check_max_energy_mads(value: float) -> None:
    """Raise `DataError` where `--max-energy-mads` is no limit."""
    if not value > 0:
        raise DataError("--max-energy-mads", "be above zero", value, "Give one like 50, or inf")


def _check_labels(file: OpenFile) -> None:
    if not {"energy", "forces"} & set(file.keys):
        remedy = "Name the labels' keys with --keys energy=KEY forces=KEY"
        raise DataError(file.name, "have labels (energy, forces)", "none that is known", remedy)


def _print_file(file: OpenFile) -> None:
    sources = name_sources(file)
    names = sources[0] if len(sources) == 1 else f"{len(sources)} files from {sources[0]} on"
    say(f"input: {file.num_records} records in {names}")
    say(f"layout: {file.layout.name} - {file.layout.description}")
    say("keys: " + ", ".join(f"{label}={key}" for label, key in sorted(file.keys.items())))
    for name in ("level_of_theory", "licence"):
        if (value := getattr(file, name)) is not None:
            say(f"{name.replace('_', ' ')} by this layout's documentation: {value}")
    for note in file.notes:
        say(f"note: {note}")


def _find_units(file: OpenFile, arguments: argparse.Namespace) -> FileUnits:
    """Choose the units on a sample of the whole input, and say what they are and why."""
    sample = read_sample(file)
    units = choose_units(sample, file.units, arguments, file.name)
    for quantity in ("energy", "length", "force"):
        turned = ", gradients with their sign turned" if quantity == "force" and units.gradients else ""
        say(f"{quantity} unit: {getattr(units, quantity)} ({getattr(units, quantity + '_reason')}){turned}")
    given = arguments.energy_unit is not None and (arguments.length_unit or arguments.force_unit) is not None
    check_units([apply_units(g, units) for g in sample], file.name, units, strict=not given)
    return units


def _build_settings(file: OpenFile, units: FileUnits, arguments: argparse.Namespace, *, by_parts: bool) -> Settings:
    isolated = (
        read_isolated_atoms(arguments.isolated_atoms, parse_keys(arguments.keys), units)
        if arguments.isolated_atoms
        else None
    )
    described = [describe_source(path) for path in file.paths]
    others = [describe_source(arguments.isolated_atoms)] if arguments.isolated_atoms else []
    common = {"layout": file.layout.name, "keys": file.keys, "units": units.names, "seed": arguments.seed}
    provenance = {
        "tool": "so3krates convert",
        "sources": described + others,
        "unit_factors": units.factors,
        "max_force": arguments.max_force,
        "max_energy_mads": arguments.max_energy_mads if np.isfinite(arguments.max_energy_mads) else None,
        "versions": describe_versions("numpy", "ase"),
    }
    conversion = {
        "sources": [identify_source(p, d) for p, d in zip(file.paths, described, strict=True)],
        "group": arguments.group,
        "gradients": units.gradients,
        "max_force": arguments.max_force,
        "chunk_size": arguments.chunk_size,
    }
    description = Description(
        name=arguments.name or arguments.input[0].stem,
        level_of_theory=arguments.level_of_theory or file.level_of_theory or "unknown",
        licence=arguments.licence or file.licence or "unknown",
        provenance=_to_plain(common | provenance),
        split=arguments.split,
        seed=arguments.seed,
        isolated_atom_energies=isolated,
        sources=name_sources(file),
        max_energy_mads=arguments.max_energy_mads,
        max_bad_share=arguments.max_bad_share,
    )
    num_chunks = len(file.chunks(arguments.chunk_size))
    return Settings(
        conversion=_to_plain(common | conversion), description=description, num_chunks=num_chunks, by_parts=by_parts
    )


def _to_plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is left of settings that are written and read again."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _convert(job: Job, chunks: Sequence[Chunk], settings: Settings, arguments: argparse.Namespace) -> None:
    """Make the runs of some chunks; stops where so much is bad that the whole cannot be good."""
    bad = kept = 0
    limit = settings.description.max_bad_share * job.file.num_records
    finished: list[Done] = []
    with Progress("read", sum(chunk.num_records for chunk in chunks)) as progress:
        for done in convert_chunks(job, chunks, arguments.workers):
            finished.append(done)
            bad, kept = bad + done.num_bad, kept + (not done.is_new)
            progress.advance(done.num_records)
            if bad > limit:
                raise _refuse_early(job, finished, arguments.out, settings)
    if kept:
        say(f"{kept} of {len(chunks)} chunks were there already")


@contextlib.contextmanager
def _keep_chunks(parts: Path, settings: Settings) -> Iterator[None]:
    """Where the work fails or is interrupted, say that it is not lost; a single chunk is not worth keeping."""
    try:
        yield
    except (DataError, KeyboardInterrupt):
        chunks = list(parts.glob("chunk-*.run"))
        if settings.num_chunks > 1 and chunks:
            say(f"{len(chunks)} of {settings.num_chunks} chunks are in {parts}; the same command goes on with them")
        elif not settings.by_parts:
            for chunk in chunks:
                chunk.unlink()
        raise


def _refuse_early(job: Job, finished: Sequence[Done], out: Path, settings: Settings) -> DataError:
    """Return the error for too many bad structures, with those that were found so far."""
    lines = job.parts / quarantine.QUARANTINE_NAME
    reasons = Counter[str]()
    with lines.open("wb") as file:
        for number in sorted(done.number for done in finished):
            run = open_chunk(job.parts, number, job.fingerprint)
            assert run is not None, "it was written or verified just now"
            file.write(run.read_quarantine())
            reasons.update(run.facts.bad)
    num_records = sum(done.num_records for done in finished)
    return refuse_bad_share(lines, out, reasons, num_records, settings.description.max_bad_share)


def finish(parts: Path, out: Path, settings: Settings, *, verify: bool) -> Manifest:
    """Make the data set of all chunks.

    Args:
        parts: Folder of the chunks, held by this process.
        out: Data set to write.
        settings: The chunks' own.
        verify: Read all bytes of the chunks and compare them with what was written; not needed right after that.

    Raises:
        DataError: Chunks are missing or of other settings, or the data set cannot be made.
    """
    runs = open_all(parts, settings, verify=verify)
    manifest = merge_runs(out, runs, settings.description)
    counts = ", ".join(f"{manifest.num_conformers(split)} {split}" for split in SPLITS)
    dropped = quarantine.list_counts(manifest.provenance["dropped"])
    say(f"wrote {out}: {counts}; dropped: {dropped or 'nothing'}")
    if (path := out / quarantine.QUARANTINE_NAME).exists():
        reasons = quarantine.count_reasons(quarantine.iter_quarantine(path))
        total = sum(run.facts.num_records for run in runs)
        say(f"faulty structures: {quarantine.describe_counts(reasons, total)}; each is listed in {path}")
    return manifest


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
