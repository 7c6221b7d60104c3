"""Which conformers train, which validate and which test: by the hash of their geometry, in fractions or in numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from so3krates_dist.data.shards import SPLITS
from so3krates_dist.errors import DataError

DEFAULT_SPLIT: Final = "0.8,0.1,0.1"
_HASHES: Final = 2**64


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """How much of the data each of `SPLITS` gets."""

    request: str
    shares: tuple[float, ...]
    """fractions that sum to one, or numbers of conformers"""
    is_fractions: bool

    @classmethod
    def parse(cls, request: str) -> "Split":
        """Read `0.8,0.1,0.1` (fractions, a dot in any of them) or `950,50,1000` (numbers of conformers).

        Raises:
            DataError: The text is neither, or leaves nothing for training.
        """
        remedy = "Give train, validation and test as fractions like 0.8,0.1,0.1 or as numbers like 950,50,1000"
        try:
            is_fractions = "." in request
            shares = tuple((float if is_fractions else int)(part) for part in request.split(","))
        except ValueError:
            raise DataError("--split", "be three numbers", repr(request), remedy) from None
        if len(shares) != len(SPLITS) or not all(np.isfinite(shares)) or min(shares) < 0 or shares[0] <= 0:
            raise DataError("--split", "be three numbers, the first above zero", repr(request), remedy)
        if is_fractions and abs(sum(shares) - 1) > 1e-6:
            raise DataError("--split", "have fractions that sum to one", f"{sum(shares):g}", remedy)
        return cls(request, shares, is_fractions)


class SplitCounter:
    """Finds where splits end, and how much is in each, while hashes go by in ascending order.

    Attributes:
        bounds: For each split the hash that its conformers stay below; those of equal hash are in one split.
        total: Conformers so far.
        num_unused: Conformers in no split, known in the end.
    """

    def __init__(self, split: Split) -> None:
        self._split, self._ends = split, np.cumsum(split.shares)
        ends = self._ends[:-1] if split.is_fractions else ()
        self.bounds = [round(float(end) * _HASHES) for end in ends]
        self.bounds += [_HASHES] * (len(SPLITS) - len(self.bounds))
        self._below = [0] * len(SPLITS)
        self.total = self.num_unused = 0

    def add(self, hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        """Count some more conformers; all of one hash come in one call.

        Args:
            hashes: (num_conformers,) ascending, and not below those before.
        """
        for number, end in enumerate(self._ends.tolist()):
            if self._split.is_fractions:
                self._below[number] += int(np.count_nonzero(find_below(hashes, self.bounds[number])))
            elif 0 <= (place := end - self.total) < len(hashes):
                self.bounds[number] = int(hashes[place])
                self._below[number] = self.total + int(np.searchsorted(hashes, hashes[place]))
        self.total += len(hashes)

    def finish(self) -> dict[str, int]:
        """Return the number of conformers in each split.

        Raises:
            DataError: There are fewer conformers than asked for, or none for training.
        """
        if not self._split.is_fractions and self._ends[-1] > self.total:
            rule = f"ask for no more conformers than there are ({int(self._ends[-1])})"
            raise DataError("--split", rule, f"{self.total} different ones", "Lower it")
        below = [self.total if b == _HASHES else n for b, n in zip(self.bounds, self._below, strict=True)]
        self.num_unused = self.total - below[-1]
        counts = dict(zip(SPLITS, np.diff([0, *below]).tolist(), strict=True))
        if not counts["train"]:
            rule, got = "leave conformers for training", f"none of {self.total}"
            raise DataError("--split", rule, got, "Give numbers like 8,1,1 in place of fractions, or add conformers")
        return counts


def find_below(hashes: np.ndarray[Any, np.dtype[np.uint64]], bound: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which hashes are below a bound, which may be one more than the largest hash."""
    return hashes < np.uint64(bound) if bound < _HASHES else np.ones(len(hashes), bool)


def find_split(value: int, bounds: Sequence[int]) -> str | None:
    """Return the split that a hash falls in, None where it is in none."""
    return next((name for name, bound in zip(SPLITS, bounds, strict=True) if value < bound), None)
