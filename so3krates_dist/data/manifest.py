"""`manifest.json`: what a data set is, which shards and which index belong to it, in as few bytes as that takes.

Nothing in it grows with the number of blocks; their places are in the index (schema 2). Manifests of schema 1, which listed every
block, are read into the same form. Refuses names that are no plain file names, numbers that are none, and newer versions.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from so3krates_dist.data.codec import LABELS, SCHEMA, UNWEIGHTED_SCHEMA, check_schema
from so3krates_dist.data.loss_weights import Summary, check_summary
from so3krates_dist.data.verification import refuse_damaged
from so3krates_dist.errors import DataError

MANIFEST_NAME: Final = "manifest.json"
INDEX_NAME: Final = "index.safetensors"
SPLITS: Final = ("train", "validation", "test")
MAX_FILE_BYTES: Final = 1 << 50
"""Length of a shard or index, so that sums of lengths and places stay within 64 bits"""
MAX_TEXT_BYTES: Final = 1 << 28
"""Longest text that is read into memory; the manifest of ten million conformers has a few MB"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One tar file of the data set."""

    file: str
    split: str
    size: int
    """bytes"""
    sha256: str
    num_blocks: int
    num_conformers: int
    num_atoms: int

    @property
    def stem(self) -> str:
        """Name without its ending, which the keys of its blocks start with."""
        return self.file.removesuffix(".tar")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """The file that says where every block is, see data/index.py."""

    file: str
    size: int
    """bytes"""
    sha256: str


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
    """labels that at least one conformer has: `energy`, `forces`, ..."""
    splits: Mapping[str, Any]
    """how the split was made, and conformers in each"""
    groups: Mapping[str, int]
    """conformers in each group"""
    statistics: Mapping[str, Any]
    """of the training split; keys: data/statistics.py"""
    provenance: Mapping[str, Any]
    """versions, sources with sha256, unit factors, seeds; no dates, no host names"""
    shards: tuple[ShardEntry, ...]
    """those of each split together, in the order of `SPLITS`"""
    label_counts: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """for each split, how many conformers have each label"""
    loss_weights: Mapping[str, Summary] = dataclasses.field(default_factory=dict)
    """for each split, what weights its conformers have in the loss; empty where all are 1"""
    index: IndexEntry | None = None
    """None in data sets of schema 1, whose blocks are listed in `manifest.json`"""

    def of_split(self, split: str) -> tuple[ShardEntry, ...]:
        """Return the shards of one split."""
        return tuple(s for s in self.shards if s.split == split)

    def num_conformers(self, split: str) -> int:
        """Return how many conformers a split has."""
        return sum(s.num_conformers for s in self.shards if s.split == split)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any byte of the data."""
        text = "".join(f"{s.split} {s.sha256}\n" for s in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def block_key(shard: ShardEntry, number: int) -> str:
    """Return the key of a block by its number within its shard."""
    return f"{shard.stem}-{number:06d}"


def dump_manifest(manifest: Manifest) -> str:
    """Return the text of `manifest.json`: sorted keys, so that the same content gives the same bytes."""
    assert manifest.index is not None, "a manifest from schema 2 on names its index"
    content = dataclasses.asdict(manifest) | {"schema": SCHEMA if manifest.loss_weights else UNWEIGHTED_SCHEMA}
    if not manifest.loss_weights:
        del content["loss_weights"]
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a data set on disk.

    Raises:
        DataError: The folder or the file is missing, damaged or from a newer version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() and (match := re.match("([a-z0-9]+):/", str(folder))):  # what a Path leaves of `://`
        rule, remedy = (
            "be a folder of this machine",
            "Copy the data set to a folder; `train` and `evaluate` read it there too",
        )
        raise DataError(str(folder).replace(":/", "://", 1), rule, f"an address of the kind `{match[1]}:`", remedy)
    if not path.is_file():
        raise DataError(
            str(folder),
            f"hold a {MANIFEST_NAME}",
            "no such file",
            "Make a data set with `so3krates generate` or `convert`",
        )
    return parse_manifest(read_text(path), str(path))


def read_text(path: Path) -> bytes:
    """Return the bytes of a text file of this machine.

    Raises:
        DataError: It cannot be read, or is longer than any manifest.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise DataError(str(path), "be readable", error.strerror, "Check the folder's name") from error
    if len(text) > MAX_TEXT_BYTES:
        raise refuse_damaged(str(path), f"have at most {MAX_TEXT_BYTES} bytes", "more")
    return text


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Read the text of `manifest.json`.

    Raises:
        DataError: It is damaged or from a newer version.
    """
    try:
        content = json.loads(text)
        check_schema(content.get("schema"), where)
        read_shard = _read_shard_of_schema_1 if content["schema"] == 1 else _read_shard
        content["shards"] = tuple(read_shard(s) for s in content["shards"])
        content["labels"] = tuple(content["labels"])
        _check_order(content["shards"])
        if content["schema"] > 1:
            content["index"] = IndexEntry(**content["index"])
            _check_file(content["index"], "an index", "safetensors")
        manifest = Manifest(**content)
        _check_fields(manifest)
        return manifest if content["schema"] > 1 else _add_label_counts(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse_damaged(where, "be a manifest", f"{type(error).__name__}: {error}") from error


def _read_shard(entry: Mapping[str, Any]) -> ShardEntry:
    shard = ShardEntry(**entry)
    _check_file(shard, "a shard", "tar")
    counts = (shard.num_blocks, shard.num_conformers, shard.num_atoms)
    if any(type(n) is not int for n in counts) or not 1 <= counts[0] <= counts[1] <= counts[2] <= shard.size:
        raise ValueError(f"{shard.file} has {counts} blocks, conformers and atoms in {shard.size} bytes")
    return shard


def _read_shard_of_schema_1(entry: Mapping[str, Any]) -> ShardEntry:
    blocks = entry["blocks"]
    sums = {"num_conformers": sum(blocks["num_conformers"]), "num_atoms": sum(blocks["num_atoms"])}
    fields = {name: entry[name] for name in ("file", "split", "size", "sha256")}
    shard = _read_shard(fields | {"num_blocks": len(blocks["key"])} | sums)
    if blocks["key"] != [block_key(shard, k) for k in range(shard.num_blocks)]:
        raise ValueError(f"{shard.file} has blocks of other names than its own")
    if any(
        len(blocks[name]) != shard.num_blocks for name in ("offset", "size", "crc32", "num_conformers", "num_atoms")
    ):
        raise ValueError(f"{shard.file} has columns of different lengths")
    return shard


def _check_file(entry: ShardEntry | IndexEntry, kind: str, ending: str) -> None:
    if not re.fullmatch(rf"[A-Za-z0-9_-]+\.{ending}", entry.file):
        raise ValueError(f"{kind} is called {entry.file!r}")
    if (
        type(entry.size) is not int
        or not 1 <= entry.size <= MAX_FILE_BYTES
        or not re.fullmatch("[0-9a-f]{64}", entry.sha256)
    ):
        raise ValueError(f"{entry.file} has {entry.size!r} bytes with the sha256 {entry.sha256!r}")


def _check_fields(manifest: Manifest) -> None:
    """Raise `ValueError` where a field has another type than this package writes."""
    texts = (manifest.name, manifest.level_of_theory, manifest.licence, *manifest.units.values())
    if any(type(text) is not str for text in texts):
        raise ValueError("name, level_of_theory, licence or units that are no texts")
    if not set(manifest.labels) <= set(LABELS):
        raise ValueError(f"labels {manifest.labels}, which are not all among {', '.join(LABELS)}")
    if any(not isinstance(getattr(manifest, name), dict) for name in ("splits", "statistics", "provenance")):
        raise ValueError("splits, statistics or provenance that are no table")
    counts = [manifest.groups, *manifest.label_counts.values()]
    if any(type(n) is not int or n < 0 for count in counts for n in count.values()):
        raise ValueError("groups or label_counts that are no counts")
    check_summary(manifest.loss_weights, SPLITS)


def _check_order(entries: Sequence[ShardEntry]) -> None:
    """Blocks are numbered through the splits in their order, and an index by ranges; no file is there twice."""
    if len({entry.file for entry in entries}) < len(entries):
        raise ValueError("a shard that is listed twice")
    splits = [(*SPLITS, entry.split).index(entry.split) for entry in entries]
    if len(SPLITS) in splits:
        raise ValueError(f"a shard is of none of the splits {', '.join(SPLITS)}")
    if splits != sorted(splits):
        raise ValueError(f"shards are not in the order {', '.join(SPLITS)}")


def _add_label_counts(manifest: Manifest) -> Manifest:
    """In schema 1, a label was there for all conformers or for none."""
    counts = {s: dict.fromkeys(manifest.labels, manifest.num_conformers(s)) for s in SPLITS}
    return dataclasses.replace(manifest, label_counts=counts)


def build_manifest(  # noqa: PLR0913 - the manifest has that many independent entries
    *,
    name: str,
    level_of_theory: str,
    licence: str,
    splits: Mapping[str, Any],
    groups: Mapping[str, int],
    labels: Sequence[str] = (),
    statistics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    shards: Sequence[ShardEntry],
) -> Manifest:
    """Put a manifest together; units are the package's own; labels, weights and index come with `write_index_and_manifest`."""
    units = {
        "energy": "eV",
        "length": "Angstrom",
        "forces": "eV/Angstrom",
        "stress": "eV/Angstrom^3",
        "charge": "e",
    }
    return Manifest(
        schema=UNWEIGHTED_SCHEMA, name=name, level_of_theory=level_of_theory, licence=licence, units=units, labels=tuple(labels),
        splits=splits, groups=groups, statistics=statistics, provenance=provenance, shards=tuple(shards),
    )  # fmt: skip
