"""What a micro-batch costs on this machine, measured once: how much fits the memory, and what an atom and a pair are worth.

Both are fitted to a few forward and backward passes of real conformers. Rank 0 measures and all processes hear the result; it goes
into the run's plan.json, so a run never measures twice. Measuring leaves no trace: weights, gradients, the optimizer and random
numbers are as before.

Passes go around the training engine, whose backward pass would exchange gradients with processes that do not take part.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.distributed import Rank, broadcast_text, reduce_sum
from so3krates_dist.errors import ConfigError
from so3krates_dist.graph import GraphBatch, collate
from so3krates_dist.model.potential import Potential
from so3krates_dist.train.losses import compute_loss, compute_weights, count_labels
from so3krates_dist.train.memory import find_available_bytes, measure_peak
from so3krates_dist.train.probes import Probes
from so3krates_dist.train.two_pass import TwoPass

MEASURED_SHARE: Final = 0.25
"""of the memory that the passes of the fit are allowed to grow to; the check afterwards takes the rest"""
GRADIENT_COPIES: Final = 3
"""of all weights: the sum of earlier passes, and the engine's buffers, which the passes measured here do without"""
MAX_SECONDS: Final = 1.0
"""Passes that take so long are not made larger"""
MAX_CHECK_SECONDS: Final = 60.0
"""so long the check may take, by what it should; processes wait for each other for ten minutes at most"""
MIN_SECONDS: Final = 0.1
"""of passes from which costs are fitted, so that starting them does not matter"""
MAX_CHECKS: Final = 8
"""passes of the check; each lowers the limits"""
SAFETY: Final = 1.5
"""Passes that may take all memory, by so many times what their size would make of the largest before, are not tried"""
REPEATS: Final = 3
"""of passes that are timed"""
MAX_CONFORMERS: Final = 1 << 14
"""of passes that are measured"""


@dataclasses.dataclass(frozen=True)
class MeasuredLimits:
    """The largest micro-batch that fits the memory, and how that was found."""

    max_atoms: int
    max_pairs: int
    """0 where conformers have no pairs: no limit"""
    available_bytes: int
    """for the computations of one process; the smallest of all processes"""
    fixed_bytes: float
    """of any micro-batch"""
    bytes_per_atom: float
    bytes_per_pair: float
    largest_bytes: int
    """of a pass that was measured"""
    num_passes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; `MeasuredLimits(**values)` is the way back."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """Return one line for the log."""
        return (
            f"Largest micro-batch for {self.available_bytes / 1e9:.3g} GB: {self.max_atoms:,} atoms, {self.max_pairs:,} pairs"
            f" ({self.fixed_bytes / 1e6:.3g} MB, {self.bytes_per_atom / 1e3:.3g} kB per atom and"
            f" {self.bytes_per_pair / 1e3:.3g} kB per pair, by {self.num_passes} passes of up to {self.largest_bytes / 1e9:.3g} GB)"
        )


@dataclasses.dataclass(frozen=True)
class MeasuredCost:
    """What atoms and pairs cost beside each other, and the times behind it."""

    cost_per_atom: float
    """two digits"""
    cost_per_pair: float
    """1; 0 where pairs cost nothing that could be measured"""
    fixed_seconds: float
    """of any pass"""
    seconds_per_atom: float
    seconds_per_pair: float
    num_passes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; `MeasuredCost(**values)` is the way back."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """Return one line for the log."""
        return (
            f"Costs: {self.cost_per_atom:g} an atom, {self.cost_per_pair:g} a pair ({self.fixed_seconds * 1e3:.3g} ms,"
            f" {self.seconds_per_atom * 1e6:.3g} µs per atom and {self.seconds_per_pair * 1e6:.3g} µs per pair,"
            f" by {self.num_passes} passes)"
        )


# ---------------------------------------------------------------------------------------------------------------- passes


class Point(NamedTuple):
    """What was measured of a pass."""

    atoms: int
    pairs: int
    value: float
    """bytes or seconds"""

    @property
    def size(self) -> int:
        """Atoms and pairs together."""
        return self.atoms + self.pairs


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes or seconds as a function of atoms and pairs."""

    fixed: float
    per_atom: float
    per_pair: float

    def at(self, atoms: int, pairs: int) -> float:
        """Return the value for so many atoms and pairs."""
        return self.fixed + self.per_atom * atoms + self.per_pair * pairs


