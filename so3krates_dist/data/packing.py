"""How conformers are shared out so that costs come out equal: sources over places, a window over lanes, a lane over steps.

All on integers: loads are sums of them, so every machine decides alike.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from so3krates_dist.data.permutation import IntArray

_FULL: Final = np.iinfo(np.int64).max // 4
"""load of a slot that takes no more"""


def apportion(count: int, rates: Sequence[int]) -> list[int]:
    """Return how many of the first `count` places of the mixed sequence each source has; grows with `count`."""
    total = sum(rates)
    fine = 1 << 20  # of a place; what is closer counts as a tie

    def given(time: int) -> list[int]:
        return [(2 * rate * time + total * fine) // (2 * total * fine) for rate in rates]

    low, high = 0, (count + len(rates) + 1) * fine
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(given(middle)) >= count else (middle + 1, high)
    counts, before = given(low), given(low - 1) if low else [0] * len(rates)
    excess = sum(counts) - count
    for source in reversed(range(len(rates))):  # of a tie, later sources wait
        waits = min(excess, counts[source] - before[source])
        counts[source] -= waits
        excess -= waits
    return counts


def cut_evenly(costs: IntArray, block_sizes: IntArray, lanes: int) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Cut a sequence of conformers into runs of equal cost.

    At each cut the conformer of the block there whose cost fits best what the run lacks is moved to the run's end.

    Args:
        costs: (num_conformers,) positive.
        block_sizes: (num_blocks,) conformers of each block; conformers move within their block only.
        lanes: Number of runs.

    Returns:
        The conformers in their new order, and (lanes + 1,) where the runs begin.
    """
    order = np.arange(len(costs), dtype=np.int32)
    sums = np.concatenate([[0], np.cumsum(costs)])
    total, ends = int(sums[-1]), np.cumsum(block_sizes)
    bounds = np.zeros(lanes + 1, np.int64)
    bounds[-1] = len(costs)
    for cut in range(1, lanes):
        target = total * cut // lanes
        place = max(int(np.searchsorted(sums, target, side="right")) - 1, int(bounds[cut - 1]))
        if place >= len(costs):
            bounds[cut] = len(costs)
            continue
        lacking = target - int(sums[place])
        end = int(ends[np.searchsorted(ends, place, side="right")])
        misfit = np.abs(costs[order[place:end]] - lacking)
        best = int(np.argmin(misfit))
        bounds[cut] = place
        if misfit[best] < abs(lacking):
            order[[place, place + best]] = order[[place + best, place]]
            sums[place + 1 : end + 1] = sums[place] + np.cumsum(costs[order[place:end]])
            bounds[cut] = place + 1
    return order, bounds


def pack(costs: IntArray, bounds: IntArray, slots: int, capacities: IntArray | None = None) -> IntArray:
    """Put the conformers of each lane into slots, heaviest first into the lightest slot.

    Exactly that rule, for all lanes and many conformers at a time: in the order of their loads, slots take one conformer each as
    long as the next slot is lighter than all that have just got one.

    Args:
        costs: (num_conformers,) lane by lane, falling within a lane.
        bounds: (lanes + 1,) where the lanes begin.
        slots: Slots of each lane.
        capacities: (lanes, slots) conformers that each slot takes, which add up to the lane's; None: any number.

    Returns:
        (num_conformers,) slot of each conformer.
    """
    slot_of = np.zeros(len(costs), np.int64)
    if slots == 1 or not len(costs):
        return slot_of
    lanes = len(bounds) - 1
    rows, columns = np.arange(lanes)[:, None], np.arange(slots)
    loads = np.zeros((lanes, slots), np.int64)
    left = None if capacities is None else capacities.copy()
    if left is not None:
        loads[left == 0] = _FULL
    next_one, ends = bounds[:-1].copy(), bounds[1:]
    padded = np.concatenate([costs, np.zeros(1, np.int64)])
    while (next_one < ends).any():
        by_load = np.argsort(loads, axis=1, kind="stable")
        light = loads[rows, by_load]
        taken = next_one[:, None] + columns
        there = (taken < ends[:, None]) & (light < _FULL)
        heavier = light + padded[np.where(there, taken, len(costs))]
        lightest_new = np.minimum.accumulate(heavier, axis=1)
        # The first always goes; a later one as long as its slot is no heavier than any slot that has got one before it.
        goes = there.copy()
        goes[:, 1:] &= light[:, 1:] <= lightest_new[:, :-1]
        goes = np.logical_and.accumulate(goes, axis=1)
        row, column = np.nonzero(goes)
        slot = by_load[row, column]
        slot_of[taken[row, column]] = slot
        loads[row, slot] = heavier[row, column]
        if left is not None:
            left[row, slot] -= 1
            loads[row, slot] = np.where(left[row, slot] > 0, loads[row, slot], _FULL)
        next_one = next_one + goes.sum(axis=1)
    return slot_of


def match_slots(slot_of: IntArray, costs: IntArray, lane_of: IntArray, lanes: int, places: IntArray) -> IntArray:
    """Number the slots anew so that each lane's heaviest meet at one step: the others would only wait for them.

    Args:
        slot_of: (num_conformers,).
        costs: (num_conformers,).
        lane_of: (num_conformers,).
        lanes: Number of lanes.
        places: (slots,) new number of the heaviest slot, the second, ...; the same for all lanes.
    """
    slots = len(places)
    # Weights are sums of integers below 2^53, so their float64 sums are exact.
    loads = np.bincount(lane_of * slots + slot_of, weights=costs, minlength=lanes * slots).reshape(lanes, slots)
    by_load: IntArray = np.argsort(-loads, axis=1, kind="stable")
    new: IntArray = np.empty_like(by_load)
    np.put_along_axis(new, by_load, np.broadcast_to(places, by_load.shape), axis=1)
    matched: IntArray = new[lane_of, slot_of]
    return matched
