"""The plan: every conformer once an epoch of its source, the same batches for any number of processes, reproducible for ever."""

import heapq
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so3krates_dist.data.packing import cut_evenly, pack
from so3krates_dist.data.passes import Limits, count_passes, find_oversized, group_lanes, list_passes, split
from so3krates_dist.data.permutation import IntArray, hash_integers, permute, permute_at
from so3krates_dist.data.plan import Plan, PlanSettings, Schedule, Window, lanes_of_rank

INCREMENT = 0x9E3779B97F4A7C15
STORED_HASHES = [13942901723064559826, 14167685941929504932, 15737363119014420222]
STORED_PERMUTATION = [5, 1, 4, 6, 0, 3, 9, 2, 7, 8]
STORED_FEISTEL = [8, 6, 3, 7, 5, 1, 0, 9, 4, 2]
STORED_BATCHES = [
    [
        (0, 0, 0),
        (0, 1, 2),
        (0, 2, 2),
        (0, 3, 0),
        (0, 3, 2),
        (0, 3, 3),
        (0, 4, 1),
        (0, 4, 2),
        (0, 4, 3),
        (0, 5, 1),
        (0, 7, 1),
        (0, 8, 0),
        (0, 10, 0),
        (0, 10, 2),
        (0, 11, 0),
        (0, 11, 2),
    ],
    [(0, 2, 0), (0, 5, 1), (0, 9, 0), (0, 10, 0)],
]


class Source:
    """A data set of which only the sizes are known."""

    def __init__(self, block_sizes: list[int], name: str = "first", blocks_per_shard: int = 3, seed: int = 0) -> None:
        self.name, self.fingerprint = name, f"{name} {sum(block_sizes)}"
        self.block_sizes = np.array(block_sizes)
        self.block_shards = np.arange(len(block_sizes)) // blocks_per_shard
        self._ends = np.cumsum(self.block_sizes)
        drawn = hash_integers(np.arange(sum(block_sizes)), seed).astype(np.float64) / 2**64
        self.atoms = (2 + 30 * drawn**2).astype(np.int64)
        self.pairs = self.atoms * (self.atoms - 1) // 3

    def sizes(self, blocks: IntArray) -> tuple[IntArray, IntArray]:
        picked = [np.arange(self._ends[b] - self.block_sizes[b], self._ends[b]) for b in blocks]
        rows = np.concatenate([np.zeros(0, np.int64), *picked])
        return self.atoms[rows], self.pairs[rows]


def make_plan(*sources: Source, cursors: tuple[int, ...] | None = None, **changes: Any) -> Plan:
    """Return a plan of 50 conformers in blocks of four, in several windows, unless something else is asked for."""
    chosen = sources or (Source([4] * 12 + [2]),)
    values = {"weights": (1.0,), "batch_size": 3, "lanes": 4, "window_blocks": 5, "seed": 0} | changes
    return Plan(chosen, PlanSettings(**values), cursors)


