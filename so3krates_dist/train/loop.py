"""A run from the first check to the last checkpoint. Read `Training.run`: it is the story; everything else is one hop away."""

import contextlib
import dataclasses
import enum
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from so3krates_dist import __version__
from so3krates_dist.config import RunConfig
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.stream import StepData, TrainingStream, build_loader, iter_batches
from so3krates_dist.distributed import (
    Rank,
    broadcast_text,
    check_precision,
    choose_device,
    count_threads,
    matmul_precision,
    read_rank,
    reduce_sum,
    seed_everything,
    seed_step,
    set_matmul_precision,
    stop_processes,
    tune_machine,
    wait_for_all,
)
from so3krates_dist.errors import EXIT_DONE, EXIT_REQUEUE, DataError, NonFiniteError, So3kratesError
from so3krates_dist.graph import GraphBatch
from so3krates_dist.metrics import MetricsLogger
from so3krates_dist.train import inputs, planning
from so3krates_dist.train.agreement import check_same
from so3krates_dist.train.checkpoint import RunFolder
from so3krates_dist.train.claim import Claim, claim_folder, meet
from so3krates_dist.train.context import RunContext, name_epochs
from so3krates_dist.train.evaluate import EVALUATION_BATCH_SIZE, evaluate
from so3krates_dist.train.guard import StopRequest, Verdict, failing_together
from so3krates_dist.train.losses import LABELS, compute_loss, compute_weights, count_labels
from so3krates_dist.train.optim import compute_learning_rate
from so3krates_dist.train.progress import compute_score
from so3krates_dist.train.proof import choose_fixed_graphs, describe_proof, prove
from so3krates_dist.train.run_state import RunState
from so3krates_dist.train.saving import writing_in
from so3krates_dist.train.self_check import check_engine
from so3krates_dist.train.settling import settle_plan
from so3krates_dist.train.skipped import store_step
from so3krates_dist.train.window import WEIGHT, StepWindow
from so3krates_dist.train.zero3 import check_zero3


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
    check_precision(config.train.precision, device)
    if config.train.zero_stage == 3:
        check_zero3()
    folder = RunFolder(config)
    folder.check()
    record = planning.read_record(folder.path)
    hashes = config.data.verify == "sha256" and rank.local_rank == 0
    mixture = inputs.open_data(config, record.reference if record else None, hashes=hashes)
    folder.check(mixture.fingerprint)
    planning.check_plan(config, mixture, record)
    claim = claim_folder(folder, mixture.fingerprint) if rank.is_main else Claim()
    tune_machine(count_threads(config.run.threads, rank.local_world_size), device)
    set_matmul_precision(config.train.precision, device)
    meet(rank, device, claim.refusal)
    check_same(config, device, rank)
    training = Training(config, rank, device, mixture, folder, record)
    exit_code = training.run(broadcast_text(str(claim.checkpoint or ""), device), claim.complaints)
    stop_processes()  # not after an error: the other processes may be waiting in a collective
    folder.close()
    return exit_code


def take_step(loader: Iterator[StepData]) -> tuple[StepData, So3kratesError | None]:
    """Return this process's part of the next step, or what went wrong, for all processes to hear of."""
    try:
        return next(loader), None
    except So3kratesError as error:
        return StepData([]), error


