"""A first look at a file: which container it is by its first bytes, and the names inside.

Extensions are never asked: a renamed file is what its content is.
"""

import functools
import sqlite3
import struct
import zipfile
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

from so3krates_dist.errors import DataError

Container = Literal["hdf5", "sqlite", "lmdb", "zip", "xz", "gzip", "bzip2", "other"]

_HEAD_SIZE: Final = 4096
_PAGE_MARKS: Final = (b"<!doctype html", b"<html")
_MAGIC: Final[tuple[tuple[int, bytes, Container], ...]] = (
    (0, b"\x89HDF\r\n\x1a\n", "hdf5"),
    (0, b"SQLite format 3\x00", "sqlite"),
    (16, struct.pack("=I", 0xBEEFC0DE), "lmdb"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
)
"""Offset, bytes and the container that they mark; that of LMDB stands behind the header of its first page"""


class Probe:
    """What recognition looks at.

    Args:
        path: A file.
        name: How messages call it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        try:
            with path.open("rb") as file:
                self.head = file.read(_HEAD_SIZE)
        except OSError as error:
            raise DataError(
                str(path), "be a readable file", error.strerror or error, "Check its permissions"
            ) from error

    @functools.cached_property
    def container(self) -> Container:
        """The container that the first bytes mark."""
        for offset, magic, container in _MAGIC:
            if self.head[offset : offset + len(magic)] == magic:
                return container
        return "other"

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Arrays of an npz, tables of an SQLite file, keys of an LMDB that are not numbers; else nothing.

        Raises:
            DataError: The file is damaged.
        """
        readers = {"zip": _list_arrays, "sqlite": _list_tables, "lmdb": _list_lmdb_keys}
        reader = readers.get(self.container)
        return reader(self.path) if reader is not None else frozenset()

    @functools.cached_property
    def first_groups(self) -> tuple[frozenset[str], ...]:
        """Names in the first and in the last group at each level of an HDF5 file, the root first; else nothing.

        Raises:
            DataError: The file is damaged, or h5py is missing.
        """
        if self.container != "hdf5":
            return ()
        from data_tools.formats.hdf5 import list_first_groups

        return list_first_groups(self.path)


def refuse_no_data(probe: Probe) -> None:
    """Raise `DataError` for what a failed download leaves: an empty file, or a web page under the name of a data set."""
    if not probe.head:
        raise DataError(str(probe.path), "hold structures", "an empty file", "Copy or download it again")
    if probe.head.lstrip().lower().startswith(_PAGE_MARKS):
        remedy = "Download it again: the server sent a page, perhaps with an error or a login"
        raise DataError(str(probe.path), "hold structures", "a web page (HTML)", remedy)


def _list_arrays(path: Path) -> frozenset[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise npz_error(path, error) from error


def npz_error(path: Path, error: Exception) -> DataError:
    """Return what to raise for an npz that cannot be read."""
    remedy = "Copy it again, or save it without Python objects"
    return DataError(
        str(path), "be a readable npz archive", (str(error) or type(error).__name__).splitlines()[0], remedy
    )


def connect_sqlite(path: Path) -> sqlite3.Connection:
    """Open an SQLite file for reading only."""
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=20)


def _list_tables(path: Path) -> frozenset[str]:
    connection = None
    try:
        connection = connect_sqlite(path)
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    except sqlite3.Error as error:
        raise DataError(str(path), "be a readable SQLite file", error, "Copy it again") from error
    finally:
        if connection is not None:
            connection.close()
    return frozenset(str(name) for (name,) in rows)


def _list_lmdb_keys(path: Path) -> frozenset[str]:
    from data_tools.formats.aselmdb import RESERVED_KEYS, open_lmdb

    try:
        with open_lmdb(path).begin() as transaction:
            return frozenset(key for key in RESERVED_KEYS if transaction.get(key.encode()) is not None)
    except DataError:
        raise
    except Exception as error:  # lmdb has a tree of its own errors, and is not imported before it is needed
        raise DataError(str(path), "be a readable LMDB file", error, "Copy it again") from error
