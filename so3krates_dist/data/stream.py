"""From shards to minibatches: reads the blocks that the plan asks for, finds neighbour pairs, and packs each pass into one buffer.

What a process computes at a step is a pure function of the step, so worker processes, resuming and the number of processes change
nothing about it. A process reads the blocks of its own lanes, each once in a window. Damaged blocks end the run or are left out and
counted; nothing is replaced. Evaluation reads a split from front to back.
"""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from so3krates_dist.config import ModelSection, RunConfig
from so3krates_dist.data.batching import unpack
from so3krates_dist.data.folder import DataFolder, open_dataset
from so3krates_dist.data.held import HeldBlocks, count_sizes, list_blocks
from so3krates_dist.data.mixture import Mixture, Source
from so3krates_dist.data.passes import Limits, count_passes, list_passes
from so3krates_dist.data.plan import Plan, Schedule, Window, lanes_of_rank
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import DataError, So3kratesError
from so3krates_dist.graph import BoolArray, FloatArray, GraphBatch, IntArray, check_box

MAX_KEPT_ATOMS: Final = 200_000
"""A training split of at most so many atoms stays in memory"""

MAX_PIPED_BYTES: Final = 2**18
"""A step of at most so many bytes comes from a worker process through its pipe: shared memory takes a millisecond to hand over"""

MAX_STEPS_OF_TURN: Final = 16
MAX_BYTES_OF_TURN: Final = 2**20
"""Without worker processes, so many steps are prepared at a time, or those of so many bytes"""

MAX_KEPT_PAIRS: Final = 5_000_000
"""So many neighbour pairs of these atoms stay in memory (16 bytes each, 40 in periodic structures); the others are found anew.
There are some 13 an atom within 5 Å, but hundreds within a long-range cutoff, and half as many as atoms where all pairs count"""


def check_allows_box(section: ModelSection, pbc: BoolArray | None, cell: FloatArray | None, where: str) -> None:
    """Raise `DataError` where a model cannot be used for a structure because of its periodic directions or its cell.

    Args:
        section: The model.
        pbc: (3,) whether the structure repeats along each lattice vector; None for a molecule.
        cell: (3, 3) Å; None where it is not known.
        where: File, split or structure, for the message.
    """
    check_box(pbc, cell, where, sees=section.sees, reach=section.reach, image_density=section.image_density)


# ------------------------------------------------------------------------------------------------------------ training


@dataclasses.dataclass(frozen=True)
class StepData:
    """What one process computes at a step."""

    batches: list[GraphBatch]
    """one for each pass, equally many on all processes; those without conformers are empty"""
    skipped: int = 0
    """conformers of this process at this step that are left out since their block is damaged"""
    complaints: tuple[str, ...] = ()
    """what is wrong with these blocks, one line each"""


@dataclasses.dataclass(frozen=True)
class PackedStep:
    """A `StepData` in bytes: what a worker process hands over."""

    buffers: list[torch.Tensor]
    """uint8, one for each pass"""
    skipped: int
    complaints: tuple[str, ...]

    def unpack(self) -> StepData:
        """Return the batches, which share the memory of the buffers."""
        return StepData([unpack(b) for b in self.buffers], self.skipped, self.complaints)

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(b.nbytes for b in self.buffers)

    def __reduce__(self) -> tuple[Callable[..., "PackedStep"], tuple[Any, ...]]:
        """Travel between processes: torch moves tensors to shared memory, bytes go through the pipe."""
        if self.num_bytes > MAX_PIPED_BYTES:
            return PackedStep, (self.buffers, self.skipped, self.complaints)
        return _from_bytes, ([bytearray(b.numpy()) for b in self.buffers], self.skipped, self.complaints)

    def pin_memory(self) -> "PackedStep":
        """Return the buffers in page-locked memory, from where copies to a GPU overlap with computing."""
        return dataclasses.replace(self, buffers=[b.pin_memory() for b in self.buffers])


