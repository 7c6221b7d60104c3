"""The global order of the data: which conformers make up which step, as pure functions of integers.

Order and batches depend on the sources (their blocks and the sizes of their conformers), their shares, the seed, lanes, window,
batch size and the coefficients of the cost; never on the number of processes or of worker processes, nor on the limits of a
micro-batch, which only say who does what in how many passes. So the position in the data is one integer, the step, and any
step is found without going through those before it.

- Each *source* gives its blocks epoch by epoch, without replacement, in an order that a keyed permutation computes block by
  block (nothing is stored, so an epoch of millions of blocks costs nothing).
- Sources are mixed block by block by Webster's method of apportionment: at any point of the sequence each has had its share to
  within one block.
- A *window* is a run of the mixed sequence whose blocks are shuffled together. A window has a fixed number of *steps* (slots).
  A single source has a whole number of windows in an epoch, so that no batch holds a conformer twice.
- The window's conformers are cut into *lanes* of equal cost, each a contiguous run, so that a process reads the blocks of its
  own lanes only. Where a cut falls, a conformer of fitting cost is moved to it; lanes are equal to a fraction of a conformer.
- Each lane packs its conformers into the window's steps, heaviest first into the lightest (Graham's LPT rule, SIAM J. Appl.
  Math. 17, 416 (1969), 10.1137/0117039). Lanes stay in lock-step: nothing is padded, dropped, repeated, or left at an end.

Batches of fewer than four conformers a lane cannot be balanced by cost; there every step gets the same number of conformers, to
within one, and costs are balanced as far as that allows.

All arithmetic that decides is on integers: costs are sums of atoms and pairs with coefficients in hundredths.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from so3krates_dist.data.packing import apportion, cut_evenly, match_slots, pack
from so3krates_dist.data.permutation import IntArray, hash_integers, permute, permute_at

VERSION: Final = 2
"""of the rules in this file; part of the fingerprint, so that a run never goes on with another order"""

MIN_STEPS_PER_WINDOW: Final = 8
"""a window of fewer steps could not keep their costs equal"""
MIN_CONFORMERS_TO_BALANCE: Final = 4
"""per lane and step; fewer are dealt by number instead of by cost"""
COST_UNIT: Final = 100
"""coefficients of the cost count in hundredths"""
_WEIGHT_UNIT: Final = 10**9
_BLOCKS_AT_A_TIME: Final = 128
_LANES_AT_A_TIME: Final = 16
"""bound the memory of planning a window"""
_MOST_PAIRS: Final = np.iinfo(np.int32).max

# ------------------------------------------------------------------------------------------------------------- the plan


class PlanSource(Protocol):
    """What the plan knows of a data set: its training blocks, numbered from zero, and the sizes of their conformers."""

    @property
    def name(self) -> str:
        """Name in messages and records."""

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of the data."""

    @property
    def block_sizes(self) -> npt.NDArray[Any]:
        """(num_blocks,) conformers in each block."""

    @property
    def block_shards(self) -> npt.NDArray[Any]:
        """(num_blocks,) shard that each block is in; blocks of a shard follow each other."""

    def sizes(self, blocks: IntArray) -> tuple[IntArray, IntArray]:
        """Return atoms and estimated neighbour pairs of all conformers of some blocks, one block after another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Everything that the order depends on besides the sources."""

    weights: tuple[float, ...]
    """share of each source in the conformers; none negative, not all zero"""
    seed: int
    lanes: int
    """streams in lock-step that each window is dealt to"""
    window_blocks: int
    """blocks that are shuffled together, at least"""
    batch_size: int
    """conformers per step over all lanes, on average at most"""
    shuffle_shards: int = 0
    """shards whose blocks are shuffled together; 0: all of a source"""
    cost_per_atom: float = 3.0
    cost_per_pair: float = 1.0
    pair_cutoff: float | None = None
    """Å; up to where the sources count pairs, here for the record alone; None: all pairs"""


