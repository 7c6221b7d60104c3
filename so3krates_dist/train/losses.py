"""The loss: squared errors of energy per atom, forces and stress, each a mean over the labels of the whole global batch.

The mean is exact when processes hold different numbers of atoms: every process divides its own sum by the number of labels
that all processes have together, and the sums add up to the loss.
"""

from collections.abc import Sequence

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.graph import GraphBatch

LABELS = ("energy", "forces", "stress")
"""Order of label counts and error sums in this file"""


def count_labels(batch: GraphBatch) -> list[float]:
    """Return how many numbers of each kind of `LABELS` a batch has (force and stress components count singly)."""
    return [0.0 if (label := getattr(batch, name)) is None else float((~label.isnan()).sum()) for name in LABELS]


def compute_loss(
    outputs: dict[str, torch.Tensor],
    batch: GraphBatch,
    global_counts: Sequence[float],
    section: TrainSection,
    energy_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this process's share of the loss, and its absolute errors.

    Args:
        outputs: Of the potential, differentiable by its weights.
        batch: Labels; nan where there is none.
        global_counts: `count_labels` summed over all processes and micro-batches of the step.
        section: Weights of the terms.
        energy_scale: eV; energies per atom are compared in this unit, forces in this unit per Å.

    Returns:
        The share: the loss of the global batch is the sum of all of them. And (2,) sums of the absolute errors of energies
        per atom in eV and of force components in eV/Å, detached.
    """
    # An empty batch still takes part in the backward pass; through forces only where they are trained, a second derivative.
    anchor = outputs["forces"] if section.forces_weight else outputs["energy"]
    loss = (anchor.sum() * 0.0).to(outputs["forces"].dtype)
    sums = torch.zeros(2, dtype=torch.float64, device=loss.device)
    if batch.energy is not None and section.energy_weight:
        errors = _compare(outputs["energy"], batch.energy, batch.num_atoms).to(loss.dtype)
        loss = loss + section.energy_weight * (errors / energy_scale).square().sum() / max(global_counts[0], 1.0)
        sums[0] = errors.detach().abs().sum()
    if batch.forces is not None and section.forces_weight:
        errors = _compare(outputs["forces"], batch.forces)
        loss = loss + section.forces_weight * (errors / energy_scale).square().sum() / max(global_counts[1], 1.0)
        sums[1] = errors.detach().abs().sum()
    if batch.stress is not None and section.stress_weight:
        errors = _compare(outputs["stress"], batch.stress)
        loss = loss + section.stress_weight * errors.square().sum() / max(global_counts[2], 1.0)
    return loss, sums


def _compare(predicted: torch.Tensor, label: torch.Tensor, divisor: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Return the errors; zero, with zero gradient, where the label is nan. An infinite label is an error, and stays one."""
    present = ~label.isnan()
    return torch.where(present, predicted - torch.where(present, label, 0.0), 0.0) / divisor
