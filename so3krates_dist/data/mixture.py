"""The data sets of a run as one: opened, compared, mixed in shares, on one energy scale.

A `Source` is a data set as the plan and the stream see it: training blocks numbered from zero, sizes of their conformers, energies
already shifted to the model's baselines (data/levels.py). A `Mixture` is all sources of a run with what they have together.
Refuses what cannot be trained on together: different units, energies of different levels of theory without baselines, the same
data twice.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from so3krates_dist.config import DataSection, ModelSection
from so3krates_dist.data.codec import Block
from so3krates_dist.data.folder import DataFolder, open_dataset
from so3krates_dist.data.index import FLAGS, PERIODIC, estimate_pairs
from so3krates_dist.data.levels import Member, Reference, build_reference, check_levels, name_level
from so3krates_dist.data.loss_weights import find_largest
from so3krates_dist.data.manifest import Manifest
from so3krates_dist.data.passes import Limits, find_oversized
from so3krates_dist.data.storage import StorageSettings
from so3krates_dist.errors import DataError
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, FloatArray, Graph, IntArray, compute_formula

_BLOCKS_AT_A_TIME: Final = 1024
"""bounds the memory of going through an index"""
_SHARE_DIGITS: Final = 9
"""of computed shares: powers may differ in their last digit between machines"""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One data set of a run; a `PlanSource`. Travels to other processes without open files."""

    name: str
    """of the data set; with its fingerprint where several have the same"""
    location: str
    """folder or address"""
    data: DataFolder
    share: float
    """of the conformers that are trained on"""
    pair_cutoff: float
    """Å; pairs closer than this count in a conformer's size"""
    loss_weight: float = 1.0
    """factor of its errors in the training loss (`data.loss_weights`), beside each conformer's own"""
    shift: Mapping[int, float] | None = None
    """eV by atomic number, added to energies for each atom; None: nothing"""

    @property
    def manifest(self) -> Manifest:
        """Of the data set."""
        return self.data.manifest

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of the data."""
        return self.manifest.fingerprint

    @property
    def _blocks(self) -> range:
        return self.data.index.blocks_of_split("train")

    @functools.cached_property
    def block_sizes(self) -> npt.NDArray[np.int32]:
        """(num_blocks,) conformers in each training block."""
        blocks = self._blocks
        return np.diff(self.data.index.block_first[blocks.start : blocks.stop + 1]).astype(np.int32)

    @property
    def block_shards(self) -> npt.NDArray[np.int32]:
        """(num_blocks,) shard that each training block is in."""
        blocks = self._blocks
        return self.data.index.block_shard[blocks.start : blocks.stop]

    def sizes(self, blocks: IntArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return atoms and estimated pairs of all conformers of some training blocks, one block after another."""
        index = self.data.index
        rows = index.rows_of_blocks(np.asarray(blocks, np.int64) + self._blocks.start)
        atoms = index.sample_atoms[rows]
        pairs = estimate_pairs(atoms, index.sample_pairs[rows], index.sample_flags[rows], self.pair_cutoff)
        index.release()
        return atoms.astype(np.int64), pairs.astype(np.int64)

    def read_block(self, block: int) -> Block:
        """Read a training block, with energies on the model's scale.

        Raises:
            DataError: It is damaged.
        """
        return self._shift(self.data.read_block(self._blocks.start + block))

    def where(self, block: int) -> str:
        """Return the name of a training block in messages, `<shard>:<block>`."""
        return self.data.where(self._blocks.start + block)

    def iter_graphs(self, split: str) -> Iterator[Graph]:
        """Yield every conformer of a split once, in the order it was stored, with energies on the model's scale.

        Raises:
            DataError: A block is damaged.
        """
        for number in self.data.index.blocks_of_split(split):
            yield from self._shift(self.data.read_block(number))

    def _shift(self, block: Block) -> Block:
        if self.shift is None or "energy" not in block.columns:
            return block
        shifts = np.add.reduceat(self._table[block.columns["atomic_numbers"]], block.offsets[:-1])
        energies = block.columns["energy"] + shifts
        return dataclasses.replace(block, columns={**block.columns, "energy": energies})

    @functools.cached_property
    def _table(self) -> FloatArray:
        """(119,) eV by atomic number."""
        table = np.zeros(MAX_ATOMIC_NUMBER + 1)
        for element, energy in (self.shift or {}).items():
            table[element] = energy
        return table

    def find_oversized(self, limits: Limits) -> tuple[int, tuple[str, str]]:
        """Look for training conformers that exceed the limits of a micro-batch by themselves.

        Blocks are judged by their largest members first, so that few rows of the index are looked at.

        Returns:
            How many there are; and of the first one its name, `<shard>:<block>:<index>`, and its formula and sizes.
        """
        index, blocks = self.data.index, self._blocks
        own = slice(blocks.start, blocks.stop)
        pairs = estimate_pairs(index.block_max_atoms[own], index.block_max_pairs[own], PERIODIC, self.pair_cutoff)
        count, first = 0, ("", "")
        for block in find_oversized(index.block_max_atoms[own], pairs, limits).tolist():
            found_atoms, found_pairs = self.sizes(np.array([block]))
            rows = find_oversized(found_atoms, found_pairs, limits).tolist()
            if rows and not count:
                formula = compute_formula(self.read_block(block).graph(rows[0]).atomic_numbers)
                sizes = f"{formula}, {found_atoms[rows[0]]} atoms and about {found_pairs[rows[0]]} pairs"
                first = f"{self.where(block)}:{rows[0]}", sizes
            count += len(rows)
        return count, first


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """The data sets of a run."""

    sources: tuple[Source, ...]
    """in the order of the configuration; those with a share of zero are neither trained nor validated on"""
    reference: Reference
    """energy baselines and statistics that the model takes over"""

    @classmethod
    def open(cls, section: DataSection, model: ModelSection, reference: Reference | None = None) -> "Mixture":
        """Open the data sets of a configuration and compare them.

        Args:
            section: Which data sets, and their shares.
            model: Says which pairs of atoms count.
            reference: Of the run, where it has begun.

        Raises:
            DataError: One is missing or damaged, or does not go together with another one.
        """
        folders = [open_folder(location, section) for location in section.sources]
        check_manifests({loc: f.manifest for loc, f in zip(section.sources, folders, strict=True)})
        shares = compute_shares(section, [f.manifest.num_conformers("train") for f in folders])
        names = _name_sources([f.manifest for f in folders])
        weights = section.loss_weights or (1.0,) * len(folders)
        sources = [
            Source(
                name=name, location=location, data=data, share=share, pair_cutoff=model.pair_cutoff, loss_weight=weight
            )
            for name, location, data, share, weight in zip(
                names, section.sources, folders, shares, weights, strict=True
            )
        ]
        active = [s for s in sources if s.share]
        check_loss_weights(active)
        members = [_describe(s, model) for s in active]
        check_levels(members, reference)
        reference = build_reference(members, [s.iter_graphs("train") for s in active], reference)
        return cls(sources=tuple(_put_on_scale(s, reference) for s in sources), reference=reference)

    @property
    def active(self) -> tuple[Source, ...]:
        """Those that are used."""
        return tuple(s for s in self.sources if s.share)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each source in the conformers that are trained on."""
        return tuple(s.share for s in self.sources)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Of each source, beside those of single conformers; evaluation knows none."""
        return tuple(s.loss_weight for s in self.sources)

    @property
    def name(self) -> str:
        """Names of all data sets that are used."""
        return " + ".join(s.name for s in self.active)

    @property
    def level_of_theory(self) -> str:
        """Of the model's energies, with those of other levels that were shifted to it."""
        texts = list(dict.fromkeys(s.manifest.level_of_theory.strip() for s in self.active))
        if len(texts) == 1:
            return texts[0]
        others = [t for t in texts if t != self.reference.level]
        return f"{self.reference.level} (energies of {', '.join(others)} shifted to it)"

    @property
    def fingerprint(self) -> str:
        """Of one data set its own; of several, sixteen hexadecimal digits of theirs."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return hashlib.sha256("\n".join(s.fingerprint for s in self.sources).encode()).hexdigest()[:16]

    @property
    def held_out(self) -> str:
        """Fingerprints of the data sets that models are compared on while training."""
        return " ".join(s.fingerprint for s in self.active if s.manifest.num_conformers("validation"))

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that at least one conformer has."""
        return tuple(dict.fromkeys(label for s in self.active for label in s.manifest.labels))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of all groups of conformers."""
        return tuple(sorted({group for s in self.active for group in s.manifest.groups}))

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Combined, in the form of a manifest's; keys: data/statistics.py."""
        return self.reference.statistics

    def num_conformers(self, split: str) -> int:
        """Return how many conformers a split of all data sets that are used has."""
        return sum(s.manifest.num_conformers(split) for s in self.active)

    def iter_graphs(self, split: str) -> Iterator[Graph]:
        """Yield every conformer of a split of all data sets that are used, one data set after another, energies on one scale."""
        return itertools.chain.from_iterable(s.iter_graphs(split) for s in self.active)

    def describe(self) -> list[str]:
        """Return a line about each of several data sets: its share, and on which energy scale it is."""
        lines = []
        for source in self.sources if len(self.sources) > 1 else ():
            count = f"{source.manifest.num_conformers('train'):,} conformers"
            scale = "" if source.shift is None else ", energies shifted to the model's baselines"
            scale += "" if source.loss_weight == 1 else f", errors count {source.loss_weight:g} times"
            lines.append(
                f"{source.name}: {100 * source.share:.3g} % of each step, {count}, {source.manifest.level_of_theory}{scale}"
            )
        return lines

    def find(self, fingerprint: str) -> Source | None:
        """Return the source with a fingerprint."""
        return next((s for s in self.sources if s.fingerprint == fingerprint), None)


