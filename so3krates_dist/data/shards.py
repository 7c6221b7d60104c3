"""Shards on disk: how conformers become tar members and how they are read back, checked.

A data set is a folder with `manifest.json` and tar files. A tar member is a *block* of conformers stored in columns (one
safetensors file, no pickle): atoms of all conformers one after another, `num_atoms` tells where each ends. The manifest lists
every block with its place in the tar, so a reader fetches just the blocks it needs; a plain `webdataset.WebDataset(path)` with
`decode_sample` mapped over it reads the same shards from front to back. This file refuses what is truncated, altered or newer
than it understands.
"""

import dataclasses
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.numpy
import webdataset

from so3krates_dist.errors import DataError
from so3krates_dist.files import hash_file
from so3krates_dist.graph import Graph

SCHEMA: Final = 1
"""Version of blocks and manifest; a reader refuses a higher one."""

MANIFEST_NAME: Final = "manifest.json"
SPLITS: Final = ("train", "validation", "test")
MEMBER_SUFFIX: Final = "safetensors"
MAX_OPEN_SHARDS: Final = 128
"""files that a reader keeps open at a time; processes are commonly allowed 1024"""
_TAR_RECORD: Final = 512

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
}
_ALWAYS: Final = ("atomic_numbers", "positions", "total_charge", "num_unpaired_electrons", "group")


def encode_block(graphs: Sequence[Graph]) -> bytes:
    """Pack conformers into the bytes of one tar member.

    Args:
        graphs: At least one conformer; all of them have the same labels.

    Raises:
        DataError: Some conformers have a label that others lack.
    """
    columns = {"num_atoms": np.array([g.num_atoms for g in graphs], np.int32)}
    for name, (per_atom, dtype, _) in _COLUMNS.items():
        values = [getattr(g, name) for g in graphs]
        missing = sum(v is None for v in values)
        if missing == len(values):
            continue
        if missing:
            raise DataError(
                f"label `{name}`",
                "be there for all conformers of a block or for none",
                f"{missing} of {len(values)} without it",
                "Write conformers with different labels to different data sets",
            )
        joined = (np.concatenate if per_atom else np.stack)([np.asarray(v, dtype) for v in values])
        columns[name] = np.ascontiguousarray(joined)  # safetensors writes memory as it lies, whatever its order
    names = sorted({g.group for g in graphs})
    columns["group"] = np.array([names.index(g.group) for g in graphs], np.int32)
    header = json.dumps({"schema": SCHEMA, "groups": names}, sort_keys=True)
    return safetensors.numpy.save(columns, metadata={"so3krates": header})


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A decoded block: columns, and a view of each conformer on request."""

    columns: Mapping[str, np.ndarray]
    offsets: np.ndarray
    """(num_conformers + 1,) first atom of each conformer"""
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def graph(self, index: int) -> Graph:
        """Return one conformer; its arrays are views into the block."""
        atoms = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        fields: dict[str, Any] = {"group": self.groups[int(self.columns["group"][index])]}
        for name, (per_atom, _, row) in _COLUMNS.items():
            column = self.columns.get(name)
            if column is not None:
                fields[name] = column[atoms] if per_atom else column[index] if row else float(column[index])
        return Graph(**fields)

    def __iter__(self) -> Iterator[Graph]:
        return (self.graph(i) for i in range(len(self)))


def _damaged(where: str, rule: str, got: object) -> DataError:
    return DataError(where, rule, got, "Copy the file again, or make the data set anew")


def decode_block(payload: bytes, where: str = "block") -> Block:
    """Unpack the bytes of one tar member.

    Args:
        payload: What `encode_block` made.
        where: Name for error messages, `shard:member`.

    Raises:
        DataError: The bytes are no block, are damaged, or were written by a newer version.
    """
    try:
        header_size = int.from_bytes(payload[:8], "little")
        header = json.loads(json.loads(payload[8 : 8 + header_size])["__metadata__"]["so3krates"])
        columns = safetensors.numpy.load(payload)
    except Exception as error:  # safetensors, json and unicode raise many kinds for the same finding
        raise _damaged(where, "be a block of conformers", f"{type(error).__name__}: {error}") from error
    check_schema(header.get("schema"), where)
    counts = columns.get("num_atoms", np.zeros(0, np.int32)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    _check_columns(columns, len(counts), int(offsets[-1]), where)
    groups = tuple(str(g) for g in header.get("groups", ()))
    if columns["group"].size and not 0 <= int(columns["group"].min()) <= int(columns["group"].max()) < len(groups):
        raise _damaged(f"{where} column `group`", f"count the {len(groups)} groups", columns["group"].tolist()[:8])
    return Block(columns, offsets, groups)


def _check_columns(columns: Mapping[str, np.ndarray], num_conformers: int, num_atoms: int, where: str) -> None:
    for name in _ALWAYS:
        if name not in columns:
            raise _damaged(where, f"have the column `{name}`", ", ".join(sorted(columns)))
    for name, (per_atom, dtype, row) in (_COLUMNS | {"group": (False, "int32", ())}).items():
        expected = (num_atoms if per_atom else num_conformers, *row)
        column = columns.get(name)
        if column is not None and (column.shape != expected or column.dtype != np.dtype(dtype)):
            found = f"{column.dtype} {column.shape}"
            raise _damaged(f"{where} column `{name}`", f"be {dtype} {expected}", found)


def check_schema(schema: object, where: str) -> None:
    """Raise `DataError` where a schema number is no integer or comes from a newer version of this package."""
    if not isinstance(schema, int) or schema < 1:
        raise _damaged(where, "name its schema, an integer from 1", repr(schema))
    if schema > SCHEMA:
        raise DataError(where, f"have schema {SCHEMA} or lower", schema, "Install a newer so3krates-dist")


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode one WebDataset sample in place of `.decode()`, which would run pickles.

    Args:
        sample: `{"__key__": ..., "safetensors": bytes}` as `webdataset.WebDataset` yields it.

    Returns:
        `{"__key__": ..., "block": Block}`.
    """
    where = f"{Path(str(sample.get('__url__', ''))).name}:{sample['__key__']}"
    if MEMBER_SUFFIX not in sample:
        raise _damaged(where, f"hold one `.{MEMBER_SUFFIX}` member", ", ".join(sorted(sample)))
    return {"__key__": sample["__key__"], "block": decode_block(sample[MEMBER_SUFFIX], where)}


