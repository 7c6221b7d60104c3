"""Blocks: the columns of some conformers as the bytes of one tar member, and back.

Atoms of all conformers lie one after another, `num_atoms` tells where each ends. A label (or a cell) may be missing: a column that
only some conformers have holds nan (false for `pbc`) in the rows of the others, and `has_<label>` says who has it.
Decoding gives views into the bytes. Refuses what is damaged (its own check sum), oversized, unknown or newer than it understands.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from so3krates_dist.data import layout
from so3krates_dist.data.loss_weights import find_wrong_weight, to_column
from so3krates_dist.data.verification import refuse_damaged
from so3krates_dist.errors import DataError
from so3krates_dist.graph import BoolArray, Graph, IntArray

SCHEMA: Final = 3
"""Newest version of blocks and manifest; a reader refuses a higher one. 3 is 2 with weights of conformers in the loss."""

UNWEIGHTED_SCHEMA: Final = 2
"""Version that is written where there are no such weights: the same bytes as ever, which earlier programs read"""

MAX_BLOCK_BYTES: Final = 2**30
"""Longest member of a shard"""

MAX_BLOCK_CONFORMERS: Final = 65_536
"""Most conformers of a block: loaders keep the index within a block in 16 bits"""

LABELS: Final = ("energy", "forces", "stress", "dipole", "partial_charges", "hirshfeld_ratios")
"""Labels that conformers may have, in the order in which a manifest lists them"""

Columns = Mapping[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]

_COLUMNS: Final[dict[str, tuple[bool, str, tuple[int, ...]]]] = {
    # name: (one row per atom instead of per conformer, dtype, shape of a row)
    "atomic_numbers": (True, "uint8", ()),
    "positions": (True, "float32", (3,)),
    "forces": (True, "float32", (3,)),
    "partial_charges": (True, "float32", ()),
    "hirshfeld_ratios": (True, "float32", ()),
    "energy": (False, "float64", ()),  # float32 at -1e6 eV is known to 0.03 eV only
    "cell": (False, "float64", (3, 3)),
    "pbc": (False, "bool", (3,)),
    "stress": (False, "float32", (3, 3)),
    "dipole": (False, "float32", (3,)),
    "total_charge": (False, "float32", ()),
    "num_unpaired_electrons": (False, "float32", ()),
    "loss_weight": (False, "float32", ()),
}
_WEIGHT: Final = "loss_weight"
"""Column that blocks lack where all weights are 1; it is there for all conformers or for none"""
_ALWAYS: Final = ("num_atoms", "atomic_numbers", "positions", "total_charge", "num_unpaired_electrons", "group")
_HAS: Final = {f"has_{name}": (False, "uint8", ()) for name in _COLUMNS if name not in (*_ALWAYS, _WEIGHT)}
_STORED: Final = {
    name: (per_atom, np.dtype(dtype), row)
    for name, (per_atom, dtype, row) in (
        _COLUMNS | {"num_atoms": (False, "int32", ()), "group": (False, "int32", ())} | _HAS
    ).items()
}


def encode_block(graphs: Sequence[Graph]) -> bytes:
    """Pack conformers into the bytes of one tar member; the same conformers give the same bytes.

    Args:
        graphs: Conformers, one at least; each with its own labels.

    Raises:
        DataError: There are more conformers or bytes than a block may have, or a weight is below zero or not finite.
    """
    assert graphs, "a block holds conformers"
    if len(graphs) > MAX_BLOCK_CONFORMERS:
        rule = f"have at most {MAX_BLOCK_CONFORMERS} conformers"
        raise DataError("block", rule, len(graphs), "Write smaller blocks")
    columns: dict[str, Any] = {"num_atoms": np.array([g.num_atoms for g in graphs], np.int32)}
    for name in _COLUMNS:
        if name != _WEIGHT:
            columns |= _join(name, graphs)
    if (weights := to_column((g.loss_weight for g in graphs), "block")) is not None:
        columns[_WEIGHT] = weights
    names = sorted({g.group for g in graphs})
    numbers = {name: number for number, name in enumerate(names)}
    columns["group"] = np.array([numbers[g.group] for g in graphs], np.int32)
    size = sum(c.nbytes for c in columns.values())
    if size > MAX_BLOCK_BYTES - layout.MAX_HEADER_BYTES:
        raise DataError("block", f"have less than {MAX_BLOCK_BYTES} bytes", f"{size} bytes", "Write smaller blocks")
    schema = SCHEMA if _WEIGHT in columns else UNWEIGHTED_SCHEMA
    return _to_bytes(columns, json.dumps({"schema": schema, "groups": names}, sort_keys=True))


def _join(name: str, graphs: Sequence[Graph]) -> dict[str, Any]:
    """Return a column, and where only some conformers have it the column that says which; nothing where none has it."""
    per_atom, dtype, row = _COLUMNS[name]
    values = [getattr(g, name) for g in graphs]
    has = np.array([v is not None for v in values])
    if not has.any():
        return {}
    if not has.all():
        filler = 0 if dtype == "bool" else np.nan
        shapes = [(g.num_atoms, *row) if per_atom else row for g in graphs]
        values = [np.full(s, filler, dtype) if v is None else v for s, v in zip(shapes, values, strict=True)]
    joined = (np.concatenate if per_atom else np.stack)([np.asarray(v, dtype) for v in values])
    column = {name: np.ascontiguousarray(joined)}  # bytes are those of memory as it lies, whatever its order
    return column if has.all() else column | {f"has_{name}": has.astype(np.uint8)}


def _to_bytes(columns: Columns, description: str) -> bytes:
    shapes = {name: (column.dtype, column.shape) for name, column in columns.items()}
    data = b"".join(columns[name].tobytes() for name in layout.sort_columns(shapes))
    _, table = layout.build_header(shapes, {})
    checksum = f"{_compute_checksum(data, description, table):08x}"
    header, _ = layout.build_header(shapes, {"so3krates": description, "crc32": checksum})
    return header + data


def _compute_checksum(data: bytes | memoryview, description: str, table: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(table, zlib.crc32(description.encode())))


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A decoded block: columns, and a view of each conformer on request."""

    columns: Columns
    """read-only views into the bytes that were read; `has_<label>` (num_conformers,) where some conformers lack the label"""
    offsets: IntArray
    """(num_conformers + 1,) first atom of each conformer"""
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def has(self, name: str) -> BoolArray:
        """Return (num_conformers,) which conformers have a label, `cell` or `pbc`."""
        if name not in self.columns:
            return np.zeros(len(self), bool)
        flags = self.columns.get(f"has_{name}")
        return np.ones(len(self), bool) if flags is None else flags.astype(bool)

    def graph(self, index: int) -> Graph:
        """Return one conformer; its arrays are views into the block."""
        atoms = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        fields: dict[str, Any] = {"group": self.groups[int(self.columns["group"][index])]}
        for name, (per_atom, _, row) in _COLUMNS.items():
            column, has = self.columns.get(name), self.columns.get(f"has_{name}")
            if column is not None and (has is None or has[index]):
                fields[name] = column[atoms] if per_atom else column[index] if row else float(column[index])
        return Graph(**fields)

    def __iter__(self) -> Iterator[Graph]:
        return (self.graph(i) for i in range(len(self)))