plans = st.builds(
    lambda sizes, batch, lanes, window, seed, shards: make_plan(
        Source(sizes), batch_size=batch, lanes=lanes, window_blocks=window, seed=seed, shuffle_shards=shards
    ),
    st.lists(st.integers(1, 12), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.integers(0, 4),
)


def list_names(window: Window) -> list[tuple[int, int, int]]:
    return list(zip(window.source.tolist(), window.block.tolist(), window.index.tolist(), strict=True))


def list_step(plan: Plan, step: int) -> list[list[tuple[int, int, int]]]:
    """Return the conformers of each lane at a step."""
    number, slot = plan.locate(step)
    window = plan.window(number)
    names = list_names(window)
    return [names[window.rows(lane, slot)] for lane in range(window.num_lanes)]


def list_epoch(plan: Plan, epoch: int) -> list[tuple[int, int, int]]:
    first = epoch * plan.windows_per_epoch
    return [name for w in range(first, first + plan.windows_per_epoch) for name in list_names(plan.window(w))]


def list_everything(plan: Plan) -> list[tuple[int, int, int]]:
    sizes = enumerate(plan.sources[0].block_sizes.tolist())
    return [(0, block, index) for block, size in sizes for index in range(size)]


def pack_one_by_one(costs: npt.NDArray[np.int64], slots: int, capacities: list[int]) -> list[int]:
    """Return the loads that the rule gives with a heap, one conformer after another."""
    heap, left = [(0, slot) for slot in range(slots) if capacities[slot]], list(capacities)
    loads = [0] * slots
    for cost in costs.tolist():
        load, slot = heapq.heappop(heap)
        loads[slot], left[slot] = load + cost, left[slot] - 1
        if left[slot]:
            heapq.heappush(heap, (loads[slot], slot))
    return loads


class TestHash:
    def test_values_of_splitmix64(self) -> None:
        """The published generator adds the increment before each output; seed 0 gives these."""
        expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
        states = [(k * INCREMENT) % 2**64 for k in range(3)]
        assert hash_integers(np.array(states, np.uint64)).tolist() == [hash_without_key(s) for s in states]
        assert [hash_without_key(s) for s in states] == expected

    def test_values_are_for_ever(self) -> None:
        """A change here would change the order of every run that is resumed."""
        assert hash_integers([0, 1, 2], 5, 6).tolist() == STORED_HASHES
        assert permute(10, 3, 1).tolist() == STORED_PERMUTATION

    def test_keys_make_a_difference_in_every_place(self) -> None:
        keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**63,), (-1,)]
        assert len({tuple(permute(50, *k).tolist()) for k in keys}) == len(keys)

    @given(st.integers(0, 200), st.lists(st.integers(0, 2**63), max_size=3))
    def test_a_permutation_has_everything_once(self, count: int, key: list[int]) -> None:
        assert sorted(permute(count, *key).tolist()) == list(range(count))

    def test_permutations_are_even(self) -> None:
        """Each place gets each number about equally often (4 standard deviations)."""
        counts = np.zeros((5, 5))
        for seed in range(2000):
            counts[np.arange(5), permute(5, seed)] += 1
        assert np.abs(counts - 400).max() < 4 * np.sqrt(400 * 0.8)


def hash_without_key(state: int) -> int:
    """Reference in Python's integers (Steele, Lea, Flood 2014)."""
    z = (state + INCREMENT) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


class TestPermuteAt:
    @given(st.integers(1, 300), st.lists(st.integers(0, 2**63), max_size=4))
    def test_it_has_everything_once(self, count: int, key: list[int]) -> None:
        assert sorted(permute_at(np.arange(count), count, *key)) == list(range(count))

    def test_single_entries_are_those_of_the_whole(self) -> None:
        whole = permute_at(np.arange(1000), 1000, 7)
        assert permute_at([5, 999, 0], 1000, 7).tolist() == whole[[5, 999, 0]].tolist()
        assert permute_at(17, 1000, 7) == whole[17]

    def test_values_are_for_ever(self) -> None:
        assert permute_at(np.arange(10), 10, 1, 2).tolist() == STORED_FEISTEL

    @pytest.mark.parametrize("count", [2, 3, 5, 17])
    def test_it_is_even(self, count: int) -> None:
        """Chi squared of where each entry lands over many keys, five standard deviations allowed."""
        times, landed = 1500, np.zeros((count, count))
        for key in range(times):
            landed[np.arange(count), permute_at(np.arange(count), count, key)] += 1
        expected, freedom = times / count, (count - 1) ** 2
        assert ((landed - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom) + 5

    def test_a_hundred_million_need_no_memory(self) -> None:
        found = permute_at(np.arange(1000), 10**15, 3)
        assert len(set(found.tolist())) == 1000
        assert found.max() > 9e14


class TestPack:
    @given(st.lists(st.lists(st.integers(1, 1000), min_size=0, max_size=40), min_size=1, max_size=4), st.integers(1, 9))
    def test_it_is_heaviest_first_into_the_lightest(self, lanes: list[list[int]], slots: int) -> None:
        costs = [np.array(sorted(lane, reverse=True), np.int64) for lane in lanes]
        bounds = np.concatenate([[0], np.cumsum([len(c) for c in costs])])
        found = pack(np.concatenate(costs), bounds, slots)
        for lane, own in enumerate(costs):
            slot_of = found[bounds[lane] : bounds[lane + 1]]
            loads = np.bincount(slot_of, weights=own, minlength=slots)
            assert sorted(loads) == sorted(pack_one_by_one(own, slots, [len(own)] * slots))

    @given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 9))
    def test_capacities_are_kept(self, costs: list[int], slots: int) -> None:
        ordered = np.array(sorted(costs, reverse=True))
        capacities = np.bincount(np.arange(len(costs)) % slots, minlength=slots)
        found = pack(ordered, np.array([0, len(costs)]), slots, capacities[None])
        assert np.bincount(found, minlength=slots).tolist() == capacities.tolist()
        loads = np.bincount(found, weights=ordered, minlength=slots)
        assert sorted(loads) == sorted(pack_one_by_one(ordered, slots, capacities.tolist()))


