"""Shards on disk: how conformers become tar members and how they are read back, checked.

A data set is a folder (or a place on a server) with `manifest.json`, `index.safetensors` and tar files. A tar member is a *block*
of conformers stored in columns (data/codec.py). The index lists every block with its place in the tar, so a reader (data/folder.py)
fetches just the blocks it needs; a plain `webdataset.WebDataset(path)` with `decode_sample` mapped over it reads the same shards
from front to back. Refuses what is truncated, altered or newer than it understands, and says where.
"""

import contextlib
import dataclasses
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import webdataset
import webdataset.utils

from so3krates_dist import files
from so3krates_dist.data.archive import MEMBER_SUFFIX, TAR_RECORD, Member, iter_members, pad
from so3krates_dist.data.codec import LABELS, SCHEMA, UNWEIGHTED_SCHEMA, Block, check_schema, decode_block, encode_block
from so3krates_dist.data.folder import (
    BlockEntry,
    DataFolder,
    check_dataset,
    check_size,
    iter_graphs,
    open_dataset,
)
from so3krates_dist.data.index import IndexBuilder, UIntArray
from so3krates_dist.data.loss_weights import check_not_all_zero, summarize
from so3krates_dist.data.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    SPLITS,
    IndexEntry,
    Manifest,
    ShardEntry,
    block_key,
    build_manifest,
    dump_manifest,
    load_manifest,
)
from so3krates_dist.data.verification import refuse_damaged
from so3krates_dist.graph import Graph

__all__ = [
    "INDEX_NAME",
    "LABELS",
    "MANIFEST_NAME",
    "SCHEMA",
    "SPLITS",
    "UNWEIGHTED_SCHEMA",
    "Block",
    "BlockEntry",
    "DataFolder",
    "IndexBuilder",
    "IndexEntry",
    "Manifest",
    "ShardEntry",
    "ShardWriter",
    "build_manifest",
    "check_dataset",
    "check_schema",
    "choose_block_size",
    "decode_block",
    "decode_sample",
    "dump_manifest",
    "encode_block",
    "iter_graphs",
    "iter_shard",
    "load_manifest",
    "open_dataset",
    "write_index_and_manifest",
    "write_shards",
]  # fmt: skip

# Whatever shards are read through WebDataset in this process: no pickles, no shell commands in the place of file names.
webdataset.utils.enforce_security = True


# --------------------------------------------------------------------------------------------------- from front to back


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode one WebDataset sample in place of `.decode()`, which would run pickles.

    Args:
        sample: `{"__key__": ..., "safetensors": bytes}` as `webdataset.WebDataset` yields it.

    Returns:
        `{"__key__": ..., "block": Block}`.
    """
    where = f"{sample.get('__url__', 'sample')}:{sample['__key__']}"
    names = {name for name in sample if not name.startswith("_")}
    if names != {MEMBER_SUFFIX}:
        raise refuse_damaged(where, f"hold one `.{MEMBER_SUFFIX}` member", ", ".join(sorted(names)) or "none")
    return {"__key__": sample["__key__"], "block": decode_block(sample[MEMBER_SUFFIX], where)}


def iter_shard(path: Path, entry: ShardEntry | None = None) -> Iterator[tuple[str, Block]]:
    """Read one shard from front to back through WebDataset, in the order it was written.

    The frame of the tar is checked first, since WebDataset takes what is damaged for the end; then every block's own check sum.

    Args:
        path: Tar file.
        entry: What the manifest says of it: length, blocks in their order, conformers and atoms are compared with it.

    Raises:
        DataError: The shard is damaged, or not the one that the manifest means.
    """
    if entry is not None:
        check_size(path, entry.size)
    members = list(iter_members(path))
    _check_keys(path, members, entry)
    # A list, so that braces in a name mean nothing; an absolute path, so that no name can be a command (`pipe:...`).
    dataset = webdataset.WebDataset(
        [str(path.resolve())],
        shardshuffle=False,
        nodesplitter=lambda urls: urls,
        workersplitter=lambda urls: urls,
        handler=_reraise,
    )
    counts = np.zeros(3, np.int64)
    for sample in dataset.map(decode_sample):
        block = sample["block"]
        counts += 1, len(block), block.offsets[-1]
        yield sample["__key__"], block
    expected = (len(members), *counts[1:]) if entry is None else (len(members), entry.num_conformers, entry.num_atoms)
    if (found := tuple(counts.tolist())) != expected:
        rule = "hold {} blocks, {} conformers, {} atoms".format(*expected)
        raise refuse_damaged(str(path), rule, "{}, {}, {}".format(*found))


def _reraise(error: Exception) -> bool:
    raise error


def _check_keys(path: Path, members: Sequence[Member], entry: ShardEntry | None) -> None:
    if entry is None:
        return
    for number, member in enumerate(members[: entry.num_blocks]):
        if member.key != (key := block_key(entry, number)):
            raise refuse_damaged(f"{path}:{member.key}", f"come where {key} is", f"it as number {number}")
    if len(members) != entry.num_blocks:
        raise refuse_damaged(str(path), f"hold {entry.num_blocks} blocks", len(members))


# -------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes the blocks of one split as tar files `<split>-000000.tar`, ... into an existing folder, in constant memory.

    Args:
        folder: Existing folder; the caller renames it into place when all is written.
        split: `train`, `validation` or `test`; a data set's splits are written in this order.
        blocks_per_shard: Blocks in a tar file.
        index: Learns of every block, see `write_index_and_manifest`; None: the index is made of the shards later.
    """

    def __init__(self, folder: Path, split: str, *, blocks_per_shard: int, index: IndexBuilder | None = None) -> None:
        self._folder, self._split, self._blocks_per_shard, self._index = folder, split, blocks_per_shard, index
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._offset = 0
        self._counts = np.zeros(3, np.int64)
        self._entries: list[ShardEntry] = []

    def write_block(self, graphs: Sequence[Graph], pairs: UIntArray | None = None) -> None:
        """Write some conformers as the next block.

        Args:
            graphs: Conformers, one at least.
            pairs: (num_conformers, 5) what `count_pairs` gives for each; None: the index counts them.
        """
        if self._counts[0] == self._blocks_per_shard:
            self._end_shard()
        if self._file is None:
            self._begin_shard()
        payload, offset = encode_block(graphs), self._offset + TAR_RECORD
        key = f"{self._stem}-{int(self._counts[0]):06d}"
        self._tar.write({"__key__": key, MEMBER_SUFFIX: payload})
        if self._index is not None:
            crc32 = zlib.crc32(payload)
            self._index.add_block(self._split, graphs, offset=offset, size=len(payload), crc32=crc32, pairs=pairs)
        self._offset = offset + pad(len(payload))
        self._counts += 1, len(graphs), sum(g.num_atoms for g in graphs)

    @property
    def _stem(self) -> str:
        return f"{self._split}-{len(self._entries):06d}"

    def _begin_shard(self) -> None:
        self._file = (self._folder / f"{self._stem}.tar").open("wb")
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        if self._index is not None:
            self._index.begin_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._folder / f"{self._stem}.tar"
        num_blocks, num_conformers, num_atoms = self._counts.tolist()
        self._entries.append(
            ShardEntry(
                file=path.name, split=self._split, size=path.stat().st_size, sha256=files.hash_file(path),
                num_blocks=num_blocks, num_conformers=num_conformers, num_atoms=num_atoms,
            )
        )  # fmt: skip
        self._file, self._offset, self._counts = None, 0, np.zeros(3, np.int64)

    def close(self) -> list[ShardEntry]:
        """Finish the last shard; returns the manifest's entries, in order. The same blocks give the same bytes."""
        self._end_shard()
        return self._entries

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._end_shard()
        elif self._file is not None:
            with self._file, contextlib.suppress(OSError):  # the disk may be full, which is being told already
                self._tar.close()


