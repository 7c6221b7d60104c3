"""`so3krates train --dry-run`: all that can go wrong before the first step of a run of any number of processes, on this machine.

One process does what training does before processes meet: it checks the configuration, opens and checks the data, looks at the
run folder, works out the plan, and builds the model. Then it computes passes of the plan with plain torch, takes one real step, and
says what the run will hold in memory, store and take. What is refused is refused as in training, with the same exit codes.

The run folder is neither written to nor locked. A GPU that the configuration asks for and that is not here is done without; what
was not checked for that reason is said, and so is what was not measured.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from so3krates_dist.config import RunConfig, TrainSection
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.plan import Schedule
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.distributed import (
    Rank,
    check_precision,
    choose_device,
    count_threads,
    read_rank,
    seed_everything,
    set_matmul_precision,
    tune_machine,
)
from so3krates_dist.errors import EXIT_DONE, CheckpointError, ConfigError, NonFiniteError
from so3krates_dist.graph import GraphBatch
from so3krates_dist.metrics import MetricsLogger, format_duration, print_table
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import inputs, planning
from so3krates_dist.train.checkpoint import RunFolder, find_checkpoint, load_checkpoint
from so3krates_dist.train.context import RunContext
from so3krates_dist.train.forecast import STAGES, Pass, StepFigures, describe_steps, find_heaviest, predict_memory
from so3krates_dist.train.losses import LABELS, compute_loss, compute_weights, count_labels
from so3krates_dist.train.memory import find_available_bytes, measure_peak
from so3krates_dist.train.optim import compute_learning_rate
from so3krates_dist.train.plain_engine import PlainEngine
from so3krates_dist.train.progress import Progress
from so3krates_dist.train.zero3 import check_zero3

GROWTH: Final = 4
"""Passes grow by this factor until they are as large as those of the run"""
MAX_SECONDS: Final = 60.0
"""Passes and steps that would take longer here are not tried in full"""
MAX_REPEATED_SECONDS: Final = 10.0
MAX_REPEATS: Final = 5
"""of the step that is timed"""
USUAL_GPUS: Final = 8
"""of a large machine; more processes are taken to be on several"""


# ----------------------------------------------------------------------------------------------------- before the first step


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run would begin or go on with."""

    config: RunConfig
    world_size: int
    device: torch.device
    """where this process computes"""
    mixture: Mixture
    folder: RunFolder
    schedule: Schedule
    limits: Limits
    progress: Progress
    checkpoint: Path | None
    notes: tuple[str, ...]


def prepare(config: RunConfig, world_size: int) -> Prepared:
    """Do what training does before processes meet, without a trace.

    Args:
        config: Of the run.
        world_size: Its processes.

    Raises:
        So3kratesError: Training would be refused.
    """
    config.check_world_size(world_size)
    device, notes = _find_device(config.train)
    if config.train.zero_stage == 3:
        check_zero3()
    folder = RunFolder(config)
    folder.check()
    _check_writable(folder.path)
    record = planning.read_record(folder.path)
    mixture = inputs.open_data(config, record.reference if record else None, hashes=config.data.verify == "sha256")
    folder.check(mixture.fingerprint)
    planning.check_plan(config, mixture, record)
    checkpoint, complaints = find_checkpoint(folder.path / "checkpoints")
    progress = Progress()
    if checkpoint is not None:
        progress = Progress.from_json(load_checkpoint(checkpoint).progress, str(checkpoint))
    schedule, _ = planning.build_schedule(config, mixture, record, progress.data_step)
    if planning.needs_cost(config, record):
        notes.append("data.fit_cost: costs are measured when the run starts; here those of the configuration count")
    measured = record.limits if record else None
    if config.data.find_limits and measured is None:
        notes.append("data.find_limits: limits are measured when the run starts; here passes have none")
    limits = inputs.find_limits(config.data, measured)
    notes += complaints
    return Prepared(
        config, world_size, device, mixture, folder, schedule, limits, progress, checkpoint, tuple(notes)
    )  # fmt: skip


