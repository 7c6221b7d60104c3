"""What test_crash.py runs in processes of their own: saving, and being killed at a chosen moment of it."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_setup import make_config

from so3krates_dist.errors import CheckpointError
from so3krates_dist.train import checkpoint
from so3krates_dist.train.checkpoint import RunFolder, TrainingState, save_checkpoint

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
"""Python's audit events of whatever touches the disk; each is raised just before it happens"""


def make_state(step: int, value: float | None = None) -> TrainingState:
    """Return a state whose tensors tell which step they are of."""
    tensors = {f"weight.{i}": torch.full((100 + i,), float(step if value is None else value)) for i in range(5)}
    return TrainingState(step=step, best_score=0.5 * step, tensors=tensors)


class Killer:
    """Kills this process at its k-th dealing with a folder."""

    def __init__(self, folder: Path, moment: int) -> None:
        self._folder, self._left = str(folder), moment
        sys.addaudithook(self._hear)
        self._patch("fsync", os.fsync)

    def _patch(self, name: str, original: Callable[..., Any]) -> None:
        def patched(*arguments: Any) -> Any:
            self.count()
            result = original(*arguments)
            self.count()
            return result

        setattr(os, name, patched)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(self._folder):
            self.count()

    def count(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder: Path, step: int, keep: int, moment: int) -> int:
    """Save a checkpoint and be killed at the k-th moment of it; 0 where it has fewer."""
    state = make_state(step)
    original = checkpoint.save_file
    killer = Killer(folder, moment)

    def save_file(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of what")  # an event of its own, and then another
        killer.count()
        original(tensors, path)
        killer.count()

    checkpoint.save_file = save_file
    save_checkpoint(folder, state, keep=keep)
    return 0


def sign_and_die(dataset: Path, run: Path, moment: int) -> int:
    """Make a run folder and be killed at the k-th moment of it."""
    folder = RunFolder(make_config(dataset, run))
    folder.check("0123456789abcdef")
    Killer(run, moment)
    folder.acquire()
    folder.sign("0123456789abcdef", "1.0")
    return 0


def save_to_a_full_disk(folder: Path, step: int, limit: int) -> int:
    """Save where a file can have no more than some bytes; the error goes to the output."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(folder, make_state(step), keep=2)
    except CheckpointError as error:
        os.write(2, f"{error}\n".encode()[:limit])
        return 1
    return 0


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
