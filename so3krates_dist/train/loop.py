"""A run from the first check to the last checkpoint. Read `Training.run`: it is the story; everything else is one hop away."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from so3krates_dist import __version__
from so3krates_dist.config import RunConfig, TrainSection
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.stream import StepData, TrainingStream, build_loader, iter_batches
from so3krates_dist.distributed import (
    Rank,
    broadcast_text,
    choose_device,
    count_threads,
    read_rank,
    reduce_sum,
    seed_everything,
    seed_step,
    start_processes,
    stop_processes,
    tune_machine,
    wait_for_all,
)
from so3krates_dist.errors import EXIT_DONE, EXIT_REQUEUE, DataError, So3kratesError
from so3krates_dist.graph import GraphBatch
from so3krates_dist.metrics import MetricsLogger
from so3krates_dist.model.potential import CHARGED_CRYSTALS, ModelStatistics
from so3krates_dist.model.registry import build_model, save_model
from so3krates_dist.train import budget, inputs, planning
from so3krates_dist.train.checkpoint import RunFolder, TrainingState, find_checkpoint, load_checkpoint, save_checkpoint
from so3krates_dist.train.engine import TrainingEngine
from so3krates_dist.train.evaluate import EVALUATION_BATCH_SIZE, evaluate
from so3krates_dist.train.guard import FiniteGuard, StopRequest, failing_together
from so3krates_dist.train.losses import LABELS, WEIGHTS, compute_loss, count_labels
from so3krates_dist.train.memory import find_available_bytes
from so3krates_dist.train.optim import WeightMean, compute_learning_rate
from so3krates_dist.train.probes import collect_probes
from so3krates_dist.train.window import StepWindow


def run_training(config: RunConfig) -> int:
    """Train, or go on training, or find that all is done.

    Args:
        config: Of the run; the same configuration resumes it.

    Returns:
        Exit code: 0 when all steps are done, 85 when the run was asked to stop and saved its state.

    Raises:
        So3kratesError: Anything wrong with configuration, data or run folder, before any process group starts.
    """
    rank = read_rank()
    config.check_world_size(rank.world_size)
    device = choose_device(config.train.device, rank)
    folder = RunFolder(config)
    folder.check()
    record = planning.read_record(folder.path)
    hashes = config.data.verify == "sha256" and rank.local_rank == 0
    mixture = inputs.open_data(config, record.reference if record else None, hashes=hashes)
    folder.check(mixture.fingerprint)
    planning.check_plan(config, mixture, record)
    if rank.is_main:
        folder.acquire()
        folder.check(mixture.fingerprint)  # again: another run may have come first
    checkpoint, complaints = find_checkpoint(folder.path / "checkpoints") if rank.is_main else (None, [])
    tune_machine(count_threads(config.run.threads, rank.local_world_size), device)
    start_processes(rank, device)
    training = Training(config, rank, device, mixture, folder, record)
    exit_code = training.run(broadcast_text(str(checkpoint or ""), device), complaints)
    stop_processes()  # not after an error: the other processes may be waiting in a collective
    folder.close()
    return exit_code


_SCORED: Final = ("forces", "energy", "stress", "dipole", "hirshfeld_ratios")
"""Labels in the order in which their errors choose the best model"""

_STATED: Final = {"total_charge": "total_charges", "num_unpaired_electrons": "num_unpaired_electrons"}
"""Where the statistics say what values the data have"""


def compute_score(summary: Mapping[str, float], section: TrainSection) -> float:
    """Return the error by which the best model is chosen, lower is better.

    It is the mean absolute error of the first of forces, energy per atom, stress, dipole and Hirshfeld ratios that is trained and
    has labels among the held-out conformers; nan, which is never the best, where there is none.

    Args:
        summary: Of the evaluation.
        section: Weights of the terms of the loss.
    """
    names = {"energy": "energy_mae_per_atom"}
    trained = [label for label in _SCORED if getattr(section, WEIGHTS[label])]
    errors = [summary.get(names.get(label, f"{label}_mae"), math.nan) for label in trained]
    return next((error for error in errors if not math.isnan(error)), math.nan)


def take_step(loader: Iterator[StepData]) -> tuple[StepData, So3kratesError | None]:
    """Return this process's part of the next step, or what went wrong, for all processes to hear of."""
    try:
        return next(loader), None
    except So3kratesError as error:
        return StepData([]), error