def open_folder(location: str | Path, section: DataSection) -> DataFolder:
    """Open a data set with the settings of a configuration for reading and caching."""
    storage = StorageSettings(
        cache=Path(section.cache).expanduser() if section.cache else None,
        cache_bytes=round(section.cache_gb * 1e9),
        connect_timeout_s=section.connect_timeout,
        stall_timeout_s=section.stall_timeout,
        retries=section.retries,
    )
    # A hash would condemn a shard for one block, and be computed again for each of them.
    verify = "size" if section.on_damage == "skip" else section.verify
    return open_dataset(location, verify=verify, storage=storage)


def open_source(
    location: str, section: DataSection, model: ModelSection, *, name: str, share: float, reference: Reference
) -> Source:
    """Open a data set that an earlier part of a run was trained on, on the run's energy scale.

    Args:
        location: Folder or address.
        section: How to read it.
        model: Says which pairs of atoms count.
        name: That it had then.
        share: That it had then.
        reference: Of the run.
    """
    data = open_folder(location, section)
    source = Source(name=name, location=location, data=data, share=share, pair_cutoff=model.pair_cutoff)
    return _put_on_scale(source, reference)


def _put_on_scale(source: Source, reference: Reference) -> Source:
    manifest = source.manifest
    level = name_level(manifest.level_of_theory, manifest.fingerprint)
    shift = reference.shift(level) if "energy" in manifest.labels else None
    return dataclasses.replace(source, shift=shift)


