"""(Extended) XYZ: frames found by counting lines, chunks as ranges of bytes, values as ASE reads them."""

import array
import contextlib
import functools
import io
import itertools
import mmap
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.formats.ase_files import ASE_UNITS, AtomsFile, collect_structure, collect_values, unreadable
from data_tools.formats.base import Chunk, Layout, Request
from data_tools.formats.labels import attempt
from data_tools.formats.probe import Probe
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

_BLOCK: Final = 2**24
"""Bytes that are searched for line ends at once"""
_NAMES: Final = re.compile(rb"""([^\s=,'"]+)\s*=\s*("(?:\\.|[^"\\])*"|'[^']*'|\{[^}]*\}|\[[^\]]*\]|[^\s]*)""")
_MAX_HEADERS: Final = 1000
"""So many different sets of names are looked at; records name what they have again when they are read"""
_RENAMED: Final = frozenset(("Z", "charge", "move_mask", "initial_charges", "symbols", "numbers", "positions"))
"""Columns that ASE gives another name or meaning"""


class ExtxyzFile(AtomsFile):
    """Frames found by counting lines; a chunk is a range of bytes that ASE parses."""

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        self._offsets = np.zeros(1, np.int64)
        available: set[str] = set()
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                offsets, headers = _find_frames(text, path)
                self._offsets = np.array(offsets, np.int64)
                for start, stop in headers:
                    with contextlib.suppress(Exception):  # what cannot be parsed is reported when it is read
                        available.update(parse_frame(text[start:stop])[0])
        self.num_records = len(self._offsets) - 1
        if not self.num_records:
            raise DataError(str(path), "hold structures", "none", "Check the file")
        self._set_keys(available)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_offsets": None}  # chunks carry their own

    def chunks(self, size: int) -> list[Chunk]:
        """Divide the frames into chunks, each with the bytes where it starts and stops."""
        marks = self._offsets
        found = super().chunks(size)
        return [Chunk(c.number, c.file, c.start, c.stop, (int(marks[c.start]), int(marks[c.stop]))) for c in found]

    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Parse the chunk's bytes; a frame that cannot be parsed is one error."""
        start, stop = chunk.marks
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                text = file.read(stop - start)
        except OSError as error:
            raise unreadable(self.path, error) from error
        offsets, _ = _find_frames(text, self.path)
        for index in range(chunk.num_records):
            where = f"{self.name}:{chunk.start + index}"
            frame = text[offsets[index] : offsets[index + 1]]
            yield where, attempt(functools.partial(self._build, frame, where))

    def _build(self, frame: bytes, where: str) -> Graph:
        try:
            values, structure = parse_frame(frame)
        except Exception as error:  # ASE's parsers fail in their own ways
            got = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(where, "be readable by ASE", got, "Correct or remove the frame") from error
        return self._names.build(values, structure, where)


Values = dict[str, Any]


def parse_frame(frame: bytes) -> tuple[Values, Values]:
    """Return all that a frame carries by name, and its structure, as ASE has them."""
    from ase.io.extxyz import read_xyz

    text = frame.decode("utf-8", "replace")
    if (simple := _parse_simple(text)) is not None:
        return simple
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of stress and virial that differ in sign and the like: the gate measures that
        (atoms,) = read_xyz(io.StringIO(text), index=slice(None))
    return collect_values(atoms), collect_structure(atoms)


def _parse_simple(text: str) -> tuple[Values, Values] | None:
    """Return what `parse_frame` does, three times faster, for frames of a symbol and real numbers in each row; None for others."""
    from ase.data import atomic_numbers
    from ase.io.extxyz import key_val_str_to_dict

    first, comment, *rows = text.rstrip().split("\n")
    info = key_val_str_to_dict(comment.strip()) if comment.strip() else {}
    columns = _find_columns(str(info.pop("Properties", "species:S:1:pos:R:3")))
    if columns is None or "stress" in info or int(first) != len(rows) or not rows or columns.keys() & info.keys():
        return None
    words = [row.split() for row in rows]
    width = 1 + max(stop for _, stop in columns.values())
    if any(len(row) != width for row in words) or (structure := _read_lattice(info)) is None:
        return None
    try:
        table = np.array([row[1:] for row in words], np.float64)
        structure["atomic_numbers"] = np.array([atomic_numbers[row[0].capitalize()] for row in words])
    except (KeyError, ValueError):
        return None
    values = {
        name: table[:, start] if stop == start + 1 else table[:, start:stop] for name, (start, stop) in columns.items()
    }
    structure["positions"] = values.pop("pos")
    return info | values, structure


