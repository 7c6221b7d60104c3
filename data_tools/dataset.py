"""From labelled structures to a data set folder: split by hash, write shards, verify, rename into place.

The split and the order depend on the structures and the seed alone, not on the order they come in, so adding data later moves
no conformer to another split (with fractions). A folder appears under its name only when all of it is written and read back.
"""

import contextlib
import dataclasses
import fcntl
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np

from so3krates_dist import __version__, files
from so3krates_dist.data import shards
from so3krates_dist.data.shards import iter_graphs
from so3krates_dist.data.statistics import compute_statistics, hash_geometry
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

DEFAULT_SPLIT: Final = "0.8,0.1,0.1"
BLOCKS_PER_SHARD: Final = 256
_LOCK: Final = "so3krates.lock"
_CONTENT: Final = "content"
_HASHES: Final = 2**64
_LABELS: Final = ("energy", "forces", "stress", "dipole", "partial_charges", "hirshfeld_ratios")
_GRAPH_ARRAYS: Final = ("cell", "pbc", *_LABELS)


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """How much of the data each of `shards.SPLITS` gets."""

    request: str
    shares: tuple[float, ...]
    """fractions that sum to one, or numbers of conformers"""
    is_fractions: bool

    @classmethod
    def parse(cls, request: str) -> "Split":
        """Read `0.8,0.1,0.1` (fractions, a dot in any of them) or `950,50,1000` (numbers of conformers).

        Raises:
            DataError: The text is neither, or leaves nothing for training.
        """
        remedy = "Give train, validation and test as fractions like 0.8,0.1,0.1 or as numbers like 950,50,1000"
        try:
            is_fractions = "." in request
            shares = tuple((float if is_fractions else int)(part) for part in request.split(","))
        except ValueError:
            raise DataError("--split", "be three numbers", repr(request), remedy) from None
        if len(shares) != len(shards.SPLITS) or not all(np.isfinite(shares)) or min(shares) < 0 or shares[0] <= 0:
            raise DataError("--split", "be three numbers, the first above zero", repr(request), remedy)
        if is_fractions and abs(sum(shares) - 1) > 1e-6:
            raise DataError("--split", "have fractions that sum to one", f"{sum(shares):g}", remedy)
        return cls(request, shares, is_fractions)

    def find_bounds(self, hashes: Sequence[int]) -> tuple[int, ...]:
        """Return for each split the hash that its conformers stay below.

        Args:
            hashes: Of all conformers, ascending; equal ones stay in one split.

        Raises:
            DataError: There are fewer conformers than asked for.
        """
        ends = np.cumsum(self.shares)
        if self.is_fractions:
            return (*(round(float(end) * _HASHES) for end in ends[:-1]), _HASHES)
        if ends[-1] > len(hashes):
            got = f"{len(hashes)} different ones"
            raise DataError("--split", f"ask for no more conformers than there are ({int(ends[-1])})", got, "Lower it")
        return tuple(hashes[int(end)] if end < len(hashes) else _HASHES for end in ends)


def find_split(value: int, bounds: Sequence[int]) -> str | None:
    """Return the split that a hash falls in, None where it is in none."""
    return next((name for name, bound in zip(shards.SPLITS, bounds, strict=True) if value < bound), None)


def check_output_folder(folder: Path) -> None:
    """Raise `DataError` where the output folder is there already; nothing is ever overwritten."""
    if folder.exists() or folder.is_symlink():
        raise DataError(str(folder), "not exist yet", "a folder", "Choose another --out, or remove it first")
    if not folder.parent.is_dir():
        raise DataError(str(folder.parent), "be a folder", "nothing there", "Make it first, or choose another --out")
    _check_workplace(_find_workplace(folder))


def _find_workplace(folder: Path) -> Path:
    """Return the hidden folder that a data set is written in before it gets its name."""
    return folder.with_name(f".{folder.name}.tmp")


def _check_workplace(path: Path) -> None:
    """Raise `DataError` where something is in the place of the hidden folder that this tool did not put there."""
    if not path.exists() and not path.is_symlink():
        return
    names = {p.name for p in path.iterdir()} if path.is_dir() and not path.is_symlink() else {"no folder"}
    if names and (_LOCK not in names or names - {_LOCK, _CONTENT}):
        rule = "be free for a data set while it is written"
        raise DataError(str(path), rule, ", ".join(sorted(names)[:3]), "Remove it, or choose another --out")


