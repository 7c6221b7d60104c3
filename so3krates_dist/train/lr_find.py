"""`so3krates lr-find`: which learning rates are worth trying, by a test of a few hundred steps on the data of a run.

The learning-rate range test of L. N. Smith, arXiv:1506.01186, section 3.3: from random weights the rate grows with every step, and
the loss says at which rates it falls, and where that ends. Two departures: Smith's rate grows linearly, here by a constant
factor, since nobody knows its order of magnitude beforehand; and Smith's lower end is where learning begins, here it is where half
of the fall is done, since the mean energy is learned at almost any rate. What is found is an order of magnitude: the test sees a
few hundred steps, and the best rate of a long run is a matter of that run. Of the range the upper end is the rate to start from:
the best of short runs was within a factor of 2.4 of it, but 4 to 13 times the lower end (tests/benchmarks/learning_rates.md).

Computed in one process without ZeRO, with the optimizer, clipping, precision and batches of the configuration. All that it leaves
in the run folder is `lr_find/`.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from so3krates_dist.config import RunConfig, load_config
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.plan import Schedule
from so3krates_dist.data.stream import TrainingStream, build_loader
from so3krates_dist.distributed import (
    Rank,
    check_precision,
    choose_device,
    count_threads,
    read_rank,
    seed_everything,
    seed_step,
    set_matmul_precision,
    tune_machine,
)
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.files import write_text
from so3krates_dist.graph import FloatArray, GraphBatch
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import budget, inputs, pictures, planning
from so3krates_dist.train.checkpoint import RATES_NAME
from so3krates_dist.train.losses import LABELS, compute_loss, compute_weights, count_labels
from so3krates_dist.train.memory import find_available_bytes
from so3krates_dist.train.plain_engine import PlainEngine
from so3krates_dist.train.probes import collect_probes

MIN_STEPS: Final = 20
SMOOTHING: Final = 0.05
"""of all steps: how far on either side the mean at a step goes"""
FALLEN: Final = 0.5
"""of the whole fall of the logarithm of the loss: the lower end"""
LEAST_FALL: Final = 0.1
"""of the logarithm of the loss; less is no fall, but chance"""
RISEN: Final = 4.0
"""times its lowest, as medians of `MEDIAN_STEPS` steps, makes a loss that ends the test"""
MEDIAN_STEPS: Final = 5
_ALL_DONE: Final = "all steps done"


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What was seen: the loss before each step, and the rate of that step."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """finite and greater than zero"""
    ending: str
    """why there are no more"""


@dataclasses.dataclass(frozen=True)
class RateSpan:
    """What the test suggests."""

    lowest: float
    """rate at which half of the fall of the smoothed loss is done"""
    highest: float
    """rate at which it is lowest"""
    is_open: bool
    """whether the test ended before the loss rose again, so that higher rates may do as well"""

    def describe(self) -> str:
        """Return a line for the user."""
        end = "; the loss had not risen again there: try a larger --highest" if self.is_open else ""
        return (
            f"train.learning_rate: start from {self.highest:.1e}, the upper end of {self.lowest:.1e} to {self.highest:.1e}"
            " (from half of the fall of the loss to its end): an order of magnitude, not the best rate"
            f" (range test after Smith, arXiv:1506.01186){end}"
        )


def grow(lowest: float, highest: float, num_steps: int) -> list[float]:
    """Return rates that grow by a constant factor."""
    return [float(rate) for rate in np.geomspace(lowest, highest, num_steps)]


def smooth(losses: Sequence[float]) -> FloatArray:
    """Return the logarithms of losses, each as the mean of those around it, equally many on either side.

    Unlike a running mean it does not lag behind, which would make every rate that is read from it too large.
    """
    logs = np.log(np.asarray(losses, np.float64))
    reach = round(SMOOTHING * len(logs))
    sums = np.concatenate([[0.0], np.cumsum(logs)])
    places = np.arange(len(logs))
    reaches = np.minimum(reach, np.minimum(places, places[::-1]))
    return np.asarray((sums[places + reaches + 1] - sums[places - reaches]) / (2 * reaches + 1))


def find_span(test: RangeTest) -> RateSpan | None:
    """Return between which rates the loss fell; None where it did not.

    Args:
        test: With at least one step.
    """
    reach = round(SMOOTHING * len(test.losses))
    # At either end the mean is one of few, and would be the highest or the lowest by chance.
    inner = smooth(test.losses)[reach : len(test.losses) - reach]
    last = int(np.argmin(inner))
    top = float(inner[: last + 1].max())
    fall = top - float(inner[last])
    if fall < LEAST_FALL:
        return None
    above = np.flatnonzero(inner[: last + 1] > top - FALLEN * fall)
    is_open = last == len(inner) - 1 and test.ending == _ALL_DONE
    return RateSpan(test.rates[reach + int(above[-1]) + 1], test.rates[reach + last], is_open)


def run_test(config: RunConfig, mixture: Mixture, device: torch.device, rates: Sequence[float]) -> RangeTest:
    """Train from random weights, each step with the next rate, until they are used up or the loss has risen.

    Args:
        config: Of the run.
        mixture: Its data.
        device: Where to compute.
        rates: Of the steps.
    """
    section = config.train
    seed_everything(config.run.seed)
    model_statistics = ModelStatistics.from_manifest(mixture.statistics, config.model)
    engine = PlainEngine(build_model(config.model, model_statistics).to(device), section, device)
    schedule, _ = planning.build_schedule(config, mixture, None, 0)
    limits = _find_limits(config, mixture, engine.potential, schedule, device)
    stream = TrainingStream(schedule, config, 0, 1, limits)
    losses: list[float] = []
    loader = build_loader(stream, range(len(rates)), num_workers=config.data.num_workers, device=device)
    with contextlib.closing(loader):
        for step, (rate, data) in enumerate(zip(rates, loader, strict=True)):
            seed_step(config.run.seed, step, Rank())
            loss = _do_passes(engine, config, data.batches, model_statistics.energy_scale)
            if not (math.isfinite(loss) and engine.step(rate).applied):
                return RangeTest(tuple(rates[:step]), tuple(losses), f"loss or gradient not finite at {rate:.1e}")
            losses.append(max(loss, sys.float_info.min))  # logarithms are taken, also of a model that is exact
            if _has_risen(losses):
                ending = f"loss {RISEN:g} times its lowest at {rate:.1e}"
                return RangeTest(tuple(rates[: step + 1]), tuple(losses), ending)
    return RangeTest(tuple(rates), tuple(losses), _ALL_DONE)


def _do_passes(engine: PlainEngine, config: RunConfig, batches: Sequence[GraphBatch], energy_scale: float) -> float:
    """Do the passes of a step; return its loss."""
    section = config.train
    counts = [sum(count_labels(b)[i] for b in batches) for i in range(len(LABELS))]
    weights, total = compute_weights(0, section), 0.0
    for number, micro_batch in enumerate(batches, 1):
        batch = micro_batch.to(engine.potential.energy_baselines.device, engine.dtype)
        loss, _ = compute_loss(engine.forward(batch), batch, counts, section, weights, energy_scale)
        engine.backward(loss, is_last=number == len(batches))
        total += float(loss.detach())
    return total


def _has_risen(losses: Sequence[float]) -> bool:
    """Return whether the last losses are far above the lowest; single batches that are hard do not count."""
    if len(losses) < 2 * MEDIAN_STEPS:
        return False
    medians = (statistics.median(losses[i : i + MEDIAN_STEPS]) for i in range(len(losses) - MEDIAN_STEPS + 1))
    return statistics.median(losses[-MEDIAN_STEPS:]) > RISEN * min(medians)


def _find_limits(
    config: RunConfig, mixture: Mixture, potential: Potential, schedule: Schedule, device: torch.device
) -> Limits:
    """Return the limits of a pass, measured where the configuration says so."""
    section, rank = config.data, Rank()
    measured = None
    if section.find_limits:
        probes = collect_probes(mixture.active, potential.cutoffs)
        measured = budget.find_limits(
            potential, probes, config.train, device, rank, available_bytes=find_available_bytes(device, rank),
            conformers_per_step=planning.count_conformers(schedule, 0, 1),
        ).to_json()  # fmt: skip
    limits = inputs.find_limits(section, measured)
    if section.oversized == "refuse":
        inputs.check_sizes(mixture, limits)
    return limits


def find_rates(config: RunConfig, lowest: float, highest: float, num_steps: int) -> Iterator[str]:
    """Do the test, write `lr_find/rates.json` and `rates.png` into the run folder, and yield lines for the user.

    Args:
        config: Of the run.
        lowest: First learning rate.
        highest: Last learning rate.
        num_steps: At most.

    Raises:
        ConfigError: A rate or the number of steps is out of range, or there are several processes.
        So3kratesError: Anything wrong with the configuration or the data.
    """
    _check_arguments(lowest, highest, num_steps)
    section = config.train
    device = choose_device(section.device, Rank())
    check_precision(section.precision, device)
    config.check_world_size(1)
    mixture = inputs.open_data(config)
    folder = _make_folder(config)
    tune_machine(count_threads(config.run.threads, 1), device)
    set_matmul_precision(section.precision, device)
    if section.zero_stage:
        yield "note: ZeRO is not used here: this is one process"
    test = run_test(config, mixture, device, grow(lowest, highest, num_steps))
    span = find_span(test) if test.losses else None
    write_text(folder / "rates.json", json.dumps(_describe(config, test, span), indent=1) + "\n")
    if test.losses:
        ends = None if span is None else (span.lowest, span.highest)
        pictures.plot_rates(test.rates, test.losses, np.exp(smooth(test.losses)), ends, folder / "rates.png")
    yield f"{len(test.losses)} of {num_steps} steps from {lowest:.1e} to {highest:.1e}: {test.ending}"
    yield span.describe() if span else "No suggestion: the loss did not fall. Try more --steps or other rates"
    yield f"written to {folder}"


def _check_arguments(lowest: float, highest: float, num_steps: int) -> None:
    rank = read_rank()
    if rank.world_size > 1:
        raise ConfigError("processes", "be one for lr-find", rank.world_size, "Start it without a launcher")
    if not 0 < lowest < math.inf:
        raise ConfigError("--lowest", "be a number greater than zero", lowest, "Change the value")
    if not lowest < highest < math.inf:
        raise ConfigError("--highest", f"be a number greater than --lowest ({lowest})", highest, "Change the value")
    if num_steps < MIN_STEPS:
        raise ConfigError("--steps", f"be at least {MIN_STEPS}", num_steps, "Change the value")


def _make_folder(config: RunConfig) -> Path:
    """Make the folder that the findings go to, before they are computed."""
    folder = config.folder / RATES_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        got = "" if os.access(folder, os.W_OK | os.X_OK) else "one that is read-only"
    except OSError as error:
        got = str(error.strerror)
    if got:
        rule, remedy = "be a folder that can be written to", "Set run.folder to another folder"
        raise CheckpointError(f"run.folder {config.folder}", rule, got, remedy)
    return folder


def _describe(config: RunConfig, test: RangeTest, span: RateSpan | None) -> dict[str, Any]:
    """Return what is written as JSON."""
    keys = ("optimizer", "adam_beta1", "adam_beta2", "gradient_clipping", "layer_decay", "precision")
    return {
        "suggestion": None if span is None else dataclasses.asdict(span),
        "rule": "after Smith 2015, arXiv:1506.01186: from half of the fall of the smoothed loss to where it is lowest",
        "ending": test.ending,
        "seed": config.run.seed,
        "batch_size": config.data.batch_size,
        "model": config.model.name,
        "train": {key: getattr(config.train, key) for key in keys},
        "rates": list(test.rates),
        "losses": list(test.losses),
        "smoothed": np.exp(smooth(test.losses)).tolist() if test.losses else [],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `so3krates lr-find` takes."""
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the run, as for `so3krates train`")
    parser.add_argument("--lowest", type=float, default=1e-6, metavar="LR", help="first learning rate (default: 1e-6)")
    parser.add_argument("--highest", type=float, default=1.0, metavar="LR", help="last learning rate (default: 1)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps in between (default: 300)")


def run(arguments: argparse.Namespace) -> int:
    """Do the test and print what it found; return the exit code."""
    for line in find_rates(load_config(arguments.settings), arguments.lowest, arguments.highest, arguments.steps):
        print(line, flush=True)
    return 0
