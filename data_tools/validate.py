"""`so3krates validate`: is a data set folder whole, and can its labels be believed?

Errors are what must not be trained on: bytes that differ from what was written, an index or counts that do not fit the blocks,
labels or weights that are not finite, atoms on top of each other, conformers in the wrong split or in two. Warnings are what a
person should look at: large forces, energies far off the baselines, energies and forces that do not follow each other. Shards are
read one by one, block by block, in as many processes as asked for; memory does not grow with the data set.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final

import numpy as np

from data_tools import detective, gate, report, survey
from data_tools.console import Progress, say
from data_tools.examine import Findings, Settings, ShardReport, check_file, examine_shard
from data_tools.processes import start_pool
from data_tools.repeats import GeometryHashes
from so3krates_dist.data import loss_weights, shards
from so3krates_dist.errors import EXIT_DATA, EXIT_DONE, DataError

DEFAULT_MAX_FORCE: Final = 50.0
"""eV/Å; more is a warning"""
_MAX_LINES: Final = 20
_SAMPLE: Final = 2000
"""training conformers, in evenly spaced blocks, that units and the usual energies are told from"""
_MIN_PROGRESS: Final = 20
"""shards; fewer are read before anybody wonders"""


@dataclasses.dataclass(slots=True)
class Report(Findings):
    """What was found in a data set, one line each."""

    num_conformers: int = 0
    num_blocks: int = 0
    units: detective.UnitsVerdict | None = None
    """None where no conformer could be read"""


@dataclasses.dataclass(slots=True)
class _Totals:
    """What was counted, to be compared with the manifest."""

    groups: Counter[str] = dataclasses.field(default_factory=Counter)
    splits: Counter[str] = dataclasses.field(default_factory=Counter)
    labels: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: {s: Counter() for s in shards.SPLITS})
    elements: dict[str, set[int]] = dataclasses.field(default_factory=lambda: {s: set() for s in shards.SPLITS})
    weights: dict[str, loss_weights.WeightSums] = dataclasses.field(
        default_factory=lambda: {s: loss_weights.WeightSums() for s in shards.SPLITS}
    )

    def add(self, split: str, found: ShardReport) -> None:
        self.groups += found.groups
        self.splits[split] += found.num_conformers
        self.labels[split] += found.labels
        self.elements[split] |= found.elements
        self.weights[split].merge(found.weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates validate`."""
    parser.add_argument("folder", type=Path, help="data set")
    parser.add_argument(
        "--max-force", type=float, default=DEFAULT_MAX_FORCE, help="eV/Å, more is a warning (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that read shards (%(default)s)")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help=".html or .png like that of `so3krates inspect`, with what was found",
    )


def run(arguments: argparse.Namespace) -> int:
    """Validate a data set and print what was found; returns the exit code."""
    gate.check_max_force(arguments.max_force)
    if arguments.report is not None:
        report.check_target(arguments.report)
    found = validate(arguments.folder, max_force=arguments.max_force, workers=arguments.workers)
    for kind in ("errors", "warnings"):
        lines, name = getattr(found, kind), kind.removesuffix("s")
        for line in lines[:_MAX_LINES]:
            say(f"{name}: {line}")
        if (more := found.count(kind) - _MAX_LINES) > 0:
            say(f"{name}: and {more} more")
    if found.units is not None:
        say(f"units check: {found.units}")
    if arguments.report is not None:
        report.write_report(arguments.folder, arguments.report, findings=found)
        say(f"report: {arguments.report}")
    verdict = "is not valid" if found.errors else "is valid"
    counts = f"{found.count('errors')} errors, {found.count('warnings')} warnings"
    say(f"{arguments.folder} {verdict}: {found.num_conformers} conformers in {found.num_blocks} blocks, {counts}")
    return EXIT_DATA if found.errors else EXIT_DONE


def validate(folder: Path, *, max_force: float = DEFAULT_MAX_FORCE, workers: int = 1) -> Report:
    """Read all of a data set and check it.

    Args:
        folder: Data set.
        max_force: eV/Å; larger forces are warnings.
        workers: Processes that read shards; the findings do not depend on it.

    Returns:
        Errors name shard, block and number of the conformer.

    Raises:
        DataError: There is no manifest, or none that can be read, or there are no workers.
    """
    if workers < 1:
        raise DataError("--workers", "be at least 1", workers, "Give one per core")
    manifest, found, totals = shards.load_manifest(folder), Report(), _Totals()
    seed, bounds = _read_split(manifest, found)
    with shards.open_dataset(folder, manifest=manifest) as dataset, contextlib.ExitStack() as stack:
        has_table = _check_table(dataset, found)
        band = _look_at_sample(dataset, found) if has_table else None
        settings = Settings(folder, manifest, has_table, max_force, seed, bounds, band)
        hashes = stack.enter_context(GeometryHashes(sum(s.num_conformers for s in manifest.shards)))
        for shard, part in zip(manifest.shards, examine_all(settings, workers), strict=True):
            found.add(part.findings)
            found.num_blocks += part.num_blocks
            found.num_conformers += part.num_conformers
            totals.add(shard.split, part)
            hashes.add(part.hashes, part.numbers)
        _look_for_repeats(dataset, hashes, found)
    _compare_with_manifest(folder, manifest, totals, found)
    if found.units is not None and found.units.findings:
        found.warn(f"the data set has {found.units.explain()}; are its units right?")
    return found


