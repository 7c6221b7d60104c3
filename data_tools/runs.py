"""Runs: conformers sorted by hash, one file for each piece of the input, and many such files read as if they were one.

An external sort. A piece of any size and number becomes a run; `iter_ranges` walks through all of them in ranges of the hash,
which are the same part of every run because a hash is as good as random. So the order, and which of exact duplicates goes, depend
on the conformers alone, and memory on the length of a range. A run is whole under its name or not there at all, and says what it
was made from; files are open only while they are read. Refuses what is damaged.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from so3krates_dist import files
from so3krates_dist.data import layout
from so3krates_dist.data.index import PAIR_CUTOFFS, count_pairs
from so3krates_dist.data.statistics import hash_geometry
from so3krates_dist.errors import DataError
from so3krates_dist.graph import BoolArray, Graph, IntArray

FORMAT: Final = 2
"""Of the file; a run of another one is made anew"""
RUN_CONFORMERS: Final = 16_384
"""in a piece of the input; more need more memory, fewer make more files"""
RANGE_BYTES: Final = 64 * 2**20
"""of all runs that are looked at together; the result does not depend on it"""

_HASHES: Final = 2**64
_COLUMNS: Final[dict[str, tuple[bool, str, tuple[int, ...]]]] = {
    # name: (one row per atom instead of per conformer, dtype, shape of a row); as they are stored in blocks
    "atomic_numbers": (True, "uint8", ()),
    "positions": (True, "float32", (3,)),
    "total_charge": (False, "float32", ()),
    "num_unpaired_electrons": (False, "float32", ()),
    "cell": (False, "float64", (3, 3)),
    "pbc": (False, "bool", (3,)),
    "energy": (False, "float64", ()),
    "forces": (True, "float32", (3,)),
    "stress": (False, "float32", (3, 3)),
    "dipole": (False, "float32", (3,)),
    "partial_charges": (True, "float32", ()),
    "hirshfeld_ratios": (True, "float32", ()),
    "loss_weight": (False, "float32", ()),
}
_ALWAYS: Final = ("atomic_numbers", "positions", "total_charge", "num_unpaired_electrons", "loss_weight")
_MAY_LACK: Final = tuple(n for n in _COLUMNS if n not in _ALWAYS)
"""Bit i of `has` says whether a conformer has the i-th of them"""
_KEY: Final = ("hash", "content", "source", "record")
ALL_COLUMNS: Final = (*_COLUMNS, "pairs", "group")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A conformer on its way into a run."""

    graph: Graph
    """in eV and Å"""
    source: int = 0
    """number of its file"""
    record: int = 0
    """number in the file"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a run says of itself."""

    number: int = 0
    """of the piece of the input"""
    fingerprint: str = ""
    """of all that decides what a piece becomes"""
    num_records: int = 0
    """of the input in this piece"""
    num_conformers: int = 0
    """those that became conformers, with duplicates"""
    bad: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """structures in quarantine, for each reason"""
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """structures that are neither in quarantine nor conformers, for each reason"""

    def to_json(self) -> str:
        """Return the text that stands in a run; the same facts give the same text."""
        counts = {"bad": dict(self.bad), "left_out": dict(self.left_out)}  # `asdict` turns a Counter inside out
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({"format": FORMAT} | fields | counts, sort_keys=True)


def store(graph: Graph) -> Graph:
    """Return the structure as it is stored: dtypes of the block columns, arrays in C order."""
    changes: dict[str, Any] = {}
    for name, (_, dtype, row) in _COLUMNS.items():
        value = getattr(graph, name)
        if value is not None:
            is_number = not row and np.ndim(value) == 0
            changes[name] = float(np.dtype(dtype).type(value)) if is_number else np.ascontiguousarray(value, dtype)
    return dataclasses.replace(graph, **changes)


