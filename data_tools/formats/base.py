"""What every file layout offers: recognition by content, units that its documentation fixes, and records by chunk.

A layout (`Layout`) describes a family of files. A file that was opened with it (`OpenFile`) tells its keys and its number of
records, divides them into chunks whose limits depend on nothing but the file and the size asked for, and reads any chunk
without reading the rest. Values stay in the file's units; a label that a record lacks is None.
"""

import abc
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from data_tools.formats.probe import Probe
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

INSTALL_FORMATS: Final = "Install it with `pip install 'so3krates-dist[formats]'`"


@dataclasses.dataclass(frozen=True, slots=True)
class Units:
    """Units of a file's numbers, by their names in `so3krates_dist.units`."""

    energy: str
    length: str
    force: str
    """an energy unit, a slash, a length unit"""
    reason: str
    """where they come from, printed beside them"""
    is_convention: bool = False
    """they are what such files usually have, not what a documentation of this file promises"""

    def __str__(self) -> str:
        return f"{self.energy}, {self.length}, {self.force} by {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for."""

    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """the file's key for labels that go by another name than the layout's"""
    group: str | None = None
    """name that results of all structures are grouped by; None takes the file's, or the formula"""
    labels: bool = True
    """read energies and the like; else only what names a structure, its charge and its spin"""


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive records of one file."""

    number: int
    """in the canonical order through all files, from 0"""
    file: int
    """number of the file among those that were opened together"""
    start: int
    """first record, counted in its file"""
    stop: int
    """one past the last record"""
    marks: tuple[Any, ...] = ()
    """where the layout finds them, for example byte offsets"""

    @property
    def num_records(self) -> int:
        """Number of records in the chunk."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A family of files that are read alike."""

    name: str
    """for `--layout`"""
    description: str
    recognise: Callable[[Probe], bool]
    """whether the content of a file says that it is one of these"""
    open: "Callable[[Path, str, Layout, Request], OpenFile]"
    """reads as little as tells the keys and the number of records; arguments: path, name in messages, this layout, request"""
    units: Units | None = None
    """None: they have to be given or recognised"""
    level_of_theory: str | None = None
    """of the labels that are read unless `--keys` names others; None: the layout says nothing"""
    licence: str | None = None
    """SPDX identifier; None: the layout says nothing"""
    source: str = ""
    """paper and data, by DOI"""
    is_fallback: bool = False
    """takes what no other layout recognises"""


class OpenFile(abc.ABC):
    """A file with its layout. Can be pickled and used after a fork: its handle is opened again where it is needed.

    Args:
        path: The file.
        name: How messages call it.
        layout: How it is read.
        request: What the user asked for.
    """

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        self.path, self.name, self.layout, self.request = path, name, layout, request
        self.keys: dict[str, str] = {}
        """the file's key of each label that was found"""
        self.num_records = 0
        self.units: Units | None = layout.units
        self.level_of_theory: str | None = layout.level_of_theory
        self.licence: str | None = layout.licence
        self.notes: tuple[str, ...] = ()
        """what the user should know about how this file is read"""
        self._handle: Any = None
        self._pid = 0

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that are read."""
        return (self.path,)

    def chunks(self, size: int) -> list[Chunk]:
        """Divide the records into chunks, the same ones whoever asks.

        Args:
            size: Largest number of records of a chunk.
        """
        edges = range(0, self.num_records, size)
        return [Chunk(i, 0, start, min(start + size, self.num_records)) for i, start in enumerate(edges)]

    @abc.abstractmethod
    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Read the records of a chunk in the order of the file.

        Yields:
            Name of the record ("file:record") and the structure in the file's units, or what is wrong with this record.

        Raises:
            DataError: The file itself cannot be read.
        """

    def read(self, chunk: Chunk) -> Iterator[Graph]:
        """Read the structures of a chunk in the order and the units of the file.

        Raises:
            DataError: The file or one of the records cannot be read.
        """
        for _, item in self.read_records(chunk):
            if isinstance(item, DataError):
                raise item
            yield item

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._handle is not None and self._pid == os.getpid():
            self._close_handle(self._handle)
        self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_pid": 0}

    @property
    def handle(self) -> Any:
        """What `_open_handle` opened in this process."""
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = self._open_handle(), os.getpid()
        return self._handle

    def _open_handle(self) -> Any:
        """Open the file for reading."""
        raise AssertionError(f"the layout {self.layout.name} keeps no handle")

    def _close_handle(self, handle: Any) -> None:
        """Close what `_open_handle` returned."""
        handle.close()


class ManyFiles(OpenFile):
    """Several files of one layout as if they were one: the chunks of the first, then those of the second, and so on.

    Args:
        files: At least one, in their canonical order.
    """

    def __init__(self, files: Sequence[OpenFile]) -> None:
        first = files[0]
        super().__init__(first.path, first.name, first.layout, first.request)
        self.files = tuple(files)
        self._current = 0
        self.num_records = sum(file.num_records for file in files)
        for name in ("units", "level_of_theory", "licence"):
            setattr(self, name, self._agree_on(name))
        for file in files:
            self._add_keys(file)
        self.notes = tuple(dict.fromkeys(note for file in files for note in file.notes))

    def _agree_on(self, name: str) -> Any:
        first = getattr(self.files[0], name)
        for file in self.files[1:]:
            if (other := getattr(file, name)) != first:
                rule = f"have the same {name.replace('_', ' ')} as {self.files[0].name} ({first})"
                raise DataError(file.name, rule, other, "Convert the files one by one")
        return first

    def _add_keys(self, file: OpenFile) -> None:
        for label, key in file.keys.items():
            if self.keys.setdefault(label, key) != key:
                rule = f"have the key `{self.keys[label]}` for {label} like the files before it"
                raise DataError(file.name, rule, f"`{key}`", f"Choose with --keys {label}=KEY, or convert it alone")

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that are read."""
        return tuple(path for file in self.files for path in file.paths)

    def chunks(self, size: int) -> list[Chunk]:
        """Divide the records of all files into chunks; none holds records of two files."""
        found: list[Chunk] = []
        for number, file in enumerate(self.files):
            for chunk in file.chunks(size):
                found.append(dataclasses.replace(chunk, number=len(found), file=number))
        return found

    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Read the records of a chunk in the order of its file; the file read before is closed, so that thousands can be read."""
        if chunk.file != self._current:
            self.files[self._current].close()
            self._current = chunk.file
        return self.files[chunk.file].read_records(chunk)

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for file in self.files:
            file.close()
