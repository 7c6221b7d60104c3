"""Training with something that happens at one step: what processes of the tests run instead of `so3krates train`."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training_setup import read_own_rank, train

from so3krates_dist.data.mixture import Source
from so3krates_dist.data.plan import lanes_of_rank
from so3krates_dist.train import planning
from so3krates_dist.train.loop import Training


def _before_step(step: int, rank: int, action: Callable[[Training], None]) -> None:
    """Let something happen on one process before it does a step."""
    original = Training.train_step

    def train_step(self: Training, number: int, *arguments: Any) -> dict[str, float]:
        if number == step and self.rank.rank == rank:
            action(self)
        return original(self, number, *arguments)

    Training.train_step = train_step  # type: ignore[method-assign]


def train_with_signal(settings: Sequence[str], step: int, rank: int, number: int) -> int:
    """Get a signal in the midst of training; the step at hand is finished first."""
    _before_step(step, rank, lambda _: os.kill(os.getpid(), number))
    return train(settings)


def train_and_die(settings: Sequence[str], step: int, rank: int) -> int:
    """Be killed: no handler runs, nothing is flushed or saved."""
    return train_with_signal(settings, step, rank, signal.SIGKILL)


def train_with_stop_file(settings: Sequence[str], step: int, rank: int) -> int:
    """Find the stop file that somebody has put into the run folder."""
    _before_step(step, rank, lambda training: (training.context.folder.path / "STOP").touch())
    return train(settings)


def train_on_nan(settings: Sequence[str], first_step: int, rank: int) -> int:
    """Compute nan on one process from a step on."""
    return train_on_faults(settings, "positions", range(first_step, 1000), rank)


def train_on_faults(settings: Sequence[str], kind: str, data_steps: Sequence[int], rank: int) -> int:
    """Meet some fault on one process at some positions of the data."""
    original = Training.train_step

    def train_step(self: Training, number: int, batches: Any, *arguments: Any) -> dict[str, float]:
        if self.rank.rank != rank or self.state.progress.data_step not in data_steps:
            return original(self, number, batches, *arguments)
        if kind == "gradient":  # the loss is as it should be
            weight = next(self.engine.potential.parameters())
            hook = weight.register_hook(lambda gradient: gradient * float("nan"))
            try:
                return original(self, number, batches, *arguments)
            finally:
                hook.remove()
        for batch in batches:
            if kind == "positions":
                batch.positions[:1] = float("nan")
            elif kind == "label":
                batch.forces[:1] = float("inf")
            else:
                assert kind == "spike"
                batch.forces[:1] += 1e3
        return original(self, number, batches, *arguments)

    Training.train_step = train_step  # type: ignore[method-assign]
    return train(settings)


def train_with_dead_worker(settings: Sequence[str], step: int, rank: int) -> int:
    """Lose a worker process of the loader as the kernel ends it where memory is short."""

    def kill(_: Training) -> None:
        (worker,) = multiprocessing.active_children()
        worker.kill()

    _before_step(step, rank, kill)
    return train(settings)


def flip_byte(path: Path, position: int) -> None:
    """Damage a file as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def find_block_of_rank(training: Training, rank: int, epoch: int) -> tuple[Source, int]:
    """Return a data set and the number of a block of it that one process alone reads in an epoch of one window."""
    plan = training.schedule.segments[0][1]
    assert plan.windows_per_epoch == 1
    window = plan.window(epoch)
    ranks = range(training.rank.world_size)
    own, *others = (
        {tuple(row) for row in window.blocks_of_lanes(lanes_of_rank(window.num_lanes, r, len(ranks))).tolist()}
        for r in sorted(ranks, key=lambda r: r != rank)
    )
    source, block = min(own.difference(*others))
    return training.mixture.sources[source], block


def train_on_damaged_shard(settings: Sequence[str], step: int, rank: int) -> int:
    """Meet a shard in the second epoch that was damaged after the start, on one process alone."""

    def damage(training: Training) -> None:
        source, number = find_block_of_rank(training, rank, epoch=1)
        block = source.data.block_entry(number)
        path = Path(source.location) / block.file
        with path.open("r+b") as file:  # in place: the processes have the file open
            file.seek(block.offset + block.size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))

    _before_step(step, 0, damage)
    return train(settings)


def train_on_data_of_rank(settings: Sequence[str], *folders: Path) -> int:
    """Find other data under the same name than the other processes, as on machines with disks of their own."""
    return train([*settings, f"data.folder={folders[read_own_rank().rank]}"])


def train_without_room_for_the_plan(settings: Sequence[str]) -> int:
    """Have a disk that is full when the plan is written."""

    def write_text(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    planning.write_text = write_text
    return train(settings)


def train_on_a_full_disk(settings: Sequence[str], step: int, bytes_of_a_file: int) -> int:
    """Have room for small files only on rank 0, from a step on; negative: from the start."""

    def fill(_: object = None) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, resource.RLIM_INFINITY))

    if step >= 0:
        _before_step(step, 0, fill)
    elif read_own_rank().is_main:
        fill()
    return train(settings)


def train_without_a_run_folder(settings: Sequence[str], step: int) -> int:
    """Lose the run folder in the midst of training."""
    _before_step(step, 0, lambda training: shutil.rmtree(training.context.folder.path))
    return train(settings)
