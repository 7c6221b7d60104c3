"""From labelled structures to a data set folder: split by hash, write shards, verify, rename into place.

The split and the order depend on the structures and the seed alone, not on the order they come in or how they were shared out, so
adding data later moves no conformer to another split (with fractions). Structures go through runs (`runs.py`), which are read
three times at most: for the energies that most of them have, for the number of conformers in each split, and to be written.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from data_tools import gate, quarantine
from data_tools.provenance import describe_source, describe_versions
from data_tools.quarantine import QUARANTINE_NAME, BadStructure
from data_tools.runs import ALL_COLUMNS, RUN_CONFORMERS, Entry, Facts, Rows, Run, hash_content, iter_ranges, write_run
from data_tools.split import DEFAULT_SPLIT, Split, SplitCounter, find_below, find_split
from data_tools.workplace import check_output_folder, make_workplace, rename_into_place
from so3krates_dist import files
from so3krates_dist.data import shards
from so3krates_dist.data.index import IndexBuilder
from so3krates_dist.data.statistics import BaselineSample, StatisticsBuilder
from so3krates_dist.errors import DataError
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, FloatArray, Graph, IntArray

__all__ = [
    "DEFAULT_SPLIT", "Description", "Split", "check_output_folder", "describe_source", "describe_versions", "find_split",
    "merge_runs", "write_dataset",
]  # fmt: skip

BLOCKS_PER_SHARD: Final = 256
DEFAULT_MAX_ENERGY_MADS: Final = 50.0
MIN_ENERGY_OFF: Final = 1.0
"""eV/atom; energies nearer to the usual are never put in quarantine: strained and broken molecules are there"""
_RUN_ATOMS: Final = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What is said of a data set, and how it is divided."""

    name: str
    level_of_theory: str
    """of the labels, e.g. `GFN2-xTB`"""
    licence: str
    """SPDX identifier, or `unknown`"""
    provenance: Mapping[str, Any]
    """what the data came from; plain values without dates and host names"""
    split: str
    """fractions or numbers, see `Split.parse`"""
    seed: int
    """of the hash that splits and shuffles, which the runs were written with"""
    isolated_atom_energies: Mapping[int, float] | None = None
    """eV by atomic number, at the same level of theory"""
    sources: tuple[str, ...] = ()
    """names of the files that runs count"""
    max_energy_mads: float = np.inf
    """median absolute deviations that energies may be off the baselines; infinite: any"""
    max_bad_share: float = 1.0
    """largest share of the input that may be in quarantine"""


def write_dataset(  # noqa: PLR0913 - a manifest has that many independent entries
    folder: Path,
    graphs: Iterable[Graph],
    *,
    name: str,
    level_of_theory: str,
    licence: str,
    provenance: Mapping[str, Any],
    split: str,
    seed: int,
    isolated_atom_energies: Mapping[int, float] | None = None,
) -> shards.Manifest:
    """Write a data set: shards of each split in the order of their hash, and the manifest.

    Args:
        folder: Must not exist; it appears when all is written and verified.
        graphs: Labelled structures, in any order and number; each may lack some labels. Exact duplicates are dropped and counted.
        name: Name of the data set.
        level_of_theory: Of the labels, e.g. `GFN2-xTB`.
        licence: SPDX identifier, or `unknown`.
        provenance: What the data came from; plain values without dates and host names.
        split: Fractions or numbers, see `Split.parse`.
        seed: Of the hash that splits and shuffles.
        isolated_atom_energies: eV by atomic number, at the same level of theory.

    Returns:
        The manifest. The same structures and arguments give the same bytes.

    Raises:
        DataError: The folder exists, there are no energies and no forces, or the split asks for what is not there.
    """
    check_output_folder(folder)
    Split.parse(split)
    description = Description(
        name=name, level_of_theory=level_of_theory, licence=licence, provenance=provenance, split=split, seed=seed,
        isolated_atom_energies=isolated_atom_energies,
    )  # fmt: skip
    with make_workplace(folder) as (temporary, place):
        runs = []
        for number, piece in enumerate(_cut(graphs)):
            path = place / f"run-{number:06d}"
            write_run(path, piece, seed, Facts(number=number, num_records=len(piece)))
            runs.append(Run.open(path))
        return _assemble(temporary, folder, runs, description)


