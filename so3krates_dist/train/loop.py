"""A run from the first check to the last checkpoint. Read `Training.run`: it is the story; everything else is one hop away."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from so3krates_dist import __version__
from so3krates_dist.config import RunConfig, count_threads
from so3krates_dist.data.shards import Manifest, check_dataset
from so3krates_dist.data.stream import TrainingStream, build_loader, iter_batches
from so3krates_dist.distributed import (
    Rank,
    broadcast_text,
    choose_device,
    read_rank,
    reduce_sum,
    seed_everything,
    seed_step,
    start_processes,
    stop_processes,
    tune_machine,
    wait_for_all,
)
from so3krates_dist.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError
from so3krates_dist.graph import GraphBatch
from so3krates_dist.metrics import MetricsLogger
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model, save_model
from so3krates_dist.train.checkpoint import RunFolder, TrainingState, find_checkpoint, load_checkpoint, save_checkpoint
from so3krates_dist.train.engine import TrainingEngine
from so3krates_dist.train.evaluate import evaluate
from so3krates_dist.train.guard import FiniteGuard, StopRequest
from so3krates_dist.train.losses import LABELS, compute_loss, count_labels
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
    manifest = _check_data(config)
    folder = RunFolder(config)
    folder.check(manifest.fingerprint)
    if rank.is_main:
        folder.acquire()
    tune_machine(count_threads(config, rank.local_world_size), device)
    start_processes(rank, device)
    exit_code = Training(config, rank, device, manifest, folder).run()
    stop_processes()  # not after an error: the other processes may be waiting in a collective
    folder.close()
    return exit_code


def _check_data(config: RunConfig) -> Manifest:
    """Check that there is something to train on, and that it has the labels that the loss needs."""
    if not config.data.folder:
        raise ConfigError(
            "data.folder", "name a data set", "nothing", "Set data.folder=FOLDER, see `so3krates generate`"
        )
    manifest = check_dataset(Path(config.data.folder), hashes=config.data.verify == "sha256")
    for label in LABELS:
        if getattr(config.train, f"{label}_weight") and label not in manifest.labels:
            have = f"a data set with {', '.join(manifest.labels)} only"
            raise ConfigError(f"train.{label}_weight", f"be 0 without {label} labels", have, "Set it to 0")
    return manifest


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
        self.statistics = ModelStatistics.from_manifest(manifest.statistics, config.model.cutoff)
        potential = build_model(config.model, self.statistics).to(device)
        self.mean = WeightMean(potential, config.train.ema_decay)
        self.engine = TrainingEngine(potential, config.train, device)
        self.stream = TrainingStream(Path(config.data.folder), manifest, config, rank.rank, rank.world_size)
        self.metrics = MetricsLogger(self.path, config, is_main=rank.is_main)
        self.best_forces_mae = float("inf")

    def run(self) -> int:
        """Train to the end of the run, or to the request to stop."""
        section = self.config.train
        step = self.resume()
        last = min(section.num_steps, section.stop_at or section.num_steps)
        self.announce(step)
        stop, guard, window = StopRequest(self.path), FiniteGuard(section.max_skipped_steps), StepWindow()
        loader = build_loader(
            self.stream, range(step, last), num_workers=self.config.data.num_workers, device=self.device
        )
        stopping = False
        # Closed after an error too: worker processes that are left to the interpreter's exit would make it wait for ever.
        with contextlib.closing(loader):
            while step < last and not stopping:
                with window.waiting():
                    micro_batches = next(loader)
                seed_step(self.config.run.seed, step, self.rank)
                facts = self.train_step(step, micro_batches, stop.is_pending())
                stopping = facts.pop("stop") > 0
                guard.record(step, facts["applied"] > 0)
                window.add(facts)
                step += 1
                if step % section.log_every == 0 or step == last:
                    epoch = step / self.stream.plan.steps_per_epoch
                    self.metrics.log("train", step, window.summarize(epoch=epoch))
                if step % section.validate_every == 0 or step == section.num_steps:
                    with window.pausing():
                        self.validate(step)
                if step % section.save_every == 0 or step == last or stopping:
                    with window.pausing():
                        self.save(step)
        stop.close()
        done = step >= section.num_steps
        self.metrics.message(f"{'Done' if done else 'Stopped'} after {step} steps; run folder {self.path}")
        self.metrics.close()
        return EXIT_REQUEUE if stopping and not done else EXIT_DONE

    def resume(self) -> int:
        """Go back to the newest checkpoint that is whole; return the steps it has done."""
        chosen = ""
        if self.rank.is_main:
            checkpoint, complaints = find_checkpoint(self.path / "checkpoints")
            for complaint in complaints:
                self.metrics.message(complaint)
            chosen = str(checkpoint or "")
        chosen = broadcast_text(chosen, self.device)
        if not chosen:
            return 0
        state = load_checkpoint(Path(chosen))
        self.engine.load_state(state.tensors)
        self.mean.load_state(state.tensors)
        self.best_forces_mae = state.best_forces_mae
        return state.step

    def announce(self, step: int) -> None:
        """Say what is going to happen."""
        weights = sum(p.numel() for p in self.engine.potential.parameters())
        counts = " / ".join(f"{self.manifest.num_conformers(s):,} {s}" for s in ("train", "validation", "test"))
        self.metrics.message(
            f"so3krates_dist {__version__}: {self.config.run.name}, {self.rank.world_size} process(es) on"
            f" {self.device.type}, {weights:,} weights, conformers {counts}"
        )
        if step:
            self.metrics.message(f"Resumed at step {step} of {self.config.train.num_steps}")

    def train_step(self, step: int, micro_batches: Sequence[GraphBatch], stop_pending: bool) -> dict[str, float]:
        """Do one optimizer step; return its figures, the same on all processes."""
        section = self.config.train
        label_counts = [sum(c) for c in zip(*(count_labels(b) for b in micro_batches), strict=True)]
        num_conformers = sum(b.num_graphs for b in micro_batches)
        *counts, conformers = reduce_sum([*label_counts, num_conformers], self.device)
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
        total, energy, forces, stop = reduce_sum(
            [float(torch.stack(losses).sum()), *sums.tolist(), float(stop_pending)], self.device
        )
        return {
            "loss": total,
            "energy_mae_per_atom": energy / max(counts[0], 1.0),
            "forces_mae": forces / max(counts[1], 1.0),
            "learning_rate": learning_rate,
            "gradient_norm": result.gradient_norm,
            "applied": float(result.applied),
            "conformers": conformers,
            "stop": stop,
        }

    def validate(self, step: int) -> None:
        """Evaluate the mean weights on held-out conformers; keep them where they are the best so far."""
        forces_mae = -float(step)  # without validation conformers the latest weights count as the best
        if self.manifest.num_conformers("validation"):
            batches = iter_batches(
                Path(self.config.data.folder), "validation", batch_size=32, cutoff=self.config.model.cutoff,
                rank=self.rank.rank, world_size=self.rank.world_size, limit=self.config.data.max_validation,
            )  # fmt: skip
            with_stress = self.config.train.stress_weight > 0
            evaluation = evaluate(self.mean.potential, batches, device=self.device, compute_stress=with_stress)
            summary = evaluation.summary()
            self.metrics.log("validation", step, summary)
            forces_mae = summary["forces_mae"]
        if forces_mae < self.best_forces_mae:
            self.best_forces_mae = forces_mae
            if self.rank.is_main:
                self.save_model(self.path, step)

    def save(self, step: int) -> None:
        """Commit a checkpoint of the whole state; at the end of the run, the last weights as a model too."""
        tensors = self.engine.gather_state() | self.mean.get_state()
        if self.rank.is_main:
            state = TrainingState(step=step, best_forces_mae=self.best_forces_mae, tensors=tensors)
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
