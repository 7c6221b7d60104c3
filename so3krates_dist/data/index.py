"""The index of a data set: where every block lies, and the sizes and labels of every conformer, in memory-mapped columns.

Blocks are numbered through all shards in the manifest's order, and conformers through all blocks. Nothing here grows in memory with
the data set: a reader maps `index.safetensors`, a writer (`IndexBuilder`) appends to one file per column. Pair counts are tabulated
at a few cutoffs, so that batches can be filled by cost for any model without looking at a structure (`estimate_pairs`).
"""

import dataclasses
import itertools
import math
import mmap
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from so3krates_dist import files
from so3krates_dist.data import layout
from so3krates_dist.data.codec import MAX_BLOCK_BYTES, MAX_BLOCK_CONFORMERS, Block, Columns
from so3krates_dist.data.loss_weights import WeightSums
from so3krates_dist.data.manifest import INDEX_NAME, SPLITS, IndexEntry, Manifest
from so3krates_dist.data.pair_counts import (
    FLAGS,
    PAIR_CUTOFFS,
    PERIODIC,
    UIntArray,
    count_pairs,
    estimate_pairs,
    find_flags,
)
from so3krates_dist.data.verification import refuse_damaged
from so3krates_dist.graph import Graph, IntArray

__all__ = [
    "FLAGS", "PAIR_CUTOFFS", "PERIODIC", "BlockTable", "Index", "IndexBuilder", "Samples", "UIntArray", "check_table",
    "compute_index", "count_pairs", "estimate_pairs", "find_flags", "find_splits", "map_index", "read_places",
]  # fmt: skip

SCHEMA: Final = 2
"""Version of the index; schema 3 of blocks changed nothing in it"""
_CUTS: Final = len(PAIR_CUTOFFS)
_COLUMNS: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "block_shard": ("int32", ()),
    "block_offset": ("int64", ()),
    "block_size": ("int64", ()),
    "block_crc32": ("uint32", ()),
    "block_first": ("int64", ()),  # with an end
    "block_atoms": ("int64", ()),
    "block_pairs": ("int64", (_CUTS,)),
    "block_max_atoms": ("uint32", ()),
    "block_max_pairs": ("uint32", (_CUTS,)),
    "sample_atoms": ("uint32", ()),
    "sample_pairs": ("uint32", (_CUTS,)),
    "sample_flags": ("uint8", ()),
}
_PLACES: Final = tuple(_COLUMNS)[:6]
"""Columns of a `BlockTable`"""


