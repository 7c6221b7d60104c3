"""The door to a data set: its manifest, its index, and any block by its number, wherever the files are.

Blocks are fetched by their place in the tar, with a limited number of open files, and checked every time: length, CRC32, shape,
numbers of conformers and atoms. A file's sha256 is compared when it is first opened on a machine, where that is asked for.
"""

import bisect
import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from so3krates_dist.data.codec import Block, decode_block
from so3krates_dist.data.index import BlockTable, Index, check_table, compute_index, find_splits, map_index, read_places
from so3krates_dist.data.manifest import (
    MANIFEST_NAME,
    IndexEntry,
    Manifest,
    ShardEntry,
    block_key,
    load_manifest,
    parse_manifest,
)
from so3krates_dist.data.storage import LocalStorage, StorageSettings, open_storage
from so3krates_dist.data.verification import check_hash, refuse_damaged, verify_once
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

MAX_OPEN_SHARDS: Final = 64
"""files that a reader keeps open at a time, for each data set; processes are commonly allowed 1024 in all"""


def check_size(path: Path, expected: int) -> None:
    """Raise `DataError` where a file is missing or has another length in bytes than the manifest says."""
    if not path.is_file():
        raise refuse_damaged(str(path), "be there, the manifest lists it", "no such file")
    if (size := path.stat().st_size) != expected:
        raise refuse_damaged(str(path), f"have {expected} bytes", f"{size} bytes")


def check_dataset(folder: Path, *, hashes: bool = False) -> Manifest:
    """Check that every shard and the index of a data set on disk are there and whole.

    Args:
        folder: Data set.
        hashes: Compare the sha256 of every file too (reads all bytes, about 1 GB/s); sizes are compared always.

    Returns:
        The manifest.

    Raises:
        DataError: A file is missing, has another size, or other bytes.
    """
    manifest = load_manifest(folder)
    entries: list[ShardEntry | IndexEntry] = [*manifest.shards, *([manifest.index] if manifest.index else [])]
    for entry in entries:
        path = folder / entry.file
        check_size(path, entry.size)
        if hashes:
            check_hash(path, entry.sha256, str(path))
    return manifest


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockEntry:
    """Where one block lies and what it must be."""

    file: str
    key: str
    offset: int
    """bytes from the start of the tar to the payload"""
    size: int
    """bytes of the payload"""
    crc32: int
    num_conformers: int
    num_atoms: int


