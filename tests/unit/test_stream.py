"""The stream: global batches are the same for any number of processes, portions and workers, and nothing is lost on the way."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import write_dataset
from interruptions import flip_byte
from training_setup import make_config, make_dataset, make_graphs

from so3krates_dist.data import stream as stream_module
from so3krates_dist.data.shards import load_manifest
from so3krates_dist.data.stream import (
    TrainingStream,
    _start_worker,
    build_loader,
    estimate_cost,
    iter_batches,
    iter_graphs,
)
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import DataError
from so3krates_dist.graph import GraphBatch

CPU = torch.device("cpu")
NUM_STEPS = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty conformers in thirteen blocks; the energy tells which one it is."""
    return make_dataset(tmp_path_factory.mktemp("stream") / "data")


@pytest.fixture(scope="module")
def energies(dataset: Path) -> set[float]:
    found = [g.energy for g in iter_graphs(dataset, load_manifest(dataset), "train")]
    assert len(set(found)) == len(found) == 50
    return {e for e in found if e is not None}


def make_stream(dataset: Path, rank: int = 0, world_size: int = 1, *settings: str) -> TrainingStream:
    defaults = ("data.lanes=4", "data.batch_size=3", "data.window_blocks=5")
    return TrainingStream(
        dataset, load_manifest(dataset), make_config(dataset, "run", *defaults, *settings), rank, world_size
    )


def list_energies(batches: list[GraphBatch]) -> list[float]:
    return [float(e) for b in batches if b.energy is not None for e in b.energy]


def assert_same(first: list[GraphBatch], second: list[GraphBatch]) -> None:
    for one, two in zip(first, second, strict=True):
        for name in GraphBatch.__dataclass_fields__:
            a, b = getattr(one, name), getattr(two, name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


class TestGlobalBatches:
    @pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
    def test_processes_and_portions_only_divide_them(self, dataset: Path, world_size: int, micro_batches: int) -> None:
        whole = make_stream(dataset)
        setting = f"train.micro_batches={micro_batches}"
        streams = [make_stream(dataset, rank, world_size, setting) for rank in range(world_size)]
        assert all(len(s[0]) == micro_batches for s in streams)
        for step in range(NUM_STEPS):
            parts = [list_energies(s[step]) for s in streams]
            assert sum(parts, []) == list_energies(whole[step]), f"step {step}"  # noqa: RUF017 - short lists

    def test_an_epoch_is_every_conformer_once(self, dataset: Path, energies: set[float]) -> None:
        stream = make_stream(dataset)
        for epoch in (0, 5):
            first = epoch * stream.plan.steps_per_epoch
            dealt = [e for s in range(first, first + stream.plan.steps_per_epoch) for e in list_energies(stream[s])]
            assert len(dealt) == 50
            assert set(dealt) == energies

    def test_a_batch_as_large_as_the_set(self, dataset: Path, energies: set[float]) -> None:
        for size in (50, 200):
            stream = make_stream(dataset, 0, 1, f"data.batch_size={size}")
            for step in range(3):
                assert sorted(list_energies(stream[step])) == sorted(energies)

    def test_any_step_can_be_asked_for(self, dataset: Path) -> None:
        expected = make_stream(dataset)
        in_order = [expected[step] for step in range(NUM_STEPS)]
        stream = make_stream(dataset)
        for step in (39, 0, 17, 16, 18, 5):
            assert_same(stream[step], in_order[step])

    def test_a_batch_of_nothing_for_a_process_without_conformers(self, dataset: Path) -> None:
        streams = [make_stream(dataset, rank, 4, "data.batch_size=1") for rank in range(4)]
        for step in range(10):
            counts = sorted(s[step][0].num_graphs for s in streams)
            assert counts == [0, 0, 0, 1]

    def test_costs_of_processes_are_balanced(self, dataset: Path) -> None:
        """Over an epoch each process has about as many atoms in every step as its own mean."""
        stream = make_stream(dataset, 0, 2, "data.batch_size=10", "data.window_blocks=100")
        atoms = np.array([len(stream[s][0].atomic_numbers) for s in range(stream.plan.steps_per_epoch)])
        assert atoms.max() - atoms.min() <= 6, atoms


@pytest.mark.parametrize("num_workers", [0, 1, 2])
class TestLoader:
    def test_workers_change_nothing(self, dataset: Path, num_workers: int) -> None:
        stream, expected = make_stream(dataset), make_stream(dataset)
        loader = build_loader(stream, range(13, 29), num_workers=num_workers, device=CPU)
        for step, found in zip(range(13, 29), loader, strict=True):
            assert_same(found, expected[step])

    def test_a_damaged_block_is_the_same_error_from_anywhere(
        self, dataset: Path, tmp_path: Path, num_workers: int
    ) -> None:
        folder = make_dataset(tmp_path / "data")
        entry = load_manifest(folder).of_split("train")[0].blocks[1]
        flip_byte(folder / "train-000000.tar", entry.offset + 100)
        loader = build_loader(make_stream(folder), range(40), num_workers=num_workers, device=CPU)
        with pytest.raises(DataError, match=r"train-000000\.tar:train-000000-000001 must have the CRC \w+; got \w+\."):
            list(loader)


def test_workers_end_when_the_loader_is_closed(dataset: Path) -> None:
    import multiprocessing

    loader = build_loader(make_stream(dataset), range(1000), num_workers=2, device=CPU)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []


def test_workers_leave_signals_to_their_training_process() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    try:
        _start_worker(0)
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)


