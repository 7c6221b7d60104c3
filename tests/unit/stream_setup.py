"""Streams over two small data sets: what the tests of streams start from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from training_setup import make_config, make_dataset

from so3krates_dist.data.folder import open_dataset
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.plan import Plan, PlanSettings, Schedule
from so3krates_dist.data.stream import (
    TrainingStream,
)
from so3krates_dist.graph import GraphBatch

CPU = torch.device("cpu")
NUM_STEPS = 40


def make_first_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty conformers in thirteen blocks; the energy tells which one it is."""
    return make_dataset(tmp_path_factory.mktemp("stream") / "data")


def make_second_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty others."""
    return make_dataset(tmp_path_factory.mktemp("other") / "data", num_train=30, first_seed=500)


def read_energies(folder: Path, split: str = "train") -> list[float]:
    return [g.energy for g in open_dataset(folder).iter_graphs(split) if g.energy is not None]


def read_all_energies(dataset: Path) -> set[float]:
    found = read_energies(dataset)
    assert len(set(found)) == len(found) == 50
    return set(found)


def make_schedule(mixture: Mixture, *, seed: int = 0, **sizes: int) -> Schedule:
    settings = PlanSettings(weights=tuple(s.share for s in mixture.active), seed=seed, **sizes)
    return Schedule([(0, Plan(mixture.active, settings))])


def make_stream(
    folders: Path | Sequence[Path], rank: int = 0, world_size: int = 1, *settings: str, **options: Limits
) -> TrainingStream:
    defaults = ("data.lanes=4", "data.batch_size=3", "data.window_blocks=5")
    names = [folders] if isinstance(folders, Path) else folders
    where = ("data.folder=''", f"data.folders=[{','.join(map(str, names))}]")
    config = make_config("", "run", *where, *defaults, *settings)
    section = config.data
    schedule = make_schedule(
        Mixture.open(section, config.model),
        lanes=section.lanes, window_blocks=section.window_blocks, batch_size=section.batch_size,
    )  # fmt: skip
    return TrainingStream(schedule, config, rank, world_size, **options)


def get_plan(stream: TrainingStream) -> Plan:
    return stream._schedule.segments[-1][1]


def count_epoch_steps(stream: TrainingStream) -> int:
    plan = get_plan(stream)
    return plan.windows_per_epoch * plan.steps_per_window


def list_energies(batches: list[GraphBatch]) -> list[float]:
    return [float(e) for b in batches if b.energy is not None for e in b.energy]


def to_bytes(batch: GraphBatch) -> dict[str, object]:
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(GraphBatch)}
    return {n: v.contiguous().numpy().tobytes() if isinstance(v, torch.Tensor) else v for n, v in fields.items()}


def assert_same(first: Sequence[GraphBatch], second: Sequence[GraphBatch]) -> None:
    for one, two in zip(first, second, strict=True):
        assert to_bytes(one) == to_bytes(two)
