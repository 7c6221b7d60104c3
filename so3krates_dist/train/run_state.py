"""All that a checkpoint holds, while the run goes on: weights, optimizer, mean weights, schedule, guard, and the position."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch

from so3krates_dist.distributed import broadcast_text
from so3krates_dist.errors import NonFiniteError
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model, save_model
from so3krates_dist.train.checkpoint import find_checkpoint, load_checkpoint
from so3krates_dist.train.context import RunContext
from so3krates_dist.train.engines import build_engine
from so3krates_dist.train.guard import StepGuard, failing_together
from so3krates_dist.train.optim import Plateau, WeightMean
from so3krates_dist.train.progress import Progress
from so3krates_dist.train.saving import CheckpointWriter, collect_facts


class RunState:
    """What is saved and put back; the weights are new until `resume`.

    Args:
        context: The run; torch has been seeded.
    """

    def __init__(self, context: RunContext) -> None:
        config, section = context.config, context.config.train
        self._context, self._section = context, section
        self._folder = context.folder.path
        self.statistics = ModelStatistics.from_manifest(context.mixture.statistics, config.model)
        dtype = torch.float64 if section.precision == "float64" else torch.float32
        potential = build_model(config.model, self.statistics).to(device=context.device, dtype=dtype)
        self.mean = WeightMean(potential, section.ema_decay)
        if section.activation_checkpointing == "low_memory":  # or evaluation would take more memory than training
            self.mean.potential.as_network.checkpointing = "blocks"
        self.engine = build_engine(potential, section, context.device)
        self.guard, self.plateau, self.progress = StepGuard(section), Plateau(section), Progress()
        self.writer = CheckpointWriter(
            self._folder / "checkpoints", context.rank, context.device, keep=section.keep_checkpoints,
            asynchronous=section.async_save,
            facts=collect_facts(config, context.rank) | {"data_fingerprint": context.mixture.fingerprint},
        )  # fmt: skip

    def copy_for_measuring(self) -> Potential:
        """Return the model without the engine around it, as it is trained."""
        potential = copy.deepcopy(self.mean.potential).train().requires_grad_(True)
        potential.set_precision(self._section.precision)
        potential.as_network.checkpointing = self._section.activation_checkpointing
        return potential

    def copy_weights(self) -> dict[str, torch.Tensor]:
        """Return copies of the engine's weights on the CPU, by their names, on rank 0 and nothing on others; all call this."""
        copies: dict[str, torch.Tensor] = {}
        names = iter([name for name, _ in self.mean.potential.named_parameters()])
        for group in self.engine.lend_weights():
            if self._context.rank.is_main:
                copies |= {next(names): weight.to("cpu", copy=True) for weight in group}
        return copies

    def save(self) -> None:
        """Begin a checkpoint of the whole state, and of the latest weights and their mean as models; all processes call this."""
        weights = self.copy_weights()
        export = self._prepare_export(weights) if self._context.rank.is_main else None
        mean = self.mean.get_state()
        own = self.writer.owns(self.engine.state_sizes() | {name: t.nbytes for name, t in mean.items()})
        tensors = self.engine.gather_state(own.__contains__) | {name: t for name, t in mean.items() if name in own}
        state = {"guard": self.guard.get_state(), "plateau": self.plateau.get_state()}
        self.writer.begin(self.progress.step, self.progress.to_json() | state, tensors, export)

    def _prepare_export(self, weights: dict[str, torch.Tensor]) -> Callable[[], None]:
        """Return what writes `last` (the mean weights) and `last_raw` (those of the last step), as they are now."""
        step = self.progress.step
        mean = {name: tensor.to("cpu", copy=True) for name, tensor in self.mean.potential.state_dict().items()}
        raw = mean | weights

        def export() -> None:
            self.export(self._folder / "last", mean, step)
            self.export(self._folder / "last_raw", raw, step)

        return export

    def export(self, folder: Path, weights: dict[str, torch.Tensor], step: int) -> None:
        """Write a model that can be used by itself.

        Args:
            folder: Of the model.
            weights: Its state.
            step: Steps after which they were so.
        """
        save_model(folder, self._context.config.model, self.statistics, weights, self._context.provenance(step))

    def export_best(self) -> None:
        """Write the mean weights, which are the best so far, as the model of the run."""
        self.export(self._folder, self.mean.potential.state_dict(), self.progress.step)

    def resume(self, checkpoint: Path) -> list[str]:
        """Go back to a checkpoint; all processes call this.

        Returns:
            Lines for the log.
        """
        with failing_together(self._context.device):  # one of them may not see what another has written
            stored = load_checkpoint(checkpoint)
        self.engine.load_state(stored.tensors)
        self.mean.load_state(stored.tensors)
        progress = Progress.from_json(stored.progress, str(checkpoint))
        self.guard.set_state(stored.progress.get("guard", {}))
        self.plateau.set_state(stored.progress.get("plateau", {}))
        held_out, before = self._context.mixture.held_out, progress.scored_on
        is_another = bool(before) and before != held_out
        # Without held-out conformers the score is minus the step, which no error would ever beat.
        if is_another or (held_out and progress.best_score < 0):
            progress.best_score = math.inf
        if is_another:
            self.plateau.forget_scores()
        self.progress = progress
        return ["The best model so far was found with other held-out conformers; the search begins anew"] * is_another

    def roll_back(self) -> list[str]:
        """Go back to the newest checkpoint, but not to the data that came since; all processes call this.

        Returns:
            Lines for the log.

        Raises:
            NonFiniteError: There is none to go back to.
        """
        said = self.writer.finish()
        spoiled, main = self.progress, self._context.rank.is_main
        with failing_together(self._context.device):
            found, complaints = find_checkpoint(self._folder / "checkpoints") if main else (None, [])
        checkpoint = broadcast_text(str(found or ""), self._context.device)
        if not checkpoint:
            raise NonFiniteError(
                f"step {spoiled.step}", "have a checkpoint before it to go back to", "none",
                "Lower train.learning_rate, or train.save_every to have one earlier",
            )  # fmt: skip
        lines = [said or "", *complaints, *self.resume(Path(checkpoint))]
        self.progress.data_step = spoiled.data_step
        # A better model may have been exported since the checkpoint; the next evaluation must not overwrite it.
        self.progress.best_score, self.progress.scored_on = spoiled.best_score, spoiled.scored_on
        back = spoiled.step - self.progress.step
        return [
            *lines, f"Went back {back} steps to the checkpoint of step {self.progress.step}, past the data that spoiled them"
        ]  # fmt: skip