def _from_bytes(contents: Sequence[bytearray], skipped: int, complaints: tuple[str, ...]) -> PackedStep:
    return PackedStep([torch.frombuffer(c, dtype=torch.uint8) for c in contents], skipped, complaints)


@dataclasses.dataclass(frozen=True)
class _Held:
    """The window that a process is in, and the blocks of its lanes."""

    plan: Plan
    number: int
    window: Window
    blocks: HeldBlocks
    keeps: bool
    """whether the blocks are all there are"""
    first: int
    """place of these lanes' first conformer in the window"""
    rows: IntArray
    """where their conformers are in the blocks' table"""


class TrainingStream(Dataset[StepData]):
    """The batches of one process: item k is what it computes at step k.

    Args:
        schedule: Which conformers make up which step; its plans' sources are of data/mixture.py.
        config: Passes, what to do about damaged blocks, and the model's cutoffs.
        rank: This process.
        world_size: Processes; divides the lanes.
        limits: Of a pass; None: those of the configuration.
    """

    def __init__(
        self, schedule: Schedule, config: RunConfig, rank: int, world_size: int, limits: Limits | None = None
    ) -> None:
        self._schedule, self._model, self._on_damage = schedule, config.model, config.data.on_damage
        self._rank, self._world_size, self._groups = rank, world_size, config.train.micro_batches
        self._limits = limits or Limits(config.data.max_atoms, config.data.max_pairs)
        self._cutoffs = config.model.cutoff, max(config.model.cutoff, config.model.reach)
        self._held: _Held | None = None

    def __getitem__(self, step: int) -> StepData:
        """Return the batches of this process at a step."""
        return self.pack(step).unpack()

    def pack(self, step: int) -> PackedStep:
        """Return the batches of this process at a step, in bytes.

        Raises:
            DataError: A block is damaged, or a structure is none that the model can be used for.
        """
        plan, within = self._schedule.locate(step)
        number, slot = plan.locate(within)
        held = self._hold(plan, number)
        passes = list_passes(held.window, slot, self._lanes(plan), self._groups, self._limits)
        count = count_passes(held.window, slot, self._world_size, self._groups, self._limits)
        passes += [np.zeros(0, np.int64)] * (count - len(passes))
        buffers, lost = [], []
        for members in passes:
            rows = held.rows[members - held.first]
            is_there = held.blocks.table.is_there[rows]
            if not is_there.all():
                lost.append(rows[~is_there])
                rows = rows[is_there]
            buffers.append(held.blocks.assemble(rows, self._cutoffs))
        missing = np.concatenate(lost) if lost else np.zeros(0, np.int64)
        return PackedStep(buffers, len(missing), held.blocks.list_complaints(missing))

    def _lanes(self, plan: Plan) -> range:
        return lanes_of_rank(plan.settings.lanes, self._rank, self._world_size)

    def _check_boxes(self, blocks: HeldBlocks, rows: IntArray) -> None:
        for row in rows[blocks.table.is_periodic(rows)].tolist():
            check_allows_box(self._model, *blocks.table.get_box(row), blocks.name_row(row))

    def _hold(self, plan: Plan, number: int) -> _Held:
        """Return a window with the blocks of this process's lanes, which are read where they are not there yet."""
        held = self._held
        if held is not None and held.plan is plan and held.number == number:
            return held
        if held is None or held.plan is not plan or not held.keeps:
            held = self._held = None  # the memory of a window is free before the next one is read
        sources, lanes = _get_sources(plan), self._lanes(plan)
        window = plan.window(number)
        needed = window.blocks_of_lanes(lanes)
        if held is None:
            num_atoms = sum(shard.num_atoms for source in sources for shard in source.manifest.of_split("train"))
            keeps = num_atoms <= MAX_KEPT_ATOMS
            every = list_blocks(sources, "train") if keeps else needed
            blocks = HeldBlocks(sources, every, MAX_KEPT_PAIRS if keeps else 0, for_training=True)
        else:
            keeps, blocks = held.keeps, held.blocks
        blocks.load(needed, skip_damaged=self._on_damage == "skip")
        own = window.span_lanes(lanes)
        rows = blocks.find_rows(window.source[own], window.block[own], window.index[own])
        self._check_boxes(blocks, rows)
        self._held = _Held(plan, number, window, blocks, keeps, own.start, rows)
        return self._held

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without what has been read."""
        return {**self.__dict__, "_held": None}


def _get_sources(plan: Plan) -> tuple[Source, ...]:
    assert all(isinstance(s, Source) for s in plan.sources), "plans of a stream are made of sources that can be read"
    return cast(tuple[Source, ...], plan.sources)


class PlannedSteps(IterableDataset[StepData]):
    """The steps of a run one after another, as the first stage of a WebDataset pipeline.

    `webdataset.DataPipeline(PlannedSteps(stream, 0, 1000), webdataset.map(...))` has order and position from the plan. In the
    worker processes of a `DataLoader` with `batch_size=None`, each does its part of the steps, and they come in their order.

    Args:
        stream: Of this process.
        first: First step.
        last: Step before which to stop.
    """

    def __init__(self, stream: TrainingStream, first: int, last: int) -> None:
        self._stream, self._steps = stream, range(first, last)

    def __iter__(self) -> Iterator[StepData]:
        worker = get_worker_info()
        steps = self._steps if worker is None else self._steps[worker.id :: worker.num_workers]
        return (self._stream[step] for step in steps)


def build_loader(
    stream: TrainingStream, steps: Sequence[int], *, num_workers: int, device: torch.device
) -> Generator[StepData, None, None]:
    """Yield what this process computes at some steps, prepared ahead where there are worker processes; close it to end them.

    Raises:
        DataError: A block is damaged; the same error, whichever process found it. Or a worker process died.
    """
    on_gpu = device.type == "cuda"
    carrier = _Carrier(stream)
    if not num_workers:
        yield from _prepare_in_turns(carrier, steps, pin=on_gpu)
        return
    loader = DataLoader(
        carrier,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=on_gpu,
        # Forking a process that has started CUDA is not safe; a fork server has not.
        multiprocessing_context="forkserver" if on_gpu else None,
        worker_init_fn=_start_worker,
        prefetch_factor=2,
    )
    items = iter(loader)
    watch = _DeathWatch()
    try:
        for step in steps:
            with watch.listening(step):
                item = next(items)
            if isinstance(item, So3kratesError):
                raise item
            yield item.unpack()
    finally:
        watch.close()
        del items  # worker processes end with it; an error would keep it with this frame


class _DeathWatch:
    """Hears of the death of a worker process only while the training process waits for its data.

    torch raises an error from a signal handler as soon as a worker has died, in the midst of whatever the training process does, a
    word with the other processes among it. They would never hear why. Without that handler the pipe of a worker that died while it
    wrote would be read for ever.
    """

    def __init__(self) -> None:
        report = signal.getsignal(signal.SIGCHLD)
        assert callable(report), "torch has set a handler with its first worker process"
        self._report = report
        self._is_waiting = False
        signal.signal(signal.SIGCHLD, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._is_waiting:
            self._report(number, frame)

    @contextlib.contextmanager
    def listening(self, step: int) -> Iterator[None]:
        """Wait inside for what the worker processes make of a step.

        Raises:
            DataError: One of them has died.
        """
        try:
            self._is_waiting = True
            self._report(signal.SIGCHLD, None)  # of deaths that it has not listened to
            yield
        except RuntimeError as error:
            raise DataError(
                f"worker processes that prepare step {step}", "stay alive", str(error).strip().rstrip("."),
                "Start the same command again; where memory was short, lower data.num_workers",
            ) from error.with_traceback(None)  # fmt: skip
        finally:
            self._is_waiting = False

    def close(self) -> None:
        """Put torch's handler back."""
        signal.signal(signal.SIGCHLD, self._report)


