"""What test_crash.py runs in processes of their own: saving, and being killed or running out of space at a chosen moment of it.

The package has no code for faults: audit events of Python and replaced functions of its modules are all that is needed.
"""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_setup import make_config, read_own_rank

from so3krates_dist.distributed import Rank, reduce_sum, start_processes, stop_processes
from so3krates_dist.errors import CheckpointError
from so3krates_dist.train import saving
from so3krates_dist.train.checkpoint import RunFolder
from so3krates_dist.train.saving import CheckpointWriter

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")
"""Python's audit events of whatever touches the disk; each is raised just before it happens"""

CPU = torch.device("cpu")


def make_tensors(step: int) -> dict[str, torch.Tensor]:
    """Return tensors that tell which step they are of."""
    return {f"weight.{i}": torch.full((100 + i,), float(step)) for i in range(5)}


class Killer:
    """Kills this process at its k-th dealing with a folder."""

    def __init__(self, folder: Path, moment: int) -> None:
        self._folder, self._left = str(folder), moment
        sys.addaudithook(self._hear)
        self._count_around(os, "fsync")
        self._count_around(saving, "hash_file")
        self._write = saving.save_file
        saving.save_file = self._save_file

    def _count_around(self, module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            self.count()
            result = original(*arguments)
            self.count()
            return result

        setattr(module, name, counted)

    def _save_file(self, tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of what")  # an event of its own, and then another
        self.count()
        self._write(tensors, path)
        self.count()

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(self._folder):
            self.count()

    def count(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Saver:
    """Saves like the loop of a run: on one of several processes, step after step.

    Args:
        folder: Of checkpoints.
        asynchronous: As in a run.
    """

    def __init__(self, folder: Path, *, asynchronous: bool = True, keep: int = 2) -> None:
        self.note = ""  # of the manifest
        self.rank: Rank = read_own_rank()
        start_processes(self.rank, CPU)
        self.writer = CheckpointWriter(folder, self.rank, CPU, keep=keep, asynchronous=asynchronous, facts={})

    def begin(self, step: int) -> float:
        tensors = make_tensors(step)
        own = self.writer.owns({name: t.nbytes for name, t in tensors.items()})
        return self.writer.begin(
            step, {"step": step, "note": self.note}, {n: t for n, t in tensors.items() if n in own}, None
        )

    def settle(self) -> str | None:
        """Do what a step does about a save."""
        return self.writer.settle(*reduce_sum(self.writer.flags(), CPU))

    def save(self, step: int) -> None:
        """Save, and take steps until it is committed."""
        self.begin(step)
        while not self.settle():
            pass


def save_and_die(folder: Path, step: int, moment: int, victim: int, asynchronous: bool) -> int:
    """Save a checkpoint and be killed at the k-th moment of it; 0 where it has fewer."""
    saver = Saver(folder, asynchronous=asynchronous)
    if saver.rank.rank == victim:
        Killer(folder, moment)
    saver.save(step)
    stop_processes()
    return 0


def save_without_end(folder: Path, first_step: int, megabytes: int) -> int:
    """Save again and again until killed; each checkpoint takes a while to be written."""
    saver = Saver(folder)
    names = {f"weight.{i}": megabytes * 2**20 // 8 for i in range(8)}
    own = saver.writer.owns(names)
    for step in range(first_step, first_step + 100_000):
        tensors = {name: torch.full((names[name] // 4,), float(step)) for name in own}
        saver.writer.begin(step, {"step": step}, tensors, None)
        while not (said := saver.settle()):
            time.sleep(0.002)
        if saver.rank.is_main:
            print(step, said, flush=True)
    return 0


def sign_and_die(dataset: Path, run: Path, moment: int) -> int:
    """Make a run folder and be killed at the k-th moment of it."""
    folder = RunFolder(make_config(dataset, run))
    folder.check("0123456789abcdef")
    Killer(run, moment)
    folder.acquire()
    folder.sign("0123456789abcdef", "1.0")
    return 0


def save_to_a_full_disk(folder: Path, step: int, limit: int, victim: int, note: str = "") -> int:
    """Save where the files of one process can have no more than some bytes; the error goes to the output."""
    saver = Saver(folder)
    saver.note = note
    if saver.rank.rank == victim:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return _report(lambda: saver.save(step))


def save_with_a_slow_part(folder: Path, step: int, slow: int, ready: Path) -> int:
    """Be slow with writing on one process, and say when the others are done and have taken some steps since."""
    saver = Saver(folder)
    if saver.rank.rank == slow:

        def never_ends(tensors: Any, path: Path) -> None:
            path.write_bytes(b"half of what")
            threading.Event().wait()

        saving.save_file = never_ends
    saver.begin(step)
    written, steps_since = 0.0, 0
    while steps_since < 20:
        written, failed = reduce_sum(saver.writer.flags(), CPU)
        assert saver.writer.settle(written, failed) is None
        steps_since += written == saver.rank.world_size - 1
    ready.with_name(f"{ready.name}{saver.rank.rank}").touch()
    signal.pause()
    return 0


def save_where_parts_appear_late(folder: Path, step: int, seconds: float, patience: float) -> int:
    """Have a file system that shows rank 0 the file of rank 1 some seconds after it was written."""
    saver = Saver(folder)
    saving.VISIBLE_SECONDS = patience  # type: ignore[misc]
    if saver.rank.rank == 1:
        original = saving.put_in_place

        def put_in_place(temporary: Path, path: Path) -> None:
            original(temporary, path)
            hidden = folder / "hidden"
            path.rename(hidden)
            saving.hash_file = lambda _: hash_file(hidden)
            saver.writer._pending.part._path = hidden  # type: ignore[union-attr]
            threading.Timer(seconds, lambda: hidden.rename(path)).start()

        hash_file = saving.hash_file
        saving.put_in_place = put_in_place
    return _report(lambda: saver.save(step))


def save_where_nothing_can_be_written(folder: Path, step: int, victim: int) -> int:
    """Meet a file system that has become read-only, on one process."""
    saver = Saver(folder)
    if saver.rank.rank == victim:

        def refuse(event: str, arguments: tuple[Any, ...]) -> None:
            if event in EVENTS and str(arguments[0]).startswith(str(folder)):
                raise OSError(30, os.strerror(30), arguments[0])

        sys.addaudithook(refuse)
    return _report(lambda: saver.save(step))


def _report(save: Callable[[], object]) -> int:
    """Save, and say what went wrong."""
    code = 0
    try:
        save()
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error, flush=True)
        code = 1
    stop_processes()
    return code


def hold_folder(dataset: Path, run: Path, ready: Path) -> int:
    """Hold a run folder until killed, with a worker process that outlives this one by a while."""
    folder = RunFolder(make_config(dataset, run))
    folder.acquire()
    if os.fork() == 0:
        signal.alarm(30)
        signal.pause()
    ready.touch()
    signal.pause()
    return 0


def race_for_folder(dataset: Path, run: Path, start: float, rounds: int) -> int:
    """Try to get a run folder again and again, at the same moments as others; 3 where two held it at the same time."""
    config, held = make_config(dataset, run), run.with_name("held")
    for number in range(rounds):
        while time.time() < start + 0.8 * number:
            pass
        folder = RunFolder(config)
        try:
            folder.acquire()
        except CheckpointError as error:
            print("refused:", error)
            continue
        try:
            held.touch(exist_ok=False)
        except FileExistsError:
            return 3
        time.sleep(0.05)
        held.unlink()
        folder.close()
        print("got it")
    return 0