class Ending(enum.Enum):
    """Why a stretch of steps came to its end."""

    LAST_STEP = enum.auto()
    STOPPED = enum.auto()
    SPOILED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What all processes together have for a step."""

    counts: Sequence[float]
    """labels of each kind"""
    conformers: float
    stopping: bool
    """whether any process was asked to stop"""


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
        self.section = config.train
        with failing_together(device), writing_in(folder.path) if rank.is_main else contextlib.nullcontext():
            if rank.is_main:
                folder.sign(mixture.fingerprint, __version__)
            self.metrics = MetricsLogger(folder.path, config, is_main=rank.is_main)
        self.context = RunContext(config, rank, device, mixture, folder, self.metrics)
        seed_everything(config.run.seed)
        self.state = RunState(self.context)
        self.engine = self.state.engine
        self.num_left_out = 0
        self.is_spoiled = False
        self.complaints: set[str] = set()

    def run(self, checkpoint: str, complaints: Sequence[str]) -> int:
        """Train to the end of the run, or to the request to stop.

        Args:
            checkpoint: To go on from, the same on all processes; empty: from the start.
            complaints: About newer checkpoints that are damaged.
        """
        self.say(*complaints, *(self.state.resume(Path(checkpoint)) if checkpoint else ()))
        self.follow_plan()
        self.say(*self.context.describe(self.state.mean.potential))
        if checkpoint:
            self.say(
                f"Resumed at step {self.state.progress.step} of {self.section.num_steps}", *self.context.folder.changes
            )
        if self.state.progress.step < self.section.num_steps:  # a finished run is left as it is
            self.check_arithmetic()
        stop = StopRequest(self.context.folder.path, look_for_file=self.rank.is_main)
        while (ending := self.train_on(stop)) is Ending.SPOILED:
            self.say(*self.state.roll_back())
        self.say(self.state.writer.finish() or "")
        done = self.state.progress.step >= self.section.num_steps
        verb = "Done" if done else "Stopped"
        self.say(f"{verb} after {self.state.progress.step} steps; run folder {self.context.folder.path}")
        self.metrics.close()
        wait_for_all()  # a launcher ends the others as soon as one process has left with exit code 85
        stop.close()
        return EXIT_REQUEUE if ending is Ending.STOPPED and not done else EXIT_DONE

    def say(self, *lines: str) -> None:
        """Tell the user what there is to tell."""
        for line in filter(None, lines):
            self.metrics.message(line)

    def train_on(self, stop: StopRequest) -> Ending:
        """Do step after step until something ends that."""
        section, window = self.section, StepWindow()
        last = min(section.num_steps, section.stop_at or section.num_steps)
        position = self.state.progress.data_step
        steps = range(position, position + max(0, last - self.state.progress.step))
        workers = self.config.data.num_workers
        loader = build_loader(self.stream, steps, num_workers=workers, device=self.device)
        # Closed after an error too: worker processes that are left to the interpreter's exit would make it wait for ever.
        with contextlib.closing(loader):
            for _ in steps:
                with window.waiting():
                    data, failure = take_step(loader)
                agreed = self.agree(data, failure, stop.is_pending())
                window.add(self.train_step(self.state.progress.step, data.batches, agreed))
                if self.is_spoiled:
                    return Ending.SPOILED
                self.look_around(window, is_last=self.state.progress.step == last or agreed.stopping)
                if agreed.stopping:
                    return Ending.STOPPED
        return Ending.LAST_STEP

    def look_around(self, window: StepWindow, *, is_last: bool) -> None:
        """Log, evaluate and save where it is time to, and at the last step."""
        section, step = self.section, self.state.progress.step
        if step % section.log_every == 0 or is_last:
            figures = window.summarize(name_epochs(self.count_epochs()))
            skipping = self.config.data.on_damage == "skip"
            left_out = {"skipped_conformers": float(self.num_left_out)} if skipping else {}
            self.metrics.log("train", step, figures | left_out)
        if step % section.validate_every == 0 or step == section.num_steps:
            with window.pausing():
                self.validate()
        if step % section.save_every == 0 or is_last:
            with window.pausing():
                self.state.save()

    # ------------------------------------------------------------------------------------------------ before the first step

    def follow_plan(self) -> None:
        """Find out which conformers come from here on."""
        settled = settle_plan(self.context, self.record, self.state.progress.data_step, self.state.copy_for_measuring)
        self.schedule, self.record = settled.schedule, settled.record
        self.stream = TrainingStream(self.schedule, self.config, self.rank.rank, self.rank.world_size, settled.limits)

    def check_arithmetic(self) -> None:
        """Say how far forces can be trusted, and that a step of the engine is what it should be."""
        section = self.section
        with failing_together(self.device):
            self.fixed_graphs = choose_fixed_graphs(self.mixture, self.state.mean.potential.cutoffs)
        if section.self_check:
            graphs = self.fixed_graphs
            self.say(check_engine(self.engine, graphs, section, self.rank, self.device))
        figures = self.prove()
        if figures:
            self.say(describe_proof(figures))
            self.metrics.log("proof", self.state.progress.step, figures)

    def prove(self) -> dict[str, float]:
        """Return what the arithmetic of training does to forces; nothing on other ranks than 0, or where it is not asked for."""
        if not (self.section.proof and self.rank.is_main):
            return {}
        return prove(self.state.mean.potential, self.fixed_graphs, self.section, self.device)

    # ------------------------------------------------------------------------------------------------------------- one step

    def agree(self, data: StepData, failure: So3kratesError | None, stop_pending: bool) -> Agreed:
        """Tell the other processes what this one has, once a step.

        Raises:
            So3kratesError: A process could not read its data, more conformers were left out than may be, or a checkpoint could
                not be written; all raise, the one that met it with its own message.
        """
        label_counts = [sum(count_labels(b)[i] for b in data.batches) for i in range(len(LABELS))]
        conformers = sum(b.num_graphs for b in data.batches)
        flags = [data.skipped, float(stop_pending), float(failure is not None), *self.state.writer.flags()]
        sums = reduce_sum([*label_counts, conformers, *flags], self.device)
        *counts, conformers_of_all, left_out, stop, failed, written, unwritten = sums
        if failed:
            self.say(self.state.writer.finish() or "")  # all processes are here: what has begun is not lost
        if failure is not None:
            raise failure
        if failed:
            raise DataError("data of another process", "be readable", "an error", "Its own message says what to do")
        self.say(self.state.writer.settle(written, unwritten) or "")
        self.complain(data.complaints)
        self.num_left_out += round(left_out)
        most = self.config.data.max_skipped
        if left_out and self.num_left_out > most:
            remedy = "Repair the data that are named above, or raise data.max_skipped"
            raise DataError("conformers left out", f"be at most data.max_skipped ({most})", self.num_left_out, remedy)
        return Agreed(counts, conformers_of_all, stop > 0)

    def complain(self, complaints: Sequence[str]) -> None:
        """Say once what was left out; a process other than the first has only its own standard error."""
        for line in complaints:
            if line in self.complaints:
                continue
            self.complaints.add(line)
            if self.rank.is_main:
                self.say(f"left out: {line}")
            else:
                print(f"rank {self.rank.rank}: left out: {line}", file=sys.stderr, flush=True)

    def train_step(self, step: int, micro_batches: Sequence[GraphBatch], agreed: Agreed) -> dict[str, float]:
        """Do one optimizer step, or skip it; return its figures, the same on all processes.

        Args:
            step: Steps done before.
            micro_batches: This process's portions.
            agreed: What `agree` found in the whole step.
        """
        section, progress = self.section, self.state.progress
        seed_step(self.config.run.seed, progress.data_step, self.rank)
        weights = compute_weights(progress.applied, section)
        learning_rate = compute_learning_rate(progress.applied, section, self.state.plateau.factor)
        losses, sums = [], torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            batch = micro_batch.to(self.device, self.engine.dtype)
            outputs = self.engine.forward(batch)
            scale = self.state.statistics.energy_scale
            loss, errors = compute_loss(outputs, batch, agreed.counts, section, weights, scale)
            self.engine.backward(loss, is_last=number == len(micro_batches))
            losses.append(loss.detach())
            sums += errors
        total, energy, forces = reduce_sum([float(torch.stack(losses).sum()), *sums.tolist()], self.device)
        verdict, norm = self.apply(total, learning_rate)
        facts = {
            "loss": total,
            "energy_mae_per_atom": energy / agreed.counts[0] if agreed.counts[0] else math.nan,
            "forces_mae": forces / agreed.counts[1] if agreed.counts[1] else math.nan,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "applied": float(verdict is Verdict.APPLY),
            "conformers": agreed.conformers,
        }
        if section.weights_until:
            facts |= {f"{WEIGHT}{label}": weight for label, weight in weights.items()}
        self.finish_step(micro_batches, verdict, facts)
        return facts

    def apply(self, loss: float, learning_rate: float) -> tuple[Verdict, float]:
        """Move the weights where the step is sound; return what was found, and the norm of the gradient."""
        verdict = self.state.guard.judge(loss)
        if verdict is not Verdict.APPLY:
            self.engine.discard()
            return verdict, math.nan
        result = self.engine.step(learning_rate)
        if not result.applied:
            return Verdict.NON_FINITE, result.gradient_norm
        self.state.mean.update(self.engine.lend_weights(), self.state.progress.applied)
        return verdict, result.gradient_norm

    def finish_step(self, micro_batches: Sequence[GraphBatch], verdict: Verdict, facts: dict[str, float]) -> None:
        """Count a step, and keep what it was made of where it was skipped."""
        progress = self.state.progress
        if verdict is not Verdict.APPLY:
            self.keep_skipped(micro_batches, verdict, facts)
        step = progress.step
        progress.step, progress.data_step = step + 1, progress.data_step + 1
        progress.applied += verdict is Verdict.APPLY
        figures = facts["loss"], facts["gradient_norm"]
        try:
            self.is_spoiled = self.state.guard.record(step, *figures, verdict, bool(facts["applied"]))
        except NonFiniteError:  # on all processes: what has begun is not lost
            self.say(self.state.writer.finish() or "")
            raise

    def keep_skipped(self, micro_batches: Sequence[GraphBatch], verdict: Verdict, facts: dict[str, float]) -> None:
        """Store what a skipped step was made of, for `so3krates replay`."""
        weights = self.state.copy_weights()
        self.say(store_step(self.context, self.state, verdict, facts, micro_batches, weights))

    # ---------------------------------------------------------------------------------------------------- between the steps

    def count_epochs(self) -> dict[str, float]:
        """Return by its name how often each data set has been gone through so far."""
        plan, within = self.schedule.locate(self.state.progress.data_step)
        counts = zip(plan.sources, plan.settings.weights, plan.epochs(within), strict=True)
        return {source.name: epoch for source, weight, epoch in counts if weight}

    def validate(self) -> None:
        """Evaluate the mean weights on held-out conformers; keep them where they are the best so far."""
        progress = self.state.progress
        score = -float(progress.step)  # without validation conformers the latest weights count as the best
        if self.mixture.num_conformers("validation"):
            batches = iter_batches(
                self.mixture, "validation", batch_size=EVALUATION_BATCH_SIZE,
                cutoffs=self.state.mean.potential.cutoffs, rank=self.rank, limit=self.config.data.max_validation,
            )  # fmt: skip
            with_stress = self.section.trains("stress")
            with matmul_precision("float32", self.device):  # as the exported model is used
                evaluation = evaluate(
                    self.state.mean.potential, batches, device=self.device, compute_stress=with_stress
                )
            summary = evaluation.summary()
            self.metrics.log("validation", progress.step, summary | self.prove())
            score = compute_score(summary, self.section)
            self.follow_plateau(score)
        if score < progress.best_score:
            progress.best_score, progress.scored_on = score, self.mixture.held_out
            self.state.writer.write_now(self.state.export_best)

    def follow_plateau(self, score: float) -> None:
        """Lower the learning rate where the held-out error, the same on all processes, has stayed where it was."""
        plateau = self.state.plateau
        before, patience = plateau.factor, self.section.plateau_patience
        if plateau.record(score, self.state.progress.applied):
            self.say(
                f"learning rate times {plateau.factor / before:.3g} from here on: no better held-out error in {patience} evaluation"
                + "s" * (patience != 1)
            )
