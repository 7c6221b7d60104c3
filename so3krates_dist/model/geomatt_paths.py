"""Two ways to apply products of pair factors to the atoms' features: in matrices of all pairs, or along a list of pairs.

A pair factor is a matrix over the atoms of a structure for each channel f,

    A_ij,f = w_f . row_ij,    row_ij = [g(d_ij), 1],    w_f = [c_f W_f, c_f b_f]        (arXiv 2106.02549, folded)

which at large distance is the constant c_f b_f. Matrices hold it for all pairs; the list holds A_ij,f - c_f b_f for close pairs,
and the constant acts on the sum of a molecule's features, so that the cost grows with the number of atoms, not with its square.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast

import torch
from torch.autograd.function import Function, FunctionCtx

from so3krates_dist.graph import GraphBatch

MAX_BLOCK: Final = {"cpu": 2**18}
"""numbers in one temporary of a product along the list of pairs: on a CPU what its cache holds"""

MAX_BLOCK_ELSEWHERE: Final = 2**24

MAX_ENTRIES_PER_EDGE: Final = 8
"""up to how many times as many matrix entries as edges matrices are the faster way (tests/benchmarks/geomatt_paths.md)"""

MAX_ENTRIES: Final = 500_000
"""entries of all matrices of a batch, of which there are some hundred: more than this does not fit into memory well"""

Operator = Callable[[torch.Tensor], torch.Tensor]
"""sum over j of alpha_ij times the values of atom j, in the layout of the path"""


@dataclasses.dataclass(frozen=True, slots=True)
class PairRows:
    """Expansion of the distances of a batch."""

    first: torch.Tensor
    """(num_pairs,) int64"""
    second: torch.Tensor
    """(num_pairs,) int64"""
    rows: torch.Tensor
    """(num_pairs, D + 1): g(d) and 0 where factors tend to a constant, else the envelope times g(d) and 1"""
    self_row: torch.Tensor
    """(D + 1,): g(0) and the same last number"""
    has_tail: bool
    """whether pairs that are not listed, and all others too, have the constant part of the factors"""


class AttentionPath(abc.ABC):
    """How attention is applied to a batch; `weights` are (layers, factors, channels, D + 1), w above."""

    @abc.abstractmethod
    def spread(self, features: torch.Tensor) -> torch.Tensor:
        """Bring (num_atoms, V) into the layout of this path."""

    @abc.abstractmethod
    def collect(self, features: torch.Tensor) -> torch.Tensor:
        """Bring features from the layout of this path back to (num_atoms, V)."""

    @abc.abstractmethod
    def expand(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the pair factors of several streams from one matrix product."""

    @abc.abstractmethod
    def build_operators(
        self, weights: torch.Tensor, factors: torch.Tensor, num_steps: int, width: int, dtype: torch.dtype | None = None
    ) -> list[Operator]:
        """Return the attention of each layer of a stream.

        Args:
            weights: (layers, factors, channels, D + 1).
            factors: The same stream's from `expand`.
            num_steps: Steps of a walk, order - 1; one factor stands for all of them where it is shared.
            width: V of the values.
            dtype: Of products of matrices; None: that of the factors.
        """


def choose_path(batch: GraphBatch, pairs: PairRows, algorithm: str) -> AttentionPath:
    """Return the path that the configuration asks for.

    Args:
        batch: Structures.
        pairs: Their pairs.
        algorithm: `dense`, `neighbor_list`, or `auto`: the faster one of them.
    """
    if algorithm == "auto":
        entries = batch.num_graphs * _count_largest(batch) ** 2
        edges = 2 * len(pairs.first) + len(batch.atomic_numbers)
        algorithm = "dense" if entries <= min(MAX_ENTRIES_PER_EDGE * edges, MAX_ENTRIES) else "neighbor_list"
    return MatrixPath(batch, pairs) if algorithm == "dense" else ListPath(batch, pairs)


def _count_largest(batch: GraphBatch) -> int:
    return int(batch.num_atoms.max()) if batch.num_graphs else 0


def _get_factor(factors: torch.Tensor, step: int) -> torch.Tensor:
    """Return the factor of a step; the only one where it is shared."""
    return factors[min(step, len(factors) - 1)]


