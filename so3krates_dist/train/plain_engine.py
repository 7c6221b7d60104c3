"""Training in one process with plain torch: float64, short measurements, and what the DeepSpeed engine is compared with.

Also what both engines share: the result of a step, and the names and shapes of the training state.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.errors import CheckpointError
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import Potential
from so3krates_dist.train.optim import build_optimizer
from so3krates_dist.train.two_pass import TwoPass

STEPS: Final = "optimizer_steps"
"""Entry of the state that counts the steps that the optimizer has taken"""


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    gradient_norm: float
    """of all weights before clipping; nan or infinity where the gradient was not finite"""
    applied: bool
    """False where the gradient was not finite and the weights were left alone"""


def list_moments(section: TrainSection) -> tuple[str, ...]:
    """Return the names of what the optimizer keeps of every weight."""
    names = ("exp_avg", "exp_avg_sq")
    return (*names, "max_exp_avg_sq") if section.optimizer == "amsgrad" else names


def compute_state_sizes(
    shapes: Mapping[str, torch.Size], moments: tuple[str, ...], dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes of each tensor of a state, in its order.

    Args:
        shapes: Of the weights, by name.
        moments: Of the optimizer.
        dtype: Of weights and moments.
    """
    sizes = {STEPS: 8}
    for name, shape in shapes.items():
        sizes |= {f"{kind}.{name}": shape.numel() * dtype.itemsize for kind in ("weight", *moments)}
    return sizes


def take_entry(state: Mapping[str, torch.Tensor], key: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return an entry of a stored state.

    Raises:
        CheckpointError: It is missing, or has another shape: the state belongs to another model.
    """
    stored = state.get(key)
    if stored is None or stored.shape != shape:
        found = "none" if stored is None else str(tuple(stored.shape))
        raise CheckpointError(
            f"`{key}`", f"have the shape {tuple(shape)}", found,
            "Resume with the configuration that the run was started with",
        )  # fmt: skip
    return stored.to(dtype)


def keep_all(name: str) -> bool:
    """Keep every tensor of a state."""
    return True


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of each parameter group: the step's times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def create_moments(optimizer: torch.optim.Optimizer, tensors: list[torch.Tensor], moments: tuple[str, ...]) -> None:
    """Make the optimizer's state of these tensors now instead of in its first step.

    Before that step there would be nothing to gather or to load into; and DeepSpeed links weights to moments after stepping the
    *first* parameter group, when the other groups have none yet.
    """
    for tensor in tensors:
        optimizer.state[tensor] = {m: torch.zeros_like(tensor, requires_grad=False) for m in moments}
        optimizer.state[tensor]["step"] = torch.zeros((), device=tensor.device)


def prepare_potential(potential: Potential, section: TrainSection) -> None:
    """Put a model into training mode, with the arithmetic and the recomputation that the configuration asks for."""
    potential.train()
    potential.set_precision(section.precision)
    potential.as_network.checkpointing = section.activation_checkpointing


def detach_geometry(batch: GraphBatch) -> GraphBatch:
    """Return a batch from which no output has a path back to positions or cells.

    Forces are taken inside the model. Taken from an engine's energies they would be divided by what DeepSpeed divides gradients by,
    at stage 1 without an error; so that cannot be done.
    """
    cell = None if batch.cell is None else batch.cell.detach()
    return dataclasses.replace(batch, positions=batch.positions.detach(), cell=cell)


class PlainEngine:
    """Forward, backward, step, and the training state, in one process and without DeepSpeed.

    Args:
        potential: The model, on its device; trained in place, with `precision=float64` converted to it.
        section: Precision, clipping, optimizer; its ZeRO stage is not used.
        device: Where it is.
    """

    def __init__(self, potential: Potential, section: TrainSection, device: torch.device) -> None:
        self.dtype = torch.float64 if section.precision == "float64" else torch.float32
        self.potential = potential.to(device, self.dtype)
        self._section = section
        self._moments = list_moments(section)
        prepare_potential(potential, section)
        self._passes = TwoPass(potential)
        self._optimizer = build_optimizer(potential, section)
        create_moments(self._optimizer, list(self.potential.parameters()), self._moments)

    def forward(self, batch: GraphBatch) -> dict[str, torch.Tensor]:
        """Return the potential's outputs, differentiable by the weights and by nothing else."""
        return self._passes.forward(self.potential, detach_geometry(batch), self._section.trains("stress"))

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of a share of the loss.

        Args:
            loss: Share of this pass.
            is_last: Whether this is the last pass of the step; of no importance here.
        """
        torch.autograd.backward(self._passes.finish(self.potential, loss))

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights, unless the gradient is not finite; forget the gradients."""
        norm = self.compute_gradient_norm()
        applied = math.isfinite(norm)
        if applied:
            limit = self._section.gradient_clipping
            if limit:
                torch.nn.utils.clip_grad_norm_(self.potential.parameters(), limit)
            for weight in self.potential.parameters():
                if weight.grad is None:  # as under ZeRO: no gradient is a gradient of zero
                    weight.grad = torch.zeros_like(weight)
            set_rates(self._optimizer, learning_rate)
            self._optimizer.step()
        self.discard()
        return StepResult(norm, applied)

    def compute_gradient_norm(self) -> float:
        """Return the norm of the gradient of all weights so far."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.potential.parameters() if p.grad is not None]))

    def discard(self) -> None:
        """Forget the gradients of a step; weights and optimizer stay as they are."""
        self._optimizer.zero_grad()

    def lend_weights(self) -> Iterator[list[torch.Tensor]]:
        """Lend all weights in one group, in the order of the model's parameters, to be read."""
        yield [p.detach() for p in self.potential.parameters()]

    def state_sizes(self) -> dict[str, int]:
        """Return the bytes of each tensor of `gather_state`, in its order."""
        shapes = {n: p.shape for n, p in self.potential.named_parameters()}
        return compute_state_sizes(shapes, self._moments, self.dtype)

    def gather_state(self, keep: Callable[[str], bool] = keep_all) -> dict[str, torch.Tensor]:
        """Return the training state on the CPU, as copies.

        Args:
            keep: Which entries are wanted.

        Returns:
            `weight.<name>`, the optimizer's moments `exp_avg.<name>` and so on, and `optimizer_steps` (1,).
        """
        states = self._optimizer.state
        steps = max(int(moments["step"]) for moments in states.values())
        entries = {STEPS: torch.tensor([steps])}
        for name, weight in self.potential.named_parameters():
            entries |= {f"weight.{name}": weight} | {f"{m}.{name}": states[weight][m] for m in self._moments}
        return {name: tensor.detach().cpu().clone() for name, tensor in entries.items() if keep(name)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `gather_state` of any engine returned.

        Raises:
            CheckpointError: The state belongs to another model.
        """
        for name, weight in self.potential.named_parameters():
            own = self._optimizer.state[weight]
            own["step"].fill_(float(state[STEPS]))
            weight.copy_(take_entry(state, f"weight.{name}", weight.shape, self.dtype))
            for moment in self._moments:
                own[moment].copy_(take_entry(state, f"{moment}.{name}", weight.shape, self.dtype))
