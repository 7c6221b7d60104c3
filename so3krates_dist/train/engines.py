"""What the training loop asks of an engine, and which engine a configuration gets."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import Potential
from so3krates_dist.train.engine import TrainingEngine
from so3krates_dist.train.plain_engine import PlainEngine, StepResult, keep_all

__all__ = ["Engine", "PlainEngine", "StepResult", "TrainingEngine", "build_engine"]


class Engine(Protocol):
    """Forward, backward, step, and the training state.

    A step is any number of passes (`forward`, the loss, `backward`), the same on all processes, and then `step` or `discard`.
    """

    @property
    def potential(self) -> Potential:
        """The model, in training mode; at ZeRO 3 its weights are in parts."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What batches have to be converted to."""
        ...

    def forward(self, batch: GraphBatch) -> dict[str, torch.Tensor]:
        """Return the potential's outputs, differentiable by the weights, for a batch on the device and of the dtype."""
        ...

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of a share of the loss; shares of all passes and processes are summed."""
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights after the last pass, unless the gradient is not finite."""
        ...

    def discard(self) -> None:
        """Forget the gradients of a step, also after its last pass; weights and optimizer stay as they are."""
        ...

    def lend_weights(self) -> Iterator[list[torch.Tensor]]:
        """Lend all weights to be read, whole and in the order of the model's parameters, at ZeRO 3 only a few at a time.

        All processes must take all groups. Each is to be read before the next is asked for, and empties then.
        """
        ...

    def state_sizes(self) -> dict[str, int]:
        """Return the bytes of each tensor of `gather_state`, in its order; no communication."""
        ...

    def gather_state(self, keep: Callable[[str], bool] = keep_all) -> dict[str, torch.Tensor]:
        """Return those tensors of the whole state that are to be kept, on the CPU; all processes must call it."""
        ...

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `gather_state` of any engine, stage and number of processes returned; all processes must call it."""
        ...


def build_engine(potential: Potential, section: TrainSection, device: torch.device) -> Engine:
    """Return the engine that a configuration asks for: plain torch for float64, else DeepSpeed's.

    Args:
        potential: The model, on its device; trained in place.
        section: Of the configuration.
        device: Where it is.
    """
    if section.precision == "float64":
        return PlainEngine(potential, section, device)
    return TrainingEngine(potential, section, device)