class TestCutEvenly:
    @given(st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 9))
    def test_runs_hold_everything_once_and_blocks_stay_together(self, blocks: list[list[int]], lanes: int) -> None:
        costs = np.concatenate([np.array(b) for b in blocks])
        sizes = np.array([len(b) for b in blocks])
        order, bounds = cut_evenly(costs, sizes, lanes)
        block_of = np.repeat(np.arange(len(blocks)), sizes)
        assert sorted(order.tolist()) == list(range(len(costs)))
        assert block_of[order].tolist() == block_of.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(costs)
        assert (np.diff(bounds) >= 0).all()
        sums = np.array([costs[order][a:b].sum() for a, b in itertools.pairwise(bounds)])
        assert np.abs(sums - costs.sum() / lanes).max() <= costs.max() + 1

    def test_a_fitting_conformer_is_moved_to_the_cut(self) -> None:
        order, bounds = cut_evenly(np.array([10, 9, 8, 5, 3, 1]), np.array([6]), 2)
        assert bounds.tolist() == [0, 2, 6]
        assert order.tolist() == [0, 2, 1, 3, 4, 5]


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 1), (1, 4), (3, 4), (5, 2), (16, 4), (32, 4), (50, 1), (200, 3)])
class TestFiftyConformers:
    def test_an_epoch_is_every_conformer_once(self, batch_size: int, lanes: int) -> None:
        plan = make_plan(batch_size=batch_size, lanes=lanes)
        for epoch in (0, 1, 10**6):
            assert sorted(list_epoch(plan, epoch)) == list_everything(plan)

    def test_steps_are_even(self, batch_size: int, lanes: int) -> None:
        plan = make_plan(batch_size=batch_size, lanes=lanes)
        for number in range(2 * plan.windows_per_epoch):
            counts = plan.window(number).num_conformers().sum(axis=0)
            assert counts.min() >= 1
            if batch_size < 4 * lanes:
                assert counts.max() - counts.min() <= 1
                assert counts.max() <= batch_size + 1


class TestAnyPlan:
    @settings(max_examples=50, deadline=None)
    @given(plans, st.integers(0, 10**6))
    def test_an_epoch_is_every_conformer_once(self, plan: Plan, epoch: int) -> None:
        assert sorted(list_epoch(plan, epoch)) == list_everything(plan)

    @settings(max_examples=30, deadline=None)
    @given(plans, st.integers(0, 10**9))
    def test_every_step_has_a_conformer(self, plan: Plan, first: int) -> None:
        for step in range(first, first + 5):
            assert sum(map(len, list_step(plan, step))) > 0

    @settings(max_examples=30, deadline=None)
    @given(plans, st.integers(0, 10**6), st.integers(1, 9))
    def test_processes_divide_the_lanes(self, plan: Plan, step: int, world_size: int) -> None:
        number, slot = plan.locate(step)
        window = plan.window(number)
        ranges = [lanes_of_rank(window.num_lanes, rank, world_size) for rank in range(world_size)]
        assert [lane for r in ranges for lane in r] == list(range(window.num_lanes))
        names = list_names(window)
        for own in ranges:
            needed = {tuple(row) for row in window.blocks_of_lanes(own).tolist()}
            taken = {names[i][:2] for i in window.rows_of_lanes(own, slot)}
            assert taken <= needed