def _cut(graphs: Iterable[Graph]) -> Iterator[list[Entry]]:
    """Divide structures into pieces that fit into the memory."""
    piece: list[Entry] = []
    num_atoms = 0
    for number, graph in enumerate(graphs):
        piece.append(Entry(graph, record=number))
        num_atoms += graph.num_atoms
        if len(piece) == RUN_CONFORMERS or num_atoms >= _RUN_ATOMS:
            yield piece
            piece, num_atoms = [], 0
    if piece:
        yield piece


def merge_runs(folder: Path, runs: Sequence[Run], description: Description) -> shards.Manifest:
    """Write the data set that `write_dataset` would write of the structures in runs, in an amount of memory that does not grow.

    Args:
        folder: Must not exist; it appears when all is written and verified.
        runs: All pieces of the input, in their order.
        description: What to say of the data set.

    Returns:
        The manifest. It does not depend on how the structures were shared out among runs.

    Raises:
        DataError: As `write_dataset`, or more structures are bad than may be; these are listed in a file beside the folder then.
    """
    check_output_folder(folder)
    with make_workplace(folder) as (temporary, _):
        return _assemble(temporary, folder, runs, description)


def _assemble(temporary: Path, folder: Path, runs: Sequence[Run], description: Description) -> shards.Manifest:
    """Write a data set into a temporary folder, verify it and give it its name."""
    band = _find_energy_band(runs, description)
    with (temporary / QUARANTINE_NAME).open("wb") as file:
        survey = _survey(runs, band, description, file)
    _check_survey(survey, temporary / QUARANTINE_NAME, folder, description)
    counts = survey.counter.finish()
    written = _write_splits(temporary, runs, band, survey, counts, description)
    manifest = shards.build_manifest(
        name=description.name,
        level_of_theory=description.level_of_theory,
        licence=description.licence,
        splits={
            "method": "blake2b of seed, atomic numbers and float32 positions, ascending",
            "seed": description.seed,
            "request": description.split,
            "upper_bounds": {p: f"{b:#x}" for p, b in zip(shards.SPLITS, survey.counter.bounds, strict=True)},
            "num_conformers": counts,
        },
        groups=dict(sorted(written.groups.items())),
        statistics=written.statistics,
        provenance=dict(description.provenance) | {"dropped": survey.count_dropped(description.provenance)},
        shards=written.entries,
    )
    manifest = shards.write_index_and_manifest(temporary, manifest, written.index)
    _verify(temporary, written.digests)
    rename_into_place(temporary, folder)
    return manifest


# ------------------------------------------------------------------------------------------ energies far off the baselines


@dataclasses.dataclass(frozen=True, slots=True)
class _EnergyBand:
    """Where energies have to lie; found on all structures, before any is left out."""

    baselines: FloatArray
    """(119,) eV by atomic number"""
    band: gate.EnergyBand
    max_mads: float

    def find_problems(self, rows: Rows) -> dict[int, gate.Problem]:
        """Return what is wrong with the energies of a range, by row."""
        numbers, first = rows.columns["atomic_numbers"], rows.first_atom
        sizes = np.diff(first)
        sums = np.add.reduceat(self.baselines[numbers], first[:-1])
        energies = rows.columns.get("energy", np.zeros(len(sizes)))
        off = (energies - sums) / sizes - self.band.median
        least = max(self.max_mads * self.band.mad, MIN_ENERGY_OFF)
        problems = {}
        for row in np.flatnonzero(rows.has("energy") & (np.abs(off) > least)).tolist():
            limit = max(least, self.band.find_limit(int(sizes[row]), float(rows.columns["total_charge"][row])))
            if abs(off[row]) > limit:
                got = f"{off[row]:.3g} eV/atom off, {abs(off[row]) / self.band.mad:.0f} median deviations"
                rule = f"have an energy within {limit:.3g} eV/atom of the usual"
                problems[row] = gate.Problem("energy off the baselines", rule, got)
        return problems


