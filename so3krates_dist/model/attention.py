"""Euclidean attention: filters of pairs, feature attention (between invariant features) and geometric attention (along harmonics).

Euclidean transformer: arXiv 2309.15126; SO3LR's variant: 10.1021/jacs.5c09558. Filters are computed once per undirected pair:
the distance and the invariants of chi_j - chi_i are the same seen from both atoms, so w_ij = w_ji exactly, and the filters are
most of the arithmetic. Attention is not normalised by a softmax, and its sums carry the smooth envelope.

A block with a `compute_dtype` rounds projections, spherical filters and their products. Radial filters resolve distances: rounding
them too adds a third to two thirds to the error of forces, so they stay as they are, like all sums (tests/benchmarks/precision.md).
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear, silu

from so3krates_dist.model.layer import Linear, initialize_lecun
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.spherical import DegreeMaps


@dataclasses.dataclass(frozen=True, slots=True)
class PairGeometry:
    """What all layers need to know of the short pairs; directed edges are the pairs as given, then the same reversed."""

    first: torch.Tensor
    """(num_pairs,) int64"""
    second: torch.Tensor
    """(num_pairs,) int64"""
    receivers: torch.Tensor
    """(2 num_pairs,) int64"""
    senders: torch.Tensor
    """(2 num_pairs,) int64"""
    distances: torch.Tensor
    """(num_pairs,) Å"""
    envelope: torch.Tensor
    """(num_pairs, 1) cutoff function"""
    radial: torch.Tensor
    """(num_pairs, K) radial basis"""
    harmonics: torch.Tensor
    """(2 num_pairs, ev_dim) harmonics of the directions from receiver to sender"""


def record_attention(
    record: AttentionRecord, pairs: PairGeometry, feature: torch.Tensor, geometric: torch.Tensor, maps: DegreeMaps
) -> None:
    """Keep the coefficients of feature attention (num_edges, heads) and of geometric attention (num_edges, num_degrees)."""
    heads = tuple(f"head {i}" for i in range(feature.shape[1]))
    record.add("feature", heads, pairs.receivers, pairs.senders, feature)
    record.add("geometric", tuple(f"l = {d}" for d in maps.degrees), pairs.receivers, pairs.senders, geometric)


def compute_in(
    dtype: torch.dtype | None, function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    """Return a function of the inputs, with its matrix products done in `dtype`; None: in that of the inputs.

    The cast belongs to the forward pass: what is differentiated later, outside, has it in its graph. Converted weights are not kept
    by torch, since weights of a module that is evaluated without gradients may have changed until the next call.
    """
    if dtype is None:
        return function(inputs)
    with torch.autocast(inputs.device.type, dtype, cache_enabled=False):
        return function(inputs)


class PairNetwork(nn.Module):
    """Several two-layer networks on the same input, done as one: the first maps stacked, the second as a batch.

    Args:
        num_inputs: Width of the input.
        num_hidden: Width of each network's hidden layer.
        num_outputs: Width of each network's output.
        count: Number of networks.
    """

    def __init__(self, num_inputs: int, num_hidden: int, num_outputs: int, count: int) -> None:
        super().__init__()
        self.count, self.num_hidden = count, num_hidden
        self.hidden = Linear(num_inputs, count * num_hidden)
        self.weight = nn.Parameter(torch.empty(count, num_hidden, num_outputs))
        self.bias = nn.Parameter(torch.zeros(count, 1, num_outputs))
        initialize_lecun(self.weight, num_hidden)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (num_pairs, num_inputs) to (count, num_pairs, num_outputs)."""
        hidden = silu(self.hidden(inputs)).view(len(inputs), self.count, self.num_hidden)
        return torch.baddbmm(self.bias, hidden.transpose(0, 1), self.weight)

    def evaluate_one(self, number: int, inputs: torch.Tensor) -> torch.Tensor:
        """Map (num_pairs, num_inputs) to (num_pairs, num_outputs) with one of the networks, counted from 0."""
        rows = slice(number * self.num_hidden, (number + 1) * self.num_hidden)
        hidden = silu(linear(inputs, self.hidden.weight[rows], self.hidden.bias[rows]))
        return torch.addmm(self.bias[number], hidden, self.weight[number])


