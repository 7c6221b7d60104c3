"""What interrupts the usual course of a run: losses that are not finite, requests to stop, and errors of single processes.

All are decided by all processes together, from one sum.
"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from so3krates_dist.distributed import reduce_sum
from so3krates_dist.errors import DataError, NonFiniteError, So3kratesError

STOP_NAME = "STOP"
"""A file of this name in the run folder asks the run to save and stop"""


@contextlib.contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """End all processes where one of them cannot do what is inside, which none could know that waits for it.

    All processes come here; what is inside must not wait for another one.

    Args:
        device: Of this process.

    Raises:
        So3kratesError: In its own words on the process that met it, in others on the rest.
    """
    failure: So3kratesError | None = None
    try:
        yield
    except So3kratesError as error:
        failure = error
    (failed,) = reduce_sum([float(failure is not None)], device)
    if failure is not None:
        raise failure
    if failed:
        raise DataError("another process", "be able to start as well", "an error", "Its own message says what to do")


class FiniteGuard:
    """Counts steps that were skipped because the loss or its gradient was not finite.

    Args:
        max_skipped: How many in a row are allowed.
    """

    def __init__(self, max_skipped: int) -> None:
        self._max_skipped = max_skipped
        self._in_a_row = 0

    def record(self, step: int, applied: bool) -> None:
        """Take note of a step.

        Raises:
            NonFiniteError: Too many were skipped in a row.
        """
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if self._in_a_row > self._max_skipped:
            raise NonFiniteError(
                f"step {step}", f"have a finite loss and gradient in one of {self._max_skipped + 1} steps", "none",
                "Lower train.learning_rate, or check the labels with `so3krates validate`; the last checkpoint is intact",
            )  # fmt: skip


class StopRequest:
    """Notices SIGTERM, SIGINT, SIGUSR1 and the stop file; handlers only set a flag.

    Args:
        folder: Run folder, where the stop file is looked for.
        look_for_file: Whether this process looks; one is enough, and spares a shared file system.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, folder: Path, look_for_file: bool = True) -> None:
        self._file = folder / STOP_NAME if look_for_file else None
        self._received = False
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def is_pending(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._received or (self._file is not None and self._file.exists())

    def close(self) -> None:
        """Put the previous handlers back and remove the stop file, which has been obeyed."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._file is not None:
            self._file.unlink(missing_ok=True)