def _prepare_in_turns(carrier: "_Carrier", steps: Sequence[int], *, pin: bool) -> Iterator[StepData]:
    """Yield steps that are prepared several at a time where they are small: caches are cold after each step of training."""
    turn: list[StepData] = []
    num_bytes = 0
    for step in steps:
        item = carrier[step]
        if isinstance(item, So3kratesError):
            yield from turn  # what comes before it can be used
            raise item
        num_bytes += item.num_bytes
        turn.append((item.pin_memory() if pin else item).unpack())
        if len(turn) == MAX_STEPS_OF_TURN or num_bytes > MAX_BYTES_OF_TURN:
            yield from turn
            turn, num_bytes = [], 0
    yield from turn


class _Carrier(Dataset[PackedStep | So3kratesError]):
    """Hands errors over as items: torch would turn those of a worker process into a RuntimeError with a traceback."""

    def __init__(self, stream: TrainingStream) -> None:
        self._stream = stream

    def __getitem__(self, step: int) -> PackedStep | So3kratesError:
        try:
            return self._stream.pack(step)
        except So3kratesError as error:
            return error


def _start_worker(_number: int) -> None:
    """Ignore the signals that ask a run to stop: the training process decides, and needs its workers until then."""
    torch.set_num_threads(1)
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------- evaluation