def describe_versions(*packages: str) -> dict[str, str]:
    """Return the version of this package and of others that have a say in the numbers."""
    return {"so3krates-dist": __version__} | {name: metadata.version(name) for name in packages}


def describe_source(path: Path) -> dict[str, str]:
    """Return name and sha256 of a file that data came from; folders above it are nobody's business."""
    return {"file": path.name, "sha256": files.hash_file(path)}


def write_dataset(  # noqa: PLR0913 - a manifest has that many independent entries
    folder: Path,
    graphs: Iterable[Graph],
    *,
    name: str,
    level_of_theory: str,
    licence: str,
    provenance: Mapping[str, Any],
    split: str,
    seed: int,
    isolated_atom_energies: Mapping[int, float] | None = None,
) -> shards.Manifest:
    """Write a data set: shards of each split in the order of their hash, and the manifest.

    Args:
        folder: Must not exist; it appears when all is written and verified.
        graphs: Labelled structures, all with the same labels; exact duplicates are dropped and counted.
        name: Name of the data set.
        level_of_theory: Of the labels, e.g. `GFN2-xTB`.
        licence: SPDX identifier, or `unknown`.
        provenance: What the data came from; plain values without dates and host names.
        split: Fractions or numbers, see `Split.parse`.
        seed: Of the hash that splits and shuffles.
        isolated_atom_energies: eV by atomic number, at the same level of theory.

    Returns:
        The manifest. The same structures and arguments give the same bytes.

    Raises:
        DataError: The folder exists, labels are missing or uneven, or the split asks for what is not there.
    """
    check_output_folder(folder)
    shares = Split.parse(split)
    hashed, duplicates = _sort_by_hash(graphs, seed)
    labels = _check_labels([graph for _, graph in hashed])
    bounds = shares.find_bounds([value for value, _ in hashed])
    by_split: dict[str | None, list[Graph]] = {part: [] for part in (*shards.SPLITS, None)}
    for value, graph in hashed:
        by_split[find_split(value, bounds)].append(graph)
    unused = by_split.pop(None)
    if not by_split["train"]:
        rule, got = "leave conformers for training", f"none of {len(hashed)}"
        raise DataError("--split", rule, got, "Give numbers like 8,1,1 in place of fractions, or add conformers")
    dropped = dict(provenance.get("dropped", {})) | {
        "exact duplicate": duplicates,
        "left over by the split": len(unused),
    }
    splits = {
        "method": "blake2b of seed, atomic numbers and float32 positions, ascending",
        "seed": seed,
        "request": split,
        "upper_bounds": {part: f"{bound:#x}" for part, bound in zip(shards.SPLITS, bounds, strict=True)},
        "num_conformers": {part: len(by_split[part]) for part in shards.SPLITS},
    }
    with _temporary_folder(folder) as temporary:
        manifest = shards.build_manifest(
            name=name,
            level_of_theory=level_of_theory,
            licence=licence,
            splits=splits,
            groups=dict(sorted(Counter(g.group for part in by_split.values() for g in part).items())),
            labels=labels,
            statistics=compute_statistics(by_split["train"], isolated_atom_energies),
            provenance=dict(provenance) | {"dropped": {k: n for k, n in sorted(dropped.items()) if n}},
            shards=_write_splits(temporary, {part: by_split[part] for part in shards.SPLITS}),
        )
        files.write_text(temporary / shards.MANIFEST_NAME, shards.dump_manifest(manifest))
        _verify(temporary, by_split)
        _rename_into_place(temporary, folder)
    return manifest


def _sort_by_hash(graphs: Iterable[Graph], seed: int) -> tuple[list[tuple[int, Graph]], int]:
    """Return hashes and structures in ascending order, and how many exact duplicates were dropped."""
    unique: dict[tuple[int, bytes], Graph] = {}
    total = 0
    for graph in graphs:
        total += 1
        ordered = _in_c_order(graph)
        unique.setdefault((hash_geometry(ordered, seed), _to_bytes(ordered)), ordered)
    pairs = sorted(unique.items(), key=lambda item: item[0])
    return [(value, graph) for (value, _), graph in pairs], total - len(unique)