def _find_energy_band(runs: Sequence[Run], description: Description) -> _EnergyBand | None:
    """Fit baselines to the first structures of all splits; None where energies are not looked at, or too few."""
    if not np.isfinite(description.max_energy_mads):
        return None
    sample = BaselineSample()
    for rows in iter_ranges(runs, ("atomic_numbers", "energy", "total_charge")):
        numbers, has = rows.columns["atomic_numbers"], rows.has("energy")
        for row in rows.order[has[rows.order]].tolist():
            own = numbers[rows.first_atom[row] : rows.first_atom[row + 1]]
            sample.add(own, float(rows.columns["energy"][row]), float(rows.columns["total_charge"][row]))
    baselines, _ = sample.fit(description.isolated_atom_energies, sample.elements)
    band = gate.measure_energy_band(sample.compute_residuals(baselines)) if len(sample) else None
    if band is None:
        return None
    table = np.zeros(MAX_ATOMIC_NUMBER + 1)
    table[list(baselines)] = list(baselines.values())
    return _EnergyBand(table, band, description.max_energy_mads)


def _choose(rows: Rows, band: _EnergyBand | None) -> tuple[IntArray, dict[int, gate.Problem]]:
    """Return the rows of a range that are kept, in order, and what is wrong with others of them."""
    problems = {} if band is None else band.find_problems(rows)
    if not problems:
        return rows.order, {}
    kept = ~np.isin(rows.order, list(problems))
    return rows.order[kept], {row: problems[row] for row in rows.order[~kept].tolist()}


# ------------------------------------------------------------------------------------------------ what there is to write


@dataclasses.dataclass(slots=True)
class _Survey:
    """What is known before anything is written."""

    counter: SplitCounter
    num_records: int = 0
    num_conformers: int = 0
    """with duplicates"""
    num_labelled: int = 0
    """different conformers with an energy or forces"""
    bad: Counter[str] = dataclasses.field(default_factory=Counter)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    num_off: int = 0
    """of the bad ones: those whose energies are off the baselines"""

    def count_dropped(self, provenance: Mapping[str, Any]) -> dict[str, int]:
        """Return how many structures were not written, for each reason."""
        dropped = Counter[str](provenance.get("dropped", {})) + self.bad + self.left_out
        dropped["exact duplicate"] += self.num_conformers - self.num_off - self.counter.total
        dropped["left over by the split"] += self.counter.num_unused
        return {reason: n for reason, n in sorted(dropped.items()) if n}


def _survey(runs: Sequence[Run], band: _EnergyBand | None, description: Description, file: IO[bytes]) -> _Survey:
    """Count all structures, and write the lines on bad ones in the order of the input, then those found here."""
    survey = _Survey(SplitCounter(Split.parse(description.split)))
    for run in runs:
        survey.num_records += run.facts.num_records
        survey.num_conformers += run.facts.num_conformers
        survey.bad.update(run.facts.bad)
        survey.left_out.update(run.facts.left_out)
        file.write(run.read_quarantine())
    for rows in iter_ranges(runs, () if band is None else ALL_COLUMNS):
        kept, problems = _choose(rows, band)
        survey.counter.add(rows.columns["hash"][kept].view(np.uint64))
        survey.num_labelled += int(np.count_nonzero((rows.has("energy") | rows.has("forces"))[kept]))
        for row, problem in problems.items():
            source, record = description.sources[rows.columns["source"][row]], int(rows.columns["record"][row])
            bad = BadStructure.describe(rows.graph(row), problem, source, record)
            file.write(quarantine.dump_entries([bad]).encode())
            survey.bad[problem.reason] += 1
        survey.num_off += len(problems)
    return survey


def _check_survey(survey: _Survey, path: Path, folder: Path, description: Description) -> None:
    """Raise `DataError` where there is nothing to write, or too much of the input is bad; no file is left where nothing is bad."""
    if not survey.bad:
        path.unlink()
    elif quarantine.find_bad_share(survey.bad, survey.num_records) > description.max_bad_share:
        raise refuse_bad_share(path, folder, survey.bad, survey.num_records, description.max_bad_share)
    if not survey.counter.total:
        reasons = ", ".join(f"{n} times {r}" for r, n in (survey.bad + survey.left_out).most_common()) or "none"
        raise DataError("data set", "hold structures", reasons, "Check the input and what was dropped")
    if not survey.num_labelled:
        raise DataError("data set", "have energies or forces", "neither", "Name the labels' keys with --keys")


