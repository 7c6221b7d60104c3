"""Which conformers of a data set have the same geometry, found in limited memory however many there are.

Hashes go to temporary files, each of which holds one range of them, and a file at a time is sorted.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

_BUCKET_ROWS: Final = 4_000_000
"""64 MB of hashes and numbers"""
_MAX_BUCKETS: Final = 256
"""open files"""


class GeometryHashes:
    """Collects the hashes of all geometries of a data set. Use it as a context manager: it holds temporary files.

    Args:
        num_conformers: About how many there will be.
        bucket_rows: How many may be in memory at a time.
    """

    def __init__(self, num_conformers: int, bucket_rows: int = _BUCKET_ROWS) -> None:
        count = min(max(1, math.ceil(num_conformers / bucket_rows)), _MAX_BUCKETS)
        self._files = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115 - closed by `__exit__`

    def __enter__(self) -> "GeometryHashes":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, hashes: Sequence[int], numbers: Sequence[int]) -> None:
        """Add some conformers.

        Args:
            hashes: What `hash_geometry` gives, below 2^64.
            numbers: Of the conformers in the data set.
        """
        rows = np.stack([np.array(hashes, np.uint64), np.array(numbers, np.uint64)], axis=1)
        buckets = (rows[:, 0] >> np.uint64(32)) * np.uint64(len(self._files)) >> np.uint64(32)
        for number in np.unique(buckets).tolist():
            self._files[number].write(rows[buckets == number].tobytes())

    def iter_repeats(self) -> Iterator[tuple[int, int]]:
        """Yield the numbers of two conformers for each one that has the geometry of an earlier one: that one's first."""
        for file in self._files:
            file.seek(0)
            rows = np.frombuffer(file.read(), np.uint64).reshape(-1, 2)
            rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
            changes = rows[1:, 0] != rows[:-1, 0]
            starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(rows)), bool), changes]))
            firsts = np.repeat(starts, np.diff([*starts, len(rows)]))
            for row in np.flatnonzero(firsts != np.arange(len(rows))).tolist():
                yield int(rows[firsts[row], 1]), int(rows[row, 1])
