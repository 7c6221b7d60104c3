"""A run from the first check to the last checkpoint. Read `Training.run`: it is the story; everything else is one hop away."""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from so3krates_dist import __version__
from so3krates_dist.config import ModelSection, RunConfig, TrainSection
from so3krates_dist.data.shards import Manifest, check_dataset, iter_graphs
from so3krates_dist.data.stream import TrainingStream, build_loader, check_allows_box, iter_batches
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
from so3krates_dist.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError, DataError, So3kratesError
from so3krates_dist.graph import GraphBatch
from so3krates_dist.metrics import MetricsLogger
from so3krates_dist.model.potential import (
    CHARGED_CRYSTALS,
    ModelStatistics,
    check_charges,
    check_elements,
    check_unpaired_electrons,
)
from so3krates_dist.model.registry import build_model, save_model
from so3krates_dist.train.checkpoint import RunFolder, TrainingState, find_checkpoint, load_checkpoint, save_checkpoint
from so3krates_dist.train.engine import TrainingEngine
from so3krates_dist.train.evaluate import EVALUATION_BATCH_SIZE, evaluate
from so3krates_dist.train.guard import FiniteGuard, StopRequest
from so3krates_dist.train.losses import LABELS, WEIGHTS, compute_loss, count_labels
from so3krates_dist.train.optim import WeightMean, compute_learning_rate
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
    manifest = _check_data(config, hashes=config.data.verify == "sha256" and rank.is_main)
    folder = RunFolder(config)
    folder.check(manifest.fingerprint)
    if rank.is_main:
        folder.acquire()
        folder.check(manifest.fingerprint)  # again: another run may have come first
    checkpoint, complaints = find_checkpoint(folder.path / "checkpoints") if rank.is_main else (None, [])
    tune_machine(count_threads(config.run.threads, rank.local_world_size), device)
    start_processes(rank, device)
    training = Training(config, rank, device, manifest, folder)
    exit_code = training.run(broadcast_text(str(checkpoint or ""), device), complaints)
    stop_processes()  # not after an error: the other processes may be waiting in a collective
    folder.close()
    return exit_code


def _check_data(config: RunConfig, hashes: bool) -> Manifest:
    """Check that there is something to train on, with the labels that the loss needs, and nothing else to validate on."""
    if not config.data.folder:
        raise ConfigError(
            "data.folder", "name a data set", "nothing", "Set data.folder=FOLDER, see `so3krates generate`"
        )
    folder = Path(config.data.folder)
    manifest = check_dataset(folder, hashes=hashes)
    for label in LABELS:
        if getattr(config.train, WEIGHTS[label]) and label not in manifest.labels:
            have = f"a data set with {', '.join(manifest.labels)} only"
            raise ConfigError(f"train.{WEIGHTS[label]}", f"be 0 without {label} labels", have, "Set it to 0")
    manifest = _count_unpaired_electrons(folder, manifest, config.model)
    statistics = ModelStatistics.from_manifest(manifest.statistics, config.model)  # refuses what no model can have
    if manifest.statistics.get("num_periodic", 0):  # older manifests do not say; the stream looks again
        check_allows_box(config.model, np.ones(3, bool), None, f"{folder} training split")
    _check_validation(folder, manifest, config.model, statistics)
    return manifest


def _count_unpaired_electrons(folder: Path, manifest: Manifest, section: ModelSection) -> Manifest:
    """Return a manifest that says whether there are unpaired electrons, where the model sees them; older ones do not."""
    if "num_unpaired_electrons" not in section.sees or "num_unpaired_electrons" in manifest.statistics:
        return manifest
    counts = Counter(f"{g.num_unpaired_electrons:g}" for g in iter_graphs(folder, manifest, "train"))
    return dataclasses.replace(
        manifest, statistics={**manifest.statistics, "num_unpaired_electrons": dict(sorted(counts.items()))}
    )


