"""From the columns of blocks straight to a minibatch, without an object per conformer on the way.

A `Table` holds the conformers of some blocks in columns. `assemble` gathers some of its rows and their neighbour pairs into the
bytes of a batch, all fields in one buffer, and `unpack` gives the `GraphBatch` whose tensors are views into it: a worker process
hands over one tensor, whatever a batch holds. The result is that of `collate([build_neighbors(g) for g in ...])`, bit for bit.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from so3krates_dist.data.codec import Block
from so3krates_dist.data.neighbors import (
    MAX_ATOMS_ALL_PAIRS,
    NeighborPairs,
    build_neighbors,
    find_pairs_of_molecule,
)
from so3krates_dist.graph import BoolArray, FloatArray, Graph, GraphBatch, IntArray


class _Column(NamedTuple):
    """A column of blocks that batches have too."""

    per_atom: bool
    """one row per atom instead of per conformer"""
    dtype: str
    row: tuple[int, ...] = ()
    missing: float | None = None
    """what stands for a missing label; None: all conformers have it"""


_COLUMNS: Final = {
    "atomic_numbers": _Column(True, "uint8"),
    "positions": _Column(True, "float32", (3,)),
    "total_charge": _Column(False, "float32"),
    "num_unpaired_electrons": _Column(False, "float32"),
    "energy": _Column(False, "float64", (), np.nan),
    "forces": _Column(True, "float32", (3,), np.nan),
    "stress": _Column(False, "float32", (3, 3), np.nan),
    "dipole": _Column(False, "float32", (3,), np.nan),
    "partial_charges": _Column(True, "float32", (), np.nan),
    "hirshfeld_ratios": _Column(True, "float32", (), np.nan),
    "cell": _Column(False, "float64", (3, 3), 0.0),
    "pbc": _Column(False, "bool", (3,), 0.0),
    "loss_weight": _Column(False, "float32", (), 1.0),
}
_BIT: Final = {name: 1 << place for place, name in enumerate(_COLUMNS)}
_PERIODIC: Final = 1 << len(_COLUMNS)
_OF_BOXES: Final = ("cell", "pbc", "pair_shifts")
"""fields that batches without periodic structures lack"""
_LABELS: Final = ("energy", "forces", "stress", "dipole", "partial_charges", "hirshfeld_ratios", "loss_weight")
"""fields that batches lack where none of their structures has the label, or a weight other than 1"""


class Table:
    """The conformers of some blocks in columns, one block after another.

    Args:
        num_conformers: (num_blocks,) of each block.
        num_atoms: (num_blocks,) of each block.
    """

    def __init__(self, num_conformers: npt.ArrayLike, num_atoms: npt.ArrayLike) -> None:
        self.first_row, self._first_atom = _starts(num_conformers), _starts(num_atoms)
        num_rows = int(self.first_row[-1])
        self.num_atoms = np.zeros(num_rows, np.int64)
        self.is_there = np.zeros(num_rows, bool)
        """(num_rows,) whether the conformer's block has been put in"""
        self._offsets = np.zeros(num_rows, np.int64)
        self._flags = np.zeros(num_rows, np.uint16)
        self._groups = np.zeros(num_rows, np.int32)
        self._names: dict[str, int] = {}
        self._quoted: list[bytes] = []
        self._columns: dict[str, npt.NDArray[Any]] = {}

    def put(self, number: int, block: Block, loss_weight: float = 1.0) -> None:
        """Copy a block into its place.

        Args:
            number: Of the block in this table.
            block: With as many conformers and atoms as the table was told.
            loss_weight: Factor of the weights that its conformers have in the training loss.
        """
        rows = slice(int(self.first_row[number]), int(self.first_row[number + 1]))
        atoms = slice(int(self._first_atom[number]), int(self._first_atom[number + 1]))
        flags = np.zeros(len(block), np.uint16)
        for name, column in _COLUMNS.items():
            if name in block.columns and name != "loss_weight":
                has = block.has(name)
                flags[has] |= _BIT[name]
                part = self._get_column(name)[atoms if column.per_atom else rows]
                part[:] = block.columns[name]
                if not has.all():
                    part[~(np.repeat(has, np.diff(block.offsets)) if column.per_atom else has)] = column.missing
        if "pbc" in block.columns:
            flags[self._columns["pbc"][rows].any(axis=1)] |= _PERIODIC
        if "loss_weight" in block.columns or loss_weight != 1:
            weights = self._get_column("loss_weight")[rows]
            weights[:] = block.columns.get("loss_weight", np.ones(1, np.float32)) * np.float32(loss_weight)
            flags[weights != 1] |= _BIT["loss_weight"]
        self._flags[rows] = flags
        self._offsets[rows] = block.offsets[:-1] + atoms.start
        self.num_atoms[rows] = np.diff(block.offsets)
        numbers = np.array([self._number_name(name) for name in block.groups], np.int32)
        self._groups[rows] = numbers[block.columns["group"]]
        self.is_there[rows] = True

    def _get_column(self, name: str) -> npt.NDArray[Any]:
        """Return a column, made where this is the first block that has it."""
        if name not in self._columns:
            per_atom, dtype, row, missing = _COLUMNS[name]
            length = int((self._first_atom if per_atom else self.first_row)[-1])
            self._columns[name] = np.full((length, *row), missing or 0, dtype)
        return self._columns[name]

    def _number_name(self, name: str) -> int:
        if name not in self._names:
            self._names[name] = len(self._names)
            self._quoted.append(json.dumps(name).encode())
        return self._names[name]

    def get_group(self, row: int) -> str:
        """Return the name that a conformer's results are grouped by."""
        return str(json.loads(self._quoted[int(self._groups[row])]))

    def get_box(self, row: int) -> tuple[BoolArray | None, FloatArray | None]:
        """Return the periodic directions (3,) and the cell (3, 3) in Å of a conformer; None where it has none."""
        pbc = self._columns["pbc"][row] if self._flags[row] & _BIT["pbc"] else None
        return pbc, self._columns["cell"][row] if self._flags[row] & _BIT["cell"] else None

    def is_periodic(self, rows: IntArray) -> BoolArray:
        """Return (num_rows,) which structures repeat along any lattice vector."""
        periodic: BoolArray = (self._flags[rows] & _PERIODIC) != 0
        return periodic

    def find_pairs(self, row: int, cutoff: float, reach: float) -> NeighborPairs:
        """Return the neighbour pairs of a conformer, as `build_neighbors` does.

        Args:
            row: Of the conformer.
            cutoff: Å; pairs shorter than this come first.
            reach: Å, at least the cutoff; pairs at this distance or beyond are left out.

        Raises:
            DataError: Atoms coincide, there are too many pairs, or all pairs of a periodic structure are asked for.
        """
        count, first = int(self.num_atoms[row]), int(self._offsets[row])
        positions = self._columns["positions"][first : first + count]
        if count <= MAX_ATOMS_ALL_PAIRS and not self._flags[row] & _PERIODIC:
            return find_pairs_of_molecule(positions, cutoff, reach, "structure")
        pbc, cell = self.get_box(row)
        numbers = self._columns["atomic_numbers"][first : first + count]
        found = build_neighbors(Graph(atomic_numbers=numbers, positions=positions, cell=cell, pbc=pbc), cutoff, reach)
        assert found.pair_first is not None, "build_neighbors finds pairs"
        assert found.pair_second is not None, "build_neighbors finds pairs"
        assert found.num_short_pairs is not None, "build_neighbors counts them"
        return NeighborPairs(found.pair_first, found.pair_second, found.pair_shifts, found.num_short_pairs)

    def assemble(self, rows: IntArray, pairs: Sequence[NeighborPairs]) -> torch.Tensor:
        """Return the bytes of a batch, see `unpack`.

        Args:
            rows: (num_graphs,) conformers whose blocks have been put in; none at all gives an empty batch.
            pairs: Neighbour pairs of each.
        """
        counts, offsets = self.num_atoms[rows], _starts(self.num_atoms[rows])
        flags = int(np.bitwise_or.reduce(self._flags[rows])) if len(rows) else _FLAGS_OF_NOTHING
        groups = self._groups[rows].tolist()
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        names = b"[%s]" % b",".join([self._quoted[group] for group in numbers])
        num_pairs, num_short = sum([len(p.first) for p in pairs]), sum([p.num_short for p in pairs])
        buffer, fields = _allocate(_Sizes(len(rows), int(offsets[-1]), num_pairs, len(names), num_short, flags))
        fields["names"][:] = np.frombuffer(names, np.uint8)
        fields["group"][:] = [numbers[group] for group in groups]
        fields["num_atoms"][:] = counts
        fields["graph_index"][:] = np.repeat(np.arange(len(rows)), counts)
        atoms = np.arange(int(offsets[-1])) + np.repeat(self._offsets[rows] - offsets[:-1], counts)
        for name, (per_atom, *_) in _COLUMNS.items():
            if name in fields:
                _gather(self._columns.get(name), atoms if per_atom else rows, fields[name])
        _join_pairs(fields, pairs, offsets[:-1], num_short)
        return buffer