def hash_content(graph: Graph) -> bytes:
    """Return sixteen bytes that are equal for exact duplicates only: structures of which all that is stored is the same."""
    digest = hashlib.blake2b(f"{graph.num_atoms} {graph.group}".encode(), digest_size=16)
    for name, (_, dtype, _) in _COLUMNS.items():
        value = getattr(graph, name)
        if name == "loss_weight" and value == 1:
            continue  # so that data sets without weights keep their order, which goes by this hash where geometries repeat
        digest.update(b"-" if value is None else b"+" + np.asarray(value, dtype).tobytes())
    return digest.digest()


# --------------------------------------------------------------------------------------------------------------- writing


def write_run(path: Path, entries: Iterable[Entry], seed: int, facts: Facts, quarantine: str = "") -> None:
    """Sort conformers by hash and write them, without exact duplicates, as one file that is there as a whole or not at all.

    Args:
        path: File to write or to replace.
        entries: In any order; of exact duplicates, the first by source and record is kept.
        seed: Of the hash.
        facts: What to say of the piece; conformers are counted here.
        quarantine: Lines on the structures that were left out, kept beside.
    """
    stored = [dataclasses.replace(entry, graph=store(entry.graph)) for entry in entries]
    keyed = sorted(
        ((hash_geometry(e.graph, seed), hash_content(e.graph), e.source, e.record), number)
        for number, e in enumerate(stored)
    )
    keys: list[tuple[int, bytes, int, int]] = []
    kept: list[Entry] = []
    for key, number in keyed:
        if not keys or key[:2] != keys[-1][:2]:
            keys.append(key)
            kept.append(stored[number])
    columns = _collect_keys(keys) | _collect_columns([e.graph for e in kept])
    columns["quarantine"] = np.frombuffer(quarantine.encode(), np.uint8)
    _write_columns(path, columns, dataclasses.replace(facts, num_conformers=len(stored)))


def _collect_keys(keys: Sequence[tuple[int, bytes, int, int]]) -> dict[str, Any]:
    return {
        "hash": np.array([k[0] for k in keys], np.uint64).view(np.int64),
        "content": np.frombuffer(b"".join(k[1] for k in keys), np.int64).reshape(-1, 2),
        "source": np.array([k[2] for k in keys], np.int32),
        "record": np.array([k[3] for k in keys], np.int64),
    }


def _collect_columns(graphs: Sequence[Graph]) -> dict[str, Any]:
    names = [g.group.encode() for g in graphs]
    columns: dict[str, Any] = {
        "pairs": np.array([count_pairs(g) for g in graphs], np.uint32).reshape(-1, len(PAIR_CUTOFFS)),
        "first_atom": np.cumsum([0, *(g.num_atoms for g in graphs)], dtype=np.int64),
        "group": np.frombuffer(b"".join(names), np.uint8),
        "first_letter": np.cumsum([0, *map(len, names)], dtype=np.int64),
    }
    has = np.zeros(len(graphs), np.uint8)
    for name, (per_atom, dtype, row) in _COLUMNS.items():
        values = [getattr(g, name) for g in graphs]
        present = np.array([v is not None for v in values], bool)
        if name in _MAY_LACK:
            has |= present.astype(np.uint8) << _MAY_LACK.index(name)
        filled = [
            np.zeros((g.num_atoms, *row) if per_atom else row, dtype) if v is None else np.asarray(v, dtype)
            for g, v in zip(graphs, values, strict=True)
        ]
        if present.any():
            columns[name] = np.concatenate(filled) if per_atom else np.stack(filled)
    return columns | {"has": has}


def _write_columns(path: Path, columns: Mapping[str, Any], facts: Facts) -> None:
    shapes = {name: (column.dtype, column.shape) for name, column in columns.items()}
    text = facts.to_json()
    _, table = layout.build_header(shapes, {})
    digest = hashlib.sha256(text.encode() + table)
    ordered = [np.ascontiguousarray(columns[name]) for name in layout.sort_columns(shapes)]
    for column in ordered:
        digest.update(column.data)
    header, _ = layout.build_header(shapes, {"so3krates_run": text, "sha256": digest.hexdigest()})
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )  # two hosts may write it
    with os.fdopen(descriptor, "wb") as file:
        file.write(header)
        for column in ordered:
            file.write(column.data)
    files.put_in_place(Path(name), path)