def _read_split(manifest: shards.Manifest, found: Report) -> tuple[int, tuple[int, ...] | None]:
    """Return the seed of the hash and the hashes that end the splits, None where the manifest says nothing about them."""
    recorded, seed = manifest.splits.get("upper_bounds"), manifest.splits.get("seed", 0)
    if recorded is None:
        found.warn("the manifest does not say how the split was made")
        return 0, None
    if "seed" not in manifest.splits or not isinstance(seed, int):
        found.error(shards.MANIFEST_NAME, "give the seed of the split", manifest.splits.get("seed"))
        return 0, None
    try:
        return seed, tuple(int(recorded[name], 16) for name in shards.SPLITS)
    except (KeyError, TypeError, ValueError):
        found.error(shards.MANIFEST_NAME, "give the hash that ends each split", recorded)
        return seed, None


def _check_table(dataset: shards.DataFolder, found: Report) -> bool:
    """Check the index; returns whether it can be used."""
    entry = dataset.manifest.index
    if entry is not None and not check_file(dataset.folder / entry.file, entry, found):
        return False
    try:
        return dataset.table.num_blocks > 0
    except DataError as error:
        found.note("errors", str(error))
        return False


def _look_at_sample(dataset: shards.DataFolder, found: Report) -> gate.EnergyBand | None:
    """Judge the units, and find out where energies usually lie."""
    blocks = survey.choose_blocks(dataset, _SAMPLE, ["train"])
    graphs = [placed.graph for placed in survey.iter_placed(dataset, blocks)]
    if not graphs:
        return None
    found.units = detective.judge_units(graphs)
    baselines = dataset.manifest.statistics.get("energy_baselines", {})
    residuals = [gate.compute_residual(graph, baselines) for graph in graphs]
    return gate.measure_energy_band(np.array([r for r in residuals if r is not None]))


def examine_all(settings: Settings, workers: int) -> Iterator[ShardReport]:
    """Yield what was found in each shard, in order."""
    total = len(settings.manifest.shards)
    numbers = range(total)
    with contextlib.ExitStack() as stack:
        advance = None
        if total >= _MIN_PROGRESS:
            advance = stack.enter_context(Progress("examining shards", total)).advance
        examine = functools.partial(examine_shard, settings)
        parts: Iterator[ShardReport] = map(examine, numbers)
        if workers > 1:
            parts = stack.enter_context(start_pool(workers, total)).map(examine, numbers)
        try:
            for part in parts:
                yield part
                if advance is not None:
                    advance(1)
        except BrokenProcessPool as error:
            remedy = "Look for lack of memory; try again"
            raise DataError("worker process", "live until its work is done", error, remedy) from error


def _look_for_repeats(dataset: shards.DataFolder, hashes: GeometryHashes, found: Report) -> None:
    """Geometries that are there twice: in one split they are odd, in two they make a test worthless."""
    same_split = 0
    example = ""
    for first, second in hashes.iter_repeats():
        (one, split), (other, other_split) = (_find_place(dataset, number) for number in (first, second))
        if split != other_split:
            rule = f"have a geometry that the {split} split does not have"
            found.error(f"{other} of the {other_split} split", rule, f"that of {one}", "Split by geometry anew")
        else:
            same_split += 1
            example = example or f"{other} that of {one}"
    if same_split:
        found.warn(f"{same_split} conformers have the geometry of another one of their split, e.g. {example}")


def _find_place(dataset: shards.DataFolder, number: int) -> tuple[str, str]:
    """Return name and split of a conformer by its number in the data set."""
    block = int(np.searchsorted(dataset.table.block_first, number, side="right")) - 1
    place = survey.name_place(dataset, block, number - int(dataset.table.block_first[block]))
    return place, survey.find_split_of_block(dataset, block)


def _compare_with_manifest(folder: Path, manifest: shards.Manifest, totals: _Totals, found: Report) -> None:
    path = str(folder / shards.MANIFEST_NAME)
    if dict(totals.groups) != dict(manifest.groups):
        found.error(path, "count the conformers of each group", dict(manifest.groups))
    recorded = manifest.splits.get("num_conformers", {})
    if {k: n for k, n in recorded.items() if n} != dict(+totals.splits):
        found.error(path, f"count the conformers of each split, {dict(+totals.splits)}", recorded)
    for split in shards.SPLITS:
        counted, said = +totals.labels[split], manifest.label_counts.get(split, {})
        if {k: n for k, n in said.items() if n} != dict(counted):
            found.error(path, f"count the labels of the {split} split, {dict(counted)}", dict(said))
    _compare_weights(path, manifest, totals, found)
    trained = totals.elements["train"]
    if sorted(trained) != manifest.statistics.get("elements"):
        found.error(path, f"list the training elements, {sorted(trained)}", manifest.statistics.get("elements"))
    for split in ("validation", "test"):
        if new := totals.elements[split] - trained:
            symbols = gate.name_elements(sorted(new))
            found.warn(f"the {split} split has elements that the training split lacks: {symbols}")


def _compare_weights(path: str, manifest: shards.Manifest, totals: _Totals, found: Report) -> None:
    weights = loss_weights.summarize(totals.weights)
    if not loss_weights.are_alike(weights, manifest.loss_weights):
        found.error(path, f"say of the loss weights {weights}", dict(manifest.loss_weights))
    try:
        loss_weights.check_not_all_zero(weights, path)
    except DataError as error:
        found.note("errors", str(error))