def _name_sources(manifests: Sequence[Manifest]) -> list[str]:
    counts = Counter(m.name for m in manifests)
    return [m.name if counts[m.name] == 1 else f"{m.name} ({m.fingerprint})" for m in manifests]


def check_manifests(manifests: Mapping[str, Manifest]) -> None:
    """Raise `DataError` where two data sets are the same one, or have different units.

    Args:
        manifests: By the location of each.
    """
    for (one, first), (two, second) in itertools.combinations(manifests.items(), 2):
        if first.fingerprint == second.fingerprint:
            got = f"the same data (fingerprint {first.fingerprint})"
            raise DataError(two, f"be another data set than {one}", got, "Name each data set once in data.folders")
        for quantity in sorted(first.units.keys() & second.units.keys()):
            if first.units[quantity] != second.units[quantity]:
                rule = f"have the units of {one} ({quantity} in {first.units[quantity]})"
                remedy = "Convert one of them again into the units of the other"
                raise DataError(two, rule, f"{quantity} in {second.units[quantity]}", remedy)


def check_loss_weights(sources: Sequence[Source]) -> None:
    """Raise `DataError` where errors would count for nothing in the training loss, or infinitely.

    Args:
        sources: Those that are trained on.
    """
    largest = [s.loss_weight * find_largest(s.manifest.loss_weights) for s in sources]
    where, remedy = "data.loss_weights", "Change data.loss_weights or data.weights"
    got = ", ".join(f"{s.loss_weight:g} for {s.name}" for s in sources)
    if not any(largest):
        raise DataError(where, "be above zero for a data set that is trained on", got, remedy)
    if max(largest) > float(np.finfo(np.float32).max):
        raise DataError(where, "give weights that single precision holds", got, remedy)


def compute_shares(section: DataSection, num_conformers: Sequence[int]) -> tuple[float, ...]:
    """Return the share of each data set in the conformers that are trained on; they add up to one.

    Args:
        section: Weights, or a temperature.
        num_conformers: Of the training split of each data set.
    """
    if section.weights:
        return tuple(section.weights)
    if not any(num_conformers):  # data to evaluate on
        return (round(1 / len(num_conformers), _SHARE_DIGITS),) * len(num_conformers)
    powers = [(n / max(num_conformers)) ** (1 / section.temperature) for n in num_conformers]
    return tuple(round(p / math.fsum(powers), _SHARE_DIGITS) for p in powers)


def _describe(source: Source, model: ModelSection) -> Member:
    manifest = source.manifest
    statistics = dict(manifest.statistics)
    if "num_unpaired_electrons" in model.sees and "num_unpaired_electrons" not in statistics:
        # Older programs did not count them.
        counts = Counter(f"{g.num_unpaired_electrons:g}" for g in source.iter_graphs("train"))
        statistics["num_unpaired_electrons"] = dict(sorted(counts.items()))
    return Member(
        where=source.location,
        level=name_level(manifest.level_of_theory, manifest.fingerprint),
        statistics=statistics,
        has_energies="energy" in manifest.labels,
        share=source.share,
        num_conformers=manifest.num_conformers("train"),
        num_force_atoms=_count_force_atoms(source),
    )


def _count_force_atoms(source: Source) -> int:
    """Return the atoms of the training split that have forces."""
    manifest, index = source.manifest, source.data.index
    blocks = index.blocks_of_split("train")
    if manifest.label_counts["train"].get("forces", 0) == manifest.num_conformers("train"):
        return int(index.block_atoms[blocks.start : blocks.stop].sum())
    count = 0
    for first in range(blocks.start, blocks.stop, _BLOCKS_AT_A_TIME):
        found = index.read_samples(np.arange(first, min(first + _BLOCKS_AT_A_TIME, blocks.stop)))
        count += int(found.atoms[(found.flags & FLAGS["forces"]) != 0].sum(dtype=np.int64))
    return count
