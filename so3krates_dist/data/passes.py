"""How a process goes through its share of a step: in how many passes, so that each fits into its memory.

Which conformers a step has is the plan's business, and no limit changes it. Passes say who computes what together. Every
process works out the passes of all of them from the plan, so all do equally many without a word between them; where one has
fewer, its last ones are empty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from so3krates_dist.data.permutation import IntArray
from so3krates_dist.data.plan import Window, lanes_of_rank


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a pass of one process may hold."""

    max_atoms: int = 0
    """0: any number"""
    max_pairs: int = 0
    """estimated neighbour pairs; 0: any number"""

    def hold(self, atoms: int, pairs: int) -> bool:
        """Return whether so much fits."""
        return (not self.max_atoms or atoms <= self.max_atoms) and (not self.max_pairs or pairs <= self.max_pairs)


def group_lanes(lanes: range, groups: int) -> list[range]:
    """Divide a process's lanes into groups of neighbours, equally many each as far as possible; a pass never crosses groups.

    Args:
        lanes: Of the process.
        groups: The least number of passes (`train.micro_batches`).
    """
    return [
        range(lanes.start + len(lanes) * i // groups, lanes.start + len(lanes) * (i + 1) // groups)
        for i in range(groups)
    ]


def split(atoms: npt.NDArray[Any], pairs: npt.NDArray[Any], limits: Limits) -> list[slice]:
    """Cut conformers into passes, in their order, as few as that allows.

    A conformer that exceeds the limits by itself has a pass of its own.

    Args:
        atoms: (num_conformers,).
        pairs: (num_conformers,).
        limits: Of a pass.

    Returns:
        At least one slice; an empty one where there are no conformers.
    """
    if limits.hold(int(atoms.sum()), int(pairs.sum())):
        return [slice(0, len(atoms))]
    cuts, sum_atoms, sum_pairs = [0], 0, 0
    for place, (num_atoms, num_pairs) in enumerate(zip(atoms.tolist(), pairs.tolist(), strict=True)):
        sum_atoms, sum_pairs = sum_atoms + num_atoms, sum_pairs + num_pairs
        if place > cuts[-1] and not limits.hold(sum_atoms, sum_pairs):
            cuts.append(place)
            sum_atoms, sum_pairs = num_atoms, num_pairs
    return [slice(first, last) for first, last in zip(cuts, [*cuts[1:], len(atoms)], strict=True)]


def list_passes(window: Window, slot: int, lanes: range, groups: int, limits: Limits) -> list[IntArray]:
    """Return the rows of a window that a process does in each of its passes of a step.

    Args:
        window: Of the plan.
        slot: Step in the window.
        lanes: Of the process.
        groups: The least number of passes.
        limits: Of a pass.
    """
    passes = []
    for group in group_lanes(lanes, groups):
        rows = window.rows_of_lanes(group, slot)
        passes += [rows[part] for part in split(window.atoms[rows], window.pairs[rows], limits)]
    return passes


def count_passes(window: Window, slot: int, world_size: int, groups: int, limits: Limits) -> int:
    """Return how many passes all processes do at a step: as many as the one that needs most.

    Args:
        window: Of the plan.
        slot: Step in the window.
        world_size: Processes.
        groups: The least number of passes.
        limits: Of a pass.
    """
    if limits == Limits():
        return groups
    atoms, pairs = (sums[:, slot] for sums in window.sizes)
    most = groups
    for rank in range(world_size):
        lanes = lanes_of_rank(window.num_lanes, rank, world_size)
        fits = all(limits.hold(int(atoms[g].sum()), int(pairs[g].sum())) for g in _slices(lanes, groups))
        if not fits:
            most = max(most, len(list_passes(window, slot, lanes, groups, limits)))
    return most


def _slices(lanes: range, groups: int) -> Sequence[slice]:
    return [slice(g.start, g.stop) for g in group_lanes(lanes, groups)]


def find_oversized(atoms: npt.NDArray[Any], pairs: npt.NDArray[Any], limits: Limits) -> IntArray:
    """Return which structures do not fit into a pass by themselves.

    Args:
        atoms: (num_structures,).
        pairs: (num_structures,).
        limits: Of a pass.
    """
    too_many = np.zeros(len(atoms), bool)
    for values, limit in ((atoms, limits.max_atoms), (pairs, limits.max_pairs)):
        if limit:
            too_many |= values > limit
    return np.flatnonzero(too_many)
