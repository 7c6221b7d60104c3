"""npz archives of arrays over conformers: MD17 and MD22 (sGDML), rMD17, and those of mlff and SO3LR, which only have names.

Uncompressed members are memory-mapped, so that a chunk costs what its rows cost; compressed ones are unpacked once per process.
No Python object is ever unpickled.
"""

import dataclasses
import functools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from data_tools.formats.base import Chunk, Layout, OpenFile, Request, Units
from data_tools.formats.labels import (
    ARRAY_ALIASES,
    NOT_LABELS,
    attempt,
    build_graph,
    find_keys,
    get_aliases,
    name_group,
    read_numbers,
)
from data_tools.formats.probe import Probe, npz_error
from data_tools.formats.unit_names import find_units
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, IntArray

_MAX_UNPACKED: Final = 32 * 2**30
"""Bytes of compressed arrays that a process holds"""
_WORTH_A_NOTE: Final = 2**28
_PER_ATOM: Final = ("forces", "partial_charges", "hirshfeld_ratios")
_PLAIN: Final = (
    "positions",
    "energy",
    "forces",
    "dipole",
    "partial_charges",
    "hirshfeld_ratios",
    "total_charge",
    "loss_weight",
)
"""Fields that whole chunks are converted of at once"""
_SGDML: Final = ("e_unit", "r_unit", "theory")


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """Where an array lies in the archive."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    offset: int | None
    """of its first number in the file; None where it is compressed"""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class NpzFile(OpenFile):
    """Arrays whose first axis counts conformers, and those that all conformers share."""

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        try:
            with zipfile.ZipFile(path) as archive:
                self._find_members(archive)
                self._words = _read_words(archive)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, struct.error) as error:
            raise npz_error(path, error) from error
        self._check_shapes()
        self._describe()

    def _find_members(self, archive: zipfile.ZipFile) -> None:
        available = {info.filename.removesuffix(".npy") for info in archive.infolist()}
        aliases = get_aliases(self.request) | ARRAY_ALIASES
        found = find_keys(available, self.request.keys, aliases, str(self.path))
        for label in ("atomic_numbers", "positions"):
            if label not in found:
                remedy = f"Name its key with --keys {label}=KEY"
                raise DataError(str(self.path), f"have {label}", ", ".join(sorted(available)) or "nothing", remedy)
        self.keys = found
        self._members = {label: _find_member(archive, self.path, key) for label, key in found.items()}

    def _check_shapes(self) -> None:
        shape = self._members["positions"].shape
        if len(shape) != 3 or shape[2] != 3 or not shape[0]:
            raise DataError(f"{self.path} positions", "have shape (conformers, atoms, 3)", shape, "Correct --keys")
        self.num_records, self._size = shape[:2]
        self._shared = {label for label, member in self._members.items() if self._is_shared(label, member.shape)}
        for label, member in self._members.items():
            if label not in self._shared and (not member.shape or member.shape[0] != self.num_records):
                rule = f"have {self.num_records} rows like positions"
                raise DataError(f"{self.path} {label}", rule, member.shape, "Correct the file")

    def _is_shared(self, label: str, shape: tuple[int, ...]) -> bool:
        if label == "atomic_numbers":
            return shape == (self._size,)
        if label in ("cell", "pbc"):
            return shape in ((3, 3), (3,))
        return label in (*NOT_LABELS, "loss_weight") and shape == ()

    def _describe(self) -> None:
        packed = sum(member.num_bytes for member in self._members.values() if member.offset is None)
        if packed > _MAX_UNPACKED:
            got = f"{packed / 2**30:.0f} GiB of compressed arrays"
            remedy = "Save it uncompressed with np.savez, such files are read piece by piece"
            raise DataError(str(self.path), f"unpack to at most {_MAX_UNPACKED / 2**30:.0f} GiB", got, remedy)
        if packed > _WORTH_A_NOTE:
            note = (
                f"{self.name} is compressed: each process holds {packed / 2**30:.1f} GiB of it (np.savez avoids that)"
            )
            self.notes += (note,)
        if "e_unit" in self._words and self.layout.units is None:
            energy, length = self._words["e_unit"], self._words.get("r_unit", "")
            self.units = find_units(energy, length, "the file's e_unit and r_unit")
            if self.units is None:
                self.notes += (f"{self.name} has units of an unknown name: e_unit {energy!r}, r_unit {length!r}",)
        if self.layout.level_of_theory is None:
            self.level_of_theory = self._words.get("theory") or None

    def _open_handle(self) -> dict[str, np.ndarray]:
        try:
            return {label: _load(self.path, member) for label, member in self._members.items()}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise npz_error(self.path, error) from error

    def _close_handle(self, handle: dict[str, np.ndarray]) -> None:
        handle.clear()

    def read_records(self, chunk: Chunk) -> Iterator[tuple[str, Graph | DataError]]:
        """Read conformers one after another."""
        rows = slice(chunk.start, chunk.stop)
        taken = {label: array if label in self._shared else array[rows] for label, array in self.handle.items()}
        arrays = {
            label: np.array(array) for label, array in taken.items()
        }  # graphs own what they hold, and hold no file open
        numbers = self._read_common_numbers(arrays["atomic_numbers"])
        columns = None if numbers is None else self._convert_columns(arrays)
        if numbers is not None and columns is not None:
            yield from self._read_fast(chunk, numbers, columns, arrays.get("group"))
            return
        for index in range(chunk.num_records):
            where = f"{self.name}:{chunk.start + index}"
            row = {label: array if label in self._shared else array[index] for label, array in arrays.items()}
            yield where, attempt(functools.partial(self._build, row, where))

    def _read_common_numbers(self, array: np.ndarray) -> IntArray | None:
        """Return (num_atoms,) atomic numbers of all conformers; None where they differ, are padded or wrong."""
        if "atomic_numbers" not in self._shared:
            return None
        try:
            numbers = read_numbers(array, self._size, self.name)
        except DataError:  # each record says so
            return None
        return numbers if numbers.all() else None

    def _convert_columns(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
        """Return all fields of the chunk's structures; None where they need a look record by record."""
        columns: dict[str, Any] = {}
        for label, array in arrays.items():
            if label in ("atomic_numbers", "group"):
                continue
            plain = () if label not in _PLAIN else (self._size,) * (label in _PER_ATOM or label == "positions")
            plain += (3,) * (label in ("positions", "forces", "dipole"))
            if label not in _PLAIN or label in self._shared or array.dtype.kind not in "fiu":
                return None
            rows = array.reshape(array.shape[:-1]) if array.shape[1:] == (*plain, 1) else array
            if rows.shape[1:] != plain:
                return None
            column = np.asarray(rows, np.float64)
            columns[label] = column if plain else column.tolist()
        return columns

    def _read_fast(
        self, chunk: Chunk, numbers: IntArray, columns: Mapping[str, Any], groups: np.ndarray | None
    ) -> Iterator[tuple[str, Graph | DataError]]:
        """Build structures of the same atoms from whole columns, 100,000 a second and more."""
        names, start = tuple(columns), chunk.start
        group = name_group(self.request, "" if groups is None or groups.ndim else str(groups), numbers)
        for index, values in enumerate(zip(*columns.values(), strict=True)):
            if groups is not None and groups.ndim:
                group = name_group(self.request, str(groups[index]), numbers)
            fields = dict(zip(names, values, strict=True))
            yield f"{self.name}:{start + index}", Graph(atomic_numbers=numbers, group=group, **fields)

    def _build(self, row: dict[str, Any], where: str) -> Graph:
        """Build one structure; atoms with the number zero are padding."""
        numbers = read_numbers(row["atomic_numbers"], self._size, where)
        graph = build_graph(row, self.keys, self.request, where)
        real = numbers > 0
        if real.all():
            return graph
        changes: dict[str, Any] = {"atomic_numbers": numbers[real], "positions": graph.positions[real]}
        for name in _PER_ATOM:
            if (value := getattr(graph, name)) is not None:
                changes[name] = value[real]
        group = row.get("group")
        changes["group"] = name_group(self.request, "" if group is None else str(group), numbers[real])
        return dataclasses.replace(graph, **changes)


