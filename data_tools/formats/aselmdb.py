"""LMDB files of ASE databases (.aselmdb, as fairchem's sets come): zlib-compressed JSON under the numbers 1, 2, ..., never pickles.

`nextid` is one more than the largest number, `deleted_ids` lists those that are gone; both are JSON like the rows.
"""

import functools
import os
import struct
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.formats.ase_db import RESULTS, SAMPLE, find_metadata_units, parse_json
from data_tools.formats.ase_files import ASE_UNITS, NamedValues
from data_tools.formats.base import INSTALL_FORMATS, Chunk, Layout, OpenFile, Request
from data_tools.formats.labels import attempt, find_keys, get_aliases
from data_tools.formats.probe import Probe
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, IntArray

RESERVED_KEYS: Final = ("nextid", "deleted_ids", "metadata")
MAGIC: Final = 0xBEEFC0DE
_META: Final = struct.Struct("=16xI20xI92xQQ")
"""Header of a page; magic number, version, address, size of the map; page size and the rest of two trees; last page, transaction"""
_MAX_RECORD: Final = 2**28
"""Bytes of JSON; a structure of 100,000 atoms with forces has a tenth of it"""


_ENVIRONMENTS: Final[weakref.WeakValueDictionary[tuple[int, Path], Any]] = weakref.WeakValueDictionary()
"""By process and file: LMDB refuses to open a file twice in a process"""


def open_lmdb(path: Path) -> Any:
    """Open an LMDB file for reading, without its lock file; it closes when nobody holds it any more.

    Raises:
        DataError: It is damaged, or the package lmdb is missing.
    """
    try:
        import lmdb
    except ImportError as error:
        raise DataError(str(path), "be read with lmdb", "no lmdb here", INSTALL_FORMATS) from error
    _check_length(path)
    key = os.getpid(), path.resolve()
    if (environment := _ENVIRONMENTS.get(key)) is None:
        try:
            environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise DataError(str(path), "be a readable LMDB file", error, "Copy it again") from error
        _ENVIRONMENTS[key] = environment
    return environment


