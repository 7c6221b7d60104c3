"""Factors of single conformers' errors in the training loss: what they may be, and what a manifest says of them.

A conformer without one has 1, and what has no other weights is stored as before there were any: blocks and manifests of schema 2.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from so3krates_dist.errors import DataError
from so3krates_dist.graph import FloatArray

_DIGITS: Final = 12
"""of what a manifest says"""

Summary = Mapping[str, float]
"""`num_other` (conformers with another weight than 1), `min`, `mean` and `max`"""


def find_wrong_weight(weights: npt.NDArray[Any]) -> float | None:
    """Return the first weight that is none, since it is below zero, nan or infinite; None where all are sound.

    Args:
        weights: (num_conformers,).
    """
    wrong = weights[~((weights >= 0) & (weights < np.inf))]
    return float(wrong[0]) if len(wrong) else None


def to_column(weights: Iterable[float], where: str) -> FloatArray | None:
    """Return weights as they are stored, (num_conformers,) in single precision; None where all are 1.

    Args:
        weights: Of conformers.
        where: Name for the message.

    Raises:
        DataError: One is below zero, nan, or more than single precision holds.
    """
    with np.errstate(over="ignore"):
        stored = np.array(list(weights), np.float64).astype(np.float32)
    if (wrong := find_wrong_weight(stored)) is not None:
        remedy = "Correct the weights, or leave out these conformers"
        raise DataError(where, "have a loss_weight that is a finite number, not below zero", wrong, remedy)
    return None if (stored == 1).all() else stored


@dataclasses.dataclass(slots=True)
class WeightSums:
    """What is known of the weights of the conformers of a split that have gone by."""

    count: int = 0
    num_other: int = 0
    """conformers with another weight than 1"""
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def add(self, weights: npt.NDArray[Any]) -> None:
        """Count some more conformers.

        Args:
            weights: (num_conformers,), one at least, as they are stored.
        """
        self.count += len(weights)
        self.num_other += int(np.count_nonzero(weights != 1))
        self.total += float(weights.sum(dtype=np.float64))
        self.least, self.most = min(self.least, float(weights.min())), max(self.most, float(weights.max()))

    def merge(self, other: "WeightSums") -> None:
        """Count what others have counted."""
        self.count, self.num_other = self.count + other.count, self.num_other + other.num_other
        self.total += other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    def describe(self) -> dict[str, float]:
        """Return the `Summary`; there must have been conformers."""
        mean = float(f"{self.total / self.count:.{_DIGITS}g}")
        return {"num_other": self.num_other, "min": self.least, "mean": mean, "max": self.most}


def summarize(sums: Mapping[str, WeightSums]) -> dict[str, dict[str, float]]:
    """Return what a manifest says of the weights of each split that has conformers; nothing where all weights are 1."""
    if not any(s.num_other for s in sums.values()):
        return {}
    return {split: s.describe() for split, s in sums.items() if s.count}


def find_largest(loss_weights: Mapping[str, Summary]) -> float:
    """Return the largest weight of the training split.

    Args:
        loss_weights: Of the manifest.
    """
    return loss_weights["train"]["max"] if "train" in loss_weights else 1.0


def are_alike(one: Mapping[str, Summary], other: Mapping[str, Summary]) -> bool:
    """Return whether two summaries are the same; means may differ by the order in which they were added up."""
    return one.keys() == other.keys() and all(
        one[split].keys() == other[split].keys()
        and all(math.isclose(v, other[split][n], rel_tol=1e-9 * (n == "mean")) for n, v in one[split].items())
        for split in one
    )


def check_not_all_zero(loss_weights: Mapping[str, Summary], where: str) -> None:
    """Raise `DataError` where nothing can be learned from a data set, since all its training conformers have the weight 0.

    Args:
        loss_weights: Of the manifest.
        where: Name for the message.
    """
    if not find_largest(loss_weights):
        remedy = "Correct the weights, or name their key with --keys loss_weight=KEY"
        raise DataError(where, "have a loss_weight above zero in its training split", "zero for all", remedy)


def check_summary(loss_weights: object, splits: Iterable[str]) -> None:
    """Raise `ValueError` where a manifest says something else of weights than `summarize` does."""
    names = {"num_other", "min", "mean", "max"}
    sound = isinstance(loss_weights, dict) and loss_weights.keys() <= set(splits)
    for part in loss_weights.values() if isinstance(loss_weights, dict) and sound else ():
        sound &= isinstance(part, dict) and part.keys() == names
        sound &= sound and all(type(v) in (int, float) and 0 <= v < math.inf for v in part.values())
    if not sound:
        raise ValueError("loss_weights that are no summary of weights")


def describe(loss_weights: Mapping[str, Summary], counts: Mapping[str, int]) -> str:
    """Return one line about the weights of a data set; empty where all are 1.

    Args:
        loss_weights: Of the manifest.
        counts: Conformers of each split.
    """
    parts = [
        f"{split} {s['min']:g} to {s['max']:g}, mean {s['mean']:.4g}, not 1 for {s['num_other']:.0f} of {count}"
        for split, count in counts.items()
        if (s := loss_weights.get(split))
    ]
    return "loss weights: " + "; ".join(parts) if parts else ""
