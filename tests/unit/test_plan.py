"""The plan: every conformer once an epoch, the same batches for any number of processes, and reproducible for ever."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so3krates_dist.data.plan import Place, Plan, hash_integers, pack, permute

INCREMENT = 0x9E3779B97F4A7C15
STORED_HASHES = [13942901723064559826, 14167685941929504932, 15737363119014420222]
STORED_PERMUTATION = [5, 1, 4, 6, 0, 3, 9, 2, 7, 8]

plans = st.builds(
    lambda sizes, batch, lanes, window, seed: Plan(
        sizes, batch_size=batch, lanes=lanes, window_blocks=window, seed=seed
    ),
    st.lists(st.integers(1, 12), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(0, 2**31),
)


def make_plan(**changes: Any) -> Plan:
    """Return a plan of 50 conformers in blocks of four, in several windows."""
    sizes = changes.pop("block_sizes", [4] * 12 + [2])
    return Plan(sizes, **{"batch_size": 3, "lanes": 4, "window_blocks": 5, "seed": 0} | changes)


def list_epoch(plan: Plan, epoch: int = 0) -> list[list[list[tuple[int, int]]]]:
    """Return the conformers of each step and lane; costs differ from conformer to conformer."""
    steps: list[list[list[tuple[int, int]]]] = []
    first = epoch * plan.steps_per_epoch
    for step in range(first, first + plan.steps_per_epoch):
        place = plan.locate(step)
        lanes = []
        for lane in range(plan.lanes):
            rows = plan.rows_of_lane(place, lane)
            slots = plan.slots_of_lane(place, lane, (rows[:, 0] * 7 + rows[:, 1] * 3) % 11)
            lanes.append([(int(b), int(i)) for b, i in rows[slots == place.slot]])
        steps.append(lanes)
    return steps


def list_everything(plan: Plan) -> list[tuple[int, int]]:
    return [(block, index) for block, size in enumerate(plan.block_sizes) for index in range(size)]


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


class TestPack:
    @given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 9), st.integers(0, 2**31))
    def test_capacities_are_kept(self, costs: list[float], num_slots: int, seed: int) -> None:
        capacities = np.bincount(permute(len(costs), seed) % num_slots, minlength=num_slots)
        slots = pack(np.array(costs), capacities.tolist(), seed)
        assert np.bincount(slots, minlength=num_slots).tolist() == capacities.tolist()

    def test_costs_are_balanced(self) -> None:
        """Much better than dealing at random: real spreads of molecule sizes, ten to a batch."""
        costs = np.random.default_rng(0).lognormal(3, 0.7, 400)
        slots = pack(costs, [10] * 40, 0)
        balanced = np.bincount(slots, costs)
        dealt = costs[permute(400, 1)].reshape(40, 10).sum(1)
        assert balanced.max() / balanced.mean() < 1.06
        assert dealt.max() / dealt.mean() > 1.3

    def test_equal_costs_are_dealt_at_random(self) -> None:
        first, second = (pack(np.ones(40), [10] * 4, seed) for seed in (0, 1))
        assert (first != second).any()
        assert (pack(np.ones(40), [10] * 4, 0) == first).all()

    def test_slots_may_be_empty(self) -> None:
        assert pack(np.array([3.0, 1.0]), [0, 2, 0], 0).tolist() == [1, 1]
        assert pack(np.zeros(0), [0, 0], 0).tolist() == []


@pytest.mark.parametrize("lanes", range(1, 9))
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 49, 50, 64])
class TestFiftyConformers:
    """A set as small as the issue names, with windows as small as they may be."""

    def test_an_epoch_is_every_conformer_once(self, batch_size: int, lanes: int) -> None:
        plan = make_plan(batch_size=batch_size, lanes=lanes)
        for epoch in (0, 3):
            dealt = [c for step in list_epoch(plan, epoch) for lane in step for c in lane]
            assert sorted(dealt) == list_everything(plan)

    def test_steps_and_lanes_are_even(self, batch_size: int, lanes: int) -> None:
        """So no batch holds a conformer twice, none is empty, and no lane has two more than another in any step."""
        plan = make_plan(batch_size=batch_size, lanes=lanes)
        steps = list_epoch(plan)
        assert len(steps) == plan.steps_per_epoch == -(-50 // batch_size)
        sizes: dict[int, list[int]] = {}
        for number, step in enumerate(steps):
            assert max(map(len, step)) - min(map(len, step)) <= 1
            sizes.setdefault(plan.locate(number).window, []).append(sum(map(len, step)))
        assert all(max(window) - min(window) <= 1 for window in sizes.values())
        assert len(sizes) == plan.num_windows
        assert min(map(min, sizes.values())) >= 1
        assert max(map(max, sizes.values())) <= batch_size + 2


class TestAnyPlan:
    @settings(max_examples=60, deadline=None)
    @given(plans, st.integers(0, 5))
    def test_an_epoch_is_every_conformer_once(self, plan: Plan, epoch: int) -> None:
        dealt = [c for step in list_epoch(plan, epoch) for lane in step for c in lane]
        assert sorted(dealt) == list_everything(plan)

    @settings(max_examples=60, deadline=None)
    @given(plans, st.integers(0, 10**6))
    def test_places_follow_one_another(self, plan: Plan, first: int) -> None:
        """Slots count up to the window's last, windows to the epoch's last; nothing is left out at a boundary."""
        before = plan.locate(first)
        for step in range(first + 1, first + 40):
            place = plan.locate(step)
            last_slot = before.slot == plan.num_slots(before) - 1
            last_window = last_slot and before.window == plan.num_windows - 1
            if last_window:
                assert place == Place(before.epoch + 1, 0, 0)
            elif last_slot:
                assert place == Place(before.epoch, before.window + 1, 0)
            else:
                assert place == Place(before.epoch, before.window, before.slot + 1)
            assert (place.epoch, step % plan.steps_per_epoch == 0) == (
                step // plan.steps_per_epoch,
                place == Place(place.epoch, 0, 0),
            )
            before = place


class TestOrder:
    def test_the_same_seed_gives_the_same_order(self) -> None:
        assert list_epoch(make_plan(seed=3), 2) == list_epoch(make_plan(seed=3), 2)

    def test_epochs_and_seeds_differ(self) -> None:
        orders = [str(list_epoch(make_plan(seed=s), e)) for s in (0, 1) for e in (0, 1, 2)]
        assert len(set(orders)) == 6

    def test_random_access_is_sequential_access(self) -> None:
        plan = make_plan()
        expected = [list_epoch(plan, epoch) for epoch in range(3)]
        fresh = make_plan()
        assert [list_epoch(fresh, epoch) for epoch in (2, 0, 1)] == [expected[2], expected[0], expected[1]]

    def test_windows_do_not_share_blocks(self) -> None:
        """A process keeps one window in memory, so each block is read once an epoch."""
        plan = make_plan(batch_size=1)
        assert plan.num_windows == 3
        blocks = []
        for window in range(3):
            rows = np.concatenate([plan.rows_of_lane(Place(0, window, 0), lane) for lane in range(4)])
            blocks.append(set(rows[:, 0].tolist()))
        assert not blocks[0] & blocks[1]
        assert not blocks[1] & blocks[2]
        assert set.union(*blocks) == set(range(13))

    def test_windows_are_not_shorter_than_eight_steps(self) -> None:
        for batch_size in (1, 2, 3, 6, 10):
            plan = make_plan(batch_size=batch_size, window_blocks=1)
            for window in range(plan.num_windows):
                steps = plan.num_slots(Place(0, window, 0))
                assert steps >= 6 or plan.num_windows == 1

    def test_neighbours_in_the_data_are_spread_over_the_epoch(self) -> None:
        """Conformers of one trajectory lie side by side on disk; where the window is the whole set they are mixed."""
        plan = Plan([10] * 20, batch_size=10, lanes=1, window_blocks=100, seed=0)
        steps = list_epoch(plan)
        blocks_per_step = [len({b for lane in step for b, _ in lane}) for step in steps]
        assert np.mean(blocks_per_step) > 6

    def test_a_plan_without_conformers_is_a_mistake(self) -> None:
        with pytest.raises(AssertionError, match="a plan needs conformers"):
            make_plan(block_sizes=[])
