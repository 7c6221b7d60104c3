"""How far a run has come: what a checkpoint says besides its tensors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final, Self

from so3krates_dist.config import LOSS_WEIGHTS, TrainSection
from so3krates_dist.errors import CheckpointError

_SCORED: Final = ("forces", "energy", "stress", "dipole", "partial_charges", "hirshfeld_ratios")
"""Labels in the order in which their errors choose the best model"""


@dataclasses.dataclass(kw_only=True, slots=True)
class Progress:
    """Where a run is. The three positions are equal until a step is skipped."""

    step: int = 0
    """steps done, skipped ones included; `train.num_steps` is the end"""
    applied: int = 0
    """steps that changed the weights; the position in the schedule of the learning rate"""
    data_step: int = 0
    """position in the data; ahead of `step` where the run went back to a checkpoint and left spoiled data behind"""
    best_score: float = math.inf
    """of the best evaluation so far, lower is better: see `compute_score`; infinity before the first"""
    scored_on: str = ""
    """fingerprints of the data sets whose held-out conformers were evaluated; empty: not known"""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        plain = dataclasses.asdict(self)
        return plain | {"best_score": self.best_score if math.isfinite(self.best_score) else None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> Self:
        """Rebuild from `to_json`; entries of other names are passed over.

        Args:
            content: Of a checkpoint.
            where: The checkpoint, for the message.

        Raises:
            CheckpointError: A position is missing or no count.
        """
        try:
            step, applied, data_step = (int(content[name]) for name in ("step", "applied", "data_step"))
            best = content.get("best_score")
            progress = cls(
                step=step, applied=applied, data_step=data_step, best_score=math.inf if best is None else float(best),
                scored_on=str(content.get("scored_on", "")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            found = f"{type(error).__name__}: {error}"
            raise CheckpointError(where, "say how far the run had come", found, "Remove this checkpoint") from error
        if not 0 <= applied <= step <= data_step:
            found = f"{applied} applied of {step}, {data_step} of the data"
            raise CheckpointError(where, "count applied steps, steps and data in this order", found, "Remove it")
        return progress


def compute_score(summary: Mapping[str, float], section: TrainSection) -> float:
    """Return the error by which the best model is chosen, lower is better.

    It is the mean absolute error of the first of forces, energy per atom, stress, dipole, partial charges and Hirshfeld ratios
    that is trained and has labels among the held-out conformers; nan, which is never the best, where there is none.

    Args:
        summary: Of the evaluation.
        section: Weights of the terms of the loss.
    """
    names = {"energy": "energy_mae_per_atom"}
    assert set(_SCORED) == set(LOSS_WEIGHTS)
    errors = [summary.get(names.get(label, f"{label}_mae"), math.nan) for label in _SCORED if section.trains(label)]
    return next((error for error in errors if not math.isnan(error)), math.nan)
