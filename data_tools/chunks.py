"""What becomes of one chunk of the input: read, units, gate, and a run; here or in processes of their own."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final

from data_tools import gate, quarantine
from data_tools.file_units import FileUnits, apply_units
from data_tools.formats import Chunk, ManyFiles, OpenFile
from data_tools.parts import find_chunk, open_chunk
from data_tools.processes import start_pool
from data_tools.runs import Entry, Facts, write_run
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

NO_LABELS: Final = "no energy and no forces"
UNREADABLE: Final = "unreadable record"


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What all chunks of a conversion have in common; travels to worker processes."""

    file: OpenFile
    units: FileUnits
    max_force: float
    """eV/Å"""
    seed: int
    fingerprint: str
    parts: Path
    """folder of the runs"""


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A chunk that is there."""

    number: int
    num_records: int
    num_bad: int
    is_new: bool
    """False: it was there before, whole and made with the same settings"""


def name_sources(file: OpenFile) -> tuple[str, ...]:
    """Return the names of the files that chunks count."""
    return tuple(f.name for f in file.files) if isinstance(file, ManyFiles) else (file.name,)


def convert_chunk(job: Job, chunk: Chunk) -> Done:
    """Make the run of a chunk, unless it is there already.

    Raises:
        DataError: The file cannot be read.
    """
    run = open_chunk(job.parts, chunk.number, job.fingerprint)
    if run is not None:
        return Done(chunk.number, run.facts.num_records, sum(run.facts.bad.values()), is_new=False)
    entries, bad, left_out = _sort_out(job, chunk)
    facts = Facts(
        number=chunk.number, fingerprint=job.fingerprint, num_records=chunk.num_records,
        bad=quarantine.count_reasons(bad), left_out=left_out,
    )  # fmt: skip
    lines = quarantine.dump_entries(bad)
    write_run(find_chunk(job.parts, chunk.number), entries, job.seed, facts, lines)
    return Done(chunk.number, chunk.num_records, len(bad), is_new=True)


def _sort_out(job: Job, chunk: Chunk) -> tuple[list[Entry], list[quarantine.BadStructure], Counter[str]]:
    """Return the conformers of a chunk, what is bad, and how many are left out for other reasons."""
    source = name_sources(job.file)[chunk.file]
    entries: list[Entry] = []
    bad: list[quarantine.BadStructure] = []
    left_out = Counter[str]()
    record = chunk.start
    for record, (_, item) in enumerate(job.file.read_records(chunk), start=chunk.start):
        if isinstance(item, DataError):
            bad.append(_describe_unreadable(item, source, record))
            continue
        graph = apply_units(item, job.units)
        if (problem := gate.find_problem(graph, job.max_force)) is not None:
            bad.append(quarantine.BadStructure.describe(graph, problem, source, record))
        elif _has_labels(graph):
            entries.append(Entry(graph, chunk.file, record))
        else:
            left_out[NO_LABELS] += 1
    if (found := len(entries) + len(bad) + left_out.total()) != chunk.num_records:
        where = f"{source}:{record}"
        raise DataError(
            where, f"be the last of {chunk.num_records} records", f"{found} of them", "Is the file being written?"
        )
    return entries, bad, left_out


def _has_labels(graph: Graph) -> bool:
    return graph.energy is not None or graph.forces is not None


def _describe_unreadable(error: DataError, source: str, record: int) -> quarantine.BadStructure:
    return quarantine.BadStructure(source=source, record=record, reason=UNREADABLE, rule=error.rule, got=str(error.got))


# ------------------------------------------------------------------------------------------------------------- processes

_job: list[Job] = []
"""of a worker process; the file's tables travel to it once"""


def _take_job(job: Job) -> None:
    _job[:] = [job]


def _convert_here(chunk: Chunk) -> Done:
    return convert_chunk(_job[0], chunk)


def convert_chunks(job: Job, chunks: Sequence[Chunk], workers: int) -> Iterator[Done]:
    """Make the runs of chunks and yield them as they are done.

    Args:
        job: What they have in common.
        chunks: In any order.
        workers: Processes; 1: this one alone.

    Raises:
        DataError: The file cannot be read, or a worker process died.
    """
    if workers == 1 or len(chunks) <= 1:
        yield from (convert_chunk(job, chunk) for chunk in chunks)
        return
    done = 0
    try:
        with start_pool(workers, len(chunks), _take_job, (job,)) as pool:
            futures: list[Future[Done]] = [pool.submit(_convert_here, chunk) for chunk in chunks]
            for future in as_completed(futures):
                yield future.result()
                done += 1
    except BrokenProcessPool as error:
        where = f"worker process, after {done} of {len(chunks)} chunks,"
        raise DataError(where, "live until its work is done", error, "Look for lack of memory; try again") from error
