"""Permutations that are functions of a key: nothing is stored, and they are the same for ever.

They sort or iterate hashes (splitmix64), not numpy's generators, whose streams may change between versions (NEP 19).
"""

from typing import Final

import numpy as np
import numpy.typing as npt

UIntArray = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

_ROUNDS: Final = 8
"""of the Feistel network; four make a pseudorandom permutation of ideal round functions (Luby, Rackoff, 10.1137/0217022)"""
_INCREMENT, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MASK: Final = 2**64 - 1


def hash_integers(values: npt.ArrayLike, *key: int) -> UIntArray:
    """Hash integers with a key (splitmix64: Steele, Lea, Flood, OOPSLA 2014, 10.1145/2660193.2660195).

    Args:
        values: (...) integers of at least zero.
        key: Integers that choose the hash function.
    """
    with np.errstate(over="ignore"):
        mixed: UIntArray = np.zeros((), np.uint64)
        for part in key:
            mixed = _mix(mixed ^ np.uint64(part & _MASK))
        return _mix(np.asarray(values, np.uint64) ^ mixed)


def _mix(values: UIntArray) -> UIntArray:
    values = values + _INCREMENT
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    mixed: UIntArray = values ^ (values >> np.uint64(31))
    return mixed


def permute(count: int, *key: int) -> IntArray:
    """Return a permutation of 0 ... count-1 that depends on the key alone."""
    return np.argsort(hash_integers(np.arange(count), *key), kind="stable")


def permute_at(positions: npt.ArrayLike, count: int, *key: int) -> IntArray:
    """Return single entries of a permutation of 0 ... count-1 that depends on the key alone.

    A Feistel network on the smallest square power of two that holds `count`; what falls outside goes through it again until it
    is inside (cycle walking: Black and Rogaway, CT-RSA 2002, 10.1007/3-540-45760-7_9). Needs no memory, whatever the count.

    Args:
        positions: (...) from 0 to count-1.
        count: Length of the permutation.
        key: Chooses the permutation.
    """
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    values = np.array(positions, np.uint64, ndmin=1)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (hash_integers(right, *key, number) & low)
        values[outside] = (left << half) | right
        outside[outside] = values[outside] >= count
    return values.astype(np.int64).reshape(np.shape(positions))