def _check_length(path: Path) -> None:
    """Raise where the file is shorter than its last page: LMDB maps it, and reading behind its end kills the process.

    Each of the first two pages describes the tree after a transaction (`MDB_meta` in LMDB's mdb.c); the later one counts.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        page_size = _read_meta(file.read(_META.size), path)[1]
        file.seek(page_size)
        second = file.read(_META.size)
        file.seek(0)
        metas = [_read_meta(file.read(_META.size), path), _read_meta(second, path)]
    last_page = max(metas, key=lambda meta: meta[3])[2]
    if size < (last_page + 1) * page_size:
        raise DataError(str(path), f"have {(last_page + 1) * page_size} bytes", size, "Copy it again: it is cut short")


def _read_meta(head: bytes, path: Path) -> tuple[int, int, int, int]:
    """Return the magic number, the page size, the last page and the transaction of a page that describes a tree."""
    found: tuple[int, int, int, int] = _META.unpack(head) if len(head) == _META.size else (0, 0, 0, 0)
    if found[0] != MAGIC or not 256 <= found[1] <= 2**16:
        raise DataError(str(path), "be a readable LMDB file", "no description of its pages", "Copy it again")
    return found


class AseLmdbFile(OpenFile):
    """Rows by number."""

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        self._ids = self._list_ids()
        self.num_records = len(self._ids)
        if not self.num_records:
            raise DataError(str(path), "hold structures", "none", "Check the file")
        sample = np.union1d(self._ids[:SAMPLE], self._ids[:: max(1, self.num_records // SAMPLE)])
        available: set[str] = set()
        for number in sample:
            available.update(_collect(self._read_row(int(number), f"{name}:{number}")))
        self.keys = find_keys(available, request.keys, get_aliases(request), str(path))
        self._names = NamedValues(self.keys, request)
        metadata = self._read_entry("metadata", {})
        self.units, self.notes = find_metadata_units(metadata if isinstance(metadata, dict) else {}, self.keys, self)

    def _list_ids(self) -> IntArray:
        """Return the numbers that are not deleted; more than the file has entries cannot be."""
        last, deleted = self._read_entry("nextid", 1), self._read_entry("deleted_ids", [])
        is_sound = isinstance(last, int) and isinstance(deleted, list) and all(isinstance(d, int) for d in deleted)
        if not is_sound or last - 1 - len(deleted) > self.handle.stat()["entries"]:
            got = f"nextid {last!r}"[:80]
            raise DataError(str(self.path), "say how many records it has", got, "Copy it again")
        self._deleted = frozenset(deleted)
        return np.setdiff1d(np.arange(1, last), np.array(deleted, np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_ids": ()}  # chunks carry their own

    def _open_handle(self) -> Any:
        return open_lmdb(self.path)

    def _close_handle(self, handle: Any) -> None:
        """Leave the environment to others who hold it."""

    def _get(self, key: str) -> bytes | None:
        import lmdb

        try:
            with self.handle.begin() as transaction:
                found = transaction.get(key.encode("ascii"))
        except lmdb.Error as error:
            raise DataError(str(self.path), "be a readable LMDB file", error, "Copy it again") from error
        return None if found is None else bytes(found)

    def _read_entry(self, key: str, default: Any) -> Any:
        stored = self._get(key)
        if stored is None:
            return default
        where = f"{self.path} {key}"
        return parse_json(f'{{"value": {_unpack(stored, where)}}}', where)["value"]

    def _read_row(self, number: int, where: str) -> dict[str, Any]:
        stored = self._get(str(number))
        if stored is None:
            raise DataError(where, "be in the file", "nothing under this number", "Copy it again")
        return parse_json(_unpack(stored, where), where)

    def chunks(self, size: int) -> list[Chunk]:
        """Divide the records into chunks, each with the numbers of its first and last record."""
        ids = self._ids
        found = super().chunks(size)
        return [Chunk(c.number, c.file, c.start, c.stop, (int(ids[c.start]), int(ids[c.stop - 1]))) for c in found]

    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Read rows in the order of their numbers; records are called by these numbers."""
        first, last = chunk.marks
        for number in range(first, last + 1):
            if number not in self._deleted:
                where = f"{self.name}:{number}"
                yield where, attempt(functools.partial(self._build, number, where))

    def _build(self, number: int, where: str) -> Graph:
        row = self._read_row(number, where)
        for key in ("numbers", "positions"):
            if key not in row:
                raise DataError(where, f"have {key}", ", ".join(sorted(row)) or "nothing", "Check the file")
        structure = {"atomic_numbers": row["numbers"], "positions": row["positions"]}
        if any(row.get("pbc", ())):
            structure |= {"cell": row.get("cell"), "pbc": row["pbc"]}
        return self._names.build(_collect(row), structure, where)


def _collect(row: dict[str, Any]) -> dict[str, Any]:
    """Return all that a row carries by name; results hide pairs and data of the same name."""
    found: dict[str, Any] = {}
    for key in ("data", "key_value_pairs"):
        if isinstance(row.get(key), dict):
            found |= row[key]
    return found | {name: row[name] for name in RESULTS if row.get(name) is not None}


def _unpack(stored: bytes, where: str) -> str:
    """Return the text of an entry, of a bounded size."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(stored, _MAX_RECORD)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise ValueError(f"more than {_MAX_RECORD} bytes, or a part of it")
        return text.decode()
    except (zlib.error, ValueError) as error:
        remedy = "Convert it with the library that wrote it: only compressed JSON is read, nothing is unpickled"
        raise DataError(where, "be zlib-compressed JSON", str(error)[:80], remedy) from error


def _is_aselmdb(probe: Probe) -> bool:
    return probe.container == "lmdb" and "nextid" in probe.names


ASELMDB: Final = Layout(
    name="aselmdb",
    description="LMDB of an ASE database (.aselmdb of fairchem): eV and Å by ASE's convention",
    recognise=_is_aselmdb,
    open=AseLmdbFile,
    units=ASE_UNITS,
)