def iter_shard(path: Path) -> Iterator[tuple[str, Block]]:
    """Read one shard from front to back through WebDataset, in the order it was written."""
    # A list, so that braces in a name mean nothing; an absolute path, so that no name can be a command (`pipe:...`).
    dataset = webdataset.WebDataset(
        [str(path.resolve())],
        shardshuffle=False,
        nodesplitter=lambda urls: urls,
        workersplitter=lambda urls: urls,
        handler=_reraise,
    )
    for sample in dataset.map(decode_sample):
        yield sample["__key__"], sample["block"]


def _reraise(error: Exception) -> bool:
    raise error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockEntry:
    """Where one block lies and what it must be."""

    key: str
    offset: int
    """bytes from the start of the tar to the payload"""
    size: int
    """bytes of the payload"""
    crc32: int
    num_conformers: int
    num_atoms: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One tar file of the data set."""

    file: str
    split: str
    size: int
    """bytes"""
    sha256: str
    blocks: tuple[BlockEntry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What is in a data set folder; the content of `manifest.json`."""

    schema: int
    name: str
    level_of_theory: str
    licence: str
    """SPDX identifier, or `unknown`"""
    units: Mapping[str, str]
    labels: tuple[str, ...]
    """label columns that all conformers have: `energy`, `forces`, ..."""
    splits: Mapping[str, Any]
    """how the split was made, and conformers in each"""
    groups: Mapping[str, int]
    """conformers in each group"""
    statistics: Mapping[str, Any]
    """of the training split; keys: data/statistics.py"""
    provenance: Mapping[str, Any]
    """versions, sources with sha256, unit factors, seeds; no dates, no host names"""
    shards: tuple[ShardEntry, ...]

    def of_split(self, split: str) -> tuple[ShardEntry, ...]:
        """Return the shards of one split."""
        return tuple(s for s in self.shards if s.split == split)

    def num_conformers(self, split: str) -> int:
        """Return how many conformers a split has."""
        return sum(b.num_conformers for s in self.of_split(split) for b in s.blocks)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any byte of the data."""
        text = "".join(f"{s.split} {s.sha256}\n" for s in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shard_to_json(shard: ShardEntry) -> dict[str, Any]:
    """Blocks as columns: ten thousand of them stay readable and load fast."""
    columns = {f.name: [getattr(b, f.name) for b in shard.blocks] for f in dataclasses.fields(BlockEntry)}
    return {
        "file": shard.file,
        "split": shard.split,
        "size": shard.size,
        "sha256": shard.sha256,
        "blocks": columns,
    }


def _shard_from_json(entry: Mapping[str, Any]) -> ShardEntry:
    if not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", entry["file"]):
        raise ValueError(f"a shard is called {entry['file']!r}")
    names = [f.name for f in dataclasses.fields(BlockEntry)]
    rows = zip(*(entry["blocks"][n] for n in names), strict=True)
    blocks = tuple(BlockEntry(**dict(zip(names, row, strict=True))) for row in rows)
    return ShardEntry(
        file=entry["file"], split=entry["split"], size=entry["size"], sha256=entry["sha256"], blocks=blocks
    )


def dump_manifest(manifest: Manifest) -> str:
    """Return the text of `manifest.json`: sorted keys, so that the same content gives the same bytes."""
    content = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    content["shards"] = [_shard_to_json(s) for s in manifest.shards]
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a data set.

    Raises:
        DataError: The folder or the file is missing, damaged or from a newer version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            str(folder),
            f"hold a {MANIFEST_NAME}",
            "no such file",
            "Make a data set with `so3krates generate` or `convert`",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_schema(content.get("schema"), str(path))
        content["shards"] = tuple(_shard_from_json(s) for s in content["shards"])
        content["labels"] = tuple(content["labels"])
        return Manifest(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(str(path), "be a manifest", f"{type(error).__name__}: {error}") from error


def check_dataset(folder: Path, *, hashes: bool = False) -> Manifest:
    """Check that every shard is there and whole.

    Args:
        folder: Data set.
        hashes: Compare the sha256 of every shard too (reads all bytes, about 1 GB/s); sizes are compared always.

    Returns:
        The manifest.

    Raises:
        DataError: A shard is missing, has another size, or other bytes.
    """
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file():
            raise _damaged(str(path), "be there, the manifest lists it", "no such file")
        size = path.stat().st_size
        if size != shard.size:
            raise _damaged(str(path), f"have {shard.size} bytes", f"{size} bytes")
        if hashes and (found := hash_file(path)) != shard.sha256:
            raise _damaged(str(path), f"have the sha256 {shard.sha256[:12]}...", f"{found[:12]}...")
    return manifest


class BlockReader:
    """Reads single blocks of a data set by their place in the tar, and checks each one's CRC."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def read(self, shard: ShardEntry, block: BlockEntry) -> Block:
        """Read and decode one block.

        Raises:
            DataError: The shard is missing, or the bytes are not those that were written.
        """
        where = f"{self._folder / shard.file}:{block.key}"
        if shard.file not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                self.close()
            try:
                self._descriptors[shard.file] = os.open(self._folder / shard.file, os.O_RDONLY)
            except OSError as error:
                raise _damaged(where, "be readable", error.strerror) from error
        payload = os.pread(self._descriptors[shard.file], block.size, block.offset)
        if len(payload) != block.size:
            raise _damaged(where, f"have {block.size} bytes", f"{len(payload)} bytes")
        if zlib.crc32(payload) != block.crc32:
            raise _damaged(where, f"have the CRC {block.crc32:08x}", f"{zlib.crc32(payload):08x}")
        return decode_block(payload, where)

    def close(self) -> None:
        """Close all files; the reader may be used again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without open files."""
        return {"_folder": self._folder, "_descriptors": {}}