# --------------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTable:
    """Where the blocks of a data set lie; columns are read-only and, from schema 2 on, memory-mapped."""

    block_shard: npt.NDArray[np.int32]
    """(num_blocks,) number of the shard in the manifest"""
    block_offset: IntArray
    """(num_blocks,) bytes from the start of the shard to the payload"""
    block_size: IntArray
    """(num_blocks,) bytes"""
    block_crc32: UIntArray
    """(num_blocks,) of the payload"""
    block_first: IntArray
    """(num_blocks + 1,) first conformer of each block, with an end"""
    block_atoms: IntArray
    """(num_blocks,) atoms of all its conformers"""
    splits: Mapping[str, range]
    """blocks of each split"""

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all splits."""
        return len(self.block_shard)

    @property
    def num_conformers(self) -> int:
        """Number of conformers of all splits."""
        return int(self.block_first[-1])

    def blocks_of_split(self, split: str) -> range:
        """Return the numbers of the blocks of a split."""
        return self.splits.get(split, range(0))

    def rows(self, block: int) -> slice:
        """Return the conformers of a block: its rows of the `sample_` columns."""
        return slice(int(self.block_first[block]), int(self.block_first[block + 1]))

    def rows_of_blocks(self, blocks: npt.ArrayLike) -> IntArray:
        """Return the conformers of several blocks, one block after another."""
        blocks = np.asarray(blocks, np.int64)
        firsts = self.block_first[blocks]
        sizes = self.block_first[blocks + 1] - firsts
        ends = np.cumsum(sizes)
        starts: IntArray = np.repeat(firsts - (ends - sizes), sizes)
        return starts + np.arange(len(starts))


class Samples(NamedTuple):
    """What the index says of some conformers."""

    atoms: UIntArray
    """(num_conformers,)"""
    pairs: UIntArray
    """(num_conformers, 5) within `PAIR_CUTOFFS`"""
    flags: npt.NDArray[np.uint8]
    """(num_conformers,) sums of `FLAGS` and `PERIODIC`"""


@dataclasses.dataclass(frozen=True, eq=False)
class Index(BlockTable):
    """Where the blocks of a data set lie, and the sizes and labels of all conformers."""

    block_pairs: IntArray
    """(num_blocks, 5) pairs of all its conformers within `PAIR_CUTOFFS`"""
    block_max_atoms: UIntArray
    """(num_blocks,) atoms of its largest conformer"""
    block_max_pairs: UIntArray
    """(num_blocks, 5) pairs of the conformer that has most"""
    sample_atoms: UIntArray
    """(num_conformers,)"""
    sample_pairs: UIntArray
    """(num_conformers, 5) pairs within `PAIR_CUTOFFS`"""
    sample_flags: npt.NDArray[np.uint8]
    """(num_conformers,) sums of `FLAGS` and `PERIODIC`"""
    path: Path | None = None
    """file that the columns are mapped from; None: they are in memory"""
    _mapped: mmap.mmap | None = None
    _descriptor: int = -1
    """the same file, open for reading; closed with the last reference to the index"""
    _starts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """byte of the file where each column starts; `sample_` columns come last"""

    def read_samples(self, blocks: npt.ArrayLike) -> "Samples":
        """Return the sizes and labels of all conformers of some blocks, one block after another.

        They are read from the file, not through the map: pages of a map come in groups, which for blocks at random places is a
        hundred times the memory of the rows.

        Raises:
            DataError: The file was cut since it was opened.
        """
        blocks = np.asarray(blocks, np.int64)
        if self._descriptor < 0:
            rows = self.rows_of_blocks(blocks)
            return Samples(self.sample_atoms[rows], self.sample_pairs[rows], self.sample_flags[rows])
        groups = np.split(
            blocks, np.flatnonzero(np.diff(blocks) != 1) + 1
        )  # blocks that follow each other are read at once
        runs = [(int(self.block_first[g[0]]), int(self.block_first[g[-1] + 1])) for g in groups if len(g)]
        return Samples(*(self._read_rows(name, runs) for name in ("sample_atoms", "sample_pairs", "sample_flags")))

    def _read_rows(self, name: str, runs: Sequence[tuple[int, int]]) -> npt.NDArray[Any]:
        dtype, row = _COLUMNS[name]
        rows = np.empty((sum(last - first for first, last in runs), *row), dtype)
        buffer, width, position = rows.reshape(-1).view(np.uint8).data, rows.itemsize * math.prod(row), 0
        for first, last in runs:
            end = position + (last - first) * width
            offset = self._starts[name] + first * width
            while position < end:
                count = os.preadv(self._descriptor, [buffer[position:end]], offset)
                if not count:
                    raise refuse_damaged(
                        str(self.path), f"have rows {first} to {last} of `{name}`", "the end of the file"
                    )
                position, offset = position + count, offset + count
        return rows

    def release(self) -> None:
        """Give the memory of rows of the `sample_` columns that were looked at back to the system; they are mapped again on use."""
        if self._mapped is not None:
            start = min(v for k, v in self._starts.items() if k.startswith("sample_"))
            page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            if page < len(self._mapped):
                self._mapped.madvise(mmap.MADV_DONTNEED, page)

    def __reduce__(self) -> tuple[Callable[..., "Index"], tuple[Any, ...]]:
        """Travel to another process as a file name: what is mapped is not copied."""
        if self.path is not None:
            return map_index, (self.path, self.splits)
        columns = {name: getattr(self, name) for name in _COLUMNS}
        return _from_columns, (columns, self.splits)


def _from_columns(columns: Columns, splits: Mapping[str, range]) -> Index:
    fields: dict[str, Any] = {name: columns[name] for name in _COLUMNS}
    return Index(**fields, splits=splits)


def map_index(path: Path, splits: Mapping[str, range], descriptor: int | None = None) -> Index:
    """Map an index file.

    Args:
        path: `index.safetensors`.
        splits: Blocks of each split, see `find_splits`.
        descriptor: The file where it is open for reading already; it is closed with the last reference to the index.

    Raises:
        DataError: The file is missing, damaged or from a newer version.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
    except OSError as error:
        raise refuse_damaged(str(path), "be readable", error.strerror) from error
    try:
        mapped, spans, first = _map_file(descriptor)
        columns = layout.view_columns(mapped, spans, first)
        _check_columns(columns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        os.close(descriptor)
        raise refuse_damaged(str(path), "be an index", f"{type(error).__name__}: {error}") from error
    fields: dict[str, Any] = {name: columns[name] for name in _COLUMNS}
    starts = {name: first + span.start for name, span in spans.items()}
    index = Index(**fields, splits=splits, path=path, _mapped=mapped, _descriptor=descriptor, _starts=starts)
    weakref.finalize(index, os.close, descriptor)
    return index


def _map_file(descriptor: int) -> tuple[mmap.mmap, dict[str, layout.Span], int]:
    """Return the file in memory, where its columns are, and where the first one starts."""
    size = min(int.from_bytes(os.pread(descriptor, 8, 0), "little"), layout.MAX_HEADER_BYTES)
    spans, metadata, first = layout.read_header(os.pread(descriptor, 8 + size, 0), os.fstat(descriptor).st_size)
    if metadata.get("so3krates_index") != str(SCHEMA):
        raise ValueError(f"an index of schema {metadata.get('so3krates_index')}")
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), spans, first