class TestEvaluation:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_every_conformer_once_in_stored_order(self, dataset: Path, energies: set[float], world_size: int) -> None:
        parts = [
            [
                list_energies([b])
                for b in iter_batches(
                    dataset, "train", batch_size=8, cutoffs=(4.0, 4.0), rank=Rank(rank=r, world_size=world_size)
                )
            ]
            for r in range(world_size)
        ]
        dealt = [parts[i % world_size][i // world_size] for i in range(7)]
        assert [len(b) for b in dealt] == [8] * 6 + [2]
        stored = [g.energy for g in iter_graphs(dataset, load_manifest(dataset), "train")]
        assert [e for b in dealt for e in b] == stored

    def test_a_limit(self, dataset: Path) -> None:
        batches = list(iter_batches(dataset, "train", batch_size=8, cutoffs=(4.0, 4.0), limit=11))
        assert [b.num_graphs for b in batches] == [8, 3]
        assert sum(b.num_graphs for b in iter_batches(dataset, "test", batch_size=8, cutoffs=(4.0, 4.0), limit=99)) == 4

    def test_labels_and_pairs_are_there(self, dataset: Path) -> None:
        (batch,) = iter_batches(dataset, "validation", batch_size=32, cutoffs=(4.0, 4.0))
        assert batch.energy is not None
        assert batch.energy.dtype == torch.float64
        assert batch.forces is not None
        assert batch.forces.shape == batch.positions.shape
        distances = (batch.positions[batch.pair_second] - batch.positions[batch.pair_first]).norm(dim=1)
        assert 0.5 < float(distances.min()) <= float(distances.max()) < 4.0
        assert batch.group == ("size4", "size5", "size6", "size7")

    def test_a_split_without_conformers(self, dataset: Path) -> None:
        with pytest.raises(DataError, match=r"split `nothing` of small must have conformers; got none\."):
            next(iter_batches(dataset, "nothing", batch_size=8, cutoffs=(4.0, 4.0)))

    def test_a_data_set_without_training_conformers(self, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = load_manifest(dataset)
        import dataclasses

        emptied: Any = dataclasses.replace(manifest, shards=manifest.of_split("test"))
        with pytest.raises(DataError, match="split `train` of small must have conformers"):
            TrainingStream(dataset, emptied, make_config(dataset, "run"), 0, 1)


def test_the_cost_grows_with_the_atoms() -> None:
    """Half of the pairs an atom has, six for the atom itself, and no more than 27 neighbours."""
    assert estimate_cost(1) == 3.0
    assert estimate_cost(9) == 9 * (8 + 6) / 2
    assert estimate_cost(200) == 2 * estimate_cost(100) == 200 * 33 / 2


@pytest.mark.parametrize(("name", "limit"), [("MAX_KEPT_ATOMS", 0), ("MAX_KEPT_PAIRS", 0), ("MAX_KEPT_PAIRS", 300)])
def test_keeping_conformers_changes_nothing(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    kept = make_stream(dataset)
    for step in range(kept.plan.steps_per_epoch):
        kept[step]
    monkeypatch.setattr(stream_module, name, limit)
    read_anew = make_stream(dataset)
    for step in range(2 * kept.plan.steps_per_epoch + 1):
        for one, other in zip(kept[step], read_anew[step], strict=True):
            for field in dataclasses.fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert count_kept_pairs(kept) == kept._num_kept_pairs > 300
    assert count_kept_pairs(read_anew) == read_anew._num_kept_pairs <= limit
    assert bool(read_anew._kept) == (name == "MAX_KEPT_PAIRS")
    assert (count_kept_pairs(read_anew) > 200) == (limit == 300), "as many as fit"


def count_kept_pairs(stream: TrainingStream) -> int:
    return sum(len(g.pair_first) for g in stream._kept.values() if g.pair_first is not None)


def test_a_box_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """A manifest of an earlier version does not say that there are some."""
    graphs = [dataclasses.replace(g, cell=20 * np.eye(3), pbc=np.ones(3, bool), group="box") for g in make_graphs(4)]
    folder = write_dataset(tmp_path / "data", {"train": graphs})
    stream = make_stream(folder, 0, 1, "model.name=geomatt")
    with pytest.raises(DataError, match="box must be a molecule for this model; got a periodic structure"):
        stream[0]
    assert make_stream(folder)[0][0].pbc is not None
