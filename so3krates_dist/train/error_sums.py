"""Sums of errors: what is added up over batches and processes, and the figures that come of it.

Sums, not means, so ranks with different numbers of atoms count rightly; labels that are missing (nan) are left out and counted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, FloatArray, GraphBatch
from so3krates_dist.train.losses import shift_dipoles

OTHER: Final = "(other)"
"""Row for conformers of a group that was not named"""
LABELS: Final = ("energy", "forces", "stress", "dipole", "partial_charges", "hirshfeld_ratios")
"""Labels that predictions are compared with"""
_COLUMNS: Final = {name: slice(1 + 3 * i, 4 + 3 * i) for i, name in enumerate(LABELS)}
"""Where the sums of each label are in a row, after the number of conformers"""


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over the compared numbers of one label; adding two of them is exact."""

    count: float = 0.0
    """numbers compared: conformers, force components or stress components"""
    absolute: float = 0.0
    squared: float = 0.0

    @property
    def mae(self) -> float:
        """Mean absolute error; nan where nothing was compared."""
        return self.absolute / self.count if self.count else math.nan

    @property
    def rmse(self) -> float:
        """Root of the mean squared error; nan where nothing was compared."""
        return math.sqrt(self.squared / self.count) if self.count else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Errors on one group of conformers."""

    num_conformers: int
    energy: ErrorSums
    """per atom, eV"""
    forces: ErrorSums
    """per component, eV/Å"""
    stress: ErrorSums
    """per component of the 3x3 matrix, eV/Å³"""
    dipole: ErrorSums = ErrorSums()
    """per component, e Å"""
    partial_charges: ErrorSums = ErrorSums()
    """per atom, e"""
    hirshfeld_ratios: ErrorSums = ErrorSums()
    """per atom"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Every prediction beside its label, in the order of the batches of this process."""

    num_atoms: FloatArray
    """(num_conformers,)"""
    atomic_numbers: FloatArray
    """(num_atoms,)"""
    energy: tuple[FloatArray, FloatArray]
    """label and prediction, (num_conformers,) eV; nan where there is no label"""
    forces: tuple[FloatArray, FloatArray]
    """label and prediction, (num_atoms, 3) eV/Å"""
    partial_charges: tuple[FloatArray, FloatArray]
    """label and prediction, (num_atoms,) e; nan where there is no label or the model has none"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Errors over all processes."""

    overall: Errors
    per_group: Mapping[str, Errors]
    """by group, those that occur"""
    per_element: Mapping[str, ErrorSums]
    """force errors by chemical symbol, those that occur"""
    samples: Samples | None = None

    def summary(self) -> dict[str, float]:
        """Return the figures that are logged: eV/atom, eV/Å, eV/Å³, e Å, e; nan where the data have no energies or forces.

        Other labels are there where data and model have them.
        """
        result = {
            "energy_mae_per_atom": self.overall.energy.mae,
            "energy_rmse_per_atom": self.overall.energy.rmse,
            "forces_mae": self.overall.forces.mae,
            "forces_rmse": self.overall.forces.rmse,
        }
        for name in LABELS[2:]:
            sums: ErrorSums = getattr(self.overall, name)
            if sums.count:
                result |= {f"{name}_mae": sums.mae, f"{name}_rmse": sums.rmse}
        return result

    def to_json(self) -> dict[str, Any]:
        """Return all figures and counts; nan becomes None."""
        return {
            "summary": {k: _to_finite(v) for k, v in self.summary().items()},
            "overall": _errors_to_json(self.overall),
            "groups": {name: _errors_to_json(errors) for name, errors in self.per_group.items()},
            "elements": {symbol: _sums_to_json(sums) for symbol, sums in self.per_element.items()},
        }


def _to_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sums_to_json(sums: ErrorSums) -> dict[str, Any]:
    return {"count": int(sums.count), "mae": _to_finite(sums.mae), "rmse": _to_finite(sums.rmse)}


