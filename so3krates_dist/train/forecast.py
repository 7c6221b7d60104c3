"""What a process of a run will hold in memory, and which of its passes is the heaviest: worked out, without starting one.

Everything but the activations follows from the number of weights, the stage of ZeRO and the number of processes: weights and
optimizer are in float32 (or float64), whatever `train.precision` does inside the model. The shares below were read in DeepSpeed
0.19.8 (runtime/engine.py, runtime/zero/stage_1_and_2.py and stage3.py) and are compared with measured peaks in
tests/benchmarks/dry_run.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np

from so3krates_dist.config import TrainSection
from so3krates_dist.data.passes import Limits, count_passes, group_lanes, list_passes
from so3krates_dist.data.plan import Schedule, lanes_of_rank
from so3krates_dist.train.plain_engine import list_moments
from so3krates_dist.train.zero3 import find_piece

STAGES: Final = ((0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True))
"""of ZeRO, each without and with the optimizer on the CPU"""


# ---------------------------------------------------------------------------------------------------------------- memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Bytes of one process."""

    weights: int
    gradients: int
    """with the bucket that DeepSpeed collects them in"""
    optimizer: int
    """its moments, and under ZeRO the weights that it moves"""
    mean: int
    """exponential mean of the weights, which every process has"""
    exchange: int
    """while processes exchange gradients or put weights together, when there are no activations"""
    activations: int
    """of the largest pass"""
    host: int = 0
    """in the memory of the CPU, where the optimizer is there"""

    @property
    def peak(self) -> int:
        """The most that is on the device at a time."""
        held = self.weights + self.gradients + self.optimizer + self.mean
        return held + max(self.exchange, self.activations)


def predict_memory(
    section: TrainSection, weights: Sequence[int], world_size: int, *, passes: int, activations: int
) -> ProcessMemory:
    """Return what a process holds.

    With c bytes of all weights, p = c / N on each of N processes, b of `zero3.find_piece`, and m moments of the optimizer (2;
    AMSGrad 3):

    - stage 0: weights c, gradients c, moments mc; a copy c of the gradients to exchange;
    - stages 1 and 2: weights c; a bucket b for gradients; (1 + m)p of moments and of the weights that the optimizer moves; stage 2
      with several passes adds gradients up in a further p; at the end of a step gradients c (stage 2: p) and p of what the
      optimizer gets of them;
    - stage 3: weights p, gradients p and the bucket b, (1 + m)p as above; 2b while weights are put together, for the mean, or a
      bucket is exchanged;
    - the optimizer on the CPU: there (3 + m)p and the sums of stage 2; up to stage 2 also two buffers of the largest weight, one
      on the CPU and one on the device;
    - the mean of the weights: c on every process.

    With float64 there is one process of plain torch: weights, gradients, moments and the mean.

    Args:
        section: Precision, optimizer, stage, offload.
        weights: Numbers in each tensor of weights.
        world_size: Processes.
        passes: Of each process in a step, at most.
        activations: Bytes of the largest pass.
    """
    plain, stage = section.precision == "float64", section.zero_stage
    copy, moments = sum(weights) * (8 if plain else 4), len(list_moments(section))
    part = -(-copy // world_size)
    piece = 4 * find_piece(weights)
    held, gradients, optimizer, host = copy, piece, (1 + moments) * part, 0
    exchange = part + (copy if stage == 1 else part)
    sums = part if stage == 2 and passes > 1 else 0
    if plain or stage == 0:
        gradients, optimizer, exchange = copy, moments * copy, 0 if plain else copy
    elif stage == 3:
        held, gradients, exchange = part, part + piece, 2 * piece
    if section.offload_optimizer:
        buffer = 0 if stage == 3 else 4 * max(weights)
        host, optimizer = optimizer + 2 * part + sums + buffer, 0
        gradients, sums = piece + buffer, 0
    return ProcessMemory(
        weights=held, gradients=gradients + sums, optimizer=optimizer, mean=copy, exchange=exchange, activations=activations,
        host=host,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- passes


@dataclasses.dataclass(frozen=True)
class Pass:
    """Which conformers one process computes at a time."""

    step: int
    rank: int
    number: int
    """of the pass in the step"""
    conformers: int
    atoms: int
    pairs: int
    """as the plan estimates them"""

    @property
    def size(self) -> int:
        """Atoms and pairs together."""
        return self.atoms + self.pairs


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """What the steps of a window are like."""

    num_steps: int
    conformers: float
    """of a step, on average"""
    atoms: float
    pairs: float
    most_passes: int
    """of each process in a step"""
    imbalance: float
    """how much longer a step is than with processes of equal load, on average, by the plan's costs"""


def find_heaviest(schedule: Schedule, step: int, world_size: int, groups: int, limits: Limits) -> Pass:
    """Return the heaviest pass of any process from a step on, to the end of the plan's window.

    Args:
        schedule: Of the run.
        step: Position in the data.
        world_size: Processes.
        groups: `train.micro_batches`.
        limits: Of a pass.
    """
    plan, within = schedule.locate(step)
    number, first = plan.locate(within)
    window = plan.window(number)
    loads = window.loads()[:, first:]
    candidates = [
        (rank, loads[group.start : group.stop].sum(axis=0))
        for rank in range(world_size)
        for group in group_lanes(lanes_of_rank(window.num_lanes, rank, world_size), groups)
    ]
    rank, sums = max(candidates, key=lambda candidate: int(candidate[1].max()))
    slot = first + int(sums.argmax())
    passes = list_passes(window, slot, lanes_of_rank(window.num_lanes, rank, world_size), groups, limits)
    costs = window.costs
    heaviest = int(np.argmax([int(costs[rows].sum()) for rows in passes]))
    rows = passes[heaviest]
    atoms, pairs = (int(values[rows].sum()) for values in (window.atoms, window.pairs))
    return Pass(step + slot - first, rank, heaviest, len(rows), atoms, pairs)


def describe_steps(schedule: Schedule, step: int, world_size: int, groups: int, limits: Limits) -> StepFigures:
    """Return figures of the window that a step is in.

    Args:
        schedule: Of the run.
        step: Position in the data.
        world_size: Processes.
        groups: `train.micro_batches`.
        limits: Of a pass.
    """
    plan, within = schedule.locate(step)
    window = plan.window(plan.locate(within)[0])
    slots = window.num_slots
    loads = np.stack([
        window.loads()[(own := lanes_of_rank(window.num_lanes, rank, world_size)).start : own.stop].sum(axis=0)
        for rank in range(world_size)
    ])  # fmt: skip
    return StepFigures(
        num_steps=slots, conformers=len(window.atoms) / slots, atoms=float(window.atoms.sum(dtype=np.int64)) / slots,
        pairs=float(window.pairs.sum(dtype=np.int64)) / slots,
        most_passes=max(count_passes(window, slot, world_size, groups, limits) for slot in range(slots)),
        imbalance=float(loads.max(axis=0).sum() * world_size / loads.sum()) - 1,
    )  # fmt: skip
