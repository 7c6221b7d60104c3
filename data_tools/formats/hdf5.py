"""HDF5 files of groups of conformers: what the published sets in `hdf5_sets.py` have in common.

A group holds the conformers of a molecule or a reaction, its arrays run over them. A chunk names the groups and rows that it
takes, and only these are read.
"""

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from data_tools.formats.base import INSTALL_FORMATS, Chunk, Layout, OpenFile, Request
from data_tools.formats.labels import attempt, build_graph, choose_fixed_keys
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

_MAX_LEVELS: Final = 4


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file for reading.

    Raises:
        DataError: It is damaged, or h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(str(path), "be read with h5py", "no h5py here", INSTALL_FORMATS) from error
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise hdf5_error(path, error) from error


def hdf5_error(path: Path, error: object) -> DataError:
    """Return what to raise for a damaged file."""
    return DataError(str(path), "be a readable HDF5 file", str(error).splitlines()[0], "Copy it again")


def list_first_groups(path: Path) -> tuple[frozenset[str], ...]:
    """Return the names in the first and in the last group at each level, the root first."""
    with open_hdf5(path) as file:
        try:
            return _list_levels(file)
        except (KeyError, OSError, RuntimeError) as error:
            raise hdf5_error(path, error) from error


def _list_levels(file: Any) -> tuple[frozenset[str], ...]:
    import h5py

    levels: list[frozenset[str]] = []
    groups = [file]
    while groups and len(levels) < _MAX_LEVELS:
        names = [list(group) for group in groups]
        levels.append(frozenset(name for found in names for name in found))
        ends = [group[name] for group, found in zip(groups, names, strict=True) for name in {*found[:1], *found[-1:]}]
        groups = [member for member in ends if isinstance(member, h5py.Group)]
    return tuple(levels)


class GroupedFile(OpenFile):
    """Groups of conformers; subclasses say where groups are and what their arrays are called."""

    numbers_key: ClassVar[str]
    positions_key: ClassVar[str]
    levels: ClassVar[Mapping[str, tuple[str, str | None]]]
    """by the key of energies, the usual ones first: the key of forces at the same level of theory, and its name"""
    others: ClassVar[Mapping[str, str]] = {}
    """key of each other label unless the user names another"""

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        with self._safely():
            self._groups, self._counts = self._count_records(self.handle)
        self.num_records = sum(self._counts)
        if not self.num_records:
            raise DataError(str(path), "hold structures", "none", "Check the file")
        with self._safely():
            ends = {self._groups[0], self._groups[-1]}
            available = {name for group in ends for name in self._list_names(self.handle[group])}
        self.keys = choose_fixed_keys(available, request, self._choose_defaults(), str(path))
        self.level_of_theory = self._find_level()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_groups": (), "_counts": ()}  # chunks carry their own

    def _safely(self) -> "_Safely":
        return _Safely(self.path)

    def _open_handle(self) -> Any:
        return open_hdf5(self.path)

    def _find_energy(self) -> str:
        """Return the key of energies: the user's, that of the level of the user's forces, or the usual one."""
        if "energy" in self.request.keys or "forces" not in self.request.keys:
            return self.request.keys.get("energy", next(iter(self.levels)))
        return next((e for e, (forces, _) in self.levels.items() if forces == self.request.keys["forces"]), "")

    def _choose_defaults(self) -> Mapping[str, str]:
        """Return the keys of labels that the user does not name; forces are of the level of the energies, never of another."""
        energy = self._find_energy()
        return {"energy": energy, "forces": self.levels.get(energy, ("", None))[0], **self.others}

    def _find_level(self) -> str | None:
        """Return the level of theory of the labels, None where it is not one that is known."""
        forces, level = self.levels.get(self._find_energy(), ("", None))
        return level if self.keys.get("forces", forces) == forces else None

    def _list_names(self, group: Any) -> Sequence[str]:
        """Return what the keys of labels can be."""
        return list(group)

    @abc.abstractmethod
    def _count_records(self, file: Any) -> tuple[list[str], list[int]]:
        """Return the groups in the order of the file, and how many records each has."""

    def chunks(self, size: int) -> list[Chunk]:
        """Divide the records into chunks; each has the groups it takes from, with the first row and the one behind the last."""
        found: list[Chunk] = []
        parts: list[tuple[str, int, int]] = []
        start = filled = 0
        for group, count in zip(self._groups, self._counts, strict=True):
            row = 0
            while row < count:
                taken = min(count - row, size - filled)
                parts.append((group, row, row + taken))
                row, filled = row + taken, filled + taken
                if filled == size:
                    found.append(Chunk(len(found), 0, start, start + filled, tuple(parts)))
                    start, filled, parts = start + filled, 0, []
        if filled:
            found.append(Chunk(len(found), 0, start, start + filled, tuple(parts)))
        return found

    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Read the rows of each group that the chunk names; records are called "group/row"."""
        for group, first, behind in chunk.marks:
            with self._safely():
                yield from self.read_group(self.handle[group], group, range(first, behind))

    def read_group(self, group: Any, name: str, rows: range) -> Iterator[tuple[str, Graph | DataError]]:
        """Read some conformers of a group."""
        where = f"{self.name}:{name}"
        try:
            shared, columns = self._read_columns(group, rows, where)
        except DataError as error:
            rest = error.where.removeprefix(where)
            for row in rows:
                record = f"{where}/{row}"
                yield record, DataError(record + rest, error.rule, error.got, error.remedy)
            return
        for index, row in enumerate(rows):
            values = shared | {label: column[index] for label, column in columns.items()}
            record = f"{where}/{row}"
            yield record, attempt(functools.partial(self._build, values, record))

    def _build(self, values: dict[str, Any], where: str) -> Graph:
        return build_graph(values, self.keys, self.request, where)

    def _read_columns(self, group: Any, rows: range, where: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return values that all conformers of a group share, and arrays over the rows."""
        labels = {label: key for label, key in self.keys.items() if key in group}
        keys = labels | {"positions": self.positions_key}
        count = _find_dataset(group, self.positions_key, where).shape[0]
        columns = {label: _read_rows(group, key, rows, count, where) for label, key in keys.items()}
        numbers = read_array(group, self.numbers_key, where)
        return {"atomic_numbers": numbers}, columns