class TestOrder:
    def test_the_same_seed_gives_the_same_order(self) -> None:
        assert [list_step(make_plan(), s) for s in range(30)] == [list_step(make_plan(), s) for s in range(30)]

    def test_batches_are_for_ever(self) -> None:
        """A change of these is a change of `VERSION`, and breaks runs that go on."""
        mixed = make_plan(Source([4] * 12 + [2]), Source([3] * 9, "second"), weights=(0.6, 0.4), shuffle_shards=2)
        found = [list_step(make_plan(batch_size=20), 3), list_step(mixed, 1000)]
        assert [sorted(sum(step, [])) for step in found] == STORED_BATCHES  # noqa: RUF017 - short lists

    def test_epochs_and_seeds_differ(self) -> None:
        plan, other = make_plan(), make_plan(seed=1)
        assert list_epoch(plan, 0) != list_epoch(plan, 1)
        assert list_epoch(plan, 0) != list_epoch(other, 0)

    def test_random_access_is_sequential_access(self) -> None:
        plan = make_plan()
        in_order = [list_step(plan, step) for step in range(60)]
        assert [list_step(plan, step) for step in (59, 3, 17, 16)] == [in_order[step] for step in (59, 3, 17, 16)]

    def test_windows_of_an_epoch_do_not_share_blocks(self) -> None:
        plan = make_plan(Source([4] * 60), batch_size=4)
        assert plan.windows_per_epoch > 3
        blocks = [set(plan.window(w).block.tolist()) for w in range(plan.windows_per_epoch)]
        assert sum(map(len, blocks)) == len(set.union(*blocks)) == 60

    def test_windows_are_not_shorter_than_eight_steps(self) -> None:
        assert make_plan(batch_size=6).steps_per_window >= 8
        mixed = make_plan(Source([4] * 90), Source([4] * 90, "second"), weights=(0.5, 0.5), batch_size=30)
        assert mixed.steps_per_window >= 8

    def test_shards_are_shuffled_in_groups(self) -> None:
        plan = make_plan(Source([4] * 60, blocks_per_shard=5), batch_size=4, window_blocks=10, shuffle_shards=2)
        for number in range(plan.windows_per_epoch):
            assert len({block // 5 for block in plan.window(number).block.tolist()}) == 2

    def test_a_jump_costs_no_more_than_a_step(self) -> None:
        """Far into the run no more work is done: the same number of blocks is looked at, with nothing before them."""
        asked: list[int] = []

        class Counting(Source):
            def sizes(self, blocks: IntArray) -> tuple[IntArray, IntArray]:
                asked.append(len(blocks))
                return super().sizes(blocks)

        plan = make_plan(Counting([4] * 200), Counting([4] * 50, "second"), weights=(0.5, 0.5))
        plan.window(0)
        near = sum(asked)
        asked.clear()
        plan.window(10**12)
        assert sum(asked) == near > 0


class TestBalance:
    @pytest.mark.parametrize("lanes", [2, 8, 64])
    def test_lanes_carry_the_same_at_every_step(self, lanes: int) -> None:
        plan = make_plan(Source([64] * (8 * lanes)), batch_size=16 * lanes, lanes=lanes, window_blocks=8 * lanes)
        loads = plan.window(0).loads()
        assert (1 - loads.mean(axis=0) / loads.max(axis=0)).max() < 0.02

    def test_by_number_costs_are_balanced_as_well(self) -> None:
        plan = make_plan(Source([64] * 32), batch_size=16, lanes=8, window_blocks=64)
        window = plan.window(0)
        halves = window.loads().reshape(2, 4, -1).sum(axis=1)
        random = np.bincount(np.arange(2048) % 256, weights=window.costs).std()
        assert halves.std() < random

    @pytest.mark.parametrize(("batch_size", "lanes"), [(16, 8), (64, 8), (256, 8)])
    def test_steps_are_fair_samples(self, batch_size: int, lanes: int) -> None:
        """The heaviest tenth is spread over the steps no worse than by chance, and comes at no special time of an epoch."""
        source = Source([64] * 64)
        plan = make_plan(source, batch_size=batch_size, lanes=lanes, window_blocks=64)
        heavy = source.atoms >= np.quantile(source.atoms, 0.9)
        counts = []
        for number in range(4):
            window = plan.window(number)
            is_heavy = heavy[window.block * 64 + window.index]
            rows = [window.rows_of_lanes(range(lanes), slot) for slot in range(window.num_slots)]
            counts.append([is_heavy[r].sum() for r in rows])
        found = np.array(counts)
        by_chance = batch_size * heavy.mean() * (1 - heavy.mean())
        assert found.var() < 1.3 * by_chance
        times = np.linspace(-1, 1, found.shape[1])
        for epoch in found:
            assert abs(np.corrcoef(times, epoch)[0, 1]) < 4 / np.sqrt(len(times))

    def test_coefficients_decide_what_is_heavy(self) -> None:
        source = Source([64] * 32)
        plan = make_plan(source, batch_size=64, lanes=4, window_blocks=64, cost_per_atom=1.0, cost_per_pair=0.0)
        atoms, _ = plan.window(0).sizes
        assert (atoms.max(axis=0) - atoms.min(axis=0)).max() <= 30
        assert plan.fingerprint != make_plan(source, batch_size=64, lanes=4, window_blocks=64).fingerprint


class TestMixing:
    def test_shares_are_exact_to_one_block(self) -> None:
        sources = [Source([4] * 40), Source([4] * 7, "second"), Source([4] * 11, "third")]
        weights = (0.5, 0.3, 0.2)
        plan = make_plan(*sources, weights=weights, window_blocks=13, batch_size=4)
        for number in (1, 2, 3, 17, 1000, 10**9):
            total = number * 13
            for found, weight in zip(plan.blocks_before(number), weights, strict=True):
                assert abs(found - weight * total) < 1

    def test_shares_are_of_conformers(self) -> None:
        sources = [Source([10] * 40), Source([2] * 40, "second")]
        plan = make_plan(*sources, weights=(0.5, 0.5), window_blocks=60, batch_size=4)
        counts = np.bincount(np.concatenate([plan.window(w).source for w in range(20)]))
        assert counts[0] / counts.sum() == pytest.approx(0.5, abs=0.02)

    def test_each_source_is_gone_through_without_replacement(self) -> None:
        sources = [Source([4] * 12 + [2]), Source([3] * 5, "second")]
        plan = make_plan(*sources, weights=(0.5, 0.5), window_blocks=6)
        given_blocks: list[list[tuple[int, int]]] = [[], []]
        for number in range(40):
            window = plan.window(number)
            before, after = plan.blocks_before(number), plan.blocks_before(number + 1)
            counts = np.diff([before, after], axis=0)[0]
            for source, count in enumerate(counts):
                own = window.block[window.source == source]
                found, times = np.unique(own, return_counts=True)
                whole = times // sources[source].block_sizes[found]
                assert (times == whole * sources[source].block_sizes[found]).all()
                assert whole.sum() == count
                given_blocks[source].extend((int(b), int(n)) for b, n in zip(found, whole, strict=True))
        for source, blocks in enumerate(given_blocks):
            times = np.zeros(len(sources[source].block_sizes), int)
            for block, count in blocks:
                times[block] += count
            assert times.max() - times.min() <= 1

    def test_epochs_of_each_source(self) -> None:
        plan = make_plan(
            Source([4] * 40), Source([4] * 10, "second"), weights=(0.5, 0.5), window_blocks=20, batch_size=4
        )
        assert plan.epochs(0) == (0.0, 0.0)
        assert plan.epochs(8 * plan.steps_per_window) == (2.0, 8.0)
        assert plan.epochs(8 * plan.steps_per_window + plan.steps_per_window // 2) == (2.125, 8.5)
        assert make_plan().epochs(make_plan().steps_per_window * make_plan().windows_per_epoch * 3)[0] == 3.0


class TestSchedule:
    def test_a_change_goes_on_where_each_source_was(self) -> None:
        """Before and after a change of the shares, each source gives its blocks in turn, none twice and none left out."""
        sources = [Source([4] * 30), Source([4] * 20, "second")]
        old = make_plan(*sources, weights=(0.5, 0.5), window_blocks=8)
        step = 2 * old.steps_per_window
        assert old.cursors_at(step) == {"first": 8, "second": 8}
        new = make_plan(*sources, weights=(0.25, 0.75), window_blocks=8, lanes=2, cursors=(8, 8))
        schedule = Schedule([(0, old), (step, new)])
        assert schedule.locate(step - 1) == (old, step - 1)
        assert schedule.locate(step) == (new, 0)
        windows = (old.window(0), old.window(1), new.window(0), new.window(1))
        blocks = np.concatenate([np.unique(w.block[w.source == 0]) for w in windows])
        assert len(np.unique(blocks)) == len(blocks) == 12
        assert new.cursors_at(2 * new.steps_per_window) == {"first": 12, "second": 20}

    def test_a_source_keeps_its_order_whatever_others_come_and_go(self) -> None:
        sources = [Source([4] * 30), Source([4] * 20, "second")]
        old = make_plan(*sources, weights=(0.5, 0.5), window_blocks=8)
        alone = make_plan(sources[1], window_blocks=4, cursors=(4,))
        assert not alone.is_aligned  # it begins in the middle of an epoch
        given_before = set(old.window(0).block[old.window(0).source == 1].tolist())
        given_after = [set(alone.window(number).block.tolist()) for number in range(4)]
        assert set.union(given_before, *given_after) == set(range(20))

    def test_a_mixture_of_small_sources_has_no_window_longer_than_them(self) -> None:
        plan = make_plan(
            Source([4] * 10), Source([4] * 6, "second"), weights=(0.5, 0.5), window_blocks=512, batch_size=2
        )
        assert sum(plan.blocks_before(1)) == 16

    def test_every_field_changes_the_fingerprint(self) -> None:
        plan = make_plan()
        changes: list[dict[str, Any]] = [
            {"seed": 1}, {"lanes": 2}, {"window_blocks": 4}, {"batch_size": 4}, {"shuffle_shards": 1}, {"cost_per_atom": 2.0},
            {"cost_per_pair": 0.5},
        ]  # fmt: skip
        others = [make_plan(**change) for change in changes]
        others += [
            make_plan(Source([4] * 12 + [2], "other")),
            make_plan(Source([4] * 12 + [3])),
            make_plan(cursors=(1,)),
        ]
        assert len({p.fingerprint for p in [plan, *others]}) == len(others) + 1
        assert make_plan(cost_per_atom=3.001).fingerprint == plan.fingerprint  # coefficients count in hundredths


class TestPasses:
    def test_a_pass_keeps_the_limits(self) -> None:
        atoms, pairs = np.array([5, 5, 5, 9, 1, 1]), np.array([10, 10, 90, 10, 1, 1])
        assert split(atoms, pairs, Limits()) == [slice(0, 6)]
        assert split(atoms, pairs, Limits(max_atoms=10)) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
        assert split(atoms, pairs, Limits(max_pairs=95)) == [slice(0, 2), slice(2, 3), slice(3, 6)]
        assert split(atoms[:0], pairs[:0], Limits(max_atoms=1)) == [slice(0, 0)]

    def test_what_exceeds_them_has_a_pass_of_its_own(self) -> None:
        atoms = np.array([2, 50, 2, 2])
        assert split(atoms, atoms, Limits(max_atoms=10)) == [slice(0, 1), slice(1, 2), slice(2, 4)]
        assert find_oversized(atoms, atoms, Limits(max_atoms=10)).tolist() == [1]
        assert find_oversized(atoms, 3 * atoms, Limits(max_pairs=7)).tolist() == [1]
        assert find_oversized(atoms, atoms, Limits()).tolist() == []

    @settings(max_examples=40, deadline=None)
    @given(plans, st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3), st.integers(0, 60), st.integers(0, 300))
    def test_all_processes_do_equally_many_and_nothing_is_lost(
        self, plan: Plan, step: int, world_size: int, groups: int, max_atoms: int, max_pairs: int
    ) -> None:
        number, slot = plan.locate(step)
        window, limits = plan.window(number), Limits(max_atoms, max_pairs)
        lanes = [lanes_of_rank(window.num_lanes, rank, world_size) for rank in range(world_size)]
        passes = [list_passes(window, slot, own, groups, limits) for own in lanes]
        assert count_passes(window, slot, world_size, groups, limits) == max(map(len, passes))
        for own, parts in zip(lanes, passes, strict=True):
            assert np.concatenate(parts).tolist() == window.rows_of_lanes(own, slot).tolist()
            for part in parts:
                assert len(part) < 2 or limits.hold(int(window.atoms[part].sum()), int(window.pairs[part].sum()))

    def test_lanes_are_grouped_evenly(self) -> None:
        assert group_lanes(range(4, 8), 2) == [range(4, 6), range(6, 8)]
        assert [len(g) for g in group_lanes(range(2), 3)] == [0, 1, 1]
