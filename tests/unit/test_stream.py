"""The stream: global batches are the same for any number of processes, passes and workers, and nothing is lost on the way."""

import contextlib
import dataclasses
import os
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from analytic import write_dataset
from interruptions import flip_byte
from stream_setup import (
    CPU,
    NUM_STEPS,
    assert_same,
    count_epoch_steps,
    get_plan,
    list_energies,
    make_first_set,
    make_second_set,
    make_stream,
    read_all_energies,
    read_energies,
)
from torch.utils.data import DataLoader
from training_setup import make_config, make_dataset, make_graphs

from so3krates_dist.data import stream as stream_module
from so3krates_dist.data.folder import open_dataset
from so3krates_dist.data.held import HeldBlocks, list_blocks
from so3krates_dist.data.mixture import Mixture, Source
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.shards import decode_sample
from so3krates_dist.data.stream import (
    PlannedSteps,
    TrainingStream,
    _start_worker,
    build_loader,
    iter_batches,
)
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, collate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_first_set(tmp_path_factory)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_second_set(tmp_path_factory)


@pytest.fixture(scope="module")
def energies(dataset: Path) -> set[float]:
    return read_all_energies(dataset)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conformers with weights from 0 to 1.5 in the loss."""
    graphs = [dataclasses.replace(g, loss_weight=0.5 * (i % 4)) for i, g in enumerate(make_graphs(40, 700))]
    splits = {"train": graphs[4:], "validation": graphs[:4]}
    return write_dataset(tmp_path_factory.mktemp("weighted") / "data", splits, name="weighted")


class TestGlobalBatches:
    @pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
    def test_processes_and_portions_only_divide_them(self, dataset: Path, world_size: int, micro_batches: int) -> None:
        whole = make_stream(dataset)
        setting = f"train.micro_batches={micro_batches}"
        streams = [make_stream(dataset, rank, world_size, setting) for rank in range(world_size)]
        assert all(len(s[0].batches) == micro_batches for s in streams)
        for step in range(NUM_STEPS):
            parts = [list_energies(s[step].batches) for s in streams]
            assert sum(parts, []) == list_energies(whole[step].batches), f"step {step}"  # noqa: RUF017 - short lists

    def test_limits_only_divide_them(self, dataset: Path) -> None:
        """All processes do equally many passes, each within the limits or of one conformer that exceeds them by itself."""
        whole, limits = make_stream(dataset, 0, 1, "data.batch_size=20"), Limits(max_atoms=12, max_pairs=30)
        streams = [make_stream(dataset, rank, 2, "data.batch_size=20", limits=limits) for rank in range(2)]
        by_config = make_stream(dataset, 1, 2, "data.batch_size=20", "data.max_atoms=12", "data.max_pairs=30")
        numbers = set()
        for step in range(6):
            parts = [s[step].batches for s in streams]
            assert_same(by_config[step].batches, parts[1])
            assert len(parts[0]) == len(parts[1])
            numbers.add(len(parts[0]))
            dealt = list_energies(parts[0]) + list_energies(parts[1])
            assert dealt == list_energies(whole[step].batches)
            for batch in sum(parts, []):  # noqa: RUF017 - short lists
                fits = len(batch.atomic_numbers) <= 12 and len(batch.pair_first) <= 30
                assert fits or batch.num_graphs == 1
        assert min(numbers) > 1

    def test_an_epoch_is_every_conformer_once(self, dataset: Path, energies: set[float]) -> None:
        stream = make_stream(dataset)
        steps = count_epoch_steps(stream)
        for first in (0, 5 * steps):
            dealt = [e for s in range(first, first + steps) for e in list_energies(stream[s].batches)]
            assert len(dealt) == 50
            assert set(dealt) == energies

    def test_a_batch_as_large_as_the_set(self, dataset: Path, energies: set[float]) -> None:
        for size in (50, 200):
            stream = make_stream(dataset, 0, 1, f"data.batch_size={size}")
            for step in range(3):
                assert sorted(list_energies(stream[step].batches)) == sorted(energies)

    def test_any_step_can_be_asked_for(self, dataset: Path) -> None:
        expected = make_stream(dataset)
        in_order = [expected[step].batches for step in range(NUM_STEPS)]
        stream = make_stream(dataset)
        for step in (39, 0, 17, 16, 18, 5):
            assert_same(stream[step].batches, in_order[step])

    def test_a_batch_of_nothing_for_a_process_without_conformers(self, dataset: Path) -> None:
        streams = [make_stream(dataset, rank, 4, "data.batch_size=1") for rank in range(4)]
        for step in range(10):
            counts = sorted(s[step].batches[0].num_graphs for s in streams)
            assert counts in ([0, 0, 0, 1], [0, 0, 1, 1])

    def test_batches_hold_what_is_stored(self, dataset: Path) -> None:
        """Structures, labels and pairs are those of the conformer that the energy names."""
        stored = {g.energy: g for g in open_dataset(dataset).iter_graphs("train")}
        stream = make_stream(dataset, 0, 1, "data.batch_size=9")
        for step in range(4):
            (batch,) = stream[step].batches
            graphs = [stored[e] for e in list_energies([batch])]
            assert_same([batch], [collate([build_neighbors(g, 4.0) for g in graphs])])


class TestMixture:
    def test_energies_come_on_the_scale_of_the_model(self, dataset: Path, tmp_path: Path) -> None:
        """Another level of theory, whose atoms have other energies: shifted by the difference of the baselines."""
        graphs = [dataclasses.replace(g, energy=g.energy + 100.0 * len(g.atomic_numbers)) for g in make_graphs(30, 900)]
        folder = write_dataset(tmp_path / "level", {"train": graphs[:26], "validation": graphs[26:]}, "level")
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"Morse"', '"Morse plus 100 eV"'))
        stream = make_stream([dataset, folder], 0, 1, "data.batch_size=16")
        plan = get_plan(stream)
        shift = plan.sources[1].shift
        assert plan.sources[0].shift is None
        assert shift is not None
        expected = {g.energy: g.energy + sum(shift[int(z)] for z in g.atomic_numbers) for g in graphs[:26]}
        dealt = [e for step in range(2 * plan.steps_per_window) for e in list_energies(stream[step].batches)]
        unshifted = read_energies(dataset)
        for energy in dealt:
            assert energy in unshifted or min(abs(energy - e) for e in expected.values()) < 1e-9
        config = make_config("", "run", "data.folder=''", f"data.folders=[{dataset},{folder}]")
        mixture = Mixture.open(config.data, config.model)
        batches = list(iter_batches(mixture, "validation", batch_size=3, cutoffs=(4.0, 4.0)))
        assert [b.num_graphs for b in batches] == [3, 3, 2]
        stored = [g.energy for g in mixture.iter_graphs("validation")]
        assert list_energies(batches) == stored
        assert stored[:4] == read_energies(dataset, "validation")
        assert stored[4:] != read_energies(folder, "validation")

    def test_a_limit_takes_from_each_in_proportion(self, dataset: Path, other: Path) -> None:
        config = make_config("", "run", "data.folder=''", f"data.folders=[{dataset},{other}]")
        mixture = Mixture.open(config.data, config.model)
        batches = list(iter_batches(mixture, "train", batch_size=6, cutoffs=(4.0, 4.0), limit=16))
        assert [b.num_graphs for b in batches] == [6, 6, 4]
        assert list_energies(batches) == read_energies(dataset)[:10] + read_energies(other)[:6]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
class TestLoader:
    @pytest.mark.parametrize("max_piped_bytes", [0, stream_module.MAX_PIPED_BYTES])
    def test_workers_change_nothing(
        self, dataset: Path, num_workers: int, max_piped_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_module, "MAX_PIPED_BYTES", max_piped_bytes)
        stream, expected = make_stream(dataset), make_stream(dataset)
        loader = build_loader(stream, range(13, 29), num_workers=num_workers, device=CPU)
        with contextlib.closing(loader):
            for step, found in zip(range(13, 29), loader, strict=True):
                assert_same(found.batches, expected[step].batches)

    def test_a_damaged_block_is_the_same_error_from_anywhere(self, tmp_path: Path, num_workers: int) -> None:
        stream = make_stream(damage(make_dataset(tmp_path / "data"), 1), 0, 1, "data.verify=size")
        loader = build_loader(stream, range(40), num_workers=num_workers, device=CPU)
        message = r"train-000000\.tar:train-000000-000001 must have the CRC \w+; got \w+\."
        with contextlib.closing(loader), pytest.raises(DataError, match=message):
            list(loader)

    def test_steps_before_a_damaged_block_are_there(
        self, dataset: Path, tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_module, "MAX_KEPT_ATOMS", 0)
        expected = make_stream(dataset, 0, 1, "data.window_blocks=4")
        plan = get_plan(expected)
        held = [{b for _, b in plan.window(number).blocks_of_lanes(range(4)).tolist()} for number in range(3)]
        folder = damage(make_dataset(tmp_path / "data"), min(held[1] - held[0]))
        stream = make_stream(folder, 0, 1, "data.window_blocks=4", "data.verify=size")
        found = []
        loader = build_loader(stream, range(40), num_workers=num_workers, device=CPU)
        with contextlib.closing(loader), pytest.raises(DataError, match="must have the CRC"):
            found.extend(loader)
        assert 0 < len(found) <= plan.steps_per_window
        for step, data in enumerate(found):
            assert_same(data.batches, expected[step].batches)

    def test_a_damaged_block_is_left_out_and_counted(self, dataset: Path, tmp_path: Path, num_workers: int) -> None:
        folder = damage(make_dataset(tmp_path / "data"), 1)
        damaged = set(read_energies(dataset)[4:8])
        stream = make_stream(folder, 0, 1, "data.on_damage=skip", "data.max_skipped=9", "data.verify=size")
        whole = make_stream(dataset)
        steps = count_epoch_steps(whole)
        total = 0
        with contextlib.closing(build_loader(stream, range(steps), num_workers=num_workers, device=CPU)) as loader:
            data = list(loader)
        for step, found in enumerate(data):
            expected = list_energies(whole[step].batches)
            assert list_energies(found.batches) == [e for e in expected if e not in damaged]
            assert found.skipped == len(damaged & set(expected))
            total += found.skipped
            if found.skipped:
                assert len(found.complaints) == 1
                assert "train-000000.tar:train-000000-000001 must have the CRC" in found.complaints[0]
            else:
                assert found.complaints == ()
        assert total == 4


def damage(folder: Path, block: int) -> Path:
    entry = open_dataset(folder).block_entry(block)
    flip_byte(folder / entry.file, entry.offset + entry.size - 20)
    return folder


class TestWebDataset:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_planned_steps_are_the_first_stage_of_a_pipeline(self, dataset: Path, num_workers: int) -> None:
        expected = make_stream(dataset)
        pipeline = webdataset.DataPipeline(
            PlannedSteps(make_stream(dataset), 7, 18), webdataset.map(lambda data: (data.batches, data.skipped))
        )
        loader = DataLoader(pipeline, batch_size=None, num_workers=num_workers)
        items = list(pipeline if num_workers == 0 else loader)
        assert len(items) == 11
        for step, (batches, skipped) in zip(range(7, 18), items, strict=True):
            assert_same(batches, expected[step].batches)
            assert skipped == 0

    def test_pipelines_of_others_read_the_same_shards(self, dataset: Path) -> None:
        names = [str(dataset / s.file) for s in open_dataset(dataset).manifest.of_split("train")]
        foreign = webdataset.WebDataset(names, shardshuffle=False, nodesplitter=None).map(decode_sample)
        found = [graph.energy for sample in foreign for graph in sample["block"]]
        assert found == read_energies(dataset)


class TestLossWeights:
    """Weights of conformers times those of data sets, in training; the conformers of a step are those that they are without."""

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_training(self, dataset: Path, weighted: Path, num_workers: int) -> None:
        own = {g.energy: g.loss_weight for g in open_dataset(weighted).iter_graphs("train")}
        stream = make_stream([dataset, weighted], 0, 1, "data.loss_weights=[3,0.25]")
        for item in build_loader(stream, range(12), num_workers=num_workers, device=CPU):
            for batch in item.batches:
                assert batch.energy is not None
                expected = [0.25 * own[e] if e in own else 3.0 for e in batch.energy.tolist()]
                assert batch.loss_weight is not None
                assert batch.loss_weight.tolist() == expected

    def test_order(self, dataset: Path, weighted: Path) -> None:
        plain = make_stream([dataset, weighted])
        for factors in ("[3,0.25]", "[0,1]"):
            stream = make_stream([dataset, weighted], 0, 1, f"data.loss_weights={factors}")
            assert get_plan(stream).fingerprint == get_plan(plain).fingerprint
            for step in range(10):
                batches = [dataclasses.replace(b, loss_weight=None) for b in stream[step].batches]
                expected = [dataclasses.replace(b, loss_weight=None) for b in plain[step].batches]
                assert_same(batches, expected)

    def test_evaluation(self, dataset: Path, weighted: Path) -> None:
        """Batches have the weights of conformers, as collate() gives them; evaluate() asks for none."""
        config = make_config("''", "run", f"data.folders=[{dataset},{weighted}]", "data.loss_weights=[3,0.25]")
        mixture = Mixture.open(config.data, config.model)
        weights = [b.loss_weight for b in iter_batches(mixture, "validation", batch_size=100, cutoffs=(3.0, 3.0))]
        assert weights[0] is not None
        expected = [g.loss_weight for g in mixture.iter_graphs("validation")]
        assert weights[0].tolist() == expected


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


def test_a_stream_travels_to_a_worker_without_what_it_has_read(dataset: Path) -> None:
    stream = make_stream(dataset)
    before = len(pickle.dumps(stream))
    expected = stream[3].batches
    content = pickle.dumps(stream)
    assert len(content) < before + 1000
    assert_same(pickle.loads(content)[3].batches, expected)


def test_a_process_reads_the_blocks_of_its_own_lanes_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_KEPT_ATOMS", 0)
    read: list[int] = []
    source_type = type(get_plan(make_stream(dataset)).sources[0])
    original = source_type.read_block
    monkeypatch.setattr(source_type, "read_block", lambda self, block: read.append(block) or original(self, block))
    streams = [make_stream(dataset, rank, 4, "data.window_blocks=13") for rank in range(4)]
    plan = get_plan(streams[0])
    for stream in streams:
        read.clear()
        for step in range(plan.steps_per_window):
            stream[step]
        assert len(read) == len(set(read)) < 13, "none twice, and not all of them"
        assert read == sorted(read), "in the order in which they are stored"


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
        assert [e for b in dealt for e in b] == read_energies(dataset)

    def test_a_limit(self, dataset: Path) -> None:
        batches = list(iter_batches(open_dataset(dataset), "train", batch_size=8, cutoffs=(4.0, 4.0), limit=11))
        assert [b.num_graphs for b in batches] == [8, 3]
        assert sum(b.num_graphs for b in iter_batches(dataset, "test", batch_size=8, cutoffs=(4.0, 4.0), limit=99)) == 4

    def test_batches_of_another_size_than_blocks(self, dataset: Path) -> None:
        stored = list(open_dataset(dataset).iter_graphs("train"))
        for size, cutoffs in ((1, (4.0, 4.0)), (7, (3.0, 6.0)), (99, (4.0, 4.0))):
            batches = iter_batches(str(dataset), "train", batch_size=size, cutoffs=cutoffs)
            for graphs, batch in zip(chunk(stored, size), batches, strict=True):
                assert_same([batch], [collate([build_neighbors(g, *cutoffs) for g in graphs])])

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

    def test_a_damaged_block(self, tmp_path: Path) -> None:
        folder = damage(make_dataset(tmp_path / "data"), 2)
        batches = iter_batches(folder, "train", batch_size=8, cutoffs=(4.0, 4.0))
        assert next(batches).num_graphs == 8
        with pytest.raises(DataError, match="train-000000-000002 must have the CRC"):
            next(batches)


def chunk(graphs: Sequence[Graph], size: int) -> list[Sequence[Graph]]:
    return [graphs[i : i + size] for i in range(0, len(graphs), size)]


@pytest.mark.parametrize(("name", "limit"), [("MAX_KEPT_ATOMS", 0), ("MAX_KEPT_PAIRS", 0), ("MAX_KEPT_PAIRS", 300)])
def test_keeping_conformers_changes_nothing(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    kept = make_stream(dataset)
    steps = count_epoch_steps(kept)
    for step in range(steps):
        kept[step]
    monkeypatch.setattr(stream_module, name, limit)
    read_anew = make_stream(dataset)
    for step in range(2 * steps + 1):
        assert_same(kept[step].batches, read_anew[step].batches)
    first, second = get_blocks(kept), get_blocks(read_anew)
    assert count_kept_pairs(first) == first._num_kept_pairs > 300
    assert count_kept_pairs(second) == second._num_kept_pairs <= limit
    assert first.table.is_there.all()
    assert (len(second.table.is_there) == 50) == (name == "MAX_KEPT_PAIRS")
    assert (count_kept_pairs(second) > 200) == (limit == 300), "as many as fit"


def get_blocks(stream: TrainingStream) -> HeldBlocks:
    assert stream._held is not None
    return stream._held.blocks


def count_kept_pairs(blocks: HeldBlocks) -> int:
    return sum(len(p.first) for p in blocks._kept_pairs.values())


def test_a_box_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """A manifest of an earlier version does not say that there are some."""
    graphs = [dataclasses.replace(g, cell=20 * np.eye(3), pbc=np.ones(3, bool), group="box") for g in make_graphs(4)]
    folder = write_dataset(tmp_path / "data", {"train": graphs})
    stream = make_stream(folder, 0, 1, "model.name=geomatt")
    message = (
        r"train-000000\.tar:train-000000-000000:\d \(box\) must be a molecule for this model; got a periodic structure"
    )
    with pytest.raises(DataError, match=message):
        stream[0]
    assert make_stream(folder)[0].batches[0].pbc is not None


def test_atoms_on_top_of_each_other_are_named(dataset: Path) -> None:
    held = HeldBlocks(get_plan(make_stream(dataset)).sources, blocks := np.array([[0, 4], [0, 5]]))
    held.load(blocks)
    first = int(held.table._offsets[6])
    held.table._columns["positions"][first + 1] = held.table._columns["positions"][first]
    message = (
        r"train-000001\.tar:train-000001-000002:2 \(size\d\) must have its atoms at least 0\.001 Å apart; got 0 Å\."
    )
    with pytest.raises(DataError, match=message):
        held.assemble(np.array([0, 6]), (4.0, 4.0))


def test_a_shard_that_is_gone_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each of its blocks, which would mean as many downloads; the next window looks again."""
    folder = make_dataset(tmp_path / "data", num_train=40)
    config = make_config(folder, "run", "data.on_damage=skip", "data.max_skipped=99")
    (source,) = Mixture.open(config.data, config.model).sources
    blocks = list_blocks([source], "train")
    shard = source.data.manifest.shards[int(source.data.table.block_shard[0])]
    assert shard.num_blocks > 1
    (folder / shard.file).rename(tmp_path / "away")
    read: list[int] = []
    original = Source.read_block
    monkeypatch.setattr(Source, "read_block", lambda self, block: read.append(block) or original(self, block))
    held = HeldBlocks([source], blocks)
    held.load(blocks, skip_damaged=True)
    assert len(read) == len(blocks) - shard.num_blocks + 1
    rows = np.flatnonzero(~held.table.is_there)
    assert len(rows) == shard.num_conformers
    complaints = held.list_complaints(rows)
    assert len(complaints) == shard.num_blocks
    assert len(set(complaints)) == 1
    (tmp_path / "away").rename(folder / shard.file)
    held.load(blocks, skip_damaged=True)
    assert held.table.is_there.all()


def test_a_worker_process_that_is_killed(dataset: Path) -> None:
    """Nothing happens where the training process is; it hears of it when it asks for data, and nothing is left behind."""
    import multiprocessing

    before = set(multiprocessing.active_children())
    loader = build_loader(make_stream(dataset), range(1000), num_workers=2, device=CPU)
    next(loader)
    worker = next(iter(set(multiprocessing.active_children()) - before))
    worker.kill()
    worker.join()  # its signal has come: no error here
    rule = r"worker processes that prepare step \d+ must stay alive; got DataLoader worker \(pid.*lower data\.num_workers\."
    with pytest.raises(DataError, match=rule):
        list(loader)
    assert set(multiprocessing.active_children()) <= before