# --------------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run on disk. No file is open between two calls."""

    path: Path
    facts: Facts
    num_rows: int
    """conformers, without the duplicates among them"""
    num_bytes: int
    spans: Mapping[str, layout.Span]
    first: int
    """bytes from the start of the file to the first column"""
    sha256: str

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Read what a run says of itself.

        Raises:
            DataError: The file is missing, is no run, or one of another format.
        """
        try:
            total = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(8)
                size = min(int.from_bytes(head, "little"), layout.MAX_HEADER_BYTES)
                spans, metadata, first = layout.read_header(head + file.read(size), total)
            content = json.loads(metadata["so3krates_run"])
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(path, Facts(**content), spans["hash"].shape[0], total, spans, first, metadata["sha256"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _refuse(path, "be a run", f"{type(error).__name__}: {error}") from error

    def verify(self) -> None:
        """Compare all bytes with what was written.

        Raises:
            DataError: They differ.
        """
        digest = hashlib.sha256(self.facts.to_json().encode() + layout.hash_table(self.spans))
        with self.path.open("rb") as file:
            file.seek(self.first)
            while piece := file.read(2**20):
                digest.update(piece)
        if digest.hexdigest() != self.sha256:
            raise _refuse(self.path, f"have the sha256 {self.sha256[:12]}...", f"{digest.hexdigest()[:12]}...")

    def read_quarantine(self) -> bytes:
        """Return the lines on structures that were left out."""
        with self.path.open("rb") as file:
            return _read_rows(file.fileno(), self, "quarantine", 0, self.spans["quarantine"].shape[0]).tobytes()


def _refuse(path: Path, rule: str, got: object) -> DataError:
    return DataError(str(path), rule, got, "Remove it: the same command makes it anew")


def _read_rows(descriptor: int, run: Run, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Return some rows of a column."""
    span = run.spans[name]
    width = span.size // max(span.shape[0], 1)
    size = width * (stop - start)
    payload = os.pread(descriptor, size, run.first + span.start + width * start)
    if len(payload) != size:
        raise _refuse(run.path, f"have {size} more bytes of `{name}`", f"{len(payload)} bytes")
    return np.frombuffer(payload, span.dtype).reshape(stop - start, *span.shape[1:])


