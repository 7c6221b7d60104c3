"""How often the guard would call a step of a real run a spike, by factor and window.

    python tests/benchmarks/spikes.py RUN [RUN ...]

RUN: run folders of trainings with `train.log_every=1`, `train.spike_factor=0`. Their losses are handed to the guard as in training;
a step that it calls a spike is not learned from, though the run went on with it. Results: spikes.md.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from so3krates_dist.config import TrainSection
from so3krates_dist.train.guard import LEAST_LOSSES, StepGuard, Verdict

FACTORS, WINDOWS = (4.0, 6.0, 8.0, 10.0, 12.0), (50, 200)


def read_losses(run: Path) -> list[float]:
    """Return the loss of each step; nothing else was averaged into it."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [float(r["loss"]) for r in records if r.get("kind") == "train"]


def count_spikes(losses: Sequence[float], factor: float, window: int) -> int:
    """Return how many steps the guard would have skipped."""
    unlimited = len(losses)
    guard = StepGuard(TrainSection(spike_factor=factor, spike_window=window, max_skipped_steps=unlimited))
    count = 0
    for step, loss in enumerate(losses):
        verdict = guard.judge(loss)
        guard.record(step, loss, math.nan, verdict, verdict is Verdict.APPLY)
        count += verdict is Verdict.SPIKE
    return count


def find_least(losses: Sequence[float], window: int) -> float:
    """Return the smallest factor, of tenths, that calls no step a spike."""
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count_spikes(losses, middle / 10, window) == 0 else (middle, high)
    return high / 10


def find_linear(losses: Sequence[float], window: int) -> float:
    """Return the same for a rule of losses instead of logarithms: the largest distance from the median over the spread."""
    distances = []
    for step in range(LEAST_LOSSES, len(losses)):
        last = np.array(losses[max(0, step - window) : step])
        median = np.median(last)
        distances.append((losses[step] - median) / (1.4826 * np.median(np.abs(last - median))))
    return max(distances)


def find_height(losses: Sequence[float], factor: float, window: int) -> float:
    """Return how many times the median a loss has to be to be called a spike, in the middle of the run."""
    logs = np.log(losses)
    last = [logs[max(0, step - window) : step] for step in range(LEAST_LOSSES, len(losses))]
    return math.exp(factor * float(np.median([1.4826 * np.median(np.abs(part - np.median(part))) for part in last])))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    for run in parser.parse_args().runs:
        losses = read_losses(run)
        rise = math.exp(np.diff(np.log(losses)).max())
        print(
            f"{run.name}: {len(losses)} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}, largest rise {rise:.1f}-fold"
        )
        for window in WINDOWS:
            counts = ", ".join(f"{factor:g}: {count_spikes(losses, factor, window)}" for factor in FACTORS)
            least, linear = find_least(losses, window), find_linear(losses, window)
            heights = " and ".join(f"{find_height(losses, factor, window):.1f}-fold" for factor in (6.0, 8.0))
            print(f"  window {window}: steps called spikes by factor: {counts}; none from {least:g} on")
            print(f"    spikes of factors 6 and 8 are {heights}; with losses as they are, none from {linear:.1f} on")


if __name__ == "__main__":
    main()