class _TooLargeError(Exception):
    """A pass does not fit the memory."""


class _Bench:
    """Passes of a model that change nothing about it.

    Args:
        potential: Model, on its device.
        probes: Conformers.
        section: What is trained, as far as it decides what has to be computed.
        device: Of the model.
    """

    def __init__(self, potential: Potential, probes: Probes, section: TrainSection, device: torch.device) -> None:
        self._potential, self._section, self._device, self._probes = potential, section, device, probes
        self._weights = [p for p in potential.parameters() if p.requires_grad]
        assert potential.training, "outputs cannot be differentiated by the weights in evaluation mode"
        self.num_passes, self._passes = 0, TwoPass(potential)
        # Where a single thread does it all, what else the machine does need not count.
        own_time = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.process_time if own_time else time.perf_counter
        gc.collect()  # or it happens within a pass, which then seems to take less

    @property
    def bytes_of_gradients(self) -> int:
        """Bytes of what the engine keeps beside a pass."""
        return GRADIENT_COPIES * sum(p.numel() * p.element_size() for p in self._weights)

    def _build(self, chosen: Sequence[int]) -> GraphBatch:
        return collate([self._probes.graphs[i] for i in chosen])

    def _run(self, batch: GraphBatch) -> None:
        """Do what the training loop does with a micro-batch, but for the gradients, which are given up."""
        devices = [self._device] if self._device.type == "cuda" else []
        weights, scale = compute_weights(0, self._section), self._potential.statistics.energy_scale
        with torch.random.fork_rng(devices=devices):
            moved = batch.to(self._device, self._weights[0].dtype)
            outputs = self._passes.forward(self._potential, moved, self._section.trains("stress"))
            loss, _ = compute_loss(outputs, moved, count_labels(batch), self._section, weights, scale)
            # Not backward(): it would add to gradients, and set off the engine's hooks.
            torch.autograd.grad(self._passes.finish(self._potential, loss), self._weights, allow_unused=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def measure_bytes(self, chosen: Sequence[int]) -> tuple[int, float]:
        """Return the peak of the memory of a pass, and its time in seconds.

        Args:
            chosen: Numbers of the probes in it.

        Raises:
            _TooLargeError: There is not so much.
        """
        batch = self._build(chosen)
        self.num_passes += 1
        start = time.perf_counter()
        try:
            return measure_peak(lambda: self._run(batch), self._device), time.perf_counter() - start
        except torch.OutOfMemoryError as error:
            raise _TooLargeError from error

    def measure_seconds(self, chosen: Sequence[int]) -> float:
        """Return the time of a pass.

        Args:
            chosen: Numbers of the probes in it.

        Raises:
            _TooLargeError: It does not fit the memory.
        """
        batch = self._build(chosen)
        self.num_passes += 1
        start = self._clock()
        try:
            self._run(batch)
        except torch.OutOfMemoryError as error:
            raise _TooLargeError from error
        return self._clock() - start


def _share(rank: Rank, device: torch.device, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what rank 0 measured, on all processes; where it failed, all of them raise its error."""
    content: dict[str, Any] = {}
    if rank.is_main:
        try:
            content = {"result": measure()}
        except ConfigError as error:
            content = {"error": [error.where, error.rule, str(error.got), error.remedy]}
    content = json.loads(broadcast_text(json.dumps(content), device))
    if "error" in content:
        raise ConfigError(*content["error"])
    result: dict[str, Any] = content["result"]
    return result


def fit_line(points: Sequence[Point], *, relative: bool) -> Line:
    """Fit values = fixed + per_atom * atoms + per_pair * pairs, none of the three negative, by least squares.

    With three unknowns all choices of those that are zero can be tried: the best of the fits that have no negative one.

    Args:
        points: What was measured.
        relative: Whether deviations count relative to the values, as their errors do for times.
    """
    table = np.array([(1.0, *point) for point in points])
    if relative:
        table = table / table[:, 3:]
    columns, values = table[:, :3], table[:, 3]
    scales = np.maximum(columns.max(axis=0), np.finfo(np.float64).tiny)
    best, least = np.zeros(3), math.inf
    for size, free in ((n, list(chosen)) for n in (1, 2, 3) for chosen in itertools.combinations(range(3), n)):
        scaled = columns[:, free] / scales[free]
        found, _, rank, _ = np.linalg.lstsq(scaled, values, rcond=None)
        residual = float(np.square(scaled @ found - values).sum())
        if rank == size and found.min() >= 0 and residual < least:
            best, least = np.zeros(3), residual
            best[free] = found / scales[free]
    return Line(*best.tolist())


# ---------------------------------------------------------------------------------------------------------------- limits


def find_limits(
    potential: Potential, probes: Probes, section: TrainSection, device: torch.device, rank: Rank, *,
    available_bytes: int = 0, conformers_per_step: int = 0,
) -> MeasuredLimits:  # fmt: skip
    """Find the largest micro-batch that fits the memory; all processes call it, and get the same.

    Passes of growing size are measured, a line is fitted to their peaks, and a pass at the limit checks it as far as a step goes.

    Args:
        potential: Model, on its device, after the training engine was made, whose optimizer then has its memory already.
        probes: Of `collect_probes`; only rank 0's are used.
        section: What is trained.
        device: Of this process.
        rank: This process.
        available_bytes: For the passes of one process; 0: found out, and the smallest of all processes counts.
        conformers_per_step: The most that a process has in a step: the check needs no larger pass; 0: no such bound.

    Raises:
        ConfigError: Not one conformer fits, or the system does not tell; all processes raise the same.
    """
    own = available_bytes or find_available_bytes(device, rank)
    available = int(min(reduce_sum([own * (r == rank.rank) for r in range(rank.world_size)], device)))

    def measure() -> dict[str, Any]:
        bench = _Bench(potential, probes, section, device)
        return _LimitSearch(bench, probes, available).find(conformers_per_step or MAX_CONFORMERS).to_json()

    return MeasuredLimits(**_share(rank, device, measure))


class _LimitSearch:
    """The way to the limits, on rank 0.

    Args:
        bench: What passes are done with.
        probes: Conformers.
        available: Bytes for the passes of a process.
    """

    def __init__(self, bench: _Bench, probes: Probes, available: int) -> None:
        self._bench, self._probes, self._available = bench, probes, available
        self._room = available - bench.bytes_of_gradients
        self._points: list[Point] = []
        self._pace = 0.0

    def find(self, most_conformers: int) -> MeasuredLimits:
        """Return the limits.

        Args:
            most_conformers: Of the check.
        """
        self._measure_passes()
        line = self._fit()
        limits = self._check(line, choose_limits(self._room, line, self._probes), most_conformers)
        return MeasuredLimits(
            *limits, available_bytes=self._available, fixed_bytes=line.fixed + self._bench.bytes_of_gradients,
            bytes_per_atom=line.per_atom, bytes_per_pair=line.per_pair,
            largest_bytes=int(max(point.value for point in self._points)), num_passes=self._bench.num_passes,
        )  # fmt: skip

    def _measure(self, chosen: Sequence[int]) -> int | None:
        """Return the peak of a pass in bytes, and remember it; None where there is not so much memory."""
        atoms, pairs = self._probes.add_up(chosen)
        try:
            used, seconds = self._bench.measure_bytes(chosen)
        except _TooLargeError:
            return None
        self._points.append(Point(atoms, pairs, used))
        self._pace = seconds / (atoms + pairs)
        return used

    def _measure_passes(self) -> None:
        """Let passes of the smallest probe grow; then measure the others in passes of that size and of half of it."""
        sizes = [sum(self._probes.add_up([i])) for i in range(len(self._probes.graphs))]
        lightest = int(np.argmin(sizes))
        # Twice: the first pass of all has to do more.
        if self._room <= 0 or any((self._measure([lightest]) or math.inf) > self._room for _ in range(2)):
            raise self._refuse()
        del self._points[0]
        count = 1
        while not self._is_large() and 2 * count <= MAX_CONFORMERS:
            count *= 2
            if self._measure([lightest] * count) is None:
                break
        reached = self._points[-1]
        for number, share in itertools.product(range(len(sizes)), (0.5, 1.0)):
            copies = min(MAX_CONFORMERS, max(1, int(share * reached.size / sizes[number])))
            if SAFETY * reached.value / reached.size * copies * sizes[number] < self._room and number != lightest:
                self._measure([number] * copies)

    def _is_large(self) -> bool:
        """Return whether the last pass was large enough for a fit."""
        point = self._points[-1]
        return point.value >= MEASURED_SHARE * self._room or self._pace * point.size >= MAX_SECONDS

    def _fit(self) -> Line:
        """Return a line that no measured pass lies above."""
        line = fit_line(self._points, relative=False)
        if line.per_atom == line.per_pair == 0:  # nothing but noise: the atoms of the largest take it all
            largest = max(self._points, key=lambda point: point.value)
            line = Line(0.0, max(1.0, largest.value) / largest.atoms, 0.0)
        above = max(point.value - line.at(point.atoms, point.pairs) for point in self._points)
        return dataclasses.replace(line, fixed=line.fixed + max(0.0, above))

    def _check(self, line: Line, limits: tuple[int, int], most_conformers: int) -> tuple[int, int]:
        """Do a pass at the limits, or as close to them as the conformers of a step come; lower them until it fits."""
        for _ in range(MAX_CHECKS):
            chosen = fill(self._probes, *limits)
            if not chosen:
                raise self._refuse()
            in_time = MAX_CHECK_SECONDS / (self._pace * sum(self._probes.add_up(chosen)))
            chosen = chosen[: min(most_conformers, max(1, int(in_time * len(chosen))))]
            used = self._measure(chosen)
            # Of a pass below the limits only its part of the memory may be used.
            part = line.at(*self._probes.add_up(chosen)) / line.at(*limits)
            factor = 0.5 if used is None else part * self._room / max(1, used)
            if factor >= 1:
                break
            limits = _round_limits(factor * limits[0], factor * limits[1], self._probes)
        return limits

    def _refuse(self) -> ConfigError:
        remedy = "Take a smaller model or fewer processes per machine, or set data.max_atoms and data.max_pairs by hand"
        got = f"{self._room / 1e9:.3g} GB for a pass"
        return ConfigError("data.find_limits", "find memory for at least one conformer", got, remedy)


def choose_limits(room: float, line: Line, probes: Probes) -> tuple[int, int]:
    """Return limits on atoms and on pairs which a micro-batch may reach both.

    Their ratio is that of the training split; where the heaviest conformer would fit by itself, it is let through.

    Args:
        room: Bytes.
        line: Bytes by atoms and pairs; at least one of them takes some.
        probes: Of the training split.
    """
    left, ratio = room - line.fixed, probes.pairs_per_atom
    atoms = left / (line.per_atom + line.per_pair * ratio)
    pairs = atoms * ratio
    if line.per_atom * probes.most_atoms + line.per_pair * probes.most_pairs <= left:
        if pairs < probes.most_pairs:
            pairs = probes.most_pairs
            atoms = (left - line.per_pair * pairs) / line.per_atom if line.per_atom else max(atoms, probes.most_atoms)
        elif atoms < probes.most_atoms:
            atoms = probes.most_atoms
            pairs = (left - line.per_atom * atoms) / line.per_pair if line.per_pair else max(pairs, probes.most_pairs)
    return _round_limits(atoms, pairs, probes)


def _round_limits(atoms: float, pairs: float, probes: Probes) -> tuple[int, int]:
    """Round down to two digits, but not past the heaviest conformer; 0, for no limit, only where there are no pairs at all."""

    def round_down(value: float, most: int) -> int:
        unit = 10 ** max(0, math.floor(math.log10(max(value, 1.0))) - 1)
        rounded = int(max(value, 0.0)) // unit * unit
        return most if rounded < most <= value else rounded

    return round_down(atoms, probes.most_atoms), max(round_down(pairs, probes.most_pairs), min(1, probes.most_pairs))


def fill(probes: Probes, max_atoms: int, max_pairs: int) -> list[int]:
    """Return numbers of probes that fill a micro-batch up to its limits: all of them in turn, then single ones that still fit."""
    chosen: list[int] = []
    for group in ([*range(len(probes.graphs))], *([i] for i in range(len(probes.graphs)))):
        (atoms, pairs), (has_atoms, has_pairs) = probes.add_up(group), probes.add_up(chosen)
        copies = min((max_atoms - has_atoms) // atoms, (max_pairs - has_pairs) // pairs if pairs else MAX_CONFORMERS)
        chosen += group * min(max(copies, 0), MAX_CONFORMERS)
    return chosen


# ------------------------------------------------------------------------------------------------------------------ cost


def fit_cost(
    potential: Potential, probes: Probes, section: TrainSection, device: torch.device, rank: Rank
) -> MeasuredCost:
    """Find what an atom and a pair cost beside each other; all processes call it, and get the same.

    Passes of different composition are timed, three times in turn, and a line is fitted to the median of each.

    Args:
        potential: Model, on its device.
        probes: Of `collect_probes`; only rank 0's are used.
        section: What is trained.
        device: Of this process.
        rank: This process.

    Raises:
        ConfigError: Not one conformer fits the memory; all processes raise the same.
    """

    def measure() -> dict[str, Any]:
        bench = _Bench(potential, probes, section, device)
        line = fit_line(_time_passes(bench, probes), relative=True)
        return MeasuredCost(*normalise_cost(line), line.fixed, line.per_atom, line.per_pair, bench.num_passes).to_json()

    return MeasuredCost(**_share(rank, device, measure))


def _time_passes(bench: _Bench, probes: Probes) -> list[Point]:
    """Time passes of each probe by itself, of a size that takes much longer than starting a pass, and of half of it."""
    sizes = [sum(probes.add_up([i])) for i in range(len(probes.graphs))]
    lightest, count = int(np.argmin(sizes)), 1
    try:
        bench.measure_seconds([lightest])  # the first pass of all has to do more
        shortest = seconds = bench.measure_seconds([lightest])
        while seconds < max(MIN_SECONDS, 4 * shortest) and seconds < MAX_SECONDS and 2 * count <= MAX_CONFORMERS:
            seconds = bench.measure_seconds([lightest] * 2 * count)
            count *= 2
    except _TooLargeError as error:
        if count == 1:
            remedy = "Take a smaller model, or give the costs"
            raise ConfigError("data.fit_cost", "find memory for one conformer", "too little", remedy) from error
    times: dict[tuple[int, int], list[float]] = {}
    # In turn: whatever else the machine does comes and goes, and should not be taken for a property of one composition.
    for _, number, share in itertools.product(range(REPEATS), range(len(sizes)), (0.5, 1.0)):
        copies = min(MAX_CONFORMERS, max(1, int(share * count * sizes[lightest] / sizes[number])))
        with contextlib.suppress(_TooLargeError):
            seconds = bench.measure_seconds([number] * copies)
            times.setdefault((number, copies), []).append(seconds)
    return [Point(*probes.add_up([number] * copies), statistics.median(t)) for (number, copies), t in times.items()]


def normalise_cost(line: Line) -> tuple[float, float]:
    """Return the costs of an atom and of a pair, so that a pair costs 1, in two digits and whole hundredths.

    Where pairs take no time that could be measured, an atom costs 1 and a pair nothing; where nothing does, both cost 1.

    Args:
        line: Seconds by atoms and pairs.
    """
    if line.per_pair == 0:
        return 1.0, float(line.per_atom == 0)
    ratio = line.per_atom / line.per_pair
    return (round(ratio, min(2, 1 - math.floor(math.log10(ratio)))) if ratio else 0.0), 1.0