_FLAGS_OF_NOTHING: Final = _BIT["energy"] | _BIT["forces"]
"""what `collate` gives a batch without conformers"""


def _gather(column: npt.NDArray[Any] | None, index: IntArray, field: npt.NDArray[Any]) -> None:
    if column is None:  # a cell that no periodic structure has
        field[:] = 0
    elif field.dtype == column.dtype:
        column.take(index, axis=0, out=field, mode="clip")  # the default mode would go through a copy
    else:
        field[:] = column.take(index, axis=0)


def _starts(sizes: npt.ArrayLike) -> IntArray:
    starts = np.zeros(np.size(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def _join_pairs(
    fields: "dict[str, npt.NDArray[Any]]", pairs: Sequence[NeighborPairs], first_atoms: IntArray, num_short: int
) -> None:
    """Write the short pairs of all structures, then the others, with indices counted over the whole batch."""
    if not pairs:
        return
    short = [p if p.num_short == len(p.first) else p.select(slice(0, p.num_short)) for p in pairs]
    rest = [p.select(slice(p.num_short, None)) for p in pairs] if num_short < len(fields["pair_first"]) else []
    for part, place in ((short, slice(0, num_short)), (rest, slice(num_short, None))):
        if part:
            starts = np.repeat(first_atoms, [len(p.first) for p in part])
            for name, arrays in (("pair_first", [p.first for p in part]), ("pair_second", [p.second for p in part])):
                field = fields[name][place]
                np.concatenate(arrays, out=field)
                field += starts
            if "pair_shifts" in fields:
                zeros = [np.zeros((len(p.first), 3)) if p.shifts is None else p.shifts for p in part]
                np.concatenate(zeros, out=fields["pair_shifts"][place], casting="same_kind")


# ---------------------------------------------------------------------------------------------------------- one buffer

_ALIGNMENT: Final = 64
"""bytes; a cache line, and more than any vector instruction asks for"""


class _Sizes(NamedTuple):
    """The first bytes of a buffer, eight each: all that its layout follows from."""

    num_graphs: int
    num_atoms: int
    num_pairs: int
    num_name_bytes: int
    num_short_pairs: int
    flags: int
    """fields that are there"""


class _Field(NamedTuple):
    """An array in a buffer."""

    name: str
    dtype: np.dtype[Any]
    torch_dtype: torch.dtype
    unit: int
    """place in `_Sizes` of its number of rows"""
    row: tuple[int, ...]
    """shape of a row"""
    row_bytes: int
    strides: tuple[int, ...]
    """elements from one to the next along each axis"""


def _describe(name: str, dtype: str, unit: int, row: tuple[int, ...] = ()) -> _Field:
    strides = tuple(math.prod(row[axis:]) for axis in range(len(row) + 1))
    size = np.dtype(dtype).itemsize * math.prod(row)
    return _Field(name, np.dtype(dtype), getattr(torch, dtype), unit, row, size, strides)


_GRAPHS, _ATOMS, _PAIRS, _BYTES = range(4)
_FIELDS: Final = (
    _describe("names", "uint8", _BYTES),
    _describe("group", "int32", _GRAPHS),
    _describe("num_atoms", "int64", _GRAPHS),
    _describe("total_charge", "float32", _GRAPHS),
    _describe("num_unpaired_electrons", "float32", _GRAPHS),
    _describe("energy", "float64", _GRAPHS),
    _describe("stress", "float32", _GRAPHS, (3, 3)),
    _describe("dipole", "float32", _GRAPHS, (3,)),
    _describe("loss_weight", "float32", _GRAPHS),
    _describe("cell", "float32", _GRAPHS, (3, 3)),
    _describe("pbc", "bool", _GRAPHS, (3,)),
    _describe("atomic_numbers", "int64", _ATOMS),
    _describe("positions", "float32", _ATOMS, (3,)),
    _describe("graph_index", "int64", _ATOMS),
    _describe("forces", "float32", _ATOMS, (3,)),
    _describe("partial_charges", "float32", _ATOMS),
    _describe("hirshfeld_ratios", "float32", _ATOMS),
    _describe("pair_first", "int64", _PAIRS),
    _describe("pair_second", "int64", _PAIRS),
    _describe("pair_shifts", "float32", _PAIRS, (3,)),
)
_NO_TENSORS: Final = ("names", "group")


@functools.lru_cache(maxsize=64)
def _list_fields(flags: int) -> tuple[_Field, ...]:
    """Return the fields that are there."""
    absent = {name for name in _LABELS if not flags & _BIT[name]} | (set() if flags & _PERIODIC else set(_OF_BOXES))
    return tuple(field for field in _FIELDS if field.name not in absent)


def _allocate(sizes: _Sizes) -> tuple[torch.Tensor, dict[str, npt.NDArray[Any]]]:
    """Return a buffer that begins with its sizes, and the fields in it, which are empty."""
    fields, starts = _list_fields(sizes.flags), [_ALIGNMENT]
    for field in fields:
        starts.append(starts[-1] + _align(sizes[field.unit] * field.row_bytes))
    buffer = torch.empty(starts[-1], dtype=torch.uint8)
    memory = buffer.numpy()
    np.ndarray((len(sizes),), np.int64, memory)[:] = sizes
    arrays: dict[str, npt.NDArray[Any]] = {
        field.name: np.ndarray((sizes[field.unit], *field.row), field.dtype, memory, start)
        for field, start in zip(fields, starts, strict=False)
    }
    return buffer, arrays


def _align(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def unpack(buffer: torch.Tensor) -> GraphBatch:
    """Return the batch that a buffer holds; its tensors share the buffer's memory.

    Args:
        buffer: (num_bytes,) uint8 from `Table.assemble`, on the CPU.
    """
    memory = buffer.numpy()
    sizes = _Sizes(*np.ndarray((len(_Sizes._fields),), np.int64, memory).tolist())
    wholes: dict[torch.dtype, torch.Tensor] = {}
    fields: dict[str, Any] = dict.fromkeys(_OF_BOXES)
    start = _ALIGNMENT
    for field in _list_fields(sizes.flags):
        shape = (sizes[field.unit], *field.row)
        if field.name in _NO_TENSORS:
            fields[field.name] = np.ndarray(shape, field.dtype, memory, start)
        else:
            if (whole := wholes.get(field.torch_dtype)) is None:
                whole = wholes[field.torch_dtype] = buffer.view(field.torch_dtype)
            fields[field.name] = whole.as_strided(shape, field.strides, start // field.dtype.itemsize)
        start += _align(shape[0] * field.row_bytes)
    names = json.loads(fields.pop("names").tobytes())
    fields["group"] = tuple([names[number] for number in fields["group"].tolist()])
    return GraphBatch(**fields, num_short_pairs=sizes.num_short_pairs)