def _in_c_order(graph: Graph) -> Graph:
    """Return the structure with arrays in C order: safetensors stores memory as it lies, and ASE's forces lie in columns."""
    names = ("atomic_numbers", "positions", *(n for n in _GRAPH_ARRAYS if n != "energy"))
    arrays: dict[str, Any] = {n: np.ascontiguousarray(v) for n in names if (v := getattr(graph, n)) is not None}
    return dataclasses.replace(graph, **arrays)


def _to_bytes(graph: Graph) -> bytes:
    """Return all that is stored of a structure as bytes; equal for exact duplicates only."""
    arrays: list[np.ndarray] = [np.asarray(graph.atomic_numbers, np.uint8), np.asarray(graph.positions, np.float32)]
    arrays.append(np.array([graph.total_charge, graph.num_unpaired_electrons], np.float32))
    for name in _GRAPH_ARRAYS:
        value, dtype = getattr(graph, name), np.float64 if name == "energy" else np.float32
        arrays.append(np.zeros(0) if value is None else np.asarray(value, dtype))
    return graph.group.encode() + b"|" + b"|".join(array.tobytes() for array in arrays)


def _check_labels(graphs: Sequence[Graph]) -> tuple[str, ...]:
    """Return the labels that all structures have; each is there for all of them or for none."""
    if not graphs:
        raise DataError("data set", "hold structures", "none", "Check the input and what was dropped")
    present = []
    for name in _GRAPH_ARRAYS:
        missing = [g for g in graphs if getattr(g, name) is None]
        if missing and len(missing) < len(graphs):
            got = f"{len(missing)} of {len(graphs)} without it, e.g. one of {missing[0].group or 'no group'}"
            remedy = "Write structures with different labels to different data sets"
            raise DataError(f"label `{name}`", "be there for all structures or for none", got, remedy)
        if not missing and name in _LABELS:
            present.append(name)
    if not {"energy", "forces"} & set(present):
        raise DataError("data set", "have energies or forces", "neither", "Name the labels' keys with --keys")
    return tuple(present)


def _write_splits(folder: Path, by_split: Mapping[str, Sequence[Graph]]) -> list[shards.ShardEntry]:
    entries: list[shards.ShardEntry] = []
    for name, graphs in by_split.items():
        size = shards.choose_block_size(len(graphs))
        entries += shards.write_shards(folder, name, graphs, block_size=size, blocks_per_shard=BLOCKS_PER_SHARD)
    return entries


def _verify(folder: Path, by_split: Mapping[str | None, Sequence[Graph]]) -> None:
    """Read every conformer back from disk and compare it with what was meant to be written."""
    manifest = shards.check_dataset(folder)
    for split in shards.SPLITS:
        stored = iter_graphs(folder, manifest, split)
        for index, (wanted, found) in enumerate(zip_longest(by_split[split], stored)):
            if wanted is None or found is None or _to_bytes(wanted) != _to_bytes(found):
                remedy = "Check the disk, and report it"
                raise DataError(f"{folder} {split}:{index}", "be read back as it was written", "something else", remedy)


def check_block_counts(block: shards.Block, entry: shards.BlockEntry, where: str) -> None:
    """Raise `DataError` where a block has not as many conformers and atoms as the manifest says."""
    found = (len(block), int(block.offsets[-1]))
    if found != (entry.num_conformers, entry.num_atoms):
        rule = f"hold {entry.num_conformers} conformers with {entry.num_atoms} atoms as the manifest says"
        raise DataError(where, rule, f"{found[0]} with {found[1]}", "Make the data set anew")


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a hidden folder beside the wanted one; its content goes away again unless it is renamed.

    What a killed process left there is cleared. A lock, which ends with its process, tells it from what another one writes.
    """
    path = _find_workplace(folder)
    _check_workplace(path)
    path.mkdir(exist_ok=True)
    with (path / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "Wait for it, or choose another --out"
            raise DataError(str(folder), "be written by one process at a time", "another one", remedy) from None
        except OSError:
            pass  # a file system without locks
        shutil.rmtree(path / _CONTENT, ignore_errors=True)
        (path / _CONTENT).mkdir()
        try:
            yield path / _CONTENT
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _rename_into_place(temporary: Path, folder: Path) -> None:
    files.sync_folder(temporary)
    check_output_folder(folder)
    temporary.rename(folder)
    files.sync_folder(folder.parent)
