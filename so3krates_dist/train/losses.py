"""The loss: errors of energy per atom, forces, stress, dipole, partial charges and Hirshfeld ratios.

Each is a mean over the labels of the whole global batch.

The mean is exact when processes hold different numbers of atoms: every process divides its own sum by the number of labels
that all processes have together, and the sums add up to the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from so3krates_dist.config import LOSS_WEIGHTS, TrainSection
from so3krates_dist.graph import ATOMIC_MASSES, GraphBatch

LABELS: Final = tuple(LOSS_WEIGHTS)
"""Order of label counts in this file"""

_PER_GRAPH: Final = ("energy", "stress", "dipole")
"""Labels of structures; the others are labels of atoms"""


def count_labels(batch: GraphBatch) -> list[float]:
    """Return how many numbers of each kind of `LABELS` a batch has (components count singly)."""
    return [0.0 if (label := getattr(batch, name)) is None else float((~label.isnan()).sum()) for name in LABELS]


def compute_weights(step: int, section: TrainSection) -> dict[str, float]:
    """Return the weight of each trained label's errors at a step (from 0).

    It is constant up to `weights_from`, goes to the final one in a straight line, and has it from `weights_until` on.

    Args:
        step: Steps that the schedule has gone through before.
        section: First and final weights.
    """
    weights = {}
    for label in LABELS:
        if section.trains(label):
            first: float = getattr(section, LOSS_WEIGHTS[label])
            final = section.final_weight(label)
            done = (step - section.weights_from) / max(1, section.weights_until - section.weights_from)
            weights[label] = final if done >= 1 else first + max(0.0, done) * (final - first)
    return weights


def compute_loss(
    outputs: Mapping[str, torch.Tensor],
    batch: GraphBatch,
    global_counts: Sequence[float],
    section: TrainSection,
    weights: Mapping[str, float],
    energy_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this process's share of the loss, and its absolute errors.

    With a `loss_weight` in the batch, what the errors of a conformer add to the loss is multiplied by it; the divisor is still the
    number of labels.

    Args:
        outputs: Of the potential, differentiable by its weights.
        batch: Labels; nan where there is none.
        global_counts: `count_labels` summed over all processes and micro-batches of the step.
        section: Which labels are trained, and by which kinds of errors.
        weights: Of the terms at this step, from `compute_weights`; one of zero adds a gradient of zero.
        energy_scale: eV; energies per atom are compared in this unit, forces in this unit per Å.

    Returns:
        The share: the loss of the global batch is the sum of all of them. And (2,) sums of the absolute errors of energies
        per atom in eV and of force components in eV/Å, detached; conformers count alike in them.
    """
    loss = _anchor(outputs, section)
    sums = torch.zeros(2, dtype=torch.float64, device=loss.device)
    for number, label in enumerate(LABELS):
        if not section.trains(label) or (target := getattr(batch, label)) is None:
            continue
        errors = _find_errors(label, outputs, batch, target).to(loss.dtype)
        if label in ("energy", "forces"):
            sums[number] = errors.detach().abs().sum()
            errors = errors / energy_scale
        terms, width = _measure(label, errors, section)
        if batch.loss_weight is not None:
            factors = batch.loss_weight if label in _PER_GRAPH else batch.loss_weight[batch.graph_index]
            terms = terms * factors.to(terms.dtype).reshape(-1, *[1] * (terms.dim() - 1))
        loss = loss + weights[label] * terms.sum() / (global_counts[number] / width or 1.0)
    return loss, sums


def _find_errors(
    label: str, outputs: Mapping[str, torch.Tensor], batch: GraphBatch, target: torch.Tensor
) -> torch.Tensor:
    """Return predicted values less the labels; of energies, per atom."""
    if label == "energy":
        return _compare(outputs[label], target) / batch.num_atoms
    predicted = shift_dipoles(outputs[label], batch) if label == "dipole" else outputs[label]
    return _compare(predicted, target)


def _measure(label: str, errors: torch.Tensor, section: TrainSection) -> tuple[torch.Tensor, float]:
    """Return what is summed over all errors of a kind, and from how many numbers each of these terms was made."""
    kind = {"energy": section.energy_loss, "forces": section.forces_loss}.get(label, "mse")
    if kind == "l2":
        return compute_lengths(errors), 3.0
    measures: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mse": torch.square, "mae": torch.abs, "huber": lambda e: compute_huber(e, section.huber_delta),
    }  # fmt: skip
    return measures[kind](errors), 1.0


def compute_huber(errors: torch.Tensor, delta: float) -> torch.Tensor:
    """Return e^2 up to |e| = delta and 2 delta |e| - delta^2 beyond: the square, continued by its tangent.

    P. J. Huber, Ann. Math. Stat. 35, 73 (1964), 10.1214/aoms/1177703732, times two: so that small errors count as they do in the
    mean square, and a weight means the same.
    """
    sizes = errors.abs()
    return torch.where(sizes <= delta, errors.square(), delta * (2 * sizes - delta))


def compute_lengths(vectors: torch.Tensor) -> torch.Tensor:
    """Return the length of each vector (..., 3) as (...), with a gradient of zero where it is zero.

    There the length has no gradient; zero is the one that changes nothing about a vector that is right.
    """
    squares = vectors.square().sum(-1)
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).sqrt())


def _anchor(outputs: Mapping[str, torch.Tensor], section: TrainSection) -> torch.Tensor:
    """Return zero, with a gradient of zero for all weights that the loss depends on.

    A batch that is empty, or has no label of some kind, must take part in the backward pass like those of the other processes.
    It does so through forces only where they or stress are trained: they cost a second derivative. Stress itself is nan, and
    depends on no weight, where there is no cell.
    """
    trained = {"forces" if label == "stress" else label for label in LABELS if section.trains(label)}
    anchors = [outputs[label].sum() * 0.0 for label in LABELS if label in trained]
    return torch.stack([anchor.to(outputs["forces"].dtype) for anchor in anchors]).sum()


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


def _compare(predicted: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the errors; zero, with zero gradient, where the label is nan. An infinite label is an error, and stays one."""
    present = ~label.isnan()
    return torch.where(present, predicted - torch.where(present, label, 0.0), 0.0)