@dataclasses.dataclass(eq=False)
class Window:
    """The conformers of one window in the order of lanes, and in a lane in the order of steps."""

    source: npt.NDArray[np.uint16]
    """(num_conformers,) number of the source"""
    block: npt.NDArray[np.int32]
    """(num_conformers,) training block of that source"""
    index: npt.NDArray[np.uint16]
    """(num_conformers,) place in the block"""
    atoms: npt.NDArray[np.int32]
    """(num_conformers,)"""
    pairs: npt.NDArray[np.int32]
    """(num_conformers,) estimated neighbour pairs"""
    offsets: IntArray
    """(lanes, slots + 1) where the conformers of a lane's slot begin; the last one is the lane's end"""
    coefficients: tuple[int, int]
    """cost of an atom and of a pair, in hundredths"""

    @property
    def costs(self) -> IntArray:
        """(num_conformers,) in hundredths."""
        return _add_costs(self.atoms, self.pairs, self.coefficients)

    @property
    def num_lanes(self) -> int:
        """Lanes."""
        return len(self.offsets)

    @property
    def num_slots(self) -> int:
        """Steps of the window."""
        return int(self.offsets.shape[1]) - 1

    def rows(self, lane: int, slot: int) -> slice:
        """Return where the conformers of a lane are at a step of the window."""
        return slice(int(self.offsets[lane, slot]), int(self.offsets[lane, slot + 1]))

    def rows_of_lanes(self, lanes: range, slot: int) -> IntArray:
        """Return the conformers of several lanes at a step, in the order of the lanes."""
        if not len(lanes):
            return np.zeros(0, np.int64)
        return np.concatenate([np.arange(*self.rows(lane, slot).indices(len(self.block))) for lane in lanes])

    def span_lanes(self, lanes: range) -> slice:
        """Return where the conformers of some neighbouring lanes are, those of all steps together."""
        if not len(lanes):  # a process more than there were lanes before they were changed
            return slice(0, 0)
        return slice(int(self.offsets[lanes.start, 0]), int(self.offsets[lanes.stop - 1, -1]))

    def blocks_of_lanes(self, lanes: range) -> IntArray:
        """Return (num_blocks, 2) the different sources and blocks that some neighbouring lanes need."""
        own = self.span_lanes(lanes)
        return np.unique(np.stack([self.source[own], self.block[own]], axis=1).astype(np.int64), axis=0)

    def loads(self) -> IntArray:
        """Return (lanes, slots) the cost of each lane's share of each step."""
        return self._add_up(self.costs)

    def num_conformers(self) -> IntArray:
        """Return (lanes, slots) conformers."""
        return np.diff(self.offsets, axis=1)

    @functools.cached_property
    def sizes(self) -> tuple[IntArray, IntArray]:
        """(lanes, slots) atoms and pairs."""
        return self._add_up(self.atoms), self._add_up(self.pairs)

    def _add_up(self, values: npt.NDArray[Any]) -> IntArray:
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
        return np.diff(sums[self.offsets], axis=1)


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> range:
    """Return the lanes that a process does: equally many each where the number of processes divides that of lanes."""
    return range(lanes * rank // world_size, lanes * (rank + 1) // world_size)


class Plan:
    """Which conformers make up which step.

    Args:
        sources: Data sets; each has blocks.
        settings: Shares, seed, lanes, sizes.
        cursors: Blocks that each source has given before this plan's first step, counted through all its epochs.
    """

    def __init__(
        self, sources: Sequence[PlanSource], settings: PlanSettings, cursors: Sequence[int] | None = None
    ) -> None:
        assert len(sources) == len(settings.weights) > 0, "one weight for each source"
        self.sources, self.settings = tuple(sources), settings
        self.cursors = tuple(cursors or [0] * len(sources))
        self._held: tuple[int, Window] | None = None
        self._num_blocks = [len(s.block_sizes) for s in sources]
        # A source keeps its order whatever others come and go.
        self._keys = [_hash_text(s.fingerprint) for s in sources]
        self._shards = [_list_shards(s.block_shards, settings.shuffle_shards) for s in sources]
        # Fractions: sums of floats come out differently in other versions of Python.
        means = [Fraction(int(np.sum(s.block_sizes, dtype=np.int64)), len(s.block_sizes)) for s in sources]
        # A share of conformers becomes a share of blocks, which hold different numbers of them.
        rates = [Fraction(weight) / mean for weight, mean in zip(settings.weights, means, strict=True)]
        self._rates = [round(rate / sum(rates) * _WEIGHT_UNIT) for rate in rates]
        self._by_cost = settings.batch_size >= MIN_CONFORMERS_TO_BALANCE * settings.lanes
        self._coefficients = round(settings.cost_per_atom * COST_UNIT), round(settings.cost_per_pair * COST_UNIT)
        # A single source has whole windows in an epoch; a mixture has no epoch, and neither has what begins in the middle of one.
        self.is_aligned = len(sources) == 1 and self.cursors[0] % self._num_blocks[0] == 0
        self.windows_per_epoch = 0
        if self.is_aligned:
            self._align(int(np.sum(sources[0].block_sizes, dtype=np.int64)))
        else:
            total = sum((r * m for r, m in zip(self._rates, means, strict=True)), start=Fraction(0))
            self._mix(total / sum(self._rates))

    def _align(self, num_conformers: int) -> None:
        """Choose the windows of an epoch and the steps of a window so that steps come out at most of the size asked for."""
        settings, blocks = self.settings, self._num_blocks[0]
        steps = -(-num_conformers // settings.batch_size)
        most = min(max(1, steps // MIN_STEPS_PER_WINDOW), blocks)
        self.windows_per_epoch = min(-(-blocks // settings.window_blocks), most)
        self._window_blocks = blocks // self.windows_per_epoch
        smallest = np.partition(self.sources[0].block_sizes, self._window_blocks - 1)[: self._window_blocks]
        wanted = -(-num_conformers // (self.windows_per_epoch * settings.batch_size))
        self.steps_per_window = max(1, min(wanted, int(np.sum(smallest, dtype=np.int64))))

    def _mix(self, mean_block: Fraction) -> None:
        settings = self.settings
        least = MIN_STEPS_PER_WINDOW * settings.batch_size / mean_block
        used = sum(n for n, rate in zip(self._num_blocks, self._rates, strict=True) if rate)
        self._window_blocks = max(min(settings.window_blocks, used), math.ceil(least))
        self.steps_per_window = max(1, round(self._window_blocks * mean_block / settings.batch_size))

    # ------------------------------------------------------------------------------------------------------- what and where

    def fields(self) -> dict[str, Any]:
        """Return everything that the order depends on, as plain values; equal fields mean equal batches for ever."""
        settings = self.settings
        return {
            "version": VERSION,
            "sources": [s.name for s in self.sources],
            "fingerprints": [s.fingerprint for s in self.sources],
            "weights": list(settings.weights),
            "seed": settings.seed,
            "lanes": settings.lanes,
            "window_blocks": settings.window_blocks,
            "slots": self.steps_per_window,
            "batch_size": settings.batch_size,
            "shuffle_shards": settings.shuffle_shards,
            "cost_per_atom": self._coefficients[0] / COST_UNIT,
            "cost_per_pair": self._coefficients[1] / COST_UNIT,
            "pair_cutoff": settings.pair_cutoff,
            "cursors": list(self.cursors),
        }

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of `fields`."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()[:16]

    def locate(self, step: int) -> tuple[int, int]:
        """Return the window of a step and its slot there."""
        return divmod(step, self.steps_per_window)

    def blocks_before(self, window: int) -> tuple[int, ...]:
        """Return how many blocks each source has given before a window, counted through all its epochs.

        Webster's divisor sequence in closed form: block k of a source with rate w is due at time (2k + 1) / 2w.
        """
        if self.is_aligned:
            epoch, within = divmod(window, self.windows_per_epoch)
            blocks = self._num_blocks[0]
            return (self.cursors[0] + epoch * blocks + within * blocks // self.windows_per_epoch,)
        return tuple(
            c + n for c, n in zip(self.cursors, apportion(window * self._window_blocks, self._rates), strict=True)
        )

    def cursors_at(self, step: int) -> dict[str, int]:
        """Return by its name how many blocks each source has given before a step that begins a window."""
        window, slot = self.locate(step)
        assert slot == 0, "a window must be whole"
        return dict(zip((s.name for s in self.sources), self.blocks_before(window), strict=True))

    def epochs(self, step: int) -> tuple[float, ...]:
        """Return how often each source has been gone through before a step, its windows counted evenly."""
        window, slot = self.locate(step)
        share = slot / self.steps_per_window
        before, after = self.blocks_before(window), self.blocks_before(window + 1)
        counts = zip(before, after, self._num_blocks, strict=True)
        return tuple((first + share * (last - first)) / blocks for first, last, blocks in counts)

    def window(self, number: int) -> Window:
        """Return what a window holds, for all lanes.

        Args:
            number: Of the window, from zero.
        """
        if self._held is None or self._held[0] != number:
            self._held = None  # its memory is free before the next one is made
            self._held = number, self._make_window(number)
        return self._held[1]

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without a window."""
        return {**self.__dict__, "_held": None}

    def _make_window(self, number: int) -> Window:
        blocks = self._list_blocks(number)
        sizes = np.empty(len(blocks), np.int64)
        for source, known in enumerate(self.sources):
            own = blocks[:, 0] == source
            sizes[own] = known.block_sizes[blocks[own, 1]]
        atoms, pairs = self._measure(blocks, sizes)
        order, offsets = self._deal(number, _add_costs(atoms, pairs, self._coefficients), sizes)
        block_of = np.repeat(np.arange(len(blocks), dtype=np.int32), sizes)[order]
        return Window(
            source=blocks[:, 0].astype(np.uint16)[block_of], block=blocks[:, 1].astype(np.int32)[block_of],
            index=(order - _starts(sizes).astype(np.int32)[block_of]).astype(np.uint16), atoms=atoms[order],
            pairs=pairs[order], offsets=offsets, coefficients=self._coefficients,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- from here to there

    def _measure(self, blocks: IntArray, sizes: IntArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return atoms and pairs of all conformers of some blocks, asked for in pieces that stay small in memory."""
        atoms, pairs = (np.empty(int(sizes.sum()), np.int32) for _ in range(2))
        starts = _starts(sizes)
        for source, known in enumerate(self.sources):
            own = np.flatnonzero(blocks[:, 0] == source)
            for first in range(0, len(own), _BLOCKS_AT_A_TIME):
                piece = own[first : first + _BLOCKS_AT_A_TIME]
                places = _concatenate_ranges(starts[piece], sizes[piece])
                found_atoms, found_pairs = known.sizes(blocks[piece, 1])
                atoms[places], pairs[places] = found_atoms, np.minimum(found_pairs, _MOST_PAIRS)
        return atoms, pairs

    def _list_blocks(self, window: int) -> IntArray:
        """Return (num_blocks, 2) source and block of the window, shuffled."""
        found = []
        for source, (first, last) in enumerate(
            zip(self.blocks_before(window), self.blocks_before(window + 1), strict=True)
        ):
            positions = np.arange(first, last)
            blocks = np.empty(len(positions), np.int64)
            epochs, within = np.divmod(positions, self._num_blocks[source])
            for epoch in np.unique(epochs):
                blocks[epochs == epoch] = self._order(source, int(epoch), within[epochs == epoch])
            found.append(np.stack([np.full(len(blocks), source), blocks], axis=1))
        joined = np.concatenate(found)
        return joined[permute(len(joined), self.settings.seed, 2, window)]

    def _order(self, source: int, epoch: int, positions: IntArray) -> IntArray:
        """Return the blocks at some positions of a source's epoch."""
        seed, count = self.settings.seed, self._num_blocks[source]
        shards = self._shards[source]
        if shards is None:
            return permute_at(positions, count, seed, 1, self._keys[source], epoch)
        first, counts = shards
        order = permute(len(first), seed, 5, self._keys[source], epoch)
        ends = np.cumsum(counts[order])
        groups = np.append(np.arange(0, len(first), self.settings.shuffle_shards), len(first))
        begins = np.concatenate([[0], ends])
        bounds = begins[groups]
        group_of = np.searchsorted(bounds, positions, side="right") - 1
        places = np.empty(len(positions), np.int64)
        for group in np.unique(group_of):
            own, start = group_of == group, int(bounds[group])
            size = int(bounds[group + 1]) - start
            places[own] = start + permute_at(
                positions[own] - start, size, seed, 1, self._keys[source], epoch, int(group)
            )
        shard = np.searchsorted(ends, places, side="right")
        found: IntArray = first[order[shard]] + places - begins[shard]
        return found

    def _deal(self, window: int, costs: IntArray, block_sizes: IntArray) -> tuple[npt.NDArray[np.int32], IntArray]:
        """Return the conformers in the order of lanes and slots, and (lanes, slots + 1) where each slot begins."""
        lanes, slots = self.settings.lanes, self.steps_per_window
        count = len(costs)
        if self._by_cost:
            order, bounds = cut_evenly(costs, block_sizes, lanes)
            capacities = None
        else:
            order, bounds = np.arange(count, dtype=np.int32), count * np.arange(lanes + 1) // lanes
            # Numbered through all lanes, conformer q takes a place of slot q modulo the number of slots.
            whole, rest = np.divmod(bounds, slots)
            filled = whole[:, None] + (np.arange(slots) < rest[:, None])
            capacities = np.diff(filled, axis=0)
        offsets = np.zeros((lanes, slots + 1), np.int64)
        for first in range(0, lanes, _LANES_AT_A_TIME):
            own = slice(first, min(first + _LANES_AT_A_TIME, lanes))
            lanes_capacities = None if capacities is None else capacities[own]
            counts = self._fill_slots(window, first, order, costs, bounds[own.start : own.stop + 1], lanes_capacities)
            offsets[own, 1:] = np.cumsum(counts, axis=1)
        return order, offsets + bounds[:-1, None]

    def _fill_slots(
        self,
        window: int,
        first: int,
        order: npt.NDArray[np.int32],
        costs: IntArray,
        bounds: IntArray,
        capacities: IntArray | None,
    ) -> IntArray:
        """Put the conformers of some lanes in the order of their slots, in place; return (lanes, slots) how many each has.

        Args:
            window: Number of the window.
            first: Number of the first lane.
            order: (num_conformers,) of the window, lane by lane.
            costs: (num_conformers,) of the window, as its blocks come.
            bounds: (lanes + 1,) where these lanes begin in `order`.
            capacities: (lanes, slots), or None: any number.
        """
        lanes, slots, seed = len(bounds) - 1, self.steps_per_window, self.settings.seed
        own = order[bounds[0] : bounds[-1]]
        lane_of = np.repeat(np.arange(lanes), np.diff(bounds))
        # Heaviest first; what costs the same in an order of chance.
        own = own[np.lexsort((hash_integers(own, seed, 3, window), -costs[own], lane_of))]
        # Slots of the same load take their turn in an order of chance, another one in each lane: else the heaviest of all
        # lanes would meet in the same step.
        numbers = np.arange(first * slots, (first + lanes) * slots).reshape(lanes, slots)
        turns = np.argsort(hash_integers(numbers, seed, 6, window), axis=1)
        in_turn = None if capacities is None else np.take_along_axis(capacities, turns, axis=1)
        slot_of = turns[lane_of, pack(costs[own], bounds - bounds[0], slots, in_turn)]
        if capacities is None:
            slot_of = match_slots(slot_of, costs[own], lane_of, lanes, permute(slots, seed, 4, window))
        cell = lane_of * slots + slot_of
        order[bounds[0] : bounds[-1]] = own[np.argsort(cell, kind="stable")]
        return np.bincount(cell, minlength=lanes * slots).reshape(lanes, slots)


def _add_costs(atoms: npt.NDArray[Any], pairs: npt.NDArray[Any], coefficients: tuple[int, int]) -> IntArray:
    return coefficients[0] * atoms.astype(np.int64) + coefficients[1] * pairs.astype(np.int64)


def _list_shards(block_shards: npt.NDArray[Any], group: int) -> tuple[IntArray, IntArray] | None:
    """Return the first block of each shard and how many blocks it has; None where all shards are shuffled together."""
    if not group:
        return None
    _, first, counts = np.unique(block_shards, return_index=True, return_counts=True)
    return (first, counts) if group < len(first) else None


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _starts(sizes: IntArray) -> IntArray:
    return np.cumsum(sizes) - sizes


def _concatenate_ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """Return start, start + 1, ... for each of some ranges, one after another."""
    return np.repeat(starts - _starts(sizes), sizes) + np.arange(int(sizes.sum()))


# ------------------------------------------------------------------------------------------------------------- the schedule


class Schedule:
    """The plans of a run one after another: a change of sources, shares or lanes starts a new one at the end of a window.

    Args:
        segments: First step and plan of each, ascending; the first one begins at step 0.
    """

    def __init__(self, segments: Sequence[tuple[int, Plan]]) -> None:
        assert segments[0][0] == 0, "a schedule begins at step 0"
        self.segments = tuple(segments)

    def locate(self, step: int) -> tuple[Plan, int]:
        """Return the plan that a step belongs to, and the step's number in it."""
        first, plan = next(s for s in reversed(self.segments) if s[0] <= step)
        return plan, step - first
