"""The DeepSpeed engine around the potential; the only importer of deepspeed.

Writes DeepSpeed's configuration (nobody writes it by hand), takes steps, and moves the training state in and out as plain
tensors under the names of the weights: a checkpoint of any ZeRO stage has the same form, contains no pickle, and does not
depend on the number of processes.

What must not change here without the tests of tests/distributed: forces are taken inside the wrapped module's forward;
`gradient_clipping` is always written (DeepSpeed clips at 1.0 where the key is absent); no `bf16` or `fp16` section (they
round the master weights); the shared-memory op is off on CPUs (a killed first build of it hangs every later start).
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import Potential
from so3krates_dist.train.optim import build_optimizer
from so3krates_dist.train.plain_engine import (
    STEPS,
    StepResult,
    compute_state_sizes,
    create_moments,
    detach_geometry,
    keep_all,
    list_moments,
    prepare_potential,
    set_rates,
    take_entry,
)
from so3krates_dist.train.two_pass import TwoPass
from so3krates_dist.train.zero3 import PartitionedWeights, build_zero3_options, check_zero3, find_piece


def build_deepspeed_config(section: TrainSection, weights: Sequence[int]) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run.

    The batch size that DeepSpeed asks for is a formality: it does not load data here, and the loss carries its own
    normalisation (losses.py). So are its accumulation steps: it would divide by a number that has to be known beforehand and is the
    same in every step; here the number of passes varies from step to step, and shares add up (`TrainingEngine.backward`).

    Args:
        section: Of the configuration.
        weights: Numbers in each tensor of weights. DeepSpeed's default bucket of 5e8 numbers is a buffer of 2 GB in every backward
            pass of stages 1 and 2, whatever the model (read in its stage_1_and_2.py); one for all gradients would be as much as all
            weights at stage 3.
    """
    piece = find_piece(weights)
    bucket = piece + piece % 2  # DeepSpeed wants an even number
    zero: dict[str, Any] = {
        "stage": section.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if section.zero_stage == 3:
        zero |= build_zero3_options()
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.gradient_clipping,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
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
        if section.zero_stage == 3:
            check_zero3()
        self._deepspeed = _import_deepspeed(device)
        self._section = section
        self._stage = section.zero_stage
        self._moments = list_moments(section)
        self.dtype = torch.float32
        prepare_potential(potential, section)
        self._shapes = {name: weight.shape for name, weight in potential.named_parameters()}
        self._engine, *_ = self._deepspeed.initialize(
            model=potential,
            optimizer=build_optimizer(potential, section),
            config=build_deepspeed_config(section, [p.numel() for p in potential.parameters()]),
            dist_init_required=False,
        )
        self.potential = potential
        self._weights = PartitionedWeights(potential, self._engine.optimizer) if self._stage == 3 else None
        self._passes = TwoPass(potential)
        self._create_moments()
        self.world_size = torch.distributed.get_world_size()

    def forward(self, batch: GraphBatch) -> dict[str, torch.Tensor]:
        """Return the potential's outputs, differentiable by the weights and by nothing else."""
        with self._passing():
            return self._passes.forward(self._engine, detach_geometry(batch), self._section.trains("stress"))

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of a share of the loss; shares of all passes and processes are summed.

        A step consists of any number of passes, the same on all processes (stages 2 and 3 exchange gradients in each of them): one
        that has nothing left to do takes an empty batch.

        Args:
            loss: Share of this pass of this process.
            is_last: Whether this is the last pass of the step; `step` follows.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        with self._passing():
            # DeepSpeed divides by the number of processes when it averages over them.
            self._engine.backward(self._passes.finish(self._engine, loss * self.world_size))

    def _passing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._weights is None else self._weights.passing()

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights, after the last pass of a step.

        Args:
            learning_rate: Of this step.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "the last pass has to say so, or nothing is updated"
        set_rates(self._engine.optimizer, learning_rate)
        if self._stage == 0:
            return self._step_without_zero()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        self.discard()
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
        """Forget the gradients of a step, also after its last pass; weights and optimizer stay as they are."""
        optimizer = self._engine.optimizer
        self._engine.zero_grad()
        optimizer.zero_grad()
        if self._weights is not None:
            self._weights.clear_gradients()
        elif self._stage > 0:
            # Sums of the passes before the last, which zero_grad leaves.
            optimizer.all_grad_tensors.clear()
            if self._section.offload_optimizer:
                optimizer.micro_step_id = -1  # no pass of a step has been done
                optimizer._offload_accumulated_param_ids.clear()
                optimizer.accumulated_grads_in_cpu.clear()
                optimizer.reset_cpu_buffers()
        if self._section.offload_optimizer:
            # The next step overwrites these, but for weights that have no gradient in it.
            for tensor in self._list_stepped():
                assert tensor.grad is not None
                tensor.grad.zero_()

    def lend_weights(self) -> Iterator[list[torch.Tensor]]:
        """Lend all weights to be read, in the order of the model's parameters: at stage 3 a few at a time, else in one group.

        All processes must take all groups. Each is to be read before the next is asked for, and empties then.
        """
        if self._weights is not None:
            return self._weights.lend()
        return iter([[p.detach() for p in self.potential.parameters()]])

    def state_sizes(self) -> dict[str, int]:
        """Return the bytes of each tensor of `gather_state`, in its order; no communication."""
        return compute_state_sizes(self._shapes, self._moments, self.dtype)

    def gather_state(self, keep: Callable[[str], bool] = keep_all) -> dict[str, torch.Tensor]:
        """Return the training state as whole tensors on the CPU; all processes must call it.

        Args:
            keep: Which entries this process wants; the others take part in the communication and are dropped one by one.

        Returns:
            `weight.<name>`, the optimizer's moments `exp_avg.<name>` and so on in float32, and `optimizer_steps` (1,).
        """
        state = {STEPS: torch.tensor([self._count_optimizer_steps()])} if keep(STEPS) else {}
        for name, weight in self.potential.named_parameters():
            for kind in ("weight", *self._moments):
                whole = self._get_whole(weight, kind)
                if keep(f"{kind}.{name}"):
                    state[f"{kind}.{name}"] = whole.detach().cpu().clone()
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `gather_state` returned, from any engine, ZeRO stage and number of processes.

        Raises:
            CheckpointError: The state belongs to another model.
        """
        for moments in self._optimizer_state().values():
            moments["step"].fill_(float(state[STEPS]))
        for name, weight in self.potential.named_parameters():
            for kind in ("weight", *self._moments):
                value = take_entry(state, f"{kind}.{name}", self._shapes[name], self.dtype)
                self._set_whole(weight, kind, value.to(weight.device))

    def _optimizer_state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """AdamW's own state: per weight at stage 0, per flat partition of a group under ZeRO."""
        optimizer = self._engine.optimizer
        return optimizer.state if self._stage == 0 else optimizer.optimizer.state  # type: ignore[no-any-return] # DeepSpeed's

    def _count_optimizer_steps(self) -> int:
        return max(int(moments["step"]) for moments in self._optimizer_state().values())

    def _list_stepped(self) -> list[torch.Tensor]:
        """Return what the optimizer steps: weights, or this process's flat part of each group of weights."""
        outer = self._engine.optimizer
        if self._weights is not None:
            return self._weights.flat_weights
        inner = outer if self._stage == 0 else outer.optimizer
        return [tensor for group in inner.param_groups for tensor in group["params"]]

    def _create_moments(self) -> None:
        outer = self._engine.optimizer
        create_moments(outer if self._stage == 0 else outer.optimizer, self._list_stepped(), self._moments)
        if self._stage in (1, 2):
            outer._lazy_init_hp_params_optimizer_state()

    def _get_whole(self, weight: torch.nn.Parameter, kind: str) -> torch.Tensor:
        """Return a weight or one of its moments; collective under ZeRO."""
        if self._weights is not None:
            return self._weights.get(weight, kind)
        utilities = self._deepspeed.utils
        if self._stage == 0:
            return weight if kind == "weight" else self._optimizer_state()[weight][kind]
        if kind == "weight":
            return utilities.safe_get_full_fp32_param(weight)  # type: ignore[no-any-return] # DeepSpeed's
        return utilities.safe_get_full_optimizer_state(weight, kind)  # type: ignore[no-any-return] # DeepSpeed's

    @torch.no_grad()
    def _set_whole(self, weight: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if self._weights is not None:
            self._weights.set(weight, kind, value)
            return
        utilities = self._deepspeed.utils
        if kind == "weight":
            weight.copy_(value)
            if self._stage > 0:
                utilities.safe_set_full_fp32_param(weight, value)
        elif self._stage == 0:
            self._optimizer_state()[weight][kind].copy_(value)
        else:
            utilities.safe_set_full_optimizer_state(weight, value, kind)