def write_shards(
    folder: Path,
    split: str,
    graphs: Iterable[Graph],
    *,
    block_size: int,
    blocks_per_shard: int,
    index: IndexBuilder | None = None,
) -> list[ShardEntry]:
    """Write the conformers of one split as tar files, see `ShardWriter`.

    Args:
        folder: Existing folder; the caller renames it into place when all is written.
        split: `train`, `validation` or `test`.
        graphs: Conformers in the order they shall have.
        block_size: Conformers in a block.
        blocks_per_shard: Blocks in a tar file.
        index: Learns of every block.

    Returns:
        The manifest's entries, in order. The same conformers give the same bytes.
    """
    rest = iter(graphs)
    with ShardWriter(folder, split, blocks_per_shard=blocks_per_shard, index=index) as writer:
        while block := list(itertools.islice(rest, block_size)):
            writer.write_block(block)
    return writer.close()


def write_index_and_manifest(folder: Path, manifest: Manifest, index: IndexBuilder | None = None) -> Manifest:
    """Write `index.safetensors` and then `manifest.json`, so that a data set always has both.

    Args:
        folder: Data set in the making, with all shards of the manifest.
        manifest: All but the labels and the index.
        index: What the writers of the shards told; None: the shards are read for it.

    Returns:
        The manifest that was written.

    Raises:
        DataError: All conformers of the training split have the weight 0 in the loss.
    """
    index = index or _build_index(folder, manifest.shards)
    assert index.num_shards == len(manifest.shards), "an index of all shards"
    weights = summarize(index.loss_weights)
    check_not_all_zero(weights, manifest.name)
    counts = index.label_counts
    labels = tuple(label for label in LABELS if any(counts[split][label] for split in SPLITS))
    manifest = dataclasses.replace(
        manifest,
        schema=SCHEMA if weights else UNWEIGHTED_SCHEMA,
        labels=labels,
        loss_weights=weights,
        label_counts={split: {label: counts[split][label] for label in labels} for split in SPLITS},
        index=index.finish(),
    )
    files.write_text(folder / MANIFEST_NAME, dump_manifest(manifest))
    return manifest


def _build_index(folder: Path, entries: Iterable[ShardEntry]) -> IndexBuilder:
    index = IndexBuilder(folder)
    for entry in entries:
        index.begin_shard()
        path = folder / entry.file
        with path.open("rb") as file:
            for member in iter_members(path):
                payload = os.pread(file.fileno(), member.size, member.offset)
                graphs = list(decode_block(payload, f"{path}:{member.key}"))
                crc32 = zlib.crc32(payload)
                index.add_block(entry.split, graphs, offset=member.offset, size=member.size, crc32=crc32)
    return index


def choose_block_size(num_conformers: int) -> int:
    """Return how many conformers a block shall hold: 128, or fewer where a split would have less than sixteen blocks.

    Enough blocks keep the order random (blocks are permuted, notes in data/plan.py) and give every reader something to do.
    """
    return int(np.clip(-(-num_conformers // 16), 1, 128))
