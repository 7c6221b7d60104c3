"""Resuming: the same global batches, byte for byte, on any number of processes and workers, and after a change of the plan."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from stream_setup import (
    CPU,
    assert_same,
    get_plan,
    list_energies,
    make_first_set,
    make_second_set,
    make_stream,
    read_energies,
    to_bytes,
)
from training_setup import make_config

from so3krates_dist.data.plan import Plan, Schedule
from so3krates_dist.data.stream import (
    TrainingStream,
    build_loader,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_first_set(tmp_path_factory)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_second_set(tmp_path_factory)


LANES = 24
SETTINGS = (f"data.lanes={LANES}", "data.batch_size=40", "data.window_blocks=16", "data.weights=[0.7,0.3]")


def make_lane_stream(folders: Sequence[Path], rank: int, world_size: int) -> TrainingStream:
    """Each pass is one lane, so that batches can be compared whatever the number of processes."""
    return make_stream(folders, rank, world_size, *SETTINGS, f"train.micro_batches={LANES // world_size}")


@pytest.fixture(scope="module")
def expected_lanes(dataset: Path, other: Path) -> list[list[dict[str, object]]]:
    """The lanes' batches of each step, as one process without workers has them."""
    stream = make_lane_stream([dataset, other], 0, 1)
    return [[to_bytes(b) for b in stream[step].batches] for step in range(14)]


class TestResume:
    """The number of processes and workers may change at any step."""

    WORLDS = (1, 2, 3, 4, 6, 8)

    @pytest.mark.parametrize("world_size", WORLDS)
    def test_on_another_number_of_processes(self, dataset: Path, other: Path, expected_lanes, world_size: int) -> None:
        streams = [make_lane_stream([dataset, other], rank, world_size) for rank in range(world_size)]
        for step in (5, 6, 13, 0):
            lanes = [to_bytes(b) for s in streams for b in s[step].batches]
            assert len(lanes) == LANES
            assert lanes == expected_lanes[step]

    @pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on a machine of two cores
    @pytest.mark.parametrize("num_workers", [1, 2, 3])
    @pytest.mark.parametrize("world_size", WORLDS)
    def test_with_workers(self, dataset: Path, other: Path, expected_lanes, world_size: int, num_workers: int) -> None:
        rank = (num_workers + 1) % world_size
        share = LANES // world_size
        first = world_size + num_workers
        loader = build_loader(
            make_lane_stream([dataset, other], rank, world_size),
            range(first, first + 3),
            num_workers=num_workers,
            device=CPU,
        )
        with contextlib.closing(loader):
            for step, data in enumerate(loader, first):
                lanes = [to_bytes(b) for b in data.batches]
                assert lanes == expected_lanes[step][rank * share : (rank + 1) * share]

    def test_each_conformer_once_per_epoch_of_its_source(self, dataset: Path, other: Path) -> None:
        stream = make_stream([dataset, other], 0, 1, *SETTINGS)
        plan = get_plan(stream)
        dealt: Counter[float] = Counter()
        for window in range(6):
            for slot in range(plan.steps_per_window):
                dealt.update(list_energies(stream[window * plan.steps_per_window + slot].batches))
            for folder, given in zip((dataset, other), plan.blocks_before(window + 1), strict=True):
                epochs, rest = divmod(given, len(plan.sources[folder == other].block_sizes))
                times = Counter(dealt[e] for e in read_energies(folder))
                assert set(times) <= {epochs, epochs + 1}
                assert (times[epochs + 1] > 0) == (rest > 0)
        assert epochs >= 1


def test_changing_the_plan_in_mid_run(dataset: Path, other: Path) -> None:
    """After a rebase the steps of the first segment are as they were, and the others follow the new plan from its beginning."""
    first, second = make_stream(dataset), make_stream([dataset, other], 0, 1, "data.lanes=2")
    boundary = get_plan(first).steps_per_window
    cursors = get_plan(first).cursors_at(boundary)
    plan = get_plan(second)
    later = Plan(plan.sources, plan.settings, [cursors.get(s.name, 0) for s in plan.sources])
    joined = TrainingStream(Schedule([(0, get_plan(first)), (boundary, later)]), make_config(dataset, "run"), 0, 1)
    alone = TrainingStream(Schedule([(0, later)]), make_config(dataset, "run"), 0, 1)
    for step in (boundary - 1, boundary, boundary + 4, 0):
        expected = first[step] if step < boundary else alone[step - boundary]
        assert_same(joined[step].batches, expected.batches)
