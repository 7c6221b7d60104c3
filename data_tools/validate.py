"""`so3krates validate`: is a data set folder whole, and can its labels be believed?

Errors are what must not be trained on: bytes that differ from what was written, counts that do not fit the manifest, labels that
are not finite, atoms on top of each other, conformers in the wrong split. Warnings are what a person should look at: large
forces, energies far off the baselines, energies and forces that do not follow each other.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from data_tools import gate
from data_tools.console import say
from data_tools.dataset import check_block_counts, find_split
from so3krates_dist import files
from so3krates_dist.data import shards
from so3krates_dist.data.statistics import hash_geometry
from so3krates_dist.errors import EXIT_DATA, EXIT_DONE, DataError
from so3krates_dist.graph import FloatArray, Graph

DEFAULT_MAX_FORCE: Final = 50.0
"""eV/Å; more is a warning"""
OUTLIER_MADS: Final = 20.0
"""Energies per atom this many median absolute deviations off the baselines are a warning: thermal ones stay below ten"""
_MIN_MAD: Final = 1e-3
"""eV/atom"""
_MAX_LINES: Final = 20
_SAMPLE: Final = 2000


@dataclasses.dataclass(slots=True)
class Report:
    """What was found, one line each."""

    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    num_conformers: int = 0
    num_blocks: int = 0

    def error(self, where: str, rule: str, got: object, remedy: str = "Make the data set anew") -> None:
        """Note an error in the words that `DataError` has."""
        self.errors.append(str(DataError(where, rule, got, remedy)))


@dataclasses.dataclass(slots=True)
class _Findings:
    """What is gathered while conformers go by."""

    groups: Counter[str] = dataclasses.field(default_factory=Counter)
    splits: Counter[str] = dataclasses.field(default_factory=Counter)
    elements: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    residuals: list[float] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    sample: list[Graph] = dataclasses.field(default_factory=list)
    """of the training split"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates validate`."""
    parser.add_argument("folder", type=Path, help="data set")
    parser.add_argument(
        "--max-force", type=float, default=DEFAULT_MAX_FORCE, help="eV/Å, more is a warning (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Validate a data set and print what was found; returns the exit code."""
    gate.check_max_force(arguments.max_force)
    report = validate(arguments.folder, max_force=arguments.max_force)
    for kind, lines in (("error", report.errors), ("warning", report.warnings)):
        for line in lines[:_MAX_LINES]:
            say(f"{kind}: {line}")
        if len(lines) > _MAX_LINES:
            say(f"{kind}: and {len(lines) - _MAX_LINES} more")
    verdict = "is not valid" if report.errors else "is valid"
    found = f"{len(report.errors)} errors, {len(report.warnings)} warnings"
    say(f"{arguments.folder} {verdict}: {report.num_conformers} conformers in {report.num_blocks} blocks, {found}")
    return EXIT_DATA if report.errors else EXIT_DONE


def validate(folder: Path, *, max_force: float = DEFAULT_MAX_FORCE) -> Report:
    """Read all of a data set and check it.

    Args:
        folder: Data set.
        max_force: eV/Å; larger forces are warnings.

    Returns:
        Errors name shard, block and number of the conformer.

    Raises:
        DataError: There is no manifest, or none that can be read.
    """
    manifest = shards.load_manifest(folder)
    report, findings = Report(), _Findings()
    bounds = _read_bounds(manifest, report)
    for shard in manifest.shards:
        _check_shard(folder, shard, report)
        for place, graph in _iter_conformers(folder, shard, report):
            is_sound = _check_conformer(graph, place, report, max_force)
            _check_split(graph, place, shard.split, manifest, bounds, report)
            _count(graph, shard.split, findings)
            if is_sound:
                _gather(graph, place, shard.split, manifest, findings)
    report.num_conformers = sum(findings.groups.values())
    _compare_with_manifest(folder, manifest, findings, report)
    _look_for_outliers(findings, report)
    _look_at_units(findings, report)
    return report


def _check_shard(folder: Path, shard: shards.ShardEntry, report: Report) -> None:
    path = folder / shard.file
    if not path.is_file():
        report.error(str(path), "be there, the manifest lists it", "no such file", "Copy the data set again")
    elif (found := files.hash_file(path)) != shard.sha256:
        rule = f"have {shard.size} bytes with the sha256 {shard.sha256[:12]}..."
        report.error(str(path), rule, f"{path.stat().st_size} bytes, {found[:12]}...", "Copy the data set again")


def _iter_conformers(folder: Path, shard: shards.ShardEntry, report: Report) -> list[tuple[str, Graph]]:
    """Return the conformers of a shard with their places, read both ways: block by block, and by WebDataset as a whole."""
    reader, conformers = shards.BlockReader(folder), []
    for entry in shard.blocks:
        report.num_blocks += 1
        try:
            block = reader.read(shard, entry)
            check_block_counts(block, entry, f"{folder / shard.file}:{entry.key}")
        except DataError as error:
            report.errors.append(str(error))
            continue
        conformers += [(f"{shard.file}:{entry.key}:{index}", graph) for index, graph in enumerate(block)]
    reader.close()
    _check_with_webdataset(folder / shard.file, shard, report)
    return conformers


def _check_with_webdataset(path: Path, shard: shards.ShardEntry, report: Report) -> None:
    if not path.is_file():
        return
    try:
        found = [(key, len(block)) for key, block in shards.iter_shard(path)]
    except Exception as error:  # whatever tarfile and webdataset raise over a damaged tar
        report.error(str(path), "be readable by webdataset", f"{type(error).__name__}: {error}", "Copy it again")
        return
    expected = [(entry.key, entry.num_conformers) for entry in shard.blocks]
    if found != expected:
        report.error(str(path), f"hold the {len(expected)} blocks of the manifest", f"{len(found)} or other ones")


def _check_conformer(graph: Graph, place: str, report: Report, max_force: float) -> bool:
    """Note what is wrong with a conformer; returns whether nothing is, large forces aside."""
    where = f"{place} {gate.describe(graph)}"
    if (problem := gate.find_problem(graph, np.inf)) is not None:
        report.error(where, problem.rule, problem.got, "Make the data set anew without it")
        return False
    if graph.forces is not None and (largest := float(np.linalg.norm(graph.forces, axis=1).max())) > max_force:
        report.warnings.append(f"{where} has a force of {largest:.3g} eV/Å (more than {max_force:g})")
    return True


def _read_bounds(manifest: shards.Manifest, report: Report) -> list[int] | None:
    """Return the hashes that end the splits, None where the manifest says nothing about them."""
    recorded = manifest.splits.get("upper_bounds")
    if recorded is None:
        report.warnings.append("the manifest does not say how the split was made")
        return None
    if not isinstance(seed := manifest.splits.get("seed"), int):
        report.error(shards.MANIFEST_NAME, "give the seed of the split", seed)
        return None
    try:
        return [int(recorded[name], 16) for name in shards.SPLITS]
    except (KeyError, TypeError, ValueError):
        report.error(shards.MANIFEST_NAME, "give the hash that ends each split", recorded)
        return None


def _check_split(
    graph: Graph, place: str, split: str, manifest: shards.Manifest, bounds: Sequence[int] | None, report: Report
) -> None:
    if bounds is not None and (found := find_split(hash_geometry(graph, manifest.splits["seed"]), bounds)) != split:
        report.error(f"{place} {gate.describe(graph)}", f"be in the split of its hash, {found}", split)


def _count(graph: Graph, split: str, findings: _Findings) -> None:
    findings.groups[graph.group] += 1
    findings.splits[split] += 1
    findings.elements.setdefault(split, set()).update(graph.atomic_numbers.tolist())


def _gather(graph: Graph, place: str, split: str, manifest: shards.Manifest, findings: _Findings) -> None:
    """Keep what statistics need of a sound conformer."""
    if split == "train" and len(findings.sample) < _SAMPLE:
        findings.sample.append(graph)
    residual = compute_residual(graph, manifest)
    if residual is not None:
        findings.residuals.append(residual)
        findings.places.append(f"{place} {gate.describe(graph)}")


def compute_residual(graph: Graph, manifest: shards.Manifest) -> float | None:
    """Return the energy less the baselines per atom (eV/atom), None without energy or baselines."""
    baselines = manifest.statistics.get("energy_baselines", {})
    if graph.energy is None or not all(str(z) in baselines for z in set(graph.atomic_numbers.tolist())):
        return None
    return float(graph.energy - sum(baselines[str(z)] for z in graph.atomic_numbers.tolist())) / graph.num_atoms


def _compare_with_manifest(folder: Path, manifest: shards.Manifest, findings: _Findings, report: Report) -> None:
    path = str(folder / shards.MANIFEST_NAME)
    if dict(findings.groups) != dict(manifest.groups):
        report.error(path, "count the conformers of each group", dict(manifest.groups))
    recorded = manifest.splits.get("num_conformers", {})
    if {k: n for k, n in recorded.items() if n} != dict(findings.splits):
        report.error(path, f"count the conformers of each split, {dict(findings.splits)}", recorded)
    trained = findings.elements.get("train", set())
    if sorted(trained) != manifest.statistics.get("elements"):
        report.error(path, f"list the training elements, {sorted(trained)}", manifest.statistics.get("elements"))
    for split in ("validation", "test"):
        if new := findings.elements.get(split, set()) - trained:
            symbols = gate.name_elements(sorted(new))
            report.warnings.append(f"the {split} split has elements that the training split lacks: {symbols}")


def _look_for_outliers(findings: _Findings, report: Report) -> None:
    residuals: FloatArray = np.array(findings.residuals)
    if not len(residuals):
        return
    off = np.abs(residuals - np.median(residuals))
    limit = OUTLIER_MADS * max(float(np.median(off)), _MIN_MAD)
    for index in np.flatnonzero(off > limit):
        text = f"has an energy {residuals[index]:.3g} eV/atom off the baselines (more than {limit:.3g})"
        report.warnings.append(f"{findings.places[index]} {text}")


def _look_at_units(findings: _Findings, report: Report) -> None:
    measured = gate.measure_units_slope(findings.sample)
    if measured is not None and not measured.agrees:
        report.warnings.append(f"the data set has {measured.explain()}; are its units right?")
