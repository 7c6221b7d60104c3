"""The DeepSpeed engine around the potential; the only importer of deepspeed.

Writes DeepSpeed's configuration (nobody writes it by hand), takes steps, and moves the training state in and out as plain
tensors under the names of the weights: a checkpoint of any ZeRO stage has the same form, contains no pickle, and does not
depend on the number of processes.

What must not change here without the tests of tests/distributed: forces are taken inside the wrapped module's forward;
`gradient_clipping` is always written (DeepSpeed clips at 1.0 where the key is absent); no `bf16` or `fp16` section (they
round the master weights); the shared-memory op is off on CPUs (a killed first build of it hangs every later start).
"""

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.errors import CheckpointError
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import Potential
from so3krates_dist.train.optim import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per weight"""


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    gradient_norm: float
    """of all weights before clipping; nan or infinity where the gradient was not finite"""
    applied: bool
    """False where the gradient was not finite and the weights were left alone"""


def build_deepspeed_config(section: TrainSection, num_weights: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run.

    The batch size that DeepSpeed asks for is a formality: it does not load data here, and the loss carries its own
    normalisation (losses.py). So are its accumulation steps: it would divide by a number that has to be known beforehand and is the
    same in every step; here the number of passes varies from step to step, and shares add up (`TrainingEngine.backward`).

    Args:
        section: Of the configuration.
        num_weights: Of the model. Buckets of that size hold all gradients; DeepSpeed's default of 5e8 numbers is a buffer of
            2 GB in every backward pass of stages 1 and 2, whatever the model (read in its stage_1_and_2.py).
    """
    bucket = max(num_weights + num_weights % 2, 2)  # DeepSpeed wants an even number
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.gradient_clipping,
        "zero_optimization": {
            "stage": section.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, once a step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class TrainingEngine:
    """Forward, backward, step, and the training state.

    Args:
        potential: The model, on its device; trained in place.
        section: ZeRO stage, clipping, optimizer.
        device: Where it is.

    The process group must have been started.
    """

    def __init__(self, potential: Potential, section: TrainSection, device: torch.device) -> None:
        self._deepspeed = _import_deepspeed(device)
        self._section = section
        self._stage = section.zero_stage
        potential.train()
        potential.network.checkpoint_attention = section.checkpoint_attention  # type: ignore[assignment]
        self._engine, *_ = self._deepspeed.initialize(
            model=potential,
            optimizer=build_optimizer(potential, section),
            config=build_deepspeed_config(section, sum(p.numel() for p in potential.parameters())),
            dist_init_required=False,
        )
        self.potential = potential
        self._create_moments()
        self.world_size = torch.distributed.get_world_size()

    def forward(self, batch: GraphBatch) -> dict[str, torch.Tensor]:
        """Return the potential's outputs, differentiable by the weights."""
        outputs: dict[str, torch.Tensor] = self._engine(batch, compute_stress=self._section.stress_weight > 0)
        return outputs

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of a share of the loss; shares of all passes and processes are summed.

        A step consists of any number of passes, the same on all processes (stage 2 exchanges gradients in each of them): one that
        has nothing left to do takes an empty batch.

        Args:
            loss: Share of this pass of this process.
            is_last: Whether this is the last pass of the step; `step` follows.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.world_size)  # which DeepSpeed divides by when it averages over processes

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights, after the last pass of a step.

        Args:
            learning_rate: Of this step.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "the last pass has to say so, or nothing is updated"
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage == 0:
            return self._step_without_zero()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, bool(self._engine.was_step_applied()) and math.isfinite(norm))

    def _step_without_zero(self) -> StepResult:
        """Stage 0 has no check of its own: a gradient that is not finite would destroy the weights."""
        gradients = [p.grad for p in self.potential.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.discard()
            return StepResult(norm, False)
        self._engine.step()
        return StepResult(norm, True)

    def discard(self) -> None:
        """Forget the gradients of an unfinished step; weights and optimizer stay as they are."""
        optimizer = self._engine.optimizer
        self._engine.zero_grad()
        optimizer.zero_grad()
        if self._stage > 0:  # sums of the passes before the last, and what the last made of them; zero_grad leaves both
            optimizer.all_grad_tensors.clear()
            optimizer.averaged_gradients.clear()

    def _named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.potential.named_parameters()

    def gather_state(self) -> dict[str, torch.Tensor]:
        """Return the training state as whole tensors on the CPU; all processes must call it.

        Returns:
            `weight.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>` in float32, and `optimizer_steps` (1,).
        """
        state = {"optimizer_steps": torch.tensor([self._count_optimizer_steps()])}
        for name, weight in self._named_weights():
            state[f"weight.{name}"] = self._get_weight(weight).detach().cpu().clone()
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = self._get_moment(weight, moment).detach().cpu().clone()
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `gather_state` returned, into any ZeRO stage and number of processes.

        Raises:
            CheckpointError: The state belongs to another model.
        """
        for moments in self._optimizer_state().values():
            moments["step"].fill_(float(state["optimizer_steps"]))
        for name, weight in self._named_weights():
            self._set_weight(weight, _take(state, f"weight.{name}", weight))
            for moment in MOMENTS:
                self._set_moment(weight, moment, _take(state, f"{moment}.{name}", weight))

    def _optimizer_state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """AdamW's own state: per weight at stage 0, per flat partition of a group under ZeRO."""
        optimizer = self._engine.optimizer
        return optimizer.state if self._stage == 0 else optimizer.optimizer.state  # type: ignore[no-any-return]

    def _count_optimizer_steps(self) -> int:
        return max(int(moments["step"]) for moments in self._optimizer_state().values())

    def _create_moments(self) -> None:
        """Make AdamW's moments now instead of in its first step.

        DeepSpeed links weights to moments after stepping the *first* parameter group, when the other groups have none yet.
        """
        optimizer = self._engine.optimizer
        state = self._optimizer_state()
        for group in (optimizer if self._stage == 0 else optimizer.optimizer).param_groups:
            for tensor in group["params"]:
                state[tensor] = {m: torch.zeros_like(tensor, requires_grad=False) for m in MOMENTS}
                state[tensor]["step"] = torch.zeros((), device=tensor.device)
        if self._stage > 0:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _get_weight(self, weight: torch.nn.Parameter) -> torch.Tensor:
        if self._stage == 0:
            return weight
        return self._deepspeed.utils.safe_get_full_fp32_param(weight)  # type: ignore[no-any-return]

    def _set_weight(self, weight: torch.nn.Parameter, value: torch.Tensor) -> None:
        with torch.no_grad():
            weight.copy_(value)
        if self._stage > 0:
            self._deepspeed.utils.safe_set_full_fp32_param(weight, value)

    def _get_moment(self, weight: torch.nn.Parameter, moment: str) -> torch.Tensor:
        if self._stage == 0:
            return self._optimizer_state()[weight][moment]
        return self._deepspeed.utils.safe_get_full_optimizer_state(weight, moment)  # type: ignore[no-any-return]

    def _set_moment(self, weight: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        if self._stage == 0:
            self._optimizer_state()[weight][moment].copy_(value)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(weight, value, moment)


def _take(state: dict[str, torch.Tensor], key: str, weight: torch.nn.Parameter) -> torch.Tensor:
    """Return an entry of a stored state, on the device of the weight that it belongs to."""
    stored = state.get(key)
    if stored is None or stored.shape != weight.shape:
        found = "none" if stored is None else str(tuple(stored.shape))
        raise CheckpointError(
            f"`{key}`", f"have the shape {tuple(weight.shape)}", found,
            "Resume with the configuration that the run was started with",
        )  # fmt: skip
    return stored.to(weight.device)
