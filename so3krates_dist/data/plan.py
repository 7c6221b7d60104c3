"""The global order of the data: which conformers make up which step, as pure functions of integers.

Order and batches depend on the data set, the seed, the batch size and the number of lanes; never on the number of processes or
of worker processes, which only say who does which lanes. So the position in the data is one integer, the step.

- An *epoch* is every conformer once: blocks are permuted, and each block's conformers are.
- An epoch is cut into *windows* of blocks that are shuffled together; a window into *steps*, all of the same size to within one
  conformer of their mean, so no conformer is dropped or repeated and no batch ever holds one twice.
- A window's conformers are dealt in equal ranges to the *lanes*. A process reads only the blocks of its own lanes.
- Within a lane, conformers are dealt to the steps so that the steps' costs are balanced (heaviest first to the lightest).

Permutations sort hashes (splitmix64), not numpy's generators, whose streams may change between versions (NEP 19).
"""

import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

UIntArray = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

MIN_STEPS_PER_WINDOW: Final = 8
"""a window of fewer steps could not keep their sizes equal"""

_INCREMENT, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MASK: Final = 2**64 - 1


def hash_integers(values: npt.ArrayLike, *key: int) -> UIntArray:
    """Hash integers with a key (splitmix64: Steele, Lea, Flood, OOPSLA 2014, 10.1145/2660193.2660195).

    Args:
        values: (...) integers of at least zero.
        key: Integers that choose the hash function.
    """
    with np.errstate(over="ignore"):
        mixed: UIntArray = np.zeros((), np.uint64)
        for part in key:
            mixed = _mix(mixed ^ np.uint64(part & _MASK))
        return _mix(np.asarray(values, np.uint64) ^ mixed)


def _mix(values: UIntArray) -> UIntArray:
    values = values + _INCREMENT
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    mixed: UIntArray = values ^ (values >> np.uint64(31))
    return mixed


def permute(count: int, *key: int) -> IntArray:
    """Return a permutation of 0 ... count-1 that depends on the key alone."""
    return np.argsort(hash_integers(np.arange(count), *key), kind="stable")


def pack(costs: npt.NDArray[Any], capacities: Sequence[int], *key: int) -> IntArray:
    """Deal conformers to slots of given capacities so that the slots' costs come out about equal.

    Args:
        costs: (num_conformers,) cost of each.
        capacities: Conformers that each slot takes; they add up to num_conformers.
        key: Chooses among equal costs.

    Returns:
        (num_conformers,) the slot of each conformer.
    """
    shuffled = permute(len(costs), *key)
    order = shuffled[np.argsort(-np.asarray(costs)[shuffled], kind="stable")]
    left = list(capacities)
    heap = [(0.0, int(rank), slot) for slot, rank in enumerate(permute(len(left), *key, 1)) if left[slot]]
    heapq.heapify(heap)
    slots = np.empty(len(costs), np.int64)
    for index in order:
        load, rank, slot = heapq.heappop(heap)
        slots[index] = slot
        left[slot] -= 1
        if left[slot]:
            heapq.heappush(heap, (load + float(costs[index]), rank, slot))
    return slots


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a step lies."""

    epoch: int
    window: int
    """within the epoch"""
    slot: int
    """step within the window"""


class Plan:
    """Which conformers make up which step.

    Args:
        block_sizes: (num_blocks,) conformers in each block.
        batch_size: Conformers per step over all processes.
        lanes: Streams that each window is dealt to.
        window_blocks: Blocks that are shuffled together.
        seed: Chooses the order.
    """

    def __init__(
        self, block_sizes: Sequence[int], *, batch_size: int, lanes: int, window_blocks: int, seed: int
    ) -> None:
        self.block_sizes = np.asarray(block_sizes, np.int64)
        self.num_conformers = int(self.block_sizes.sum())
        assert self.num_conformers > 0, "a plan needs conformers"
        self.lanes, self.seed = lanes, seed
        self.steps_per_epoch = -(-self.num_conformers // batch_size)
        most_windows = max(1, self.steps_per_epoch // MIN_STEPS_PER_WINDOW)
        self.num_windows = min(-(-len(self.block_sizes) // window_blocks), most_windows)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - one plan a run; an epoch's order is asked for at every step
    def _epoch(self, epoch: int) -> tuple[IntArray, IntArray, IntArray]:
        """Return the order of the blocks, and for each window its first block and its first step (with an end)."""
        order = permute(len(self.block_sizes), self.seed, 1, epoch)
        edges = np.arange(self.num_windows + 1) * len(order) // self.num_windows
        conformers = np.concatenate([[0], np.cumsum(self.block_sizes[order])])[edges]
        first_steps = (2 * conformers * self.steps_per_epoch + self.num_conformers) // (2 * self.num_conformers)
        return order, edges, first_steps

    def locate(self, step: int) -> Place:
        """Return where a step lies."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first_steps = self._epoch(epoch)[2]
        window = int(np.searchsorted(first_steps, within, side="right")) - 1
        return Place(epoch, window, within - int(first_steps[window]))

    def num_slots(self, place: Place) -> int:
        """Return how many steps the window of a place has."""
        first_steps = self._epoch(place.epoch)[2]
        return int(first_steps[place.window + 1] - first_steps[place.window])

    def rows_of_lane(self, place: Place, lane: int) -> IntArray:
        """Return the conformers that a lane has in the window of a place.

        Returns:
            (num_conformers, 2) block and index in the block.
        """
        order, edges, _ = self._epoch(place.epoch)
        blocks = order[edges[place.window] : edges[place.window + 1]]
        ends = np.cumsum(self.block_sizes[blocks])
        first, last = (int(ends[-1]) * c // self.lanes for c in (lane, lane + 1))
        rows = [np.empty((0, 2), np.int64)]
        for position in range(int(np.searchsorted(ends, first, side="right")), len(blocks)):
            block, size = int(blocks[position]), int(self.block_sizes[blocks[position]])
            start = int(ends[position]) - size
            if start >= last:
                break
            indices = permute(size, self.seed, 2, place.epoch, block)[max(0, first - start) : last - start]
            rows.append(np.stack([np.full(len(indices), block), indices], axis=1))
        return np.concatenate(rows)

    def slots_of_lane(self, place: Place, lane: int, costs: npt.NDArray[Any]) -> IntArray:
        """Return the step (slot) of each conformer of `rows_of_lane`.

        Numbered through all lanes, conformer q of a window fills a place of slot q modulo the number of slots; so the sizes
        of the steps differ by one at most, and the lanes' shares of each step as well.

        Args:
            place: Names the window.
            lane: Lane.
            costs: (num_conformers,) cost of each conformer, in the order of `rows_of_lane`.
        """
        _, edges, _ = self._epoch(place.epoch)
        num_slots = self.num_slots(place)
        blocks = self._epoch(place.epoch)[0][edges[place.window] : edges[place.window + 1]]
        total = int(self.block_sizes[blocks].sum())
        first, last = (total * c // self.lanes for c in (lane, lane + 1))
        capacities = np.bincount(np.arange(first, last) % num_slots, minlength=num_slots)
        return pack(costs, capacities.tolist(), self.seed, 3, place.epoch, place.window, lane)
