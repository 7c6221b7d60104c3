"""The data of a run, opened and checked before it starts: labels, elements, boxes, charges, sizes, and that all files are whole.

Everything here is done alike by all processes before they meet, so that what is wrong ends all of them with the same line.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from so3krates_dist.config import LOSS_WEIGHTS, DataSection, ModelSection, RunConfig
from so3krates_dist.data.folder import check_dataset, check_size
from so3krates_dist.data.levels import Reference
from so3krates_dist.data.manifest import SPLITS, load_manifest
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.stream import check_allows_box
from so3krates_dist.data.verification import verify_once
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.model.potential import (
    CHARGED_CRYSTALS,
    ModelStatistics,
    Potential,
    check_charges,
    check_elements,
    check_unpaired_electrons,
)
from so3krates_dist.train.losses import LABELS

MAX_BYTES_HASHED_FIRST: Final = 8 * 2**30
"""Data sets of up to so many bytes are hashed before the first step, in some eight seconds; larger ones shard by shard, when each
is opened"""


def open_data(config: RunConfig, reference: Reference | None = None, *, hashes: bool = False) -> Mixture:
    """Open what a run is trained on, and check it as far as that goes without training.

    Args:
        config: Of the run.
        reference: Of the run, where it has begun.
        hashes: Compare the sha256 of small data sets now; one process of a machine is enough.

    Raises:
        ConfigError: No data set is named, or none has a label that the loss needs, or the schedule needs a validation split.
        DataError: A data set is damaged, does not go together with another one, or is none for this model.
    """
    if not config.data.sources:
        remedy = "Set data.folder=FOLDER, see `so3krates generate`"
        raise ConfigError("data.folder", "name a data set", "nothing", remedy)
    for location in config.data.sources:
        if "://" not in location:
            check_files(Path(location), config.data, hashes=hashes)
    mixture = Mixture.open(config.data, config.model, reference)
    for source in mixture.sources:
        if not source.manifest.num_conformers("train"):
            got = ", ".join(f"{s}: {source.manifest.num_conformers(s)}" for s in SPLITS)
            remedy = "Make it with a larger share for training, or leave it out"
            raise DataError(f"{source.location} training split", "have conformers", got, remedy)
    check_labels(config, mixture)
    if config.train.schedule == "plateau" and not mixture.num_conformers("validation"):
        rule, remedy = "be another schedule than plateau without a validation split", "Set train.schedule=cosine"
        raise ConfigError("train.schedule", rule, "plateau", remedy)
    statistics = ModelStatistics.from_manifest(mixture.statistics, config.model)  # refuses what no model can have
    for source in mixture.active:
        if source.manifest.statistics.get("num_periodic", 0):  # older manifests do not say; the stream looks again
            check_allows_box(config.model, np.ones(3, bool), None, f"{source.location} training split")
    if config.data.oversized == "refuse":
        check_sizes(mixture, find_limits(config.data))
    _check_validation(mixture, config.model, statistics)
    return mixture


def check_files(folder: Path, section: DataSection, *, hashes: bool) -> None:
    """Check the sizes of all files of a data set on disk, and where it is small and that is asked for their hashes.

    Where damaged blocks are to be left out, the index alone, which says where they are: shards are looked at block by block.
    """
    if section.on_damage == "skip":
        entry = load_manifest(folder).index
        if entry is not None:
            check_size(folder / entry.file, entry.size)
            if hashes:
                verify_once(folder / entry.file, entry.sha256, str(folder / entry.file))
        return
    manifest = check_dataset(folder)
    if hashes and sum(s.size for s in manifest.shards) <= MAX_BYTES_HASHED_FIRST:
        for shard in manifest.shards:
            verify_once(folder / shard.file, shard.sha256, str(folder / shard.file))


def check_labels(config: RunConfig, mixture: Mixture) -> None:
    """Raise `ConfigError` where the loss needs a label that nothing has, and `DataError` for data that it needs nothing of."""
    trained = [label for label in LABELS if config.train.trains(label)]
    for label in trained:
        if label not in mixture.labels:
            have = f"a data set with {', '.join(mixture.labels) or 'no labels'} only"
            raise ConfigError(f"train.{LOSS_WEIGHTS[label]}", f"be 0 without {label} labels", have, "Set it to 0")
    for source in mixture.active:
        if not set(trained) & set(source.manifest.labels):
            got = ", ".join(source.manifest.labels) or "none"
            remedy = "Leave it out of data.folders, or give one of its labels a weight"
            raise DataError(
                source.location, f"have one of the labels that are trained ({', '.join(trained)})", got, remedy
            )


def find_limits(section: DataSection, measured: Mapping[str, int] | None = None) -> Limits:
    """Return the limits of a micro-batch: those of the configuration, or those that were measured for it."""
    if section.find_limits:
        return Limits() if measured is None else Limits(measured["max_atoms"], measured["max_pairs"])
    return Limits(section.max_atoms, section.max_pairs)


def check_sizes(mixture: Mixture, limits: Limits) -> None:
    """Raise `DataError` where a training conformer is larger than a micro-batch may be, with the name of the first one.

    Args:
        mixture: Of the run.
        limits: Of a micro-batch.
    """
    if limits == Limits():
        return
    found = [source.find_oversized(limits) for source in mixture.active]
    count = sum(number for number, _ in found)
    if not count:
        return
    name, sizes = next(first for number, first in found if number)
    rule = " and ".join(
        f"at most {limit} {what} (data.max_{key})"
        for limit, what, key in ((limits.max_atoms, "atoms", "atoms"), (limits.max_pairs, "estimated pairs", "pairs"))
        if limit
    )
    others = f", and {count - 1} more like it" if count > 1 else ""
    remedy = "Raise the limit, set data.oversized=alone, or leave such structures out of the data"
    raise DataError(name, f"have {rule}", f"{sizes}{others}", remedy)


def _check_validation(mixture: Mixture, section: ModelSection, statistics: ModelStatistics) -> None:
    """Check that the held-out conformers are of a kind that the training split has."""
    for source in mixture.active:
        where = f"{source.location} validation split"
        elements: set[int] = set()
        charges: set[float] = set()
        has_unpaired = False
        for graph in source.iter_graphs("validation"):
            elements.update(graph.atomic_numbers.tolist())
            charges.add(graph.total_charge)
            has_unpaired |= graph.num_unpaired_electrons != 0
            check_allows_box(section, graph.pbc, graph.cell, where)
        check_elements(elements, statistics.elements, where)
        check_charges(section.sees, statistics, charges, where)
        if has_unpaired:
            check_unpaired_electrons(section.sees, statistics, where)


def check_structures(data: Mixture, split: str, potential: Potential) -> set[str]:
    """Check all structures before computing the first; reading them is cheap beside computing them.

    Returns:
        Which of `total_charge` and `num_unpaired_electrons` are not zero somewhere, and `CHARGED_CRYSTALS` where there are some.
    """
    present = set[str]()
    for folder in (s.data for s in data.active):
        for number in folder.table.blocks_of_split(split):
            block, where = folder.read_block(number), folder.where(number)
            columns = block.columns
            check_elements(np.unique(columns["atomic_numbers"]).tolist(), potential.elements, where)
            pbcs = columns.get("pbc", np.zeros((len(block), 3), bool))
            for pbc, cell in zip(pbcs, columns.get("cell", itertools.repeat(None)), strict=False):
                potential.check_box(pbc, cell, where)
            stated = {n for n in ("total_charge", "num_unpaired_electrons") if columns[n].any()}
            if (pbcs.any(1) & (columns["total_charge"] != 0)).any():
                stated.add(CHARGED_CRYSTALS)
            potential.check_electrons(columns["total_charge"].tolist(), "num_unpaired_electrons" in stated, where)
            present |= stated
    return present
