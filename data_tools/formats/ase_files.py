"""Files that only ASE can take apart, read frame by frame; and what all layouts with names of ASE's kind have in common."""

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.formats.base import Chunk, Layout, OpenFile, Request, Units
from data_tools.formats.labels import attempt, build_graph, find_keys, get_aliases
from data_tools.formats.probe import Probe
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

ASE_UNITS: Final = Units("eV", "Angstrom", "eV/Angstrom", "ASE's convention", is_convention=True)
_REMEDY: Final = "Give a file that `ase.io.read` understands (extxyz is safest), or an .npz"
_OWN: Final = frozenset(("numbers", "positions"))
_MAX_SIGNATURES: Final = 1000
"""So many different sets of names are remembered"""


def unreadable(path: Path, error: object, remedy: str = _REMEDY) -> DataError:
    """Return what to raise for a file that ASE cannot read."""
    from ase.io.formats import UnknownFileTypeError

    got = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    if isinstance(error, UnknownFileTypeError):  # says the extension only
        got = "a format that neither content nor name tell"
    return DataError(str(path), "be readable by ASE", got.splitlines()[0], remedy)


def collect_values(atoms: Any) -> dict[str, Any]:
    """Return all that a frame carries by name; a calculator's result hides an entry of the same name."""
    results = {} if atoms.calc is None else {k: v for k, v in atoms.calc.results.items() if v is not None}
    return {k: v for k, v in (atoms.info | atoms.arrays | results).items() if k not in _OWN}


class NamedValues:
    """Which of a record's names are labels: the choice made for the file, checked against what each record has.

    Args:
        keys: The file's key of each label.
        request: What the user asked for.
    """

    def __init__(self, keys: Mapping[str, str], request: Request) -> None:
        self._keys, self._request = dict(keys), request
        self._cache: dict[frozenset[str], dict[str, str] | DataError] = {}

    def choose(self, names: Collection[str], where: str) -> dict[str, str]:
        """Return the key of each label that a record has.

        Raises:
            DataError: It has another key for a label than the rest of the file, or two.
        """
        signature = frozenset(names)
        if signature not in self._cache:
            if len(self._cache) > _MAX_SIGNATURES:
                self._cache.clear()
            self._cache[signature] = self._choose(signature)
        found = self._cache[signature]
        if isinstance(found, DataError):
            raise DataError(where, found.rule, found.got, found.remedy)
        return found

    def _choose(self, names: frozenset[str]) -> dict[str, str] | DataError:
        usual = {k: v for k, v in get_aliases(self._request).items() if k not in self._request.keys}
        try:
            found = find_keys(names, {}, usual, "")
        except DataError as error:
            return error
        for label, key in found.items():
            if (other := self._keys.get(label, key)) != key:
                return DataError("", f"have `{other}` like the others", f"`{key}`", f"Choose with --keys {label}=KEY")
        named = {label: key for label, key in self._keys.items() if key in names}
        return found | named

    def build(self, values: Mapping[str, Any], structure: Mapping[str, Any], where: str) -> Graph:
        """Build one structure.

        Args:
            values: All that the record carries, by the file's names.
            structure: Atomic numbers, positions, cell and pbc.
            where: "file:record", for messages.
        """
        keys = self.choose(values.keys(), where)
        return build_graph({k: values[key] for k, key in keys.items()} | dict(structure), keys, self._request, where)


def collect_structure(atoms: Any) -> dict[str, Any]:
    """Return atomic numbers and positions of what ASE read, and cell and pbc of a crystal."""
    structure = {"atomic_numbers": atoms.numbers, "positions": atoms.positions}
    if atoms.pbc.any():
        structure |= {"cell": np.asarray(atoms.cell[:]), "pbc": np.asarray(atoms.pbc)}
    return structure


class AtomsFile(OpenFile):
    """What files of ASE's formats have in common."""

    def _set_keys(self, available: set[str]) -> None:
        self.keys = find_keys(available, self.request.keys, get_aliases(self.request), str(self.path))
        self._names = NamedValues(self.keys, self.request)


class AseFile(AtomsFile):
    """A file of any format of ASE, which only ASE can take apart: it is read once to count, and once for its chunks in order."""

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        available: set[str] = set()
        for atoms in self._iterate(0):
            available.update(collect_values(atoms))
            self.num_records += 1
        if not self.num_records:
            raise DataError(str(path), "hold structures", "none", "Check the file")
        self._set_keys(available)
        self._next = 0

    def _iterate(self, start: int) -> Iterator[Any]:
        import ase.io

        try:
            index = slice(start, None)
            yield from ase.io.iread(str(self.path.absolute()), index=index, do_not_split_by_at_sign=True)
        except Exception as error:  # every format of ASE fails in its own way
            raise unreadable(self.path, error) from error

    def _open_handle(self) -> Iterator[Any]:
        return self._iterate(self._next)

    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Go on where the last chunk ended, or start again."""
        if chunk.start != self._next:
            self.close()
            self._next = chunk.start
        for number in range(chunk.start, chunk.stop):
            try:
                atoms = next(self.handle)
            except StopIteration:
                raise unreadable(self.path, f"only {number} of {self.num_records} records") from None
            self._next = number + 1
            where = f"{self.name}:{number}"
            yield where, attempt(functools.partial(self._build, atoms, where))

    def _build(self, atoms: Any, where: str) -> Graph:
        return self._names.build(collect_values(atoms), collect_structure(atoms), where)


def _is_anything(probe: Probe) -> bool:
    return probe.container in ("other", "gzip", "bzip2", "xz")


ASE: Final = Layout(
    name="ase",
    description="any other file that ASE reads: eV and Å by ASE's convention",
    recognise=_is_anything,
    open=AseFile,
    units=ASE_UNITS,
    is_fallback=True,
)