class HeadProjections(nn.Module):
    """Several projections per head, done as one batched product.

    Args:
        num_features: F.
        num_heads: Heads; each sees its contiguous chunk of F / num_heads features.
        count: Number of projections (query, key, value).
        bias: Whether they have biases (So3krates of 2022) or none (its successors).
    """

    def __init__(self, num_features: int, num_heads: int, count: int, bias: bool = False) -> None:
        super().__init__()
        width = num_features // num_heads
        self.num_heads, self.count = num_heads, count
        self.weight = nn.Parameter(torch.empty(num_heads, width, count * width))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, count * width)) if bias else None
        initialize_lecun(self.weight, width)

    def forward(self, inv_features: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Map (num_atoms, F) to `count` tensors (num_atoms, F), computed in `dtype`."""
        num_atoms, width = len(inv_features), self.weight.shape[1]
        heads = inv_features.view(num_atoms, self.num_heads, width).transpose(0, 1).to(dtype)
        projected = torch.bmm(heads, self.weight.to(dtype))
        if self.bias is not None:
            projected = projected + self.bias.to(dtype)
        projected = projected.view(self.num_heads, num_atoms, self.count, width)
        return list(projected.permute(2, 1, 0, 3).flatten(2).unbind(0))


class EuclideanAttention(nn.Module):
    """One attention block: messages to invariant features and to Euclidean variables.

    Args:
        num_features: F.
        num_heads: Heads of the feature attention.
        maps: Tables of the degrees; the geometric attention has one head per degree.
        num_radial_basis: K.
        filter_widths: Hidden widths of the radial and of the spherical filter networks.
        message_scale: Divisor of the attention coefficients (a mean number of neighbours), or None for the square root of
            the features per head.
    """

    compute_dtype: torch.dtype | None = None
    """of projections, spherical filters and their products; None: that of the features. See `Potential.set_precision`"""

    def __init__(
        self,
        num_features: int,
        num_heads: int,
        maps: DegreeMaps,
        *,
        num_radial_basis: int,
        filter_widths: tuple[int, int],
        message_scale: float | None,
    ) -> None:
        super().__init__()
        num_degrees = maps.contraction.shape[1]
        self.maps = maps
        self.heads = (num_heads, num_degrees)
        self.scales = tuple(message_scale or math.sqrt(num_features / heads) for heads in self.heads)
        self.radial_filter = PairNetwork(num_radial_basis, filter_widths[0], num_features, 2)
        self.spherical_filter = PairNetwork(num_degrees, filter_widths[1], num_features, 2)
        self.feature_projections = HeadProjections(num_features, num_heads, 3)
        self.geometric_projections = HeadProjections(num_features, num_degrees, 2)

    def forward(
        self,
        inv_features: torch.Tensor,
        ev_features: torch.Tensor | None,
        pairs: PairGeometry,
        record: AttentionRecord | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the messages.

        Args:
            inv_features: (num_atoms, F).
            ev_features: (num_atoms, ev_dim), or None where they are zero (the first layer): the spherical filter is then
                one constant vector.
            pairs: Geometry of the neighbour pairs.
            record: Keeps the attention coefficients.

        Returns:
            (num_atoms, F) and (num_atoms, ev_dim), to be added to x and chi.
        """
        dtype = self.compute_dtype or inv_features.dtype
        filters = self._compute_filters(ev_features, pairs).to(dtype)
        query, key, value = self.feature_projections(inv_features, dtype)
        feature_weights = self._compute_coefficients(query, key, filters[0], pairs, 0)
        geometric_query, geometric_key = self.geometric_projections(inv_features, dtype)
        geometric_weights = self._compute_coefficients(geometric_query, geometric_key, filters[1], pairs, 1)

        if record is not None:
            record_attention(record, pairs, feature_weights, geometric_weights, self.maps)
        num_atoms, num_features = inv_features.shape
        values = value.index_select(0, pairs.senders).view(*feature_weights.shape, num_features // self.heads[0])
        messages = (feature_weights[..., None] * values).view(-1, num_features)
        inv_messages = inv_features.new_zeros(num_atoms, num_features).index_add(0, pairs.receivers, messages)
        directed = self.maps.repeat(geometric_weights) * pairs.harmonics
        ev_messages = directed.new_zeros(num_atoms, directed.shape[1]).index_add(0, pairs.receivers, directed)
        return inv_messages, ev_messages

    def _compute_filters(self, ev_features: torch.Tensor | None, pairs: PairGeometry) -> torch.Tensor:
        """Return (2, num_pairs, F): the filters of feature and geometric attention."""
        if ev_features is None:
            invariants: torch.Tensor = pairs.radial.new_zeros(1, self.heads[1])
        else:
            difference = ev_features.index_select(0, pairs.second) - ev_features.index_select(0, pairs.first)
            invariants = self.maps.compute_invariants(difference)
        spherical = compute_in(self.compute_dtype, self.spherical_filter, invariants)
        radial: torch.Tensor = self.radial_filter(pairs.radial)
        return radial + spherical

    def _compute_coefficients(
        self, query: torch.Tensor, key: torch.Tensor, filters: torch.Tensor, pairs: PairGeometry, which: int
    ) -> torch.Tensor:
        """Return (2 num_pairs, heads): envelope / scale times the sum over a head's features of q_i w_ij k_j."""
        products = query.index_select(0, pairs.receivers) * key.index_select(0, pairs.senders)
        products = products.view(2, *filters.shape) * filters
        products = products.view(2, len(filters), self.heads[which], filters.shape[1] // self.heads[which])
        sums = products.sum(-1, dtype=pairs.envelope.dtype)
        return (sums * (pairs.envelope / self.scales[which])).view(-1, self.heads[which])