def iter_graphs(folder: Path, manifest: Manifest, split: str) -> Iterator[Graph]:
    """Yield every conformer of a split once, in the order it was stored."""
    reader = BlockReader(folder)
    try:
        for shard in manifest.of_split(split):
            for block in shard.blocks:
                yield from reader.read(shard, block)
    finally:
        reader.close()


def write_shards(
    folder: Path, split: str, graphs: Iterable[Graph], *, block_size: int, blocks_per_shard: int
) -> list[ShardEntry]:
    """Write the conformers of one split as tar files `<split>-000000.tar`, ... into an existing folder.

    Args:
        folder: Existing folder; the caller renames it into place when all is written.
        split: `train`, `validation` or `test`.
        graphs: Conformers in the order they shall have.
        block_size: Conformers in a block.
        blocks_per_shard: Blocks in a tar file.

    Returns:
        The manifest's entries, in order. The same conformers give the same bytes.
    """
    ordered = list(graphs)
    blocks = [ordered[i : i + block_size] for i in range(0, len(ordered), block_size)]
    shards = []
    for number, first in enumerate(range(0, len(blocks), blocks_per_shard)):
        path = folder / f"{split}-{number:06d}.tar"
        entries = _write_shard(path, blocks[first : first + blocks_per_shard])
        size, digest = path.stat().st_size, hash_file(path)
        shards.append(ShardEntry(file=path.name, split=split, size=size, sha256=digest, blocks=entries))
    return shards