def _find_member(archive: zipfile.ZipFile, path: Path, key: str) -> _Member:
    """Read the header of an array, and all its bytes once: the archive's checksum covers what is mapped later."""
    info = archive.getinfo(f"{key}.npy" if f"{key}.npy" in archive.NameToInfo else key)
    with archive.open(info) as file:
        shape, is_fortran, dtype = _read_header(file)
        start = file.tell()
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if info.file_size - start != size:
            raise ValueError(f"{info.filename} has {info.file_size - start} bytes where its shape {shape} needs {size}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            return _Member(info.filename, dtype, shape, is_fortran, None)
        while file.read(2**20):
            pass
    with path.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        name_size, extra_size = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + 30 + name_size + extra_size + start
    return _Member(info.filename, dtype, shape, is_fortran, offset)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _load(path: Path, member: _Member) -> np.ndarray:
    """Map the array, or unpack it."""
    if member.offset is not None and member.num_bytes and member.shape:
        shape = member.shape[::-1] if member.is_fortran else member.shape
        mapped = np.asarray(np.memmap(path, member.dtype, "r", member.offset, shape))
        return mapped.T if member.is_fortran else mapped
    with zipfile.ZipFile(path) as archive, archive.open(member.file) as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _read_words(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return what sGDML's files say of themselves, where it is text."""
    words = {}
    for key in _SGDML:
        if f"{key}.npy" in archive.NameToInfo:
            try:
                with archive.open(f"{key}.npy") as file:
                    value = np.lib.format.read_array(file, allow_pickle=False)
            except ValueError:  # an old file with Python objects: its units have to be given
                continue
            if value.shape == () and value.dtype.kind in "SU":
                words[key] = value.item().decode("utf-8", "replace") if value.dtype.kind == "S" else str(value)
    return words


def _is_npz(probe: Probe) -> bool:
    return probe.container == "zip"


def has_structures(probe: Probe) -> bool:
    """Return whether a file is an npz with atomic numbers and positions under names that are known."""
    has = [any(name in probe.names for name in ARRAY_ALIASES[label]) for label in ("atomic_numbers", "positions")]
    return _is_npz(probe) and all(has)


def _is_rmd17(probe: Probe) -> bool:
    return has_structures(probe) and {"nuclear_charges", "coords", "old_energies"} <= probe.names


def _is_sgdml(probe: Probe) -> bool:
    return has_structures(probe) and {"z", "R", "e_unit", "r_unit"} <= probe.names


NPZ: Final = Layout(
    name="npz",
    description="npz of arrays over conformers (MD17, MD22, mlff, SO3LR): units are recognised or given",
    recognise=_is_npz,
    is_fallback=True,
    open=NpzFile,
)
SGDML: Final = Layout(
    name="sgdml",
    description="npz of sGDML (MD17, MD22) with e_unit and r_unit: units as the file says",
    recognise=_is_sgdml,
    open=NpzFile,
    source="S. Chmiela et al., Comput. Phys. Commun. 240, 38 (2019), 10.1016/j.cpc.2019.02.007",
)
RMD17: Final = Layout(
    name="rmd17",
    description="npz of rMD17: nuclear_charges, coords, energies, forces in kcal/mol and Å",
    recognise=_is_rmd17,
    open=NpzFile,
    units=Units("kcal/mol", "Angstrom", "kcal/mol/Angstrom", "rMD17's documentation"),
    level_of_theory="PBE/def2-SVP",
    source="A. S. Christensen, O. A. von Lilienfeld, Mach. Learn.: Sci. Technol. 1, 045018 (2020), 10.1088/2632-2153/abba6f; "
    "data 10.6084/m9.figshare.12672038",
)
