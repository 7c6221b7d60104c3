"""The loss: squared errors of energy per atom, forces, stress, dipole and Hirshfeld ratios.

Each is a mean over the labels of the whole global batch.

The mean is exact when processes hold different numbers of atoms: every process divides its own sum by the number of labels
that all processes have together, and the sums add up to the loss.
"""

from collections.abc import Sequence
from typing import Final

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.graph import ATOMIC_MASSES, GraphBatch

WEIGHTS: Final = {
    "energy": "energy_weight",
    "forces": "forces_weight",
    "stress": "stress_weight",
    "dipole": "dipole_weight",
    "hirshfeld_ratios": "hirshfeld_weight",
}
"""Key of the section `train` that weighs the errors of each label"""

LABELS: Final = tuple(WEIGHTS)
"""Order of label counts in this file"""


def count_labels(batch: GraphBatch) -> list[float]:
    """Return how many numbers of each kind of `LABELS` a batch has (components count singly)."""
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
    loss = _anchor(outputs, section)
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
    if batch.dipole is not None and section.dipole_weight:
        errors = _compare(shift_dipoles(outputs["dipole"], batch), batch.dipole)
        loss = loss + section.dipole_weight * errors.square().sum() / max(global_counts[3], 1.0)
    if batch.hirshfeld_ratios is not None and section.hirshfeld_weight:
        errors = _compare(outputs["hirshfeld_ratios"], batch.hirshfeld_ratios)
        loss = loss + section.hirshfeld_weight * errors.square().sum() / max(global_counts[4], 1.0)
    return loss, sums


def _anchor(outputs: dict[str, torch.Tensor], section: TrainSection) -> torch.Tensor:
    """Return zero, with a gradient of zero for all weights that the loss depends on.

    A batch that is empty, or has no label of some kind, must take part in the backward pass like those of the other processes.
    It does so through forces only where they are trained: they cost a second derivative.
    """
    anchor = (outputs["forces"] if section.forces_weight else outputs["energy"]).sum() * 0.0
    for name in ("dipole", "hirshfeld_ratios"):
        if getattr(section, WEIGHTS[name]):
            anchor = anchor + outputs[name].sum() * 0.0
    return anchor.to(outputs["forces"].dtype)


def shift_dipoles(dipoles: torch.Tensor, batch: GraphBatch) -> torch.Tensor:
    """Return dipoles about the centre of mass, where the labels of charged structures have their origin.

    sum q_i (R_i - R_0) = sum q_i R_i - Q R_0, exact because the charges add up to Q. It changes nothing where Q is zero.

    Args:
        dipoles: (num_graphs, 3) e Å about the origin of the coordinates.
        batch: Their structures.
    """
    masses = torch.tensor(ATOMIC_MASSES, dtype=torch.float64, device=dipoles.device)[batch.atomic_numbers]
    moments = masses[:, None] * batch.positions.double()
    totals = masses.new_zeros(batch.num_graphs).index_add(0, batch.graph_index, masses)
    centres = moments.new_zeros(batch.num_graphs, 3).index_add(0, batch.graph_index, moments) / totals[:, None]
    return dipoles - (batch.total_charge[:, None] * centres).to(dipoles.dtype)


def _compare(predicted: torch.Tensor, label: torch.Tensor, divisor: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Return the errors; zero, with zero gradient, where the label is nan. An infinite label is an error, and stays one."""
    present = ~label.isnan()
    return torch.where(present, predicted - torch.where(present, label, 0.0), 0.0) / divisor