def _find_device(section: TrainSection) -> tuple[torch.device, list[str]]:
    """Return where to compute here, and what is not checked since the run's device is not here."""
    if section.device == "cuda" and not torch.cuda.is_available():
        note = "train.device=cuda: there is no GPU here, so neither its memory nor whether it can do train.precision was checked"
        return torch.device("cpu"), [note]
    device = choose_device(section.device, Rank())
    check_precision(section.precision, device)
    return device, []


def _check_writable(folder: Path) -> None:
    """Raise `CheckpointError` where a run could not make its folder, as far as can be told without trying."""
    place = _find_place(folder)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise CheckpointError(
            f"run.folder {folder}", "be a folder that can be written to", f"{place}, which cannot",
            "Set run.folder to another folder",
        )  # fmt: skip


def _find_place(folder: Path) -> Path:
    """Return a folder, or where it is not there yet, the nearest one around it that is."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


# ------------------------------------------------------------------------------------------------------------- one real step


@dataclasses.dataclass(frozen=True)
class Trial:
    """The heaviest pass, tried."""

    activations: int | None
    """bytes; None where the system does not tell"""
    seconds: float
    is_whole: bool
    """whether it was done as large as it is; else its bytes and seconds follow from the largest one that was done"""
    limits: Limits
    """of passes that this machine can do"""


@dataclasses.dataclass(frozen=True)
class TriedStep:
    """What one step did here."""

    loss: float
    gradient_norm: float
    seconds: float
    """of the share of one process"""
    is_whole: bool


class Bench:
    """The model with plain torch, and passes of the plan.

    Args:
        prepared: The run.
        potential: Its model.
    """

    def __init__(self, prepared: Prepared, potential: Potential) -> None:
        self._prepared, self._section = prepared, prepared.config.train
        self.engine = PlainEngine(potential, self._section, prepared.device)

    def _read(self, step: int, rank: int, limits: Limits) -> list[GraphBatch]:
        prepared = self._prepared
        stream = TrainingStream(prepared.schedule, prepared.config, rank, prepared.world_size, limits)
        return stream[step].batches

    def _do_passes(self, batches: Sequence[GraphBatch]) -> float:
        """Do the passes of a step; return its loss."""
        counts = [sum(count_labels(b)[i] for b in batches) for i in range(len(LABELS))]
        weights = compute_weights(self._prepared.progress.applied, self._section)
        scale, total = self.engine.potential.statistics.energy_scale, 0.0
        for number, micro_batch in enumerate(batches, 1):
            batch = micro_batch.to(self._prepared.device, self.engine.dtype)
            loss, _ = compute_loss(self.engine.forward(batch), batch, counts, self._section, weights, scale)
            self.engine.backward(loss, is_last=number == len(batches))
            total += float(loss.detach())
        return total

    def try_heaviest(self, heaviest: Pass) -> Trial:
        """Measure the heaviest pass, by passes of growing size; it is not done where it would take too much of this machine.

        Args:
            heaviest: Of the run.
        """
        self._do_passes([next(self._grow(heaviest))[0]])  # the first of all takes longer; and it makes the gradients
        size, used, seconds, limits = 0, None, 0.0, Limits(1, 1)
        whole = _measure_size(self._read_pass(heaviest))
        for batch, tried in self._grow(heaviest):
            growth = _measure_size(batch) / max(1, size)
            if size and not self._has_room(None if used is None else used * growth, seconds * growth):
                break
            size, limits = _measure_size(batch), tried
            used, seconds = self._measure(batch)
        self.engine.discard()
        ratio = whole / max(1, size)
        return Trial(None if used is None else int(used * ratio), seconds * ratio, size == whole, limits)

    def _read_pass(self, place: Pass) -> GraphBatch:
        return self._read(place.step, place.rank, self._prepared.limits)[place.number]

    def _grow(self, heaviest: Pass) -> Iterator[tuple[GraphBatch, Limits]]:
        """Yield passes of the same step, from one conformer to the heaviest pass, and the limits that make them so."""
        whole = self._read_pass(heaviest)
        batch, limits = max(self._read(heaviest.step, heaviest.rank, Limits(1, 1)), key=_measure_size), Limits(1, 1)
        atoms, pairs, factor = len(batch.atomic_numbers), len(batch.pair_first), 1
        while factor * (atoms + pairs) < _measure_size(whole):
            yield batch, limits
            factor *= GROWTH
            limits = Limits(factor * max(1, atoms), factor * max(1, pairs))
            batch = max(self._read(heaviest.step, heaviest.rank, limits), key=_measure_size)
        yield whole, self._prepared.limits

    def _measure(self, batch: GraphBatch) -> tuple[int | None, float]:
        """Return bytes and seconds of a pass."""
        start = time.perf_counter()
        try:
            used: int | None = measure_peak(lambda: self._do_passes([batch]), self._prepared.device)
        except ConfigError:  # no such system; memory.py would advise about data.find_limits
            used = None
            self._do_passes([batch])
        return used, time.perf_counter() - start

    def _has_room(self, needed: float | None, seconds: float) -> bool:
        """Return whether this machine is large enough for a pass."""
        if needed is None or seconds > MAX_SECONDS:
            return seconds <= MAX_SECONDS
        return needed < find_available_bytes(self._prepared.device, Rank())

    def do_step(self, trial: Trial) -> TriedStep:
        """Take the next step of the run as its first process would, and time it.

        Args:
            trial: What this machine can do.

        Raises:
            NonFiniteError: Loss or gradient is not finite.
        """
        progress = self._prepared.progress
        batches = self._read(progress.data_step, 0, trial.limits)
        whole = sum(map(_measure_size, batches))
        self._do_passes(batches[:1])
        start = time.perf_counter()
        self._do_passes(batches[:1])
        pace = (time.perf_counter() - start) / max(1, _measure_size(batches[0]))
        self.engine.discard()
        while len(batches) > 1 and pace * sum(map(_measure_size, batches)) > MAX_SECONDS:
            batches = batches[: len(batches) // 2]
        done = sum(map(_measure_size, batches))
        repeats = max(1, min(MAX_REPEATS, int(MAX_REPEATED_SECONDS / max(pace * done, 1e-9))))
        rate, times, figures = compute_learning_rate(progress.applied, self._section), [], []
        for _ in range(repeats):
            start = time.perf_counter()
            loss = self._do_passes(batches)
            figures.append((loss, self.engine.step(rate).gradient_norm))
            times.append(time.perf_counter() - start)
        loss, norm = figures[0]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {progress.step}", "have a finite loss and gradient", f"loss {loss:g}, gradient norm {norm:g}",
                "Check the labels with `so3krates validate`, or try another model",
            )  # fmt: skip
        return TriedStep(loss, norm, statistics.median(times) * whole / max(1, done), done == whole)


def _measure_size(batch: GraphBatch) -> int:
    """Return atoms and pairs of a batch."""
    return len(batch.atomic_numbers) + len(batch.pair_first)


# ---------------------------------------------------------------------------------------------------------------- what it says


def run_dry(config: RunConfig, words: Sequence[str], world_size: int | None = None) -> int:
    """Check a run and say what it will be like.

    Args:
        config: Of the run.
        words: Of the command line, for the command to start it with.
        world_size: Processes of the run; None: those of the launcher that started this one.

    Returns:
        Exit code.

    Raises:
        So3kratesError: Training would be refused.
    """
    rank = read_rank()
    if world_size is not None and world_size < 1:
        raise ConfigError("--world-size", "be at least 1", world_size, "Give the number of processes of the run")
    if rank.is_main:  # one process of a launcher's is enough
        for line in _run_dry(prepare(config, world_size or rank.world_size), words):
            print(line, flush=True)
    return EXIT_DONE


def _run_dry(prepared: Prepared, words: Sequence[str]) -> Iterator[str]:
    """Do it, and yield lines for the user."""
    config, section = prepared.config, prepared.config.train
    tune_machine(count_threads(config.run.threads, 1), prepared.device)
    set_matmul_precision(section.precision, prepared.device)
    seed_everything(config.run.seed)
    facts = ModelStatistics.from_manifest(prepared.mixture.statistics, config.model)
    potential = build_model(config.model, facts).to(prepared.device)
    yield from (f"note: {note}" for note in prepared.notes)
    yield from _describe_run(prepared, potential)
    place = prepared.schedule, prepared.progress.data_step, prepared.world_size, section.micro_batches, prepared.limits
    figures, heaviest = describe_steps(*place), find_heaviest(*place)
    yield from _describe_steps(prepared, figures, heaviest)
    bench = Bench(prepared, potential)
    trial = bench.try_heaviest(heaviest)
    yield from _describe_trial(trial, bench.do_step(trial), prepared)
    weights = list(potential.parameters())
    _print_memory(prepared, [w.numel() for w in weights], figures.most_passes, trial)
    stored = sum(bench.engine.state_sizes().values()), sum(w.nbytes for w in weights)
    yield from _describe_end(prepared, *stored, words)


def _describe_run(prepared: Prepared, potential: Potential) -> list[str]:
    """Return what training says of a run before its first step."""
    config = prepared.config
    metrics = MetricsLogger(prepared.folder.path, config, is_main=False)  # which writes nothing
    device = torch.device(config.train.device) if config.train.device != "auto" else prepared.device
    rank = Rank(world_size=prepared.world_size)
    return RunContext(config, rank, device, prepared.mixture, prepared.folder, metrics).describe(potential)


def _describe_steps(prepared: Prepared, figures: StepFigures, heaviest: Pass) -> Iterator[str]:
    section = prepared.config.train
    plan, within = prepared.schedule.locate(section.num_steps)
    passes = "1 pass" if figures.most_passes == 1 else f"up to {figures.most_passes} passes"
    yield (
        f"Steps: {figures.conformers:.4g} conformers, {figures.atoms:.4g} atoms and about {figures.pairs:.4g} pairs each,"
        f" in {passes} on each of {prepared.world_size} process(es)"
        + (f", which wait for each other {figures.imbalance:.1%} of the time" if prepared.world_size > 1 else "")
    )
    for source, weight, epoch in zip(plan.sources, plan.settings.weights, plan.epochs(within), strict=True):
        if weight:
            yield f"Epochs: {source.name} {epoch:.4g} in {section.num_steps:,} steps, {within / epoch:,.0f} steps each"
    conformers = f"{heaviest.conformers} conformer" + "s" * (heaviest.conformers != 1)
    yield (
        f"Largest pass of the first {figures.num_steps:,} steps: {conformers}, {heaviest.atoms:,} atoms,"
        f" about {heaviest.pairs:,} pairs"
    )


def _describe_trial(trial: Trial, tried: TriedStep, prepared: Prepared) -> Iterator[str]:
    section, device = prepared.config.train, prepared.device.type
    activations = "not measured, since this system does not tell"
    if trial.activations is not None:
        how = (
            "measured" if trial.is_whole else "more than this machine should do; from smaller passes that were measured"
        )
        activations = f"{_format_bytes(trial.activations)} ({how})"
    yield f"Activations of the largest pass: {activations}"
    left = max(0, min(section.num_steps, section.stop_at or section.num_steps) - prepared.progress.step)
    yield f"One step of the first process with plain torch: loss {tried.loss:.4g}, gradient norm {tried.gradient_norm:.4g}"
    shares = "its step" if prepared.world_size == 1 else "the share of one process"
    yield (
        f"Time on this machine ({device}, {torch.get_num_threads()} threads): {tried.seconds:.3g} s for {shares}"
        f"{'' if tried.is_whole else ' (from a part of it)'}, {format_duration(tried.seconds * left)} for {left:,} steps"
        + ("" if prepared.world_size == 1 else f"; {prepared.world_size} processes were not measured")
    )


def _print_memory(prepared: Prepared, weights: Sequence[int], passes: int, trial: Trial) -> None:
    """Print the table of what a process holds at each stage of ZeRO."""
    section, rows = prepared.config.train, []
    for variant in _list_variants(section):
        memory = predict_memory(
            variant, weights, prepared.world_size, passes=passes, activations=trial.activations or 0
        )
        name = "none" if section.precision == "float64" else str(variant.zero_stage)
        name += ", optimizer on the CPU" if variant.offload_optimizer else ""
        shares = memory.weights, memory.gradients, memory.optimizer, memory.mean, memory.exchange
        cells = [_format_bytes(n) if n else "-" for n in shares]
        cells.append("?" if trial.activations is None else _format_bytes(memory.activations))
        cells += [_format_bytes(memory.peak), _format_bytes(memory.host) if memory.host else "-"]
        rows.append([f"{name}{'  <- this run' if variant == section else ''}", *cells])
    columns = ("ZeRO", "weights", "gradients", "optimizer", "mean", "exchange", "activations", "peak", "on the CPU")
    print_table(f"Memory of each of {prepared.world_size} process(es):", columns, rows)
    print(
        "exchange: buffers in which processes add up gradients and put weights together, when activations are gone;"
        " the peak has the larger of the two"
    )
    if prepared.device.type == "cpu" and section.device != "cuda":
        print("note: on CPUs a process keeps memory that it has freed, and so has up to a third more than this")


def _list_variants(section: TrainSection) -> list[TrainSection]:
    """Return the section with each stage of ZeRO that it allows."""
    variants = []
    for stage, offload in STAGES:
        with contextlib.suppress(ConfigError):  # not with this precision, or not with low_memory
            variants.append(dataclasses.replace(section, zero_stage=stage, offload_optimizer=offload))
    return variants


def _describe_end(
    prepared: Prepared, bytes_of_state: int, bytes_of_weights: int, words: Sequence[str]
) -> Iterator[str]:
    """Return what is stored, and what the real command would do.

    Args:
        prepared: The run.
        bytes_of_state: Of weights and optimizer.
        bytes_of_weights: Of weights alone; their mean is stored too, and they are the three models that a run keeps.
        words: Of the command line.
    """
    config, progress, folder = prepared.config, prepared.progress, prepared.folder.path
    last, keep = config.train.num_steps, config.train.keep_checkpoints
    checkpoint = bytes_of_state + bytes_of_weights
    needed = (keep + 1) * checkpoint + 3 * bytes_of_weights
    free = shutil.disk_usage(_find_place(folder)).free
    yield (
        f"Checkpoint: {_format_bytes(checkpoint)}; with {keep} kept, one being written and three models {_format_bytes(needed)},"
        f" of {_format_bytes(free)} that are free"
    )
    if needed > free:
        yield f"note: free {_format_bytes(needed - free)} on the disk of {folder}, or set run.folder to another one"
    yield f"Nothing was written to {folder}."
    start = ["so3krates", "train"]
    if prepared.world_size > USUAL_GPUS:
        start = ["srun", "python", "launch/train.py"]
        yield (
            f"note: {prepared.world_size} processes are more than most machines have GPUs ({USUAL_GPUS}), so the command below is"
            " for a Slurm job of as many tasks, with MASTER_ADDR and MASTER_PORT exported; without Slurm put `deepspeed --hostfile"
            f" FILE` in place of `srun python`, FILE with a line `MACHINE slots={USUAL_GPUS}` for each machine"
        )
    elif prepared.world_size > 1:
        start = ["deepspeed", "--num_accelerators", str(prepared.world_size), "launch/train.py"]
    verb = f"begins a new run of {last:,} steps there"
    if progress.step >= last:
        verb = f"finds that the run there is done after {progress.step:,} steps"
    elif prepared.checkpoint is not None:
        verb = f"goes on there from step {progress.step:,} to {last:,}"
    yield f"Next: `{shlex.join([*start, *words])}` {verb}."


def _format_bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