class _Safely:
    """Turns what HDF5 raises into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, KeyError, RuntimeError)):
            raise hdf5_error(self._path, error) from error


def _find_dataset(group: Any, key: str, where: str) -> Any:
    import h5py

    found = group.get(key)
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "biuf":
        got = ", ".join(sorted(group))[:200] if found is None else f"{type(found).__name__}"
        raise DataError(where, f"have the array `{key}`", got, "Check the file, or --layout")
    return found


def read_array(group: Any, key: str, where: str) -> np.ndarray:
    """Return a whole array of numbers, or raise."""
    return np.asarray(_find_dataset(group, key, where)[()])


def _read_rows(group: Any, key: str, rows: range, count: int, where: str) -> np.ndarray:
    found = _find_dataset(group, key, where)
    if not found.shape or found.shape[0] != count:
        raise DataError(f"{where} {key}", f"have {count} rows like positions", found.shape, "Check the file")
    return np.asarray(found[rows.start : rows.stop])


def read_word(group: Any, key: str) -> str | None:
    """Return a text, stored as itself or as the only entry of an array; None where there is none."""
    import h5py

    found = group.get(key)
    if not isinstance(found, h5py.Dataset) or found.size != 1 or found.dtype.kind not in "SO":
        return None
    value = found[()] if found.shape == () else found[(0,) * found.ndim]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def count_rows(file: Any, key: str) -> tuple[list[str], list[int]]:
    """Return the groups of the root by name, and the number of rows that an array has in each."""
    import h5py

    groups = [name for name in sorted(file) if isinstance(file.get(name), h5py.Group)]
    counts = []
    for name in groups:
        found = file[name].get(key)
        counts.append(int(found.shape[0]) if isinstance(found, h5py.Dataset) and found.shape else 0)
    return groups, counts