def decode_block(payload: bytes, where: str = "block", *, check_sum: bool = True) -> Block:
    """Unpack the bytes of one tar member.

    Args:
        payload: What `encode_block` made.
        where: Name for error messages, `shard:member`.
        check_sum: Whether to compare the block's own check sum; not needed where that of all its bytes has been compared.

    Raises:
        DataError: The bytes are no block, are damaged, or were written by a newer version.
    """
    try:
        spans, metadata, first = layout.read_header(payload, len(payload))
        header = json.loads(metadata["so3krates"])
        schema, groups = header.get("schema"), _read_groups(header["groups"])
        columns = layout.view_columns(payload, spans, first)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse_damaged(where, "be a block of conformers", f"{type(error).__name__}: {error}") from error
    check_schema(schema, where)
    if check_sum and schema > 1:
        found = _compute_checksum(memoryview(payload)[first:], metadata["so3krates"], layout.hash_table(spans))
        if f"{found:08x}" != metadata.get("crc32"):
            raise refuse_damaged(where, f"have the check sum {metadata.get('crc32')}", f"{found:08x}")
    offsets = _check_columns(columns, where)
    numbers = columns["group"]
    if not 0 <= int(numbers.min()) <= int(numbers.max()) < len(groups):
        raise refuse_damaged(f"{where} column `group`", f"count the {len(groups)} groups", numbers[:8].tolist())
    return Block(columns, offsets, groups)


def _read_groups(names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        raise ValueError("groups that are no list of texts")
    "".join(names).encode()  # half of a character could not be written to any log
    return tuple(names)


def _check_columns(columns: Columns, where: str) -> IntArray:
    """Check names, shapes and dtypes of all columns; returns the first atom of each conformer, with an end."""
    for name in _ALWAYS:
        if name not in columns:
            raise refuse_damaged(where, f"have the column `{name}`", ", ".join(sorted(columns)))
    counts = columns["num_atoms"]
    if counts.ndim != 1 or counts.dtype != np.int32 or not 1 <= len(counts) <= MAX_BLOCK_CONFORMERS or counts.min() < 1:
        rule = f"give the atoms, at least one, of 1 to {MAX_BLOCK_CONFORMERS} conformers"
        found = f"{counts.dtype} {counts.shape} {counts.ravel()[:8].tolist()}"
        raise refuse_damaged(f"{where} column `num_atoms`", rule, found)
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=offsets[1:])
    num_atoms = int(offsets[-1])
    for name, column in columns.items():
        if name not in _STORED:
            raise refuse_damaged(f"{where} column `{name}`", f"be one of {', '.join(_STORED)}", "another one")
        per_atom, dtype, row = _STORED[name]
        expected = (num_atoms if per_atom else len(counts), *row)
        if column.shape != expected or column.dtype != dtype:
            found = f"{column.dtype} {column.shape}"
            raise refuse_damaged(f"{where} column `{name}`", f"be {dtype} {expected}", found)
        if name in _HAS and (name.removeprefix("has_") not in columns or column.max() > 1):
            raise refuse_damaged(f"{where} column `{name}`", "be 0 or 1, beside what it is about", column[:8].tolist())
        if name == "pbc" and column.view(np.uint8).max() > 1:  # numpy counts on it, and writes past the end where not
            raise refuse_damaged(f"{where} column `{name}`", "be 0 or 1", column.view(np.uint8)[:8].tolist())
    if _WEIGHT in columns and (wrong := find_wrong_weight(columns[_WEIGHT])) is not None:
        raise refuse_damaged(f"{where} column `{_WEIGHT}`", "be finite numbers, none below zero", wrong)
    return offsets


def check_schema(schema: object, where: str) -> None:
    """Raise `DataError` where a schema number is no integer or comes from a newer version of this package."""
    if type(schema) is not int or schema < 1:
        raise refuse_damaged(where, "name its schema, an integer from 1", repr(schema))
    if schema > SCHEMA:
        raise DataError(where, f"have schema {SCHEMA} or lower", schema, "Install a newer so3krates-dist")