def _check_columns(columns: Columns) -> None:
    num_blocks, num_conformers = len(columns["block_shard"]), len(columns["sample_atoms"])
    for name, (dtype, row) in _COLUMNS.items():
        length = num_conformers if name.startswith("sample_") else num_blocks + (name == "block_first")
        if columns[name].shape != (length, *row) or columns[name].dtype.name != dtype:
            raise ValueError(f"column {name} is {columns[name].dtype} {columns[name].shape}")


def find_splits(manifest: Manifest) -> dict[str, range]:
    """Return the numbers of the blocks of each split."""
    ends = list(itertools.accumulate(sum(s.num_blocks for s in manifest.of_split(split)) for split in SPLITS))
    return {split: range(first, end) for split, first, end in zip(SPLITS, [0, *ends], ends, strict=False)}


def read_places(manifest: Manifest, content: Mapping[str, Any], where: str = "manifest.json") -> BlockTable:
    """Return where the blocks of a data set of schema 1 lie.

    Args:
        manifest: Of the data set.
        content: What is in `manifest.json`, whose shards list their blocks.
        where: Name of the file for messages.

    Raises:
        DataError: A place is no number, or one that no file has.
    """
    blocks = [shard["blocks"] for shard in content["shards"]]

    def join(name: str, dtype: str) -> npt.NDArray[Any]:
        values = [value for block in blocks for value in block[name]]
        if any(type(v) is not int or not 0 <= v <= np.iinfo(dtype).max for v in values):
            raise refuse_damaged(where, f"list every block's {name}, an integer from 0", "another value")
        return np.array(values, dtype)

    return BlockTable(
        block_shard=np.repeat(np.arange(len(blocks), dtype=np.int32), [s.num_blocks for s in manifest.shards]),
        block_offset=join("offset", "int64"),
        block_size=join("size", "int64"),
        block_crc32=join("crc32", "uint32"),
        block_first=np.concatenate([[0], np.cumsum(join("num_conformers", "int64"))]),
        block_atoms=join("num_atoms", "int64"),
        splits=find_splits(manifest),
    )


def check_table(index: BlockTable, manifest: Manifest, where: str) -> None:
    """Raise `DataError` where an index does not belong to the shards of a manifest."""
    shards = manifest.shards
    firsts, atoms = np.asarray(index.block_first), np.asarray(index.block_atoms)
    sizes, num_blocks = np.diff(firsts), sum(s.num_blocks for s in shards)
    fits = index.num_blocks == num_blocks  # before anything of the length that the manifest claims is made
    numbers = np.repeat(np.arange(len(shards)), [s.num_blocks for s in shards]) if fits else None
    if (
        numbers is None
        or not np.array_equal(index.block_shard, numbers)
        or firsts[0] != 0
        or firsts[-1] != sum(s.num_conformers for s in shards)
    ):
        rule = f"list the {num_blocks} blocks of the manifest"
        raise refuse_damaged(where, rule, f"{index.num_blocks} blocks, or in other shards")
    if not _are_within(sizes, MAX_BLOCK_CONFORMERS) or not _are_within(atoms, MAX_BLOCK_BYTES):
        rule = f"list blocks of 1 to {MAX_BLOCK_CONFORMERS} conformers, with atoms"
        raise refuse_damaged(where, rule, "an empty block, or a larger one")
    weights = {"num_conformers": sizes, "num_atoms": atoms}
    for field, values in weights.items():
        found = np.bincount(numbers, values, len(shards)).astype(np.int64)
        wrong = np.flatnonzero(found != [getattr(s, field) for s in shards])
        if len(wrong):
            shard = shards[wrong[0]]
            rule = f"count {getattr(shard, field)} {field.removeprefix('num_')} in {shard.file}"
            raise refuse_damaged(where, rule, found[wrong[0]])
    if not _are_within(index.block_size, MAX_BLOCK_BYTES):
        got = f"{np.min(index.block_size)} to {np.max(index.block_size)}"
        raise refuse_damaged(where, f"list blocks of 1 to {MAX_BLOCK_BYTES} bytes", got)
    room = np.array([s.size for s in shards], np.int64)[numbers] - index.block_size
    if np.any(index.block_offset > room) or np.any(index.block_offset < 0):
        raise refuse_damaged(where, "give places within the shards", "a block beyond the end of its shard")


def _are_within(values: npt.NDArray[Any], most: int) -> bool:
    return bool(np.min(values, initial=1) >= 1 and np.max(values, initial=1) <= most)


# --------------------------------------------------------------------------------------------------------------- writing