def _check_validation(folder: Path, manifest: Manifest, section: ModelSection, statistics: ModelStatistics) -> None:
    """Check that the held-out conformers are of a kind that the training split has."""
    where = f"{folder} validation split"
    elements: set[int] = set()
    charges: set[float] = set()
    has_unpaired = False
    for graph in iter_graphs(folder, manifest, "validation"):
        elements.update(graph.atomic_numbers.tolist())
        charges.add(graph.total_charge)
        has_unpaired |= graph.num_unpaired_electrons != 0
        check_allows_box(section, graph.pbc, graph.cell, where)
    check_elements(elements, statistics.elements, where)
    check_charges(section.sees, statistics, charges, where)
    if has_unpaired:
        check_unpaired_electrons(section.sees, statistics, where)


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


def take_batches(
    loader: Iterator[list[GraphBatch]],
) -> tuple[list[GraphBatch], So3kratesError | None]:
    """Return the next micro-batches, or what went wrong, for all processes to hear of."""
    try:
        return next(loader), None
    except So3kratesError as error:
        return [], error


class Training:
    """What a run consists of while it runs; the process group has been started.

    Args:
        config: Of the run.
        rank: This process.
        device: Of this process.
        manifest: Of the data set.
        folder: Of the run.
    """

    def __init__(
        self, config: RunConfig, rank: Rank, device: torch.device, manifest: Manifest, folder: RunFolder
    ) -> None:
        self.config, self.rank, self.device, self.manifest = config, rank, device, manifest
        self.path = folder.path
        if rank.is_main:
            folder.sign(manifest.fingerprint, __version__)
        seed_everything(config.run.seed)
        self.statistics = ModelStatistics.from_manifest(manifest.statistics, config.model)
        potential = build_model(config.model, self.statistics).to(device)
        self.mean = WeightMean(potential, config.train.ema_decay)
        self.engine = TrainingEngine(potential, config.train, device)
        self.stream = TrainingStream(Path(config.data.folder), manifest, config, rank.rank, rank.world_size)
        self.metrics = MetricsLogger(self.path, config, is_main=rank.is_main)
        self.best_score = float("inf")

    def run(self, checkpoint: str, complaints: Sequence[str]) -> int:
        """Train to the end of the run, or to the request to stop.

        Args:
            checkpoint: To go on from, the same on all processes; empty: from the start.
            complaints: About newer checkpoints that are damaged.
        """
        section = self.config.train
        step = self.resume(checkpoint)
        last = min(section.num_steps, section.stop_at or section.num_steps)
        self.announce(step, complaints)
        stop = StopRequest(self.path, look_for_file=self.rank.is_main)
        guard, window = FiniteGuard(section.max_skipped_steps), StepWindow()
        loader = build_loader(
            self.stream, range(step, last), num_workers=self.config.data.num_workers, device=self.device
        )
        stopping = False
        # Closed after an error too: worker processes that are left to the interpreter's exit would make it wait for ever.
        with contextlib.closing(loader):
            while step < last and not stopping:
                with window.waiting():
                    micro_batches, failure = take_batches(loader)
                counts, stopping = self.agree(micro_batches, failure, stop.is_pending())
                facts = self.train_step(step, micro_batches, counts)
                guard.record(step, facts["applied"] > 0)
                window.add(facts)
                step += 1
                if step % section.log_every == 0 or step == last or stopping:
                    epoch = step / self.stream.plan.steps_per_epoch
                    self.metrics.log("train", step, window.summarize(epoch=epoch))
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
        # Without held-out conformers the score is minus the step, which no error would ever beat.
        held_out = self.manifest.num_conformers("validation")
        self.best_score = float("inf") if held_out and state.best_score < 0 else state.best_score
        return state.step

    def announce(self, step: int, complaints: Sequence[str]) -> None:
        """Say what is going to happen, and what the user should know before."""
        for complaint in complaints:
            self.metrics.message(complaint)
        statistics = self.manifest.statistics
        present = [k for k, n in _STATED.items() if set(statistics.get(n, {})) - {"0"}]
        # Each is counted by itself: where they are more than all structures together, some are both.
        charged = sum(count for charge, count in statistics.get("total_charges", {}).items() if float(charge))
        if charged + statistics.get("num_periodic", 0) > self.manifest.num_conformers("train"):
            present.append(CHARGED_CRYSTALS)
        for note in self.mean.potential.describe_limits(present):
            self.metrics.message(f"note: {note}")
        weights = sum(p.numel() for p in self.engine.potential.parameters())
        counts = " / ".join(f"{self.manifest.num_conformers(s):,} {s}" for s in ("train", "validation", "test"))
        self.metrics.message(
            f"so3krates_dist {__version__}: {self.config.run.name}, {self.rank.world_size} process(es) on"
            f" {self.device.type}, {weights:,} weights, conformers {counts}"
        )
        if step:
            self.metrics.message(f"Resumed at step {step} of {self.config.train.num_steps}")

    def agree(
        self, micro_batches: Sequence[GraphBatch], failure: So3kratesError | None, stop_pending: bool
    ) -> tuple[list[float], bool]:
        """Tell the other processes what this one has, once a step.

        Returns:
            Labels of each kind and conformers in the whole step; and whether any process was asked to stop.

        Raises:
            So3kratesError: A process could not read its data; all raise, that one with its own message.
        """
        label_counts = [sum(count_labels(b)[i] for b in micro_batches) for i in range(len(LABELS))]
        conformers = sum(b.num_graphs for b in micro_batches)
        flags = [float(stop_pending), float(failure is not None)]
        *counts, stop, failed = reduce_sum([*label_counts, conformers, *flags], self.device)
        if failure is not None:
            raise failure
        if failed:
            raise DataError("data of another process", "be readable", "an error", "Its own message says what to do")
        return counts, stop > 0

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
        for micro_batch in micro_batches:
            batch = micro_batch.to(self.device)
            outputs = self.engine.forward(batch)
            loss, errors = compute_loss(outputs, batch, counts, section, self.statistics.energy_scale)
            self.engine.backward(loss)
            result = self.engine.step(learning_rate)
            losses.append(loss.detach())
            sums += errors
        if result.applied:
            self.mean.update(self.engine.potential.parameters(), step)
        total, energy, forces = reduce_sum([float(torch.stack(losses).sum()), *sums.tolist()], self.device)
        return {
            "loss": total,
            "energy_mae_per_atom": energy / max(counts[0], 1.0),
            "forces_mae": forces / max(counts[1], 1.0),
            "learning_rate": learning_rate,
            "gradient_norm": result.gradient_norm,
            "applied": float(result.applied),
            "conformers": counts[-1],
        }

    def validate(self, step: int) -> None:
        """Evaluate the mean weights on held-out conformers; keep them where they are the best so far."""
        score = -float(step)  # without validation conformers the latest weights count as the best
        if self.manifest.num_conformers("validation"):
            batches = iter_batches(
                Path(self.config.data.folder), "validation", batch_size=EVALUATION_BATCH_SIZE,
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
            state = TrainingState(step=step, best_score=self.best_score, tensors=tensors)
            save_checkpoint(self.path / "checkpoints", state, keep=self.config.train.keep_checkpoints)
            self.save_model(self.path / "last", step)
        wait_for_all()

    def save_model(self, folder: Path, step: int) -> None:
        """Write the mean weights with all that is needed to use them."""
        provenance = {
            "step": step,
            "data": self.manifest.name,
            "data_fingerprint": self.manifest.fingerprint,
            "level_of_theory": self.manifest.level_of_theory,
            "package_version": __version__,
        }
        weights = self.mean.potential.state_dict()
        save_model(folder, self.config.model, self.statistics, weights, provenance)
