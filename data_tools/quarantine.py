"""The quarantine: one line for each structure that did not pass the gate, with the reason.

The file is JSON lines with sorted keys, so that the same findings give the same bytes, in the order of the input: parts that
were written by several processes are put together by concatenation. What is not finite is null, JSON knows no nan.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.gate import Problem, are_elements
from so3krates_dist import files
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, compute_formula

QUARANTINE_NAME: Final = "quarantine.jsonl"
"""beside `manifest.json` in the folder of a data set"""
DEFAULT_MAX_BAD_SHARE: Final = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadStructure:
    """A structure that was left out, and why."""

    source: str
    """name of the file, without the folders above it"""
    record: int
    """number of the structure in that file, from 0"""
    reason: str
    """the same words for all structures with the same fault"""
    rule: str
    """what must hold, as the words after "must" """
    got: str
    formula: str = ""
    """empty where there are atoms of no known element"""
    group: str = ""
    num_atoms: int = 0
    total_charge: float | None = None
    """e"""
    num_unpaired_electrons: float | None = None
    energy: float | None = None
    """eV; None where there is none or it is not finite"""
    max_force: float | None = None
    """eV/Å, largest norm; None where there are no forces or they are not finite"""

    @classmethod
    def describe(cls, graph: Graph, problem: Problem, source: str, record: int) -> "BadStructure":
        """Put on record what is wrong with a structure, whose shapes may be wrong too.

        Args:
            graph: The structure, in eV and Å.
            problem: What the gate found.
            source: Name of the file.
            record: Number in that file.
        """
        numbers = np.asarray(graph.atomic_numbers)
        known = numbers.ndim == 1 and numbers.dtype.kind in "iu" and are_elements(numbers)
        return cls(
            source=source,
            record=record,
            reason=problem.reason,
            rule=problem.rule,
            got=problem.got,
            formula=compute_formula(numbers) if known else "",
            group=graph.group,
            num_atoms=int(numbers.size),
            total_charge=_to_finite(graph.total_charge),
            num_unpaired_electrons=_to_finite(graph.num_unpaired_electrons),
            energy=_to_finite(graph.energy),
            max_force=_find_max_force(graph),
        )

    def to_json(self) -> str:
        """Return the line of this structure, without its end."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace").decode()  # bytes of a file name that are no unicode: \\udcff


def _to_finite(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever a file held: what is no number raises
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _find_max_force(graph: Graph) -> float | None:
    forces = np.asarray([] if graph.forces is None else graph.forces)
    if forces.ndim != 2 or not forces.size or forces.dtype.kind not in "fiu":
        return None
    return _to_finite(np.linalg.norm(forces.astype(np.float64), axis=1).max())


def dump_entries(entries: Iterable[BadStructure]) -> str:
    """Return the lines of structures, the last one with its end too; no text for none."""
    return "".join(f"{entry.to_json()}\n" for entry in entries)


def write_quarantine(path: Path, entries: Iterable[BadStructure]) -> Counter[str]:
    """Write a quarantine file, whole or not at all.

    Args:
        path: File to write or to replace.
        entries: In the order of the input.

    Returns:
        How many structures there are for each reason.
    """
    kept = list(entries)
    files.write_text(path, dump_entries(kept))
    return count_reasons(kept)


def append_quarantine(path: Path, entries: Iterable[BadStructure]) -> Counter[str]:
    """Add lines to the end of a quarantine file (made where there is none) and have them on the disk; returns counts by reason."""
    kept = list(entries)
    with path.open("a", encoding="utf-8") as file:
        file.write(dump_entries(kept))
    files.sync_file(path)
    return count_reasons(kept)


def concatenate_quarantines(parts: Iterable[Path], path: Path) -> Counter[str]:
    """Put quarantine files together, in the order given and in constant memory; parts that are not there are empty.

    Args:
        parts: Files of the parts; every line of them is checked.
        path: File to write or to replace, whole or not at all.

    Returns:
        How many structures there are for each reason.

    Raises:
        DataError: A line is no record of a bad structure.
    """
    counts = Counter[str]()
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for part in parts:
            for entry in iter_quarantine(part) if part.exists() else ():
                file.write(f"{entry.to_json()}\n")
                counts[entry.reason] += 1
    files.put_in_place(temporary, path)
    return counts


def iter_quarantine(path: Path) -> Iterator[BadStructure]:
    """Read a quarantine file line by line.

    Raises:
        DataError: A line is no record of a bad structure.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _parse(json.loads(line))
            except (ValueError, TypeError) as error:
                rule, got = "be the record of a bad structure", f"{type(error).__name__}: {error}"
                raise DataError(f"{path}:{number}", rule, got, "Copy the file again, or convert anew") from error


_TEXTS: Final = ("source", "reason", "rule", "got", "formula", "group")
_COUNTS: Final = ("record", "num_atoms")


def _parse(content: Any) -> BadStructure:
    """Return the record of a line; raises `TypeError` where a field is missing, unknown or of the wrong type."""
    entry = BadStructure(**content)
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        allowed = str if field.name in _TEXTS else int if field.name in _COUNTS else (int, float, type(None))
        if not isinstance(value, allowed) or isinstance(value, bool):  # bool is an int
            raise TypeError(f"{field.name} is {value!r}")
    return entry


def count_reasons(entries: Iterable[BadStructure]) -> Counter[str]:
    """Return how many structures there are for each reason."""
    return Counter(entry.reason for entry in entries)


def find_bad_share(counts: Mapping[str, int], total: int) -> float:
    """Return the share of bad structures.

    Args:
        counts: Structures for each reason.
        total: All structures, good and bad.
    """
    return sum(counts.values()) / total if total else 0.0


def describe_counts(counts: Mapping[str, int], total: int) -> str:
    """Say how many structures are bad and why, the most frequent reason first.

    Args:
        counts: Structures for each reason.
        total: All structures, good and bad.
    """
    bad = sum(counts.values())
    if not bad:
        return f"none of {total}"
    return f"{bad} of {total} ({find_bad_share(counts, total):.2%}): {list_counts(counts)}"


def list_counts(counts: Mapping[str, int]) -> str:
    """Return numbers and reasons as one text, the most frequent reason first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} for {reason}" for reason, number in ranked)


def check_max_bad_share(value: float) -> None:
    """Raise `DataError` where `--max-bad-share` is no share."""
    if not 0 <= value <= 1:
        raise DataError("--max-bad-share", "be a share from 0 to 1", value, "Give one like 0.01")


def check_bad_share(counts: Mapping[str, int], total: int, limit: float, where: str) -> None:
    """Raise `DataError` where more structures are bad than allowed.

    Args:
        counts: Structures for each reason.
        total: All structures, good and bad.
        limit: Largest share, from 0 to 1.
        where: The input, for the message.
    """
    if find_bad_share(counts, total) > limit:
        remedy = "Look at the quarantine file: correct the input or its settings, or raise --max-bad-share"
        raise DataError(where, f"have at most {limit:.2%} bad structures", describe_counts(counts, total), remedy)
