"""One shard under the magnifying glass: its bytes, its frame, its blocks against the index, and every conformer and label.

Runs in worker processes and keeps one block at a time. What is found comes back as plain lines and counts.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from data_tools import gate
from data_tools.split import find_split
from so3krates_dist.data import shards
from so3krates_dist.data.index import Index, count_pairs, find_flags
from so3krates_dist.data.loss_weights import WeightSums
from so3krates_dist.data.shards import Block, IndexEntry, Manifest, ShardEntry
from so3krates_dist.data.statistics import hash_geometry
from so3krates_dist.errors import DataError
from so3krates_dist.files import hash_file
from so3krates_dist.graph import Graph

MAX_KEPT: Final = 1000
"""lines of each kind that are kept; the others are counted"""
_MAY_LACK: Final = ("cell", "pbc", *shards.LABELS)
_PER_ATOM: Final = ("forces", "partial_charges", "hirshfeld_ratios")


@dataclasses.dataclass(slots=True)
class Findings:
    """Errors and warnings, one line each."""

    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    """`errors` and `warnings` that were counted but not kept"""

    def error(self, where: str, rule: str, got: object, remedy: str = "Make the data set anew") -> None:
        """Note an error in the words that `DataError` has."""
        self.note("errors", str(DataError(where, rule, got, remedy)))

    def warn(self, line: str) -> None:
        """Note a warning."""
        self.note("warnings", line)

    def note(self, kind: str, line: str) -> None:
        """Note a line of `errors` or `warnings`, once where it comes again and again, or count it where there are too many."""
        lines: list[str] = getattr(self, kind)
        if line in lines[-1:]:
            return
        if len(lines) >= MAX_KEPT:
            self.left_out[kind] += 1
        else:
            lines.append(line)

    def count(self, kind: str) -> int:
        """Return how many `errors` or `warnings` there are."""
        return len(getattr(self, kind)) + self.left_out[kind]

    def add(self, other: "Findings") -> None:
        """Add what was found elsewhere."""
        for kind in ("errors", "warnings"):
            for line in getattr(other, kind):
                self.note(kind, line)
        self.left_out += other.left_out


@dataclasses.dataclass(slots=True)
class ShardReport:
    """What was found in one shard."""

    findings: Findings = dataclasses.field(default_factory=Findings)
    num_blocks: int = 0
    num_conformers: int = 0
    groups: Counter[str] = dataclasses.field(default_factory=Counter)
    labels: Counter[str] = dataclasses.field(default_factory=Counter)
    elements: set[int] = dataclasses.field(default_factory=set)
    weights: WeightSums = dataclasses.field(default_factory=WeightSums)
    hashes: list[int] = dataclasses.field(default_factory=list)
    """of the conformers' geometries"""
    numbers: list[int] = dataclasses.field(default_factory=list)
    """of the same conformers in the data set; both are empty without an index"""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What all shards are examined with."""

    folder: Path
    manifest: Manifest
    has_table: bool
    """whether it is known where blocks lie; else shards are read from front to back only"""
    max_force: float
    """eV/Å"""
    seed: int
    bounds: tuple[int, ...] | None
    """hashes that end the splits; None where the manifest says nothing about them"""
    band: gate.EnergyBand | None
    """None: energies are not looked at"""


def examine_shard(settings: Settings, number: int) -> ShardReport:
    """Read all of a shard and check it, its conformers and their labels.

    Args:
        settings: Of the data set.
        number: Of the shard in the manifest.
    """
    entry, report = settings.manifest.shards[number], ShardReport()
    path = settings.folder / entry.file
    if not check_file(path, entry, report.findings):
        return report
    if settings.has_table:
        _read_through(path, entry, report.findings)
        with shards.open_dataset(settings.folder, manifest=settings.manifest) as dataset:
            _examine_blocks(dataset, number, settings, report)
    else:
        with _note_errors(report.findings):
            for key, block in shards.iter_shard(path, entry):
                _examine_conformers(block, f"{entry.file}:{key}", entry.split, settings, report)
    return report


def check_file(path: Path, entry: ShardEntry | IndexEntry, findings: Findings) -> bool:
    """Check the bytes of a file against the manifest; returns whether there is a file."""
    remedy = "Copy the data set again"
    if not path.is_file():
        findings.error(str(path), "be there, the manifest lists it", "no such file", remedy)
        return False
    if (found := hash_file(path)) != entry.sha256:
        rule = f"have {entry.size} bytes with the sha256 {entry.sha256[:12]}..."
        findings.error(str(path), rule, f"{path.stat().st_size} bytes, {found[:12]}...", remedy)
    return True


@contextlib.contextmanager
def _note_errors(findings: Findings) -> Iterator[None]:
    """Go on after an error of the data."""
    try:
        yield
    except DataError as error:
        findings.note("errors", str(error))


def _read_through(path: Path, entry: ShardEntry, findings: Findings) -> None:
    """Read a shard from front to back as others do, for its frame and its order."""
    with _note_errors(findings):
        for _ in shards.iter_shard(path, entry):
            pass


def _examine_blocks(dataset: shards.DataFolder, shard: int, settings: Settings, report: ShardReport) -> None:
    """Read the blocks of a shard by their places, as training does."""
    table = dataset.table
    for number in range(*np.searchsorted(table.block_shard, [shard, shard + 1]).tolist()):
        with _note_errors(report.findings):
            block, entry = dataset.read_block(number), dataset.block_entry(number)
            where = f"{entry.file}:{entry.key}"
            sound = _examine_conformers(block, where, settings.manifest.shards[shard].split, settings, report)
            report.numbers += range(int(table.block_first[number]), int(table.block_first[number + 1]))
            if isinstance(table, Index) and settings.manifest.index is not None:
                _compare_with_index(table, number, block, where, sound, report.findings)


def _compare_with_index(
    index: Index, number: int, block: Block, where: str, sound: list[bool], findings: Findings
) -> None:
    """Compare what the index says of a block and its conformers with the block."""
    name, rows = shards.INDEX_NAME, index.rows(number)
    pairs = np.asarray(index.sample_pairs[rows])
    for row, graph in enumerate(block):
        said = (int(index.sample_atoms[rows][row]), int(index.sample_flags[rows][row]), pairs[row].tolist())
        # Pairs of what is faulty are not counted again: a cell list of a flat cell never ends.
        found = (graph.num_atoms, find_flags(graph), count_pairs(graph).tolist() if sound[row] else said[2])
        for quantity, one, other in zip(("atoms", "labels", "pairs"), said, found, strict=True):
            if one != other:
                findings.error(f"{name} for {where}:{row}", f"count its {quantity}, {other}", one)
    sums = {
        "block_pairs": (index.block_pairs[number], pairs.sum(0, dtype=np.int64)),
        "block_max_atoms": (index.block_max_atoms[number], index.sample_atoms[rows].max()),
        "block_max_pairs": (index.block_max_pairs[number], pairs.max(0)),
    }
    for column, (one, other) in sums.items():
        if not np.array_equal(one, other):
            findings.error(f"{name} column {column} for {where}", f"be {other.tolist()}", np.asarray(one).tolist())


def _examine_conformers(block: Block, where: str, split: str, settings: Settings, report: ShardReport) -> list[bool]:
    """Check the conformers of a block and count what they are; returns for each whether it can be believed."""
    report.num_blocks += 1
    report.num_conformers += len(block)
    report.elements.update(np.unique(block.columns["atomic_numbers"]).tolist())
    report.labels.update({label: int(block.has(label).sum()) for label in shards.LABELS})
    report.weights.add(block.columns.get("loss_weight", np.ones(len(block), np.float32)))
    check_masks(block, where, report.findings)
    sound = []
    for index, graph in enumerate(block):
        report.groups[graph.group] += 1
        sound.append(examine_conformer(graph, f"{where}:{index} {gate.describe(graph)}", settings, report.findings))
        value = hash_geometry(graph, settings.seed)
        if settings.has_table:
            report.hashes.append(value)
        if settings.bounds is not None and (found := find_split(value, settings.bounds)) != split:
            place = f"{where}:{index} {gate.describe(graph)}"
            report.findings.error(place, f"be in the split of its hash, {found}", split)
    return sound


def check_masks(block: Block, where: str, findings: Findings) -> None:
    """Rows of conformers that lack a label hold nothing: a reader that does not know masks must not take them for labels."""
    for name in _MAY_LACK:
        if f"has_{name}" not in block.columns:
            continue
        lacking = ~block.has(name)
        rows = np.repeat(lacking, np.diff(block.offsets)) if name in _PER_ATOM else lacking
        values = block.columns[name][rows]
        filled = values.any() if name == "pbc" else not np.isnan(values).all()
        if filled:
            findings.error(f"{where} column `{name}`", f"be empty where `has_{name}` says so", "values")


def examine_conformer(graph: Graph, where: str, settings: Settings, findings: Findings) -> bool:
    """Note what is wrong with a conformer; returns whether nothing is, warnings aside."""
    if (problem := gate.find_problem(graph, np.inf)) is not None:
        findings.error(where, problem.rule, problem.got, "Make the data set anew without it")
        return False
    if graph.forces is not None and (largest := float(np.linalg.norm(graph.forces, axis=1).max())) > settings.max_force:
        findings.warn(f"{where} has a force of {largest:.3g} eV/Å (more than {settings.max_force:g})")
    doubts = gate.find_doubts(graph)
    if settings.band is not None:
        residual = gate.compute_residual(graph, settings.manifest.statistics.get("energy_baselines", {}))
        off = settings.band.find_problem(residual, graph.num_atoms, graph.total_charge)
        doubts += [off] if off is not None else []
    for doubt in doubts:
        findings.warn(f"{where} should {doubt.rule}; got {doubt.got}")
    return True