class MatrixPath(AttentionPath):
    """All pairs of each structure in matrices, padded to the largest structure with zero rows and columns.

    Padding is zero in every factor, since atoms in between are summed over too. Several images of one pair add up.
    """

    def __init__(self, batch: GraphBatch, pairs: PairRows) -> None:
        largest, num_graphs = _count_largest(batch), batch.num_graphs
        offsets = torch.cumsum(batch.num_atoms, 0) - batch.num_atoms
        numbers = torch.arange(len(batch.atomic_numbers), device=offsets.device)
        self.places = numbers - offsets[batch.graph_index]
        self.slots = batch.graph_index * largest + self.places
        self.offsets = offsets
        is_atom = torch.arange(largest, device=offsets.device) < batch.num_atoms[:, None]
        self.is_pair = is_atom[:, :, None] & is_atom[:, None, :]
        self.shape = (num_graphs, largest, largest)
        rows = pairs.rows.new_zeros(num_graphs * largest * largest, pairs.rows.shape[1])
        rows[self.slots * largest + self.places] = pairs.self_row
        if pairs.has_tail:
            rows[:, -1] = self.is_pair.flatten().to(rows.dtype)
        forward = self.slots[pairs.first] * largest + self.places[pairs.second]
        backward = self.slots[pairs.second] * largest + self.places[pairs.first]
        self.rows = rows.index_add(0, torch.cat([forward, backward]), torch.cat([pairs.rows, pairs.rows]))

    def spread(self, features: torch.Tensor) -> torch.Tensor:
        """Return (num_graphs, largest, V), padded with zeros."""
        padded = features.new_zeros(self.shape[0] * self.shape[1], features.shape[1])
        return padded.index_add(0, self.slots, features).view(*self.shape[:2], features.shape[1])

    def collect(self, features: torch.Tensor) -> torch.Tensor:
        """Return (num_atoms, V)."""
        return features.flatten(0, 1).index_select(0, self.slots)

    def expand(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return (layers, factors, channels, num_graphs, largest, largest) for each stream."""
        flat = [w.flatten(0, 2) for w in weights]
        channels = torch.split(torch.cat(flat) @ self.rows.T, [len(f) for f in flat])
        return [c.view(*w.shape[:3], *self.shape) for c, w in zip(channels, weights, strict=True)]

    def build_operators(
        self, weights: torch.Tensor, factors: torch.Tensor, num_steps: int, width: int, dtype: torch.dtype | None = None
    ) -> list[Operator]:
        """Form alpha, or apply one factor after the other where that is less arithmetic."""
        rounded = factors.to(dtype or factors.dtype)
        if num_steps > 1 and self.shape[1] * (num_steps - 1) > num_steps * width:
            return [functools.partial(_apply_chain, layer, num_steps) for layer in rounded]
        alphas = self.compute_alpha(rounded, num_steps, factors.dtype)
        return [functools.partial(_multiply, alpha) for alpha in alphas.to(rounded.dtype)]

    def compute_alpha(self, factors: torch.Tensor, num_steps: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return (layers, num_graphs, largest, largest): sum over channels of A^1 A^2 ... (arXiv 2106.02549).

        Args:
            factors: (layers, factors, channels, num_graphs, largest, largest).
            num_steps: Steps of a walk.
            dtype: Of the sum over channels; None: that of the factors.
        """
        by_factor = factors.unbind(1)
        chain = by_factor[0]
        for step in range(1, num_steps):
            chain = chain @ by_factor[min(step, len(by_factor) - 1)]
        return chain.sum(1, dtype=dtype)

    def list_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return receivers and senders of all ordered pairs, an atom with itself included, as `is_pair` selects them."""
        graph, receiver, sender = self.is_pair.nonzero(as_tuple=True)
        return self.offsets[graph] + receiver, self.offsets[graph] + sender


def _apply_chain(factors: torch.Tensor, num_steps: int, values: torch.Tensor) -> torch.Tensor:
    """Apply (factors, channels, graphs, N, N) to (graphs, N, V) from the right, in the dtype of the factors."""
    chain = values.to(factors.dtype)
    for step in reversed(range(num_steps)):
        chain = _get_factor(factors, step) @ chain
    return chain.sum(0, dtype=values.dtype)


def _multiply(alpha: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Apply (graphs, N, N) to (graphs, N, V), in the dtype of the former."""
    return (alpha @ values.to(alpha.dtype)).to(values.dtype)


class ListPath(AttentionPath):
    """Close pairs along a list, everything constant through sums over molecules; memory grows with atoms and pairs only."""

    def __init__(self, batch: GraphBatch, pairs: PairRows) -> None:
        self.pairs = pairs
        self.graph_index, self.num_graphs = batch.graph_index, batch.num_graphs

    def spread(self, features: torch.Tensor) -> torch.Tensor:
        """Leave the features as they are."""
        return features

    def collect(self, features: torch.Tensor) -> torch.Tensor:
        """Leave the features as they are."""
        return features

    def expand(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return (layers, factors, num_pairs, channels) for each stream."""
        flat = [w.flatten(0, 2) for w in weights]
        channels = torch.split(self.pairs.rows @ torch.cat(flat).T, [len(f) for f in flat], dim=1)
        return [c.view(len(c), *w.shape[:3]).permute(1, 2, 0, 3) for c, w in zip(channels, weights, strict=True)]

    def build_operators(
        self, weights: torch.Tensor, factors: torch.Tensor, num_steps: int, width: int, dtype: torch.dtype | None = None
    ) -> list[Operator]:
        """Apply one factor after the other, from the right."""
        selves, tails = weights @ self.pairs.self_row, weights[..., -1]

        def build(layer: int) -> Operator:
            return lambda values: self._apply_chain(factors[layer], selves[layer], tails[layer], num_steps, values)

        return [build(layer) for layer in range(len(weights))]

    def _apply_chain(
        self, factors: torch.Tensor, selves: torch.Tensor, tails: torch.Tensor, num_steps: int, values: torch.Tensor
    ) -> torch.Tensor:
        """Apply (factors, num_pairs, channels) and (factors, channels) constants to (num_atoms, V)."""
        chain = values[:, None, :].expand(len(values), factors.shape[-1], values.shape[1])
        for step in reversed(range(num_steps)):
            listed = multiply_symmetric(_get_factor(factors, step), chain, self.pairs.first, self.pairs.second)
            moved = listed + _get_factor(selves, step)[:, None] * chain
            if self.pairs.has_tail:
                sums = chain.new_zeros(self.num_graphs, *chain.shape[1:]).index_add(0, self.graph_index, chain)
                moved = moved + (_get_factor(tails, step)[:, None] * sums).index_select(0, self.graph_index)
            chain = moved
        return chain.sum(1)


def _list_blocks(num_pairs: int, features: torch.Tensor) -> Iterator[slice]:
    largest = MAX_BLOCK.get(features.device.type, MAX_BLOCK_ELSEWHERE)
    size = max(1, largest // max(1, features.shape[1] * features.shape[2]))
    return (slice(start, start + size) for start in range(0, num_pairs, size))


class _SymmetricProduct(Function):
    """(A h)_i,f,v = sum over the edges ij of A_ij,f h_j,f,v, for A given once for both directions.

    Done in blocks of pairs, so that no number for each pair, channel and feature is kept. Its derivatives are this product and
    `_PairProduct`, and theirs are these two again: any derivative exists and needs no more memory.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, factor: torch.Tensor, features: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(factor, features, first, second)
        result = features.new_zeros(features.shape)
        for block in _list_blocks(len(first), features):
            i, j, weights = first[block], second[block], factor[block, :, None]
            result.index_add_(0, i, weights * features.index_select(0, j))
            result.index_add_(0, j, weights * features.index_select(0, i))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor, features, first, second = ctx.saved_tensors
        (gradient,) = gradients
        return (
            multiply_pairs(gradient, features, first, second) if ctx.needs_input_grad[0] else None,
            multiply_symmetric(factor, gradient, first, second) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _PairProduct(Function):
    """sum over v of g_i,f,v h_j,f,v + g_j,f,v h_i,f,v for each pair ij and channel f, in blocks of pairs."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, left: torch.Tensor, right: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(left, right, first, second)
        result = left.new_zeros(len(first), left.shape[1])
        for block in _list_blocks(len(first), left):
            i, j = first[block], second[block]
            products = left.index_select(0, i) * right.index_select(0, j)
            products.addcmul_(left.index_select(0, j), right.index_select(0, i))
            result[block] = products.sum(-1)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right, first, second = ctx.saved_tensors
        (gradient,) = gradients
        return (
            multiply_symmetric(gradient, right, first, second) if ctx.needs_input_grad[0] else None,
            multiply_symmetric(gradient, left, first, second) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def multiply_symmetric(
    factor: torch.Tensor, features: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Return (num_atoms, F, V): sums over both directions of each pair of its factor times the other atom's features.

    Args:
        factor: (num_pairs, F).
        features: (num_atoms, F, V).
        first: (num_pairs,) int64.
        second: (num_pairs,) int64.
    """
    return cast(torch.Tensor, _SymmetricProduct.apply(factor, features, first, second))  # type: ignore[no-untyped-call] # torch's


def multiply_pairs(left: torch.Tensor, right: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return (num_pairs, F): products of the features (num_atoms, F, V) of the two atoms of each pair, in both directions."""
    return cast(torch.Tensor, _PairProduct.apply(left, right, first, second))  # type: ignore[no-untyped-call] # torch's
