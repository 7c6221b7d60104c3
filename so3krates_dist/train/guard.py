"""What interrupts the usual course of a run: steps that would spoil the weights, requests to stop, and errors of single processes.

All are decided by all processes together, from one sum.
"""

import contextlib
import enum
import math
import signal
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
import torch

from so3krates_dist.config import TrainSection
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


class Verdict(enum.Enum):
    """What is to be done with a step whose gradient has been computed."""

    APPLY = "apply"
    NON_FINITE = "non-finite"
    SPIKE = "spike"


LEAST_LOSSES: Final = 20
"""Steps before which nothing is said about what is usual"""

_LEAST_SPREAD: Final = 0.05
"""Of logarithms: losses that hardly vary do not make a spike of what is a few hundredths above them"""

_OF_NORMAL: Final = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution"""

_TINY: Final = 1e-30
"""In place of a loss of zero, which has no logarithm"""


class StepGuard:
    """Decides which steps are skipped, when the run goes back to a checkpoint, and when it stops.

    A function of the numbers that it is told: all processes tell it the same ones, so all decide alike.

    A spike is a loss whose logarithm is above the median of those of the last `train.spike_window` applied steps by more than
    `train.spike_factor` times their spread, the median absolute deviation times 1.4826: neither takes notice of a few outliers. On
    the logarithmic scale the rule is the same at the start and at the end of a run, and for small and large batches. A factor of 8
    with the window of 200 never fired in three healthy runs, and found the spikes of one whose learning rate was too high
    (tests/benchmarks/spikes.md).

    Args:
        section: Of the configuration.
    """

    def __init__(self, section: TrainSection) -> None:
        self._section = section
        self._losses: deque[float] = deque(maxlen=section.spike_window)
        self._in_a_row = 0
        self._spikes_in_a_row = 0
        self._rollbacks = 0

    @property
    def usual_loss(self) -> float:
        """Median of the losses of the last applied steps; nan as long as there are too few."""
        return statistics.median(self._losses) if len(self._losses) >= LEAST_LOSSES else math.nan

    @property
    def rollbacks(self) -> int:
        """How often the run has gone back to a checkpoint."""
        return self._rollbacks

    def judge(self, loss: float) -> Verdict:
        """Say what is to be done with a step, before the weights are moved; nothing is noted down yet.

        Args:
            loss: Of the global batch.
        """
        if not math.isfinite(loss):
            return Verdict.NON_FINITE
        if not self._section.spike_factor or len(self._losses) < LEAST_LOSSES:
            return Verdict.APPLY
        logs = np.log(np.maximum(self._losses, _TINY))
        median = float(np.median(logs))
        spread = max(_OF_NORMAL * float(np.median(np.abs(logs - median))), _LEAST_SPREAD)
        is_spike = math.log(max(loss, _TINY)) - median > self._section.spike_factor * spread
        return Verdict.SPIKE if is_spike else Verdict.APPLY

    def record(self, step: int, loss: float, gradient_norm: float, verdict: Verdict, applied: bool) -> bool:
        """Take note of a step.

        Args:
            step: Steps done before it.
            loss: Of the global batch.
            gradient_norm: Before clipping; nan where the step was skipped before it was known.
            verdict: Of `judge`.
            applied: Whether the weights were moved; False too where the gradient was not finite though the loss was.

        Returns:
            Whether to go back to the newest checkpoint now.

        Raises:
            NonFiniteError: Too many steps in a row were skipped, and the run has gone back as often as it may.
        """
        if applied:
            self._losses.append(loss)
            self._in_a_row = self._spikes_in_a_row = 0
            return False
        self._in_a_row += 1
        self._spikes_in_a_row += verdict is Verdict.SPIKE
        allowed = self._section.max_skipped_steps
        if self._in_a_row <= allowed:
            return False
        if self._rollbacks >= self._section.max_rollbacks:
            raise self._give_up(step, loss, gradient_norm)
        self._rollbacks += 1
        self._in_a_row = self._spikes_in_a_row = 0
        return True

    def _give_up(self, step: int, loss: float, gradient_norm: float) -> NonFiniteError:
        number = self._section.max_skipped_steps + 1
        times = "once" if self._rollbacks == 1 else f"{self._rollbacks} times"
        returned = f" after going back to a checkpoint {times}" if self._rollbacks else ""
        last = f"none{returned} (loss {loss:.4g}, gradient norm {gradient_norm:.4g} in the last)"
        if self._spikes_in_a_row == self._in_a_row:
            rule, hint = f"have a loss of usual size in one of {number} steps", "Raise train.spike_factor"
        else:
            rule, hint = f"have a finite loss and gradient in one of {number} steps", "Lower train.learning_rate"
        remedy = f"{hint}, or see `so3krates replay` for what was skipped; the last checkpoint is intact"
        return NonFiniteError(f"step {step}", rule, last, remedy)

    def get_state(self) -> dict[str, Any]:
        """Return what `set_state` takes, of plain numbers: part of a checkpoint."""
        return {
            "losses": list(self._losses),
            "skipped_in_a_row": self._in_a_row,
            "spikes_in_a_row": self._spikes_in_a_row,
            "rollbacks": self._rollbacks,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, at the start of a run or in the middle of it.

        In the middle of it the number of times that the run has gone back stays what it is: the checkpoint was written before.

        Args:
            state: Of `get_state`; what is missing is as at the start.
        """
        rollbacks = int(state.get("rollbacks", 0))
        has_gone_back = self._rollbacks > rollbacks
        self._rollbacks = max(self._rollbacks, rollbacks)
        self._losses = deque(map(float, state.get("losses", ())), maxlen=self._section.spike_window)
        self._in_a_row = 0 if has_gone_back else int(state.get("skipped_in_a_row", 0))
        self._spikes_in_a_row = 0 if has_gone_back else int(state.get("spikes_in_a_row", 0))


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
        if self._file is not None and not self._received:
            with contextlib.suppress(OSError):  # a file server that is away: the next save tells
                return self._file.exists()
        return self._received

    def close(self) -> None:
        """Put the previous handlers back and remove the stop file, which has been obeyed."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._file is not None:
            with contextlib.suppress(OSError):  # all is saved; the exit code must tell
                self._file.unlink(missing_ok=True)
