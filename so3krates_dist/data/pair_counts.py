"""Sizes and labels of a conformer in a few integers: pairs at tabulated cutoffs, and flags.

Whoever fills batches by cost needs the number of neighbour pairs for the cutoff of any model, without looking at a structure.
Counts at `PAIR_CUTOFFS` are made once, when a data set is written; `estimate_pairs` gives the others.
"""

import dataclasses
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from so3krates_dist.data.codec import LABELS
from so3krates_dist.data.neighbors import MAX_ATOMS_ALL_PAIRS, find_squared_distances, spans_box
from so3krates_dist.graph import Graph, IntArray

UIntArray = npt.NDArray[np.uint32]

PAIR_CUTOFFS: Final = (4.0, 5.0, 6.0, 8.0, 12.0)
"""Å; undirected pairs closer than these are counted for every conformer"""

FLAGS: Final = {label: 1 << bit for bit, label in enumerate(LABELS)}
"""What `sample_flags & FLAGS[label]` is not zero for: conformers that have the label"""

PERIODIC: Final = 1 << len(LABELS)
"""Flag of conformers that repeat along any lattice vector"""

_MAX_COUNTED: Final = 6.0
"""Å; pairs of periodic and large structures are counted up to here, and scaled with the volume beyond"""

_FAR: Final = np.array(PAIR_CUTOFFS) > _MAX_COUNTED
_FAR_VOLUMES: Final = (np.array(PAIR_CUTOFFS)[_FAR] / _MAX_COUNTED) ** 3
_CUTS: Final = len(PAIR_CUTOFFS)


def count_pairs(graph: Graph) -> UIntArray:
    """Count the undirected pairs of a structure that are closer than each of `PAIR_CUTOFFS`.

    Positions are taken as they are stored, in single precision. Exact for molecules of up to 150 atoms, and up to 6 Å for all;
    beyond, counts of larger and periodic structures are those at 6 Å times the ratio of the volumes.

    Args:
        graph: Structure; its pairs are not needed.

    Returns:
        (5,) counts; zeros where positions are not finite, or a periodic structure has no cell or a flat one.
    """
    stored = dataclasses.replace(graph, positions=np.asarray(graph.positions, np.float32))
    if not np.isfinite(stored.positions).all() or (graph.is_periodic and not spans_box(graph)):
        return np.zeros(_CUTS, np.uint32)
    squared = find_squared_distances(stored, _MAX_COUNTED)
    counts = np.array([np.count_nonzero(squared < cutoff * cutoff) for cutoff in PAIR_CUTOFFS], np.float64)
    if graph.is_periodic or graph.num_atoms > MAX_ATOMS_ALL_PAIRS:
        counts[_FAR] = counts[~_FAR][-1] * _FAR_VOLUMES
    most = 2**32 - 1 if graph.is_periodic else graph.num_atoms * (graph.num_atoms - 1) / 2
    return np.rint(np.minimum(counts, most)).astype(np.uint32)


def estimate_pairs(
    sample_atoms: npt.ArrayLike, sample_pairs: npt.ArrayLike, sample_flags: npt.ArrayLike, cutoff: float
) -> IntArray:
    """Return about how many undirected pairs conformers have within a cutoff; exact at those of `PAIR_CUTOFFS`.

    Between them, counts are interpolated linearly in the volume r³; below the first and above the last they go with it. Sums
    over several molecules may be given for single ones (with `PERIODIC` as flag, since only single molecules are bounded by all
    of their pairs), where the cutoff is finite.

    Args:
        sample_atoms: (n,) atoms.
        sample_pairs: (n, 5) pairs within `PAIR_CUTOFFS`.
        sample_flags: (n,) flags, or one for all.
        cutoff: Å; infinite: all pairs of each molecule.

    Returns:
        (n,) pairs.
    """
    atoms = np.asarray(sample_atoms).astype(np.int64)
    all_pairs = atoms * (atoms - 1) // 2
    if math.isinf(cutoff):
        return all_pairs
    table = np.asarray(sample_pairs)
    if cutoff in PAIR_CUTOFFS:
        return table[..., PAIR_CUTOFFS.index(cutoff)].astype(np.int64)
    above = min(sum(r < cutoff for r in PAIR_CUTOFFS), _CUTS - 1)
    far = table[..., above].astype(np.float64)
    if cutoff < PAIR_CUTOFFS[0] or cutoff > PAIR_CUTOFFS[-1]:
        estimate = far * _cube(cutoff / PAIR_CUTOFFS[above])
    else:
        inner, outer = _cube(PAIR_CUTOFFS[above - 1]), _cube(PAIR_CUTOFFS[above])
        near = table[..., above - 1].astype(np.float64)
        estimate = near + (far - near) * ((_cube(cutoff) - inner) / (outer - inner))
    pairs = np.rint(estimate).astype(np.int64)
    periodic = (np.asarray(sample_flags) & PERIODIC) != 0
    return np.where(periodic, pairs, np.minimum(pairs, all_pairs))


def _cube(value: float) -> float:
    """Return the third power; the order of the data hangs on its last bit, which `pow` need not give alike on all machines."""
    return value * value * value


def find_flags(graph: Graph) -> int:
    """Return which labels a structure has, and whether it is periodic, as a sum of `FLAGS` and `PERIODIC`."""
    present = sum(bit for label, bit in FLAGS.items() if getattr(graph, label) is not None)
    return present | (PERIODIC if graph.is_periodic else 0)