class IndexBuilder:
    """Collects what the index says of blocks as they are written; memory does not grow with their number.

    Args:
        folder: Data set in the making; holds hidden part files until `finish`.
    """

    def __init__(self, folder: Path) -> None:
        self._parts, self._target = folder / f".{INDEX_NAME}.parts", folder / INDEX_NAME
        self._parts.mkdir()
        self._rows: list[dict[str, Any]] = []
        self._lengths = Counter[str]()
        self._num_conformers = 0
        self.num_shards = 0
        self.label_counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        """for each split, conformers that have each label"""
        self.loss_weights = {split: WeightSums() for split in SPLITS}
        """for each split, what is known of its conformers' weights in the loss"""

    def begin_shard(self) -> None:
        """Count the blocks that come now for the next shard of the manifest."""
        self._flush()
        self.num_shards += 1

    def add_block(
        self, split: str, graphs: Sequence[Graph], *, offset: int, size: int, crc32: int, pairs: UIntArray | None = None
    ) -> None:
        """Add the next block of the current shard.

        Args:
            split: Split of the shard.
            graphs: Conformers of the block.
            offset: Bytes from the start of the shard to the payload.
            size: Bytes of the payload.
            crc32: Of the payload.
            pairs: (num_conformers, 5) what `count_pairs` gives for each; None: count them here.
        """
        rows = _describe_block(graphs, pairs)
        rows |= {"block_shard": self.num_shards - 1, "block_offset": offset, "block_size": size, "block_crc32": crc32}
        rows["block_first"] = self._num_conformers
        self._num_conformers += len(graphs)
        self.loss_weights[split].add(np.array([g.loss_weight for g in graphs], np.float32))
        for label, bit in FLAGS.items():
            self.label_counts[split][label] += int(np.count_nonzero(rows["sample_flags"] & bit))
        self._rows.append(rows)

    def _flush(self) -> None:
        for name, (dtype, row) in _COLUMNS.items():
            values = [np.asarray(rows[name], dtype).reshape(-1, *row) for rows in self._rows]
            with (self._parts / name).open("ab") as file:
                for array in values:
                    file.write(np.ascontiguousarray(array).tobytes())
            self._lengths[name] += sum(len(array) for array in values)
        self._rows = []

    def finish(self) -> IndexEntry:
        """Write `index.safetensors`; returns its entry in the manifest."""
        self._flush()
        with (self._parts / "block_first").open("ab") as file:
            file.write(np.array([self._num_conformers], np.int64).tobytes())
        self._lengths["block_first"] += 1
        shapes = {n: (np.dtype(dtype), (self._lengths[n], *row)) for n, (dtype, row) in _COLUMNS.items()}
        header, _ = layout.build_header(shapes, {"so3krates_index": str(SCHEMA)})
        temporary = self._target.with_name(f".{INDEX_NAME}.tmp")
        with temporary.open("wb") as file:
            file.write(header)
            for name in layout.sort_columns(shapes):
                _append(file, self._parts / name)
        files.put_in_place(temporary, self._target)
        shutil.rmtree(self._parts)
        size, sha256 = self._target.stat().st_size, files.hash_file(self._target)
        return IndexEntry(file=INDEX_NAME, size=size, sha256=sha256)


def _append(file: IO[bytes], part: Path) -> None:
    with part.open("rb") as source:
        shutil.copyfileobj(source, file, 2**20)


def _describe_block(graphs: Sequence[Graph], pairs: UIntArray | None) -> dict[str, Any]:
    """Return what the index says of a block, its place aside."""
    atoms = np.array([g.num_atoms for g in graphs], np.uint32)
    counts = np.stack([count_pairs(g) for g in graphs]) if pairs is None else np.asarray(pairs, np.uint32)
    assert counts.shape == (len(graphs), _CUTS), "pairs of every conformer of the block"
    return {
        "block_atoms": atoms.sum(dtype=np.int64),
        "block_pairs": counts.sum(0, dtype=np.int64),
        "block_max_atoms": atoms.max(),
        "block_max_pairs": counts.max(0),
        "sample_atoms": atoms,
        "sample_pairs": counts,
        "sample_flags": np.array([find_flags(g) for g in graphs], np.uint8),
    }


def compute_index(table: BlockTable, blocks: Iterable[Block]) -> Index:
    """Make an index in memory, for a data set of schema 1.

    Args:
        table: Where the blocks lie.
        blocks: All of them in order.
    """
    rows = [_describe_block(list(block), None) for block in blocks]
    columns: dict[str, Any] = {}
    for name, (dtype, row) in _COLUMNS.items():
        if name in _PLACES:
            columns[name] = getattr(table, name)
        else:
            values = [np.asarray(r[name], dtype).reshape(-1, *row) for r in rows]
            columns[name] = np.concatenate([np.zeros((0, *row), dtype), *values])
    return _from_columns(columns, table.splits)
