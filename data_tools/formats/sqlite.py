"""SQLite files of records by number: opened for reading only, chunks as ranges of numbers."""

import abc
import functools
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from data_tools.formats.base import Chunk, Layout, OpenFile, Request
from data_tools.formats.labels import attempt
from data_tools.formats.probe import connect_sqlite
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph


def sqlite_error(path: Path, error: Exception) -> DataError:
    """Return what to raise for a damaged file."""
    return DataError(str(path), "be a readable SQLite file", error, "Copy it again")


def _check_length(path: Path) -> None:
    """Raise where the file is shorter than its header says: SQLite reads pages that are missing in part as zeros."""
    with path.open("rb") as file:
        head = file.read(100).ljust(100, b"\0")
    page_size, pages = struct.unpack_from(">H", head, 16)[0], struct.unpack_from(">I", head, 28)[0]
    is_current = head[24:28] == head[92:96]  # else an old version wrote it, and the number of pages means nothing
    if is_current and path.stat().st_size < (size := (65_536 if page_size == 1 else page_size) * pages):
        raise DataError(str(path), f"have {size} bytes", path.stat().st_size, "Copy it again: it is cut short")


class SqliteFile(OpenFile):
    """One table of records with the column `id`; the order of the records is that of the numbers."""

    table: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        _check_length(path)
        ((self.num_records,),) = self.query(f"SELECT COUNT(*) FROM {self.table}")
        if not self.num_records:
            raise DataError(str(path), "hold structures", f"none in its table `{self.table}`", "Check the file")

    def query(self, statement: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query.

        Raises:
            DataError: The file is damaged, or lacks the table.
        """
        try:
            yield from self.handle.execute(statement, values)
        except sqlite3.Error as error:
            raise sqlite_error(self.path, error) from error

    def _open_handle(self) -> sqlite3.Connection:
        try:
            return connect_sqlite(self.path)
        except sqlite3.Error as error:
            raise sqlite_error(self.path, error) from error

    def chunks(self, size: int) -> list[Chunk]:
        """Divide the records into chunks, each with the numbers of its first record and of the one behind its last."""
        statement = f"SELECT id FROM {self.table} ORDER BY id"
        firsts = [number for index, (number,) in enumerate(self.query(statement)) if index % size == 0]
        found = []
        for chunk, first, behind in zip(super().chunks(size), firsts, [*firsts[1:], None], strict=True):
            found.append(Chunk(chunk.number, chunk.file, chunk.start, chunk.stop, (first, behind)))
        return found

    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Read rows in the order of their numbers; records are called by these numbers."""
        first, behind = chunk.marks
        names = ", ".join(self.columns)
        end = "" if behind is None else " AND id < ?"
        values = (first,) if behind is None else (first, behind)
        statement = f"SELECT id, {names} FROM {self.table} WHERE id >= ?{end} ORDER BY id"
        for number, *row in self.query(statement, *values):
            where = f"{self.name}:{number}"
            yield where, attempt(functools.partial(self.build_row, row, where))

    @abc.abstractmethod
    def build_row(self, row: list[Any], where: str) -> Graph:
        """Build the structure of a row.

        Args:
            row: Values of `columns`.
            where: "file:number", for messages.

        Raises:
            DataError: The row is no structure.
        """