class Training:
    """What a run consists of while it runs; the process group has been started.

    Args:
        config: Of the run.
        rank: This process.
        device: Of this process.
        mixture: Its data.
        folder: Of the run.
        record: The plan that the run has followed so far; None where it begins.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: Rank,
        device: torch.device,
        mixture: Mixture,
        folder: RunFolder,
        record: planning.PlanRecord | None,
    ) -> None:
        self.config, self.rank, self.device, self.mixture, self.record = config, rank, device, mixture, record
        self.path = folder.path
        if rank.is_main:
            folder.sign(mixture.fingerprint, __version__)
        seed_everything(config.run.seed)
        self.statistics = ModelStatistics.from_manifest(mixture.statistics, config.model)
        potential = build_model(config.model, self.statistics).to(device)
        self.mean = WeightMean(potential, config.train.ema_decay)
        self.engine = TrainingEngine(potential, config.train, device)
        self.metrics = MetricsLogger(self.path, config, is_main=rank.is_main)
        self.best_score = float("inf")
        self.num_skipped = 0
        self.complaints: set[str] = set()

    def run(self, checkpoint: str, complaints: Sequence[str]) -> int:
        """Train to the end of the run, or to the request to stop.

        Args:
            checkpoint: To go on from, the same on all processes; empty: from the start.
            complaints: About newer checkpoints that are damaged.
        """
        section = self.config.train
        step = self.resume(checkpoint)
        stream = self.settle_plan(step)
        last = min(section.num_steps, section.stop_at or section.num_steps)
        self.announce(step, complaints)
        stop = StopRequest(self.path, look_for_file=self.rank.is_main)
        guard, window = FiniteGuard(section.max_skipped_steps), StepWindow()
        loader = build_loader(stream, range(step, last), num_workers=self.config.data.num_workers, device=self.device)
        stopping = False
        # Closed after an error too: worker processes that are left to the interpreter's exit would make it wait for ever.
        with contextlib.closing(loader):
            while step < last and not stopping:
                with window.waiting():
                    data, failure = take_step(loader)
                counts, stopping = self.agree(data, failure, stop.is_pending())
                facts = self.train_step(step, data.batches, counts)
                guard.record(step, facts["applied"] > 0)
                window.add(facts)
                step += 1
                if step % section.log_every == 0 or step == last or stopping:
                    epochs = self.count_epochs(step)
                    self.metrics.log("train", step, window.summarize(epoch=min(epochs.values())) | self.detail(epochs))
                if step % section.validate_every == 0 or step == section.num_steps:
                    with window.pausing():
                        self.validate(step)
                if step % section.save_every == 0 or step == last or stopping:
                    with window.pausing():
                        self.save(step)
        done = step >= section.num_steps
        self.metrics.message(f"{'Done' if done else 'Stopped'} after {step} steps; run folder {self.path}")
        self.metrics.close()
        wait_for_all()  # a launcher ends the others as soon as one process has left with exit code 85
        stop.close()
        return EXIT_REQUEUE if stopping and not done else EXIT_DONE

    def resume(self, checkpoint: str) -> int:
        """Go back to a checkpoint; return the steps it has done."""
        if not checkpoint:
            return 0
        state = load_checkpoint(Path(checkpoint))
        self.engine.load_state(state.tensors)
        self.mean.load_state(state.tensors)
        held_out, before = self.mixture.held_out, state.scored_on
        is_another = bool(before) and before != held_out
        if is_another:
            self.metrics.message(
                "The best model so far was found with other held-out conformers; the search begins anew"
            )
        # Without held-out conformers the score is minus the step, which no error would ever beat.
        self.best_score = float("inf") if is_another or (held_out and state.best_score < 0) else state.best_score
        return state.step

    def settle_plan(self, step: int) -> TrainingStream:
        """Find the plan to follow from a step on, write it down where it is new, and return its stream.

        What has to be measured for it is measured now, once in a run.
        """
        section, data, record = self.config.train, self.config.data, self.record
        measure_cost = planning.needs_cost(self.config, record)
        measure_limits = data.find_limits and (record is None or record.limits is None)
        cost = limits = None
        potential = self.engine.potential
        if measure_cost or measure_limits:
            with failing_together(self.device):
                probes = collect_probes(self.mixture.active, potential.cutoffs)
        if measure_cost:
            cost = budget.fit_cost(potential, probes, section, self.device, self.rank)
        with failing_together(self.device):
            self.schedule, self.record = planning.build_schedule(
                self.config, self.mixture, record, step, cost=cost.to_json() if cost else None
            )
            free = find_available_bytes(self.device, self.rank) if measure_limits else 0
        if measure_limits:
            limits = budget.find_limits(
                potential, probes, section, self.device, self.rank, available_bytes=free,
                conformers_per_step=planning.count_conformers(self.schedule, step, self.rank.world_size),
            )  # fmt: skip
            self.record = dataclasses.replace(self.record, limits=limits.to_json())
        said = [found.describe() for found in (cost, limits) if found]
        for line in [*said, planning.describe_change(record, self.record)]:
            if line:
                self.metrics.message(line)
        applied = inputs.find_limits(data, self.record.limits)
        own = planning.identify(self.schedule, step, applied)
        of_main = broadcast_text(own, self.device)
        with failing_together(self.device):
            planning.check_alike(own, of_main, self.rank)
            if data.oversized == "refuse":
                inputs.check_sizes(self.mixture, applied)
        with failing_together(self.device):
            if self.record != record and self.rank.is_main:
                planning.write_record(self.path, self.record)
        return TrainingStream(self.schedule, self.config, self.rank.rank, self.rank.world_size, applied)

    def count_epochs(self, step: int) -> dict[str, float]:
        """Return by its name how often each data set has been gone through after some steps."""
        plan, within = self.schedule.locate(step)
        counts = zip(plan.sources, plan.settings.weights, plan.epochs(within), strict=True)
        return {source.name: epoch for source, weight, epoch in counts if weight}

    def detail(self, epochs: Mapping[str, float]) -> dict[str, float]:
        """Return the figures that only some runs have.

        They are the epochs of several data sets (`epoch` itself is the smallest of them: so often everything has been seen), and
        how many conformers have been left out since the run's last start.
        """
        figures = {f"epoch/{name}": epoch for name, epoch in epochs.items()} if len(epochs) > 1 else {}
        return figures | ({"skipped_conformers": self.num_skipped} if self.config.data.on_damage == "skip" else {})

    def announce(self, step: int, complaints: Sequence[str]) -> None:
        """Say what is going to happen, and what the user should know before."""
        for complaint in complaints:
            self.metrics.message(complaint)
        statistics = self.mixture.statistics
        present = [k for k, n in _STATED.items() if set(statistics.get(n, {})) - {"0"}]
        # Each is counted by itself: where they are more than all structures together, some are both.
        charged = sum(count for charge, count in statistics.get("total_charges", {}).items() if float(charge))
        if charged + statistics.get("num_periodic", 0) > self.mixture.num_conformers("train"):
            present.append(CHARGED_CRYSTALS)
        for note in self.mean.potential.describe_limits(present):
            self.metrics.message(f"note: {note}")
        weights = sum(p.numel() for p in self.engine.potential.parameters())
        counts = " / ".join(f"{self.mixture.num_conformers(s):,} {s}" for s in ("train", "validation", "test"))
        self.metrics.message(
            f"so3krates_dist {__version__}: {self.config.run.name}, {self.rank.world_size} process(es) on"
            f" {self.device.type}, {weights:,} weights, conformers {counts}"
        )
        for line in self.mixture.describe():
            self.metrics.message(line)
        if step:
            self.metrics.message(f"Resumed at step {step} of {self.config.train.num_steps}")

    def agree(self, data: StepData, failure: So3kratesError | None, stop_pending: bool) -> tuple[list[float], bool]:
        """Tell the other processes what this one has, once a step.

        Returns:
            Labels of each kind and conformers in the whole step; and whether any process was asked to stop.

        Raises:
            So3kratesError: A process could not read its data, or more conformers were left out than may be; all raise, the one that
                could not read its data with its own message.
        """
        label_counts = [sum(count_labels(b)[i] for b in data.batches) for i in range(len(LABELS))]
        conformers = sum(b.num_graphs for b in data.batches)
        flags = [data.skipped, float(stop_pending), float(failure is not None)]
        *counts, skipped, stop, failed = reduce_sum([*label_counts, conformers, *flags], self.device)
        if failure is not None:
            raise failure
        if failed:
            raise DataError("data of another process", "be readable", "an error", "Its own message says what to do")
        self.complain(data.complaints)
        self.num_skipped += round(skipped)
        most = self.config.data.max_skipped
        if skipped and self.num_skipped > most:
            remedy = "Repair the data that are named above, or raise data.max_skipped"
            raise DataError("conformers left out", f"be at most data.max_skipped ({most})", self.num_skipped, remedy)
        return counts, stop > 0

    def complain(self, complaints: Sequence[str]) -> None:
        """Say once what was left out; a process other than the first has only its own standard error."""
        for line in complaints:
            if line in self.complaints:
                continue
            self.complaints.add(line)
            if self.rank.is_main:
                self.metrics.message(f"left out: {line}")
            else:
                print(f"rank {self.rank.rank}: left out: {line}", file=sys.stderr, flush=True)

    def train_step(self, step: int, micro_batches: Sequence[GraphBatch], counts: Sequence[float]) -> dict[str, float]:
        """Do one optimizer step; return its figures, the same on all processes.

        Args:
            step: Steps done before.
            micro_batches: This process's portions.
            counts: What `agree` found in the whole step.
        """
        section = self.config.train
        seed_step(self.config.run.seed, step, self.rank)
        learning_rate = compute_learning_rate(step, section)
        losses, sums = [], torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            batch = micro_batch.to(self.device)
            outputs = self.engine.forward(batch)
            loss, errors = compute_loss(outputs, batch, counts, section, self.statistics.energy_scale)
            self.engine.backward(loss, is_last=number == len(micro_batches))
            losses.append(loss.detach())
            sums += errors
        result = self.engine.step(learning_rate)
        if result.applied:
            self.mean.update(self.engine.potential.parameters(), step)
        total, energy, forces = reduce_sum([float(torch.stack(losses).sum()), *sums.tolist()], self.device)
        return {
            "loss": total,
            "energy_mae_per_atom": energy / counts[0] if counts[0] else math.nan,
            "forces_mae": forces / counts[1] if counts[1] else math.nan,
            "learning_rate": learning_rate,
            "gradient_norm": result.gradient_norm,
            "applied": float(result.applied),
            "conformers": counts[-1],
        }

    def validate(self, step: int) -> None:
        """Evaluate the mean weights on held-out conformers; keep them where they are the best so far."""
        score = -float(step)  # without validation conformers the latest weights count as the best
        if self.mixture.num_conformers("validation"):
            batches = iter_batches(
                self.mixture, "validation", batch_size=EVALUATION_BATCH_SIZE,
                cutoffs=self.mean.potential.cutoffs, rank=self.rank, limit=self.config.data.max_validation,
            )  # fmt: skip
            with_stress = self.config.train.stress_weight > 0
            evaluation = evaluate(self.mean.potential, batches, device=self.device, compute_stress=with_stress)
            summary = evaluation.summary()
            self.metrics.log("validation", step, summary)
            score = compute_score(summary, self.config.train)
        if score < self.best_score:
            self.best_score = score
            if self.rank.is_main:
                self.save_model(self.path, step)

    def save(self, step: int) -> None:
        """Commit a checkpoint of the whole state, and the latest mean weights as a model."""
        tensors = self.engine.gather_state() | self.mean.get_state()
        if self.rank.is_main:
            state = TrainingState(
                step=step, best_score=self.best_score, scored_on=self.mixture.held_out, tensors=tensors
            )
            save_checkpoint(self.path / "checkpoints", state, keep=self.config.train.keep_checkpoints)
            self.save_model(self.path / "last", step)
        wait_for_all()

    def save_model(self, folder: Path, step: int) -> None:
        """Write the mean weights with all that is needed to use them."""
        provenance = {
            "step": step,
            "data": self.mixture.name,
            "data_fingerprint": self.mixture.fingerprint,
            "level_of_theory": self.mixture.level_of_theory,
            "package_version": __version__,
        }
        weights = self.mean.potential.state_dict()
        save_model(folder, self.config.model, self.statistics, weights, provenance)