def _errors_to_json(errors: Errors) -> dict[str, Any]:
    return {"num_conformers": errors.num_conformers} | {n: _sums_to_json(getattr(errors, n)) for n in LABELS}


class Accumulator:
    """Adds up on the device, without waiting for it; columns are count, sum of |error|, sum of error² of each label."""

    def __init__(self, groups: Sequence[str], device: torch.device) -> None:
        self.names = (*groups, OTHER)
        self._index = {name: i for i, name in enumerate(self.names)}
        self.groups = torch.zeros(len(self.names), 1 + 3 * len(LABELS), dtype=torch.float64, device=device)
        self.elements = torch.zeros(MAX_ATOMIC_NUMBER + 1, 3, dtype=torch.float64, device=device)

    def add(self, batch: GraphBatch, results: Mapping[str, torch.Tensor]) -> None:
        """Compare the predictions for a batch with its labels; all conformers count alike, whatever they weigh in the loss."""
        device = self.groups.device
        other = self._index[OTHER]
        names = batch.group or ("",) * batch.num_graphs
        rows = torch.tensor([self._index.get(name, other) for name in names], device=device)
        self.groups[:, 0].index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64, device=device))
        if batch.energy is not None:
            errors = (results["energy"] - batch.energy) / batch.num_atoms
            self._add_sums(self._column("energy"), rows, errors[:, None], batch.energy[:, None])
        if batch.forces is not None:
            errors = results["forces"].double() - batch.forces.double()
            self._add_sums(self._column("forces"), rows[batch.graph_index], errors, batch.forces)
            self._add_sums(self.elements, batch.atomic_numbers, errors, batch.forces)
        if batch.stress is not None and "stress" in results:
            errors = (results["stress"].double() - batch.stress.double()).flatten(1)
            self._add_sums(self._column("stress"), rows, errors, batch.stress.flatten(1))
        self._add_further(batch, results, rows)

    def _add_further(self, batch: GraphBatch, results: Mapping[str, torch.Tensor], rows: torch.Tensor) -> None:
        if batch.dipole is not None and "dipole" in results:
            errors = shift_dipoles(results["dipole"].double(), batch) - batch.dipole.double()
            self._add_sums(self._column("dipole"), rows, errors, batch.dipole)
        for name in ("partial_charges", "hirshfeld_ratios"):
            labels: torch.Tensor | None = getattr(batch, name)
            if labels is not None and name in results:
                errors = (results[name].double() - labels.double())[:, None]
                self._add_sums(self._column(name), rows[batch.graph_index], errors, labels[:, None])

    def _column(self, label: str) -> torch.Tensor:
        return self.groups[:, _COLUMNS[label]]

    @staticmethod
    def _add_sums(sums: torch.Tensor, rows: torch.Tensor, errors: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a row of errors where its label is whole; a prediction of nan is an error and stays one."""
        known = torch.isfinite(labels).all(1)
        masked = torch.where(known[:, None], errors, 0.0)
        count = known.double() * errors.shape[1]
        sums.index_add_(0, rows, torch.stack([count, masked.abs().sum(1), masked.square().sum(1)], 1))


def build_evaluation(
    names: Sequence[str], groups: np.ndarray, elements: np.ndarray, samples: Samples | None
) -> Evaluation:
    """Return the errors of an accumulator's sums.

    Args:
        names: Of the groups.
        groups: Sums of each, over all processes.
        elements: Sums of the forces' errors by atomic number, over all processes.
        samples: What is kept of this process.
    """
    present = {name: _row_to_errors(row) for name, row in zip(names, groups, strict=True) if row[0]}
    return Evaluation(
        overall=_row_to_errors(groups.sum(0)),
        per_group=present,
        per_element={ELEMENT_SYMBOLS[z]: ErrorSums(*row.tolist()) for z, row in enumerate(elements) if row[0]},
        samples=samples,
    )


def _row_to_errors(row: np.ndarray) -> Errors:
    sums = {label: ErrorSums(*row[columns].tolist()) for label, columns in _COLUMNS.items()}
    return Errors(num_conformers=round(row[0]), **sums)