def _write_shard(path: Path, blocks: Sequence[Sequence[Graph]]) -> tuple[BlockEntry, ...]:
    entries = []
    with path.open("wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            offset = 0
            for number, graphs in enumerate(blocks):
                payload, key = encode_block(graphs), f"{path.stem}-{number:06d}"
                writer.write({"__key__": key, MEMBER_SUFFIX: payload})
                entries.append(
                    BlockEntry(
                        key=key, offset=offset + _TAR_RECORD, size=len(payload), crc32=zlib.crc32(payload),
                        num_conformers=len(graphs), num_atoms=sum(g.num_atoms for g in graphs),
                    )
                )  # fmt: skip
                offset += _TAR_RECORD + -(-len(payload) // _TAR_RECORD) * _TAR_RECORD
        file.flush()
        os.fsync(file.fileno())
    return tuple(entries)


def choose_block_size(num_conformers: int) -> int:
    """Return how many conformers a block shall hold: 128, or fewer where a split would have less than sixteen blocks.

    Enough blocks keep the order random (blocks are permuted, notes in data/plan.py) and give every reader something to do.
    """
    return int(np.clip(-(-num_conformers // 16), 1, 128))


def build_manifest(  # noqa: PLR0913 - the manifest has that many independent entries
    *,
    name: str,
    level_of_theory: str,
    licence: str,
    splits: Mapping[str, Any],
    groups: Mapping[str, int],
    labels: Sequence[str],
    statistics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    shards: Sequence[ShardEntry],
) -> Manifest:
    """Put a manifest together; units are always the package's own."""
    units = {
        "energy": "eV",
        "length": "Angstrom",
        "forces": "eV/Angstrom",
        "stress": "eV/Angstrom^3",
        "charge": "e",
    }
    return Manifest(
        schema=SCHEMA, name=name, level_of_theory=level_of_theory, licence=licence, units=units, labels=tuple(labels),
        splits=splits, groups=groups, statistics=statistics, provenance=provenance, shards=tuple(shards),
    )  # fmt: skip
