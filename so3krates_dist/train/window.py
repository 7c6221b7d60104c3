"""Figures of the steps between two lines of the log: means of what was learned, rates, and where the time went."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

WEIGHT: Final = "weight/"
"""What the figure of a label's weight in the loss begins with, where weights change in the course of a run"""
_MEANS = ("loss", "energy_mae_per_atom", "forces_mae", "gradient_norm")


class StepWindow:
    """Adds up the figures of steps and the time spent waiting for data; evaluating and saving do not count as training."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._steps: list[Mapping[str, float]] = []
        self._waited = self._paused = 0.0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Do not count the time inside."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, facts: Mapping[str, float]) -> None:
        """Take note of a step."""
        self._steps.append(facts)

    def summarize(self, epochs: Mapping[str, float]) -> dict[str, float]:
        """Return the figures of the steps since the last call, and begin anew.

        Args:
            epochs: Passes through the data so far, by the names of the figures.
        """
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        applied = [f for f in self._steps if f["applied"]]
        figures = {name: _average([f[name] for f in applied]) for name in _MEANS}
        figures |= {
            "learning_rate": self._steps[-1]["learning_rate"],
            **{name: value for name, value in self._steps[-1].items() if name.startswith(WEIGHT)},
            "skipped_steps": float(len(self._steps) - len(applied)),
            "conformers_per_second": sum(f["conformers"] for f in self._steps) / seconds,
            "seconds_per_step": seconds / len(self._steps),
            "data_wait_share": self._waited / seconds,
            **epochs,
        }
        self._begin()
        return figures


def _average(values: Sequence[float]) -> float:
    """Return the mean of those that are there: a step may have no conformer with some label."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