def refuse_bad_share(lines: Path, folder: Path, bad: Mapping[str, int], num_records: int, limit: float) -> DataError:
    """Return the error for an input of which too much is bad, and put the list beside the folder that was to be written.

    Args:
        lines: Quarantine file in the making.
        folder: Of the data set.
        bad: Structures for each reason.
        num_records: All structures, good and bad.
        limit: The share that was allowed.
    """
    final = folder.with_name(f"{folder.name}.{QUARANTINE_NAME}")
    first = next(quarantine.iter_quarantine(lines))
    files.put_in_place(lines, final)
    place = " ".join(part for part in (f"{first.source}:{first.record}", first.formula) if part)
    got = f"{quarantine.describe_counts(bad, num_records)}; the first one: {place} must {first.rule}; got {first.got}"
    spin = "Name the keys of charge and spin with --keys, or look" if set(bad) & set(gate.ELECTRON_REASONS) else "Look"
    remedy = f"{spin} at {final} and correct the input or its settings, or raise --max-bad-share to leave them out"
    return DataError(first.source, f"have at most {limit:.2%} bad structures", got, remedy)


# --------------------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """What was written."""

    entries: list[shards.ShardEntry]
    index: IndexBuilder
    statistics: dict[str, Any]
    groups: Counter[str]
    digests: list[bytes]
    """of the conformers of each block, through all splits"""


def _write_splits(
    folder: Path,
    runs: Sequence[Run],
    band: _EnergyBand | None,
    survey: _Survey,
    counts: Mapping[str, int],
    description: Description,
) -> _Written:
    index, builder = IndexBuilder(folder), StatisticsBuilder(description.isolated_atom_energies)
    entries, groups, digests = [], Counter[str](), []
    stream = _iter_conformers(runs, band, survey.counter.bounds)
    for split, members in itertools.groupby(stream, key=lambda member: member[0]):
        if split is None:
            break
        size = shards.choose_block_size(counts[split])
        with shards.ShardWriter(folder, split, blocks_per_shard=BLOCKS_PER_SHARD, index=index) as writer:
            while block := list(itertools.islice(members, size)):
                graphs = [graph for _, graph, _, _ in block]
                writer.write_block(graphs, np.stack([pairs for _, _, pairs, _ in block]))
                groups.update(graph.group for graph in graphs)
                digests.append(_digest([content for _, _, _, content in block]))
                for graph in graphs if split == "train" else ():
                    builder.add(graph)
        entries += writer.close()
    return _Written(entries, index, builder.finish(), groups, digests)


def _iter_conformers(
    runs: Sequence[Run], band: _EnergyBand | None, bounds: Sequence[int]
) -> Iterator[tuple[str | None, Graph, Any, bytes]]:
    """Yield split, structure, pair counts and hash of its content, by ascending hash."""
    names = (*shards.SPLITS, None)
    for rows in iter_ranges(runs):
        kept, _ = _choose(rows, band)
        hashes = rows.columns["hash"][kept].view(np.uint64)
        splits = sum((~find_below(hashes, bound)).astype(np.int64) for bound in bounds)
        pairs, content = rows.columns["pairs"], rows.columns["content"]
        for row, split in zip(kept.tolist(), np.asarray(splits).tolist(), strict=True):
            yield names[split], rows.graph(row), pairs[row], content[row].tobytes()


def _digest(contents: Sequence[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(contents), digest_size=8).digest()


def _verify(folder: Path, digests: Sequence[bytes]) -> None:
    """Read every conformer back from disk and compare it with what was meant to be written."""
    shards.check_dataset(folder)
    with shards.open_dataset(folder) as dataset:
        for number, wanted in itertools.zip_longest(range(dataset.num_blocks), digests):
            found = None if number is None else _digest([hash_content(g) for g in dataset.read_block(number)])
            if found != wanted:
                where = str(folder) if number is None else dataset.where(number)
                raise DataError(
                    where, "be read back as it was written", "something else", "Check the disk, and report it"
                )