@dataclasses.dataclass(slots=True)
class Rows:
    """Conformers of all runs whose hash lies in one range."""

    columns: Mapping[str, Any]
    """rows of one run after those of another; what no run has is not there"""
    order: IntArray
    """(num_conformers,) rows by ascending hash, without exact duplicates"""
    first_atom: IntArray
    """(num_rows + 1,)"""
    first_letter: IntArray
    """(num_rows + 1,) of the groups' names"""

    @property
    def hashes(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """(num_conformers,) in ascending order."""
        return np.asarray(self.columns["hash"][self.order].view(np.uint64))

    def has(self, name: str) -> BoolArray:
        """Return (num_rows,) which rows have a label, `cell` or `pbc`."""
        return np.asarray(self.columns["has"] >> _MAY_LACK.index(name) & 1, bool)

    def graph(self, row: int) -> Graph:
        """Return the structure of a row; its arrays are views."""
        atoms = slice(self.first_atom[row], self.first_atom[row + 1])
        letters = self.columns["group"][self.first_letter[row] : self.first_letter[row + 1]]
        fields: dict[str, Any] = {"group": letters.tobytes().decode()}
        has = int(self.columns["has"][row])
        for name, (per_atom, _, shape) in _COLUMNS.items():
            if name not in _MAY_LACK or has >> _MAY_LACK.index(name) & 1:
                column = self.columns[name]
                fields[name] = column[atoms] if per_atom else column[row] if shape else float(column[row])
        return Graph(**fields)


def iter_ranges(runs: Sequence[Run], names: Sequence[str] = ALL_COLUMNS) -> Iterator[Rows]:
    """Read all runs together, in ascending ranges of the hash.

    Conformers with one geometry are in one range, whatever their number.

    Args:
        runs: In any order.
        names: Columns to read beside the key: of `ALL_COLUMNS`; graphs can be made from all of them only.
    """
    num_ranges = max(1, -(-sum(run.num_bytes for run in runs) // RANGE_BYTES))
    cursors = [0] * len(runs)
    for number in range(num_ranges):
        end = (number + 1) * _HASHES // num_ranges
        pieces = []
        for index, run in enumerate(runs):
            if cursors[index] < run.num_rows:
                cursors[index], piece = _read_piece(run, names, cursors[index], end, num_ranges)
                pieces.append(piece)
        pieces = [piece for piece in pieces if len(piece["hash"])]
        if pieces:
            yield _join(pieces)


def _read_piece(
    run: Run, names: Sequence[str], start: int, end: int, num_ranges: int
) -> tuple[int, dict[str, np.ndarray[Any, Any]]]:
    """Return the row where the next range starts, and the columns of the rows before it from `start` on."""
    with run.path.open("rb") as file:
        descriptor = file.fileno()
        stop = _find_stop(descriptor, run, start, end, 2 * run.num_rows // num_ranges + 64)
        atoms, letters = (_read_rows(descriptor, run, n, start, stop + 1) for n in ("first_atom", "first_letter"))
        piece = {"first_atom": atoms - atoms[0], "first_letter": letters - letters[0]}
        for name in (*_KEY, "has", *names):
            if name in run.spans:
                edges = letters if name == "group" else atoms if _is_per_atom(name) else (start, stop)
                piece[name] = _read_rows(descriptor, run, name, int(edges[0]), int(edges[-1]))
    return stop, piece


def _is_per_atom(name: str) -> bool:
    return name in _COLUMNS and _COLUMNS[name][0]


def _find_stop(descriptor: int, run: Run, start: int, end: int, guess: int) -> int:
    """Return the first row, from `start` on, with a hash of at least `end`; reads `guess` rows at a time."""
    while start < run.num_rows:
        stop = min(start + guess, run.num_rows)
        hashes = _read_rows(descriptor, run, "hash", start, stop).view(np.uint64)
        below = int(np.count_nonzero(hashes < end)) if end < _HASHES else len(hashes)
        start += below
        if start < stop:
            break
    return start


def _join(pieces: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> Rows:
    """Put the pieces of a range together, in the order of the hash and without exact duplicates."""
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for piece in pieces for name in piece if not name.startswith("first_")):
        columns[name] = np.concatenate([piece[name] if name in piece else _fill(name, piece) for piece in pieces])
    hashes, content = columns["hash"].view(np.uint64), columns["content"]
    order = np.lexsort((columns["record"], columns["source"], content[:, 1], content[:, 0], hashes))
    same = (hashes[order[1:]] == hashes[order[:-1]]) & (content[order[1:]] == content[order[:-1]]).all(1)
    order = order[np.concatenate([[True], ~same])]
    first_atom, first_letter = (_join_edges([p[n] for p in pieces]) for n in ("first_atom", "first_letter"))
    return Rows(columns, order, first_atom, first_letter)


def _fill(name: str, piece: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return a column that a run does not have; `has` says that its rows mean nothing."""
    per_atom, dtype, row = _COLUMNS[name]
    return np.zeros((int(piece["first_atom"][-1]) if per_atom else len(piece["hash"]), *row), dtype)


def _join_edges(edges: Sequence[IntArray]) -> IntArray:
    sizes = np.concatenate([np.diff(e) for e in edges])
    return np.concatenate([[0], np.cumsum(sizes)])
