"""The optimizer, the schedule of its learning rate, and the exponential mean of the weights."""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn

from so3krates_dist.config import TrainSection
from so3krates_dist.errors import CheckpointError
from so3krates_dist.model.potential import Potential

_LAYER: Final = re.compile(r"\.(?:layers|values)\.(\d+)\.")
"""What the name of a weight of one layer has in it, and the layer's number"""
_STACKED: Final = re.compile(r"\.(?:self|pair)_(?:weight|bias)$")
"""How the names of tensors end that hold weights of all layers"""


def build_optimizer(potential: nn.Module, section: TrainSection) -> torch.optim.AdamW:
    """Return AdamW, or its variant AMSGrad; only weight matrices decay, not biases, normalisations and the element table.

    AdamW: I. Loshchilov, F. Hutter, arXiv:1711.05101. AMSGrad: S. J. Reddi, S. Kale, S. Kumar, arXiv:1904.09237.

    Args:
        potential: Model.
        section: Learning rate, decays and coefficients.

    Returns:
        The optimizer. `lr_scale` of each of its groups is what the group's learning rate is of the schedule's: 1, or with a
        `layer_decay` that of `scale_layers`.
    """
    embeddings = {id(m.weight) for m in potential.modules() if isinstance(m, nn.Embedding)}
    scales = scale_layers([name for name, _ in potential.named_parameters()], section.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in potential.named_parameters():
        is_matrix = parameter.dim() >= 2 and id(parameter) not in embeddings and not name.endswith("bias")
        groups.setdefault((scales[name], is_matrix), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": groups[scale, decays], "weight_decay": section.weight_decay if decays else 0.0,
                "lr": section.learning_rate * scale, "lr_scale": scale,
            }
            for scale, decays in sorted(groups, key=lambda group: (group[0], not group[1]))
        ],
        lr=section.learning_rate, betas=(section.adam_beta1, section.adam_beta2), eps=section.adam_epsilon,
        amsgrad=section.optimizer == "amsgrad", fused=True,
    )  # fmt: skip


def scale_layers(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return by its name what the learning rate of each weight is of the schedule's.

    It is 1 for readouts and physical terms, `decay` for the last layer, its square for the one before, and so on down to the
    embeddings of elements, charge and spin. GeomAtt has the pair factors of all its layers in one tensor, and an optimizer one
    learning rate for a tensor: it is that of the middle layer.

    Args:
        names: Of all weights.
        decay: From one layer to the one before it.
    """
    names = list(names)
    layers = {name: int(match[1]) for name in names if (match := _LAYER.search(f".{name}"))}
    num_layers = 1 + max(layers.values(), default=-1)

    def find_depth(name: str) -> float:
        if name in layers:
            return num_layers - layers[name]
        if _STACKED.search(name):
            return (num_layers + 1) / 2
        return num_layers + 1 if "embedding" in name else 0

    return {name: decay ** find_depth(name) for name in names}


def compute_learning_rate(applied: int, section: TrainSection, factor: float = 1.0) -> float:
    """Return the learning rate of a step: linear warm-up, then what `schedule` says, down to the final one.

    Args:
        applied: Steps that were applied before; skipped ones do not count.
        section: Of the configuration.
        factor: Of `Plateau`; without meaning in other schedules.
    """
    first, final = section.learning_rate, section.final_learning_rate
    if applied < section.warmup_steps:
        return first * (applied + 1) / (section.warmup_steps + 1)
    progress = min(1.0, (applied - section.warmup_steps) / max(1, section.num_steps - 1 - section.warmup_steps))
    if section.schedule == "cosine":
        return final + (first - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if section.schedule == "exponential":
        return first * math.pow(final / first, progress)
    return max(final, first * factor) if section.schedule == "plateau" else first


class Plateau:
    """Lowers the learning rate when the held-out error has not improved for `plateau_patience` evaluations in a row.

    Any improvement, however small, counts: what is evaluated is a mean of weights, which is smooth. A score that is nan says
    nothing and counts neither way.

    Args:
        section: Of the configuration; with another schedule than `plateau` nothing happens.
    """

    def __init__(self, section: TrainSection) -> None:
        self._section = section
        self.factor = 1.0
        """of the learning rate, for `compute_learning_rate`"""
        self._best = math.inf
        self._waiting = 0

    def record(self, score: float, applied: int) -> bool:
        """Take in the score of an evaluation; return whether it lowers the learning rate.

        Args:
            score: Lower is better.
            applied: Steps that have changed the weights; as long as the rate still rises nothing is counted.
        """
        section = self._section
        if section.schedule != "plateau" or math.isnan(score) or applied < section.warmup_steps:
            return False
        if score < self._best:
            self._best, self._waiting = score, 0
            return False
        self._waiting += 1
        least = section.final_learning_rate / section.learning_rate
        if self._waiting < section.plateau_patience or self.factor <= least:
            return False
        self.factor, self._waiting = max(least, self.factor * section.plateau_factor), 0
        return True

    def forget_scores(self) -> None:
        """Begin the search for an improvement anew: scores of other conformers cannot be compared."""
        self._best, self._waiting = math.inf, 0

    def get_state(self) -> dict[str, Any]:
        """Return what `set_state` takes, as plain values."""
        best = self._best if math.isfinite(self._best) else None
        return {"factor": self.factor, "best": best, "waiting": self._waiting}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `get_state` was called; from nothing, as from the beginning.

        Raises:
            CheckpointError: It is no such state.
        """
        try:
            factor, best, waiting = float(state.get("factor", 1.0)), state.get("best"), int(state.get("waiting", 0))
            self._best = math.inf if best is None else float(best)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                "state of the schedule", "be what a plateau writes", f"{type(error).__name__}: {error}",
                "Remove this checkpoint",
            ) from error  # fmt: skip
        self.factor, self._waiting = factor, waiting


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
    def update(self, groups: Iterable[list[torch.Tensor]], step: int) -> None:
        """Follow the weights after a step.

        Args:
            groups: All weights in their order, some at a time, as an engine lends them.
            step: From 0.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        start = 0
        for group in groups:
            torch._foreach_lerp_(self._mean[start : start + len(group)], group, 1 - decay)
            start += len(group)
        assert start == len(self._mean)

    def get_state(self) -> dict[str, torch.Tensor]:
        """Return the mean weights on the CPU as `mean.<name>`."""
        return {f"mean.{n}": p.detach().cpu().clone() for n, p in self.potential.named_parameters()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `get_state` returned; other entries are ignored.

        Raises:
            CheckpointError: An entry is missing, or has another shape.
        """
        for name, parameter in self.potential.named_parameters():
            stored = state.get(f"mean.{name}")
            if stored is None or stored.shape != parameter.shape:
                found = "none" if stored is None else str(tuple(stored.shape))
                raise CheckpointError(
                    f"`mean.{name}`", f"have the shape {tuple(parameter.shape)}", found,
                    "Resume with the configuration that the run was started with",
                )  # fmt: skip
            parameter.copy_(stored)
