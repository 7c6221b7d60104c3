"""The optimizer, the schedule of its learning rate, and the exponential mean of the weights."""

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from so3krates_dist.config import TrainSection
from so3krates_dist.model.potential import Potential


def build_optimizer(potential: nn.Module, section: TrainSection) -> torch.optim.AdamW:
    """Return AdamW; only weight matrices decay, not biases, normalisations and the element table."""
    embeddings = {id(m.weight) for m in potential.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in potential.named_parameters():
        is_matrix = parameter.dim() >= 2 and id(parameter) not in embeddings and not name.endswith("bias")
        (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": free, "weight_decay": 0.0}]
    betas = (section.adam_beta1, section.adam_beta2)
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, fused=True)


def compute_learning_rate(step: int, section: TrainSection) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then half a cosine down to the final one."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / (section.warmup_steps + 1)
    progress = min(1.0, (step - section.warmup_steps) / max(1, section.num_steps - 1 - section.warmup_steps))
    span = section.learning_rate - section.final_learning_rate
    return section.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


class WeightMean:
    """Exponential mean of the weights: a second model that follows the trained one and is evaluated in its place.

    Args:
        potential: The model in training; copied.
        decay: Of the mean; 0 follows the weights exactly. While steps are few the decay is (1 + step) / (10 + step), so
            that the initial weights are soon forgotten.
    """

    def __init__(self, potential: Potential, decay: float) -> None:
        self.potential = copy.deepcopy(potential).eval().requires_grad_(False)
        self._decay = decay
        self._mean: list[torch.Tensor] = list(self.potential.parameters())

    @torch.no_grad()
    def update(self, weights: Iterable[torch.Tensor], step: int) -> None:
        """Follow the weights after a step (from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, [w.detach() for w in weights], 1 - decay)

    def get_state(self) -> dict[str, torch.Tensor]:
        """Return the mean weights on the CPU as `mean.<name>`."""
        return {f"mean.{n}": p.detach().cpu().clone() for n, p in self.potential.named_parameters()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `get_state` returned; other entries are ignored."""
        for name, parameter in self.potential.named_parameters():
            parameter.copy_(state[f"mean.{name}"])