class DataFolder:
    """The door to one data set: its manifest, its index, and any block by its number. Travels to processes without open files.

    Args:
        location: Folder, or the address of one on a server (data/storage.py).
        manifest: What is known of it already; None: read it.
        verify: Of a folder on this machine: compare sizes, or also the sha256 of every file when it is first opened. Both are
            compared when a file comes from a server.
        storage: How files on servers are fetched and kept; None: as by default.

    Raises:
        DataError: There is no data set, or none that can be read.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        manifest: Manifest | None = None,
        verify: Literal["size", "sha256"] = "size",
        storage: StorageSettings | None = None,
    ) -> None:
        self._storage = open_storage(str(location), storage)
        self.location = self._storage.location
        """folder or address, for messages"""
        self.manifest = manifest or self._read_manifest()
        self.verify = verify
        self._firsts = list(itertools.accumulate((s.num_blocks for s in self.manifest.shards), initial=0))
        self._table: BlockTable | None = None
        self._index: Index | None = None
        self._descriptors: dict[int, int] = {}

    def _read_manifest(self) -> Manifest:
        if isinstance(self._storage, LocalStorage):
            return load_manifest(self.folder)
        return parse_manifest(self._storage.read_text(MANIFEST_NAME), self._storage.address(MANIFEST_NAME))

    @property
    def folder(self) -> Path:
        """Folder of a data set on this machine.

        Raises:
            DataError: It is on a server.
        """
        if not isinstance(self._storage, LocalStorage):
            raise DataError(self.location, "be a folder of this machine", "an address", "Copy the data set to a folder")
        return Path(self.location)

    @property
    def table(self) -> BlockTable:
        """Where the blocks lie."""
        if self._table is None:
            self._table = self._read_table()
        return self._table

    @property
    def index(self) -> Index:
        """Where the blocks lie, and the sizes and labels of all conformers; made by reading all blocks in schema 1."""
        if self._index is None:
            table = self.table
            numbers = range(self.num_blocks)
            self._index = table if isinstance(table, Index) else compute_index(table, map(self.read_block, numbers))
        return self._index

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all splits."""
        return self._firsts[-1]

    def _read_table(self) -> BlockTable:
        entry = self.manifest.index
        where = self._storage.address(entry.file if entry else MANIFEST_NAME)
        if entry is None:
            table = read_places(self.manifest, json.loads(self._storage.read_text(MANIFEST_NAME)), where)
        else:
            self._check_file(entry)
            path = self._storage.fetch(entry.file, size=entry.size, sha256=entry.sha256)
            # Opened by the storage, which fetches it again where a small cache has dropped it since.
            descriptor = self._storage.open_file(entry.file, size=entry.size, sha256=entry.sha256)
            table = map_index(path, find_splits(self.manifest), descriptor)
        check_table(table, self.manifest, where)
        return table

    def _check_file(self, entry: ShardEntry | IndexEntry) -> None:
        """Check a file of this machine, its hash once; those of servers are checked when they are fetched."""
        if isinstance(self._storage, LocalStorage):
            path = Path(self.location) / entry.file
            check_size(path, entry.size)
            if self.verify == "sha256":
                verify_once(path, entry.sha256, str(path))

    def block_entry(self, number: int) -> BlockEntry:
        """Return where a block lies and what it must be."""
        table = self.table
        shard_number = int(table.block_shard[number])
        shard = self.manifest.shards[shard_number]
        return BlockEntry(
            file=shard.file,
            key=block_key(shard, number - self._firsts[shard_number]),
            offset=int(table.block_offset[number]),
            size=int(table.block_size[number]),
            crc32=int(table.block_crc32[number]),
            num_conformers=int(table.block_first[number + 1] - table.block_first[number]),
            num_atoms=int(table.block_atoms[number]),
        )

    def where(self, number: int) -> str:
        """Return the name of a block in messages, `<shard>:<key>`."""
        shard_number = bisect.bisect_right(self._firsts, number) - 1
        shard = self.manifest.shards[shard_number]
        return f"{self._storage.address(shard.file)}:{block_key(shard, number - self._firsts[shard_number])}"

    def read_block(self, number: int) -> Block:
        """Read and decode one block.

        Raises:
            DataError: The shard is missing, or the bytes are not those that were written.
        """
        entry = self.block_entry(number)
        where = f"{self._storage.address(entry.file)}:{entry.key}"
        descriptor = self._open(int(self.table.block_shard[number]))
        try:
            payload = os.pread(descriptor, entry.size, entry.offset)
        except OSError as error:  # a disk that fails, a file server that is gone
            raise refuse_damaged(where, "be readable", error.strerror) from error
        if len(payload) != entry.size:
            raise refuse_damaged(where, f"have {entry.size} bytes", f"{len(payload)} bytes")
        if (found := zlib.crc32(payload)) != entry.crc32:
            raise refuse_damaged(where, f"have the CRC {entry.crc32:08x}", f"{found:08x}")
        block = decode_block(payload, where, check_sum=False)
        if (len(block), int(block.offsets[-1])) != (entry.num_conformers, entry.num_atoms):
            rule = f"hold {entry.num_conformers} conformers with {entry.num_atoms} atoms as the index says"
            raise refuse_damaged(where, rule, f"{len(block)} with {block.offsets[-1]}")
        return block

    def _open(self, shard_number: int) -> int:
        descriptor = self._descriptors.pop(shard_number, None)
        if descriptor is None:
            entry = self.manifest.shards[shard_number]
            self._check_file(entry)
            while len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = self._storage.open_file(entry.file, size=entry.size, sha256=entry.sha256)
        self._descriptors[shard_number] = descriptor  # the last one used is the last one to be closed
        return descriptor

    def iter_blocks(self, split: str) -> Iterator[Block]:
        """Yield the blocks of a split in the order they were stored."""
        return map(self.read_block, self.table.blocks_of_split(split))

    def iter_graphs(self, split: str) -> Iterator[Graph]:
        """Yield every conformer of a split once, in the order it was stored."""
        return itertools.chain.from_iterable(self.iter_blocks(split))

    def close(self) -> None:
        """Close all files; the data set may be used again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> "DataFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without open files; mapped columns are mapped again there."""
        kept = {} if self.manifest.index is not None else {"_table": self._table, "_index": self._index}
        return {**self.__dict__, "_table": None, "_index": None, "_descriptors": {}} | kept


def open_dataset(
    location: str | Path,
    *,
    manifest: Manifest | None = None,
    verify: Literal["size", "sha256"] = "size",
    storage: StorageSettings | None = None,
) -> DataFolder:
    """Open a data set, see `DataFolder`."""
    return DataFolder(location, manifest=manifest, verify=verify, storage=storage)


def iter_graphs(folder: Path, manifest: Manifest, split: str) -> Iterator[Graph]:
    """Yield every conformer of a split once, in the order it was stored."""
    with open_dataset(folder, manifest=manifest) as dataset:
        yield from dataset.iter_graphs(split)