def iter_batches(
    data: Mixture | DataFolder | str | Path,
    split: str,
    *,
    batch_size: int,
    cutoffs: tuple[float, float],
    rank: Rank | None = None,
    limit: int = 0,
) -> Iterator[GraphBatch]:
    """Yield batches of a split for evaluation: every conformer once in stored order, batches dealt to the processes in turn.

    Args:
        data: The data sets of a run, one after another with energies on the model's scale; or one data set as it is.
        split: `train`, `validation` or `test`.
        batch_size: Conformers per batch.
        cutoffs: Å, the model's cutoff and reach.
        rank: This process, and how many there are; None: the only one.
        limit: So many conformers at most, the first ones of each data set in the proportion of their numbers; 0: all.

    Raises:
        DataError: The split is empty, or a block is damaged.
    """
    rank = rank or Rank()
    sources = _list_sources(data)
    blocks = list_blocks(sources, split)
    if not len(blocks):
        names = " + ".join(s.name for s in sources)
        remedy = "Make the data set with a larger share for it"
        raise DataError(f"split `{split}` of {names}", "have conformers", "none", remedy)
    ends = np.cumsum(count_sizes(sources, blocks)[0])
    starts = np.concatenate([[0], ends[:-1]])
    members = _take_in_proportion(blocks[:, 0], ends - starts, limit)
    for number, first in enumerate(range(0, len(members), batch_size)):
        if number % rank.world_size == rank.rank:
            batch = members[first : first + batch_size]
            places = np.searchsorted(ends, batch, side="right")
            held = HeldBlocks(sources, needed := blocks[np.unique(places)])
            held.load(needed)
            rows = held.find_rows(blocks[places, 0], blocks[places, 1], batch - starts[places])
            yield unpack(held.assemble(rows, cutoffs))


def _list_sources(data: Mixture | DataFolder | str | Path) -> tuple[Source, ...]:
    if isinstance(data, Mixture):
        return data.active
    folder = data if isinstance(data, DataFolder) else open_dataset(data)
    return (Source(name=folder.manifest.name, location=str(data), data=folder, share=1.0, pair_cutoff=0.0),)


def _take_in_proportion(sources: IntArray, sizes: IntArray, limit: int) -> IntArray:
    """Return the conformers to evaluate, counted through the blocks of all sources.

    Args:
        sources: (num_blocks,) source of each block, ascending.
        sizes: (num_blocks,) conformers in each.
        limit: Conformers at most; 0: all.
    """
    totals = np.bincount(sources, sizes).astype(np.int64)
    ends = np.cumsum(totals)
    total = int(ends[-1])
    taken = np.diff(ends * min(limit or total, total) // total, prepend=0)
    return np.concatenate(
        [np.arange(end - size, end - size + n) for end, size, n in zip(ends, totals, taken, strict=True)]
    )