def _read_lattice(info: Values) -> Values | None:
    """Take cell and periodic directions out of the comment's values; None where they are not as usual."""
    lattice, pbc = info.pop("Lattice", None), info.pop("pbc", None)
    if (pbc is not None and np.size(pbc) != 3) or (lattice is None and np.any(pbc)):
        return None
    repeats = np.ones(3, bool) if pbc is None else np.asarray(pbc, bool)
    return {"cell": lattice.T, "pbc": repeats} if lattice is not None and repeats.any() else {}


@functools.lru_cache(maxsize=256)
def _find_columns(properties: str) -> dict[str, tuple[int, int]] | None:
    """Return where each property stands among the numbers behind the symbol; None unless all are real and go by ASE's names."""
    fields = properties.split(":")
    names, kinds, sizes = fields[::3], fields[1::3], fields[2::3]
    is_simple = fields[:3] == ["species", "S", "1"] and set(kinds[1:]) == {"R"} and len(fields) % 3 == 0
    if not is_simple or len(set(names)) != len(names) or set(names) & _RENAMED or not all(s.isdigit() for s in sizes):
        return None
    stops = list(itertools.accumulate(int(size) for size in sizes[1:]))
    columns = {n: (stop - int(s), stop) for n, s, stop in zip(names[1:], sizes[1:], stops, strict=True)}
    return columns if columns.get("pos", (0, 0))[1] - columns.get("pos", (0, 0))[0] == 3 else None


class _Lines:
    """Line ends of a text, searched block by block, forgotten when they have been passed."""

    def __init__(self, text: "bytes | mmap.mmap") -> None:
        self._text, self._searched = text, 0
        self._ends, self._first = np.zeros(0, np.int64), 0

    def end(self, ahead: int) -> int | None:
        """Return where the line so many lines ahead ends (past its line feed); None past the end of the text."""
        while self._first + ahead >= len(self._ends):
            if self._searched >= len(self._text):
                return None
            self._search()
        return int(self._ends[self._first + ahead])

    def skip(self, count: int) -> None:
        """Go on by so many lines."""
        self._first += count

    def _search(self) -> None:
        size = len(self._text)
        block = np.frombuffer(self._text[self._searched : self._searched + _BLOCK], np.uint8)
        ends = np.flatnonzero(block == ord("\n")) + self._searched + 1
        self._searched += len(block)
        if self._searched >= size and (not len(ends) or ends[-1] != size):
            ends = np.append(ends, size)
        self._ends, self._first = np.concatenate([self._ends[self._first :], ends]), 0


def _find_frames(text: "bytes | mmap.mmap", path: Path) -> "tuple[array.array[int], list[tuple[int, int]]]":
    """Return where the frames start, with the end of the last, and the bytes of one frame for each set of names.

    Raises:
        DataError: A frame does not start with its number of atoms, or is cut short.
    """
    lines, offsets = _Lines(text), array.array("q", [0])
    headers: dict[frozenset[bytes], tuple[int, int]] = {}
    while (first := lines.end(0)) is not None:
        start, record = offsets[-1], len(offsets) - 1
        count = text[start:first].strip()
        if not count:
            if text[start:].strip():
                raise unreadable(path, f"an empty line before record {record}")
            break
        if not count.isdigit():
            raise unreadable(path, f"{count[:40]!r} where record {record} has its number of atoms")
        comment, last = lines.end(1), lines.end(1 + int(count))
        if comment is None or last is None:
            remedy = "Copy it again, or remove that record"
            raise unreadable(path, f"record {record} of {int(count)} atoms cut short", remedy)
        lines.skip(2 + int(count))
        while (vector := lines.end(0)) is not None and text[last:vector].lstrip().startswith(b"VEC"):
            last = vector
            lines.skip(1)
        if len(headers) < _MAX_HEADERS:
            names = frozenset(_list_names(text[first:comment]))
            headers.setdefault(names, (start, last))
        offsets.append(last)
    return offsets, list(headers.values())


def _list_names(comment: bytes) -> Iterator[bytes]:
    """Return the names on a comment line, those of the columns among them."""
    for name, value in _NAMES.findall(comment):
        yield name
        if name == b"Properties":
            yield value


def _is_extxyz(probe: Probe) -> bool:
    first, feed, _ = probe.head.partition(b"\n")
    return bool(feed) and first.strip().isdigit()


EXTXYZ: Final = Layout(
    name="extxyz",
    description="(extended) XYZ: eV and Å by ASE's convention",
    recognise=_is_extxyz,
    open=ExtxyzFile,
    units=ASE_UNITS,
)
