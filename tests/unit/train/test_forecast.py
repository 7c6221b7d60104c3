"""What is predicted of a process's memory, by hand, and against processes that train; and which pass is the heaviest."""

import dataclasses

import numpy as np
import pytest
from peak_memory import compare_with_prediction
from training_setup import make_config, make_dataset

from so3krates_dist.config import TrainSection
from so3krates_dist.data.passes import Limits, count_passes, list_passes
from so3krates_dist.data.plan import lanes_of_rank
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.train import forecast, zero3
from so3krates_dist.train.inputs import open_data
from so3krates_dist.train.planning import build_schedule

WEIGHTS = (600, 300, 100)
COPY, LARGEST = 4000, 2400


def predict(world_size=4, passes=1, **options) -> tuple[float, ...]:
    """Return weights, gradients, optimizer, mean, exchange and host in copies of all weights."""
    section = TrainSection(**options)
    for activations in (7, 10**6):
        memory = forecast.predict_memory(section, WEIGHTS, world_size, passes=passes, activations=activations)
        held = memory.weights + memory.gradients + memory.optimizer + memory.mean
        assert memory.activations == activations
        assert memory.peak == held + max(memory.exchange, activations)
    shares = memory.weights, memory.gradients, memory.optimizer, memory.mean, memory.exchange, memory.host
    return tuple(share / COPY for share in shares)


BUFFER = LARGEST / COPY
"""The bucket for gradients has that size too, where the largest tensor has more than a sixteenth of all weights"""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large models have them."""
    monkeypatch.setattr(zero3, "LEAST_PIECE", 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"zero_stage": 0}, (1, 1, 2, 1, 1, 0)),
        ({"zero_stage": 0, "optimizer": "amsgrad"}, (1, 1, 3, 1, 1, 0)),
        ({"zero_stage": 1}, (1, BUFFER, 0.75, 1, 1.25, 0)),
        ({"zero_stage": 1, "passes": 3}, (1, BUFFER, 0.75, 1, 1.25, 0)),
        ({"zero_stage": 1, "world_size": 1}, (1, BUFFER, 3, 1, 2, 0)),
        ({"zero_stage": 1, "optimizer": "amsgrad"}, (1, BUFFER, 1, 1, 1.25, 0)),
        ({"zero_stage": 2}, (1, BUFFER, 0.75, 1, 0.5, 0)),
        ({"zero_stage": 2, "passes": 2}, (1, BUFFER + 0.25, 0.75, 1, 0.5, 0)),
        ({"zero_stage": 3}, (0.25, 0.25 + BUFFER, 0.75, 1, 2 * BUFFER, 0)),
        ({"zero_stage": 3, "world_size": 1}, (1, 1 + BUFFER, 3, 1, 2 * BUFFER, 0)),
        ({"zero_stage": 1, "offload_optimizer": True}, (1, 2 * BUFFER, 0, 1, 1.25, 1.25 + BUFFER)),
        ({"zero_stage": 2, "offload_optimizer": True, "passes": 2}, (1, 2 * BUFFER, 0, 1, 0.5, 1.5 + BUFFER)),
        ({"zero_stage": 3, "offload_optimizer": True}, (0.25, BUFFER, 0, 1, 2 * BUFFER, 1.25)),
        ({"zero_stage": 0, "precision": "float64", "world_size": 1}, (2, 2, 4, 2, 0, 0)),
        ({"zero_stage": 1, "precision": "bf16-mixed"}, (1, BUFFER, 0.75, 1, 1.25, 0)),
    ],
)
def test_shares_by_hand(options, expected):
    assert predict(**options) == pytest.approx(expected, abs=1e-12)


def test_parts_are_rounded_up():
    one = forecast.predict_memory(TrainSection(zero_stage=1), (1,), 3, passes=1, activations=0)
    assert one.optimizer == 3 * 2


def test_several_small_tensors_share_a_bucket():
    memory = forecast.predict_memory(TrainSection(zero_stage=3), (1,) * 100, 4, passes=1, activations=0)
    assert memory.gradients == 100 + 4 * 7


def check(found: dict[str, float]) -> None:
    """What is resident has the allocator's and the system's share too, and few weights have a gradient all the time."""
    assert 0.75 * found["total"] < found["measured"] < 1.15 * found["total"], found


def test_prediction_against_a_process_that_trains(tmp_path):
    """Some 8 million weights; the rest of the stages and busier models are in tests/benchmarks/dry_run.md."""
    wide = ("model.num_features=512", "data.batch_size=4", "train.zero_stage=2")
    check(compare_with_prediction(tmp_path, 2, *wide))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_prediction_at_other_stages(tmp_path, stage, world_size):
    wide = ("model.num_features=512", "data.batch_size=4", f"train.zero_stage={stage}")
    check(compare_with_prediction(tmp_path, world_size, *wide))


# ---------------------------------------------------------------------------------------------------------------- passes


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    config = make_config(make_dataset(folder / "set", 90), folder / "run", "data.batch_size=18")
    return config, build_schedule(config, open_data(config), None, 0)[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("groups", "limits"), [(1, Limits()), (2, Limits()), (1, Limits(20, 0)), (2, Limits(0, 30))])
def test_the_heaviest_pass_is_the_one_that_a_search_through_all_finds(setup, world_size, groups, limits):
    config, schedule = setup
    if 4 // world_size < groups:
        pytest.skip("a process has fewer lanes than groups")
    found = forecast.find_heaviest(schedule, 0, world_size, groups, limits)
    window = schedule.segments[0][1].window(0)
    passes = {
        (slot, rank, number): int(window.costs[rows].sum())
        for slot in range(window.num_slots)
        for rank in range(world_size)
        for number, rows in enumerate(
            list_passes(window, slot, lanes_of_rank(window.num_lanes, rank, world_size), groups, limits)
        )
    }
    place = found.step, found.rank, found.number
    if limits == Limits():
        assert passes[place] == max(passes.values())
    else:  # cut out of the heaviest share
        assert passes[place] >= 0.8 * max(passes.values())
    section = dataclasses.replace(config.train, micro_batches=groups)
    stream = TrainingStream(schedule, dataclasses.replace(config, train=section), found.rank, world_size, limits)
    batch = stream[found.step].batches[found.number]
    assert batch.num_graphs == found.conformers
    assert len(batch.atomic_numbers) == found.atoms
    assert found.size == found.atoms + found.pairs
    figures = forecast.describe_steps(schedule, 0, world_size, groups, limits)
    counts = [count_passes(window, slot, world_size, groups, limits) for slot in range(window.num_slots)]
    assert figures.most_passes == max(counts)
    assert figures.conformers * figures.num_steps == pytest.approx(90)
    assert figures.atoms == pytest.approx(float(np.sum(window.atoms)) / window.num_slots)
    assert figures.imbalance == 0 if world_size == 1 else figures.imbalance >= 0


def test_only_what_is_left_of_a_window_counts(setup):
    _, schedule = setup
    last = schedule.segments[0][1].steps_per_window - 1
    assert forecast.find_heaviest(schedule, last, 2, 1, Limits()).step == last
    beyond = forecast.find_heaviest(schedule, last + 1, 2, 1, Limits())
    assert last < beyond.step <= 2 * last + 1
