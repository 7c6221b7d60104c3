"""So3krates as published in 2022 (NeurIPS; arXiv 2205.14276): attention between neighbours, and between atoms with close SPHC.

Each atom has invariant features x and spherical harmonic coordinates chi (SPHC), one vector of 2 l + 1 numbers per degree. The
non-local option gives every atom a second neighbourhood, in the space of SPHC instead of positions, through which a layer reaches
over any distance. Directions are those of the paper: from the neighbour to the centre, r_ij = R_i - R_j.

What this model has and its successors have not: norms of SPHC, which are not differentiable at zero (see `compute_lengths`): at
geometries so symmetric that SPHC or differences of them vanish (methane) the energy has a cone, so forces jump and second
derivatives mean nothing: no vibrations of symmetric molecules. And, if non-local, energies that do not add up over distant
molecules, because the spherical cutoff is one over the number of atoms.
"""

import dataclasses
import functools
import math
from typing import Final

import torch
from torch import nn
from torch.nn.functional import silu

from so3krates_dist.config import So3kratesSection
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, GraphBatch
from so3krates_dist.model.attention import HeadProjections, PairNetwork, compute_in
from so3krates_dist.model.constants import ConstantsModule
from so3krates_dist.model.exact import multiply_exactly
from so3krates_dist.model.layer import AttentionNetwork, Linear, build_layer_norm
from so3krates_dist.model.recompute import carry
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.spherical import (
    DegreeMaps,
    compute_lengths,
    compute_self_couplings,
    find_vanishing,
)

SELF_MIXING_STD: Final = 0.1
"""standard deviation of the initial factors of the self-mixing, the authors' value"""


@dataclasses.dataclass(frozen=True, slots=True)
class So3kratesPairs:
    """What all layers need to know of the pairs: those of geometric attention, the short ones first.

    Directed edges are the pairs as given, then the same reversed. Without non-local attention all pairs are short.
    """

    first: torch.Tensor
    """(num_pairs,) int64"""
    second: torch.Tensor
    """(num_pairs,) int64"""
    num_short: int
    """pairs within the cutoff"""
    envelope: torch.Tensor
    """(num_pairs,) cutoff function, 0 for the others"""
    radial: torch.Tensor
    """(num_short, K) radial basis times the cutoff function"""
    harmonics: torch.Tensor
    """(2, num_pairs, ev_dim) harmonics of the directions from sender to receiver"""
    sphc_cutoffs: torch.Tensor | None
    """(num_atoms,) where the softmax over SPHC distances is cut off; None without non-local attention"""
    receivers: torch.Tensor
    """(2 num_pairs,) int64"""
    senders: torch.Tensor
    """(2 num_pairs,) int64"""
    short_receivers: torch.Tensor
    """(2 num_short,) int64"""
    short_senders: torch.Tensor
    """(2 num_short,) int64"""


def compute_spherical_envelope(fractions: torch.Tensor) -> torch.Tensor:
    """Return 1 - 28 u^6 + 48 u^7 - 21 u^8 for u below 1, 0 above: DimeNet's polynomial envelope with p = 6 (arXiv 2003.03123).

    Evaluated as (1 - u)^3 (1 + 3 u + 6 u^2 + 10 u^3 + 15 u^4 + 21 u^5), the same without its cancellation near 1.

    Args:
        fractions: (...) u, at least 0.
    """
    u = fractions.clamp(max=1.0)
    rest = 1 - u
    return rest * rest * rest * (1 + u * (3 + u * (6 + u * (10 + u * (15 + 21 * u)))))


def compute_spherical_neighborhood(
    lengths: torch.Tensor, receivers: torch.Tensor, sphc_cutoffs: torch.Tensor
) -> torch.Tensor:
    """Return how much each sender belongs to its receiver's neighbourhood in SPHC, between 0 and 1.

    A softmax over the senders of each receiver turns distances into shares, small ones for close SPHC, and the envelope keeps
    those below the receiver's cutoff (arXiv 2205.14276, spherical neighbourhood).

    Args:
        lengths: (num_edges,) distances between the SPHC of receiver and sender.
        receivers: (num_edges,).
        sphc_cutoffs: (num_atoms,) upper end of the shares.
    """
    start = torch.zeros_like(sphc_cutoffs)
    # Lengths are never below the zero of the start.
    largest = start.scatter_reduce(0, receivers, lengths.detach(), "amax")
    exponentials = torch.exp(lengths - largest.index_select(0, receivers))
    sums = start.index_add(0, receivers, exponentials)
    shares = exponentials / (sums * sphc_cutoffs).index_select(0, receivers)
    return compute_spherical_envelope(shares)


class So3kratesAttention(nn.Module):
    """Feature attention between neighbours, and geometric attention that may be non-local; arXiv 2205.14276.

    Filters depend on the distance and on the distances between SPHC of each degree, the same seen from both atoms, and are
    computed once per undirected pair. The radial filter network's input carries the cutoff function, so pairs beyond the
    cutoff all get its value at zero.

    Args:
        section: Sizes.
        maps: Tables of the degrees; the geometric attention has one head per degree.
    """

    compute_dtype: torch.dtype | None = None
    """of projections, spherical filters and their products; None: that of the features. See `Potential.set_precision`"""

    def __init__(self, section: So3kratesSection, maps: DegreeMaps) -> None:
        super().__init__()
        features, num_degrees = section.num_features, len(maps.degrees)
        self.maps = maps
        self.num_heads = section.num_heads
        widths = section.radial_filter_width or features, section.spherical_filter_width or max(features // 4, 1)
        self.radial_filter = PairNetwork(section.num_radial_basis, widths[0], features, 2)
        self.spherical_filter = PairNetwork(num_degrees, widths[1], features, 2)
        self.feature_projections = HeadProjections(features, section.num_heads, 3, bias=True)
        self.geometric_projections = HeadProjections(features, num_degrees, 2, bias=True)

    def forward(
        self,
        inv_features: torch.Tensor,
        ev_features: torch.Tensor,
        pairs: So3kratesPairs,
        record: AttentionRecord | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the messages.

        Args:
            inv_features: (num_atoms, F).
            ev_features: (num_atoms, ev_dim) SPHC.
            pairs: Geometry of the pairs.
            record: Keeps the attention coefficients.

        Returns:
            (num_atoms, F) and (num_atoms, ev_dim), to be added to x and chi.
        """
        receivers, senders = pairs.receivers, pairs.senders
        short_receivers, short_senders = pairs.short_receivers, pairs.short_senders
        dtype = self.compute_dtype or inv_features.dtype
        squares, sizes = self._compute_squares(ev_features, pairs)
        feature_filters, geometric_filters = self._compute_filters(compute_lengths(squares, sizes), pairs)

        query, key, value = self.feature_projections(inv_features, dtype)
        products = query.index_select(0, short_receivers) * key.index_select(0, short_senders)
        short_envelope = pairs.envelope[: pairs.num_short].repeat(2)
        feature_weights = _reduce_heads(products, feature_filters.to(dtype), self.num_heads, short_envelope)

        query, key = self.geometric_projections(inv_features, dtype)
        products = query.index_select(0, receivers) * key.index_select(0, senders)
        envelope = pairs.envelope.repeat(2)
        if pairs.sphc_cutoffs is not None:
            lengths = compute_lengths(squares.sum(-1), sizes.squeeze(-1)).repeat(2)
            envelope = envelope + compute_spherical_neighborhood(lengths, receivers, pairs.sphc_cutoffs)
        geometric_weights = _reduce_heads(products, geometric_filters.to(dtype), len(self.maps.degrees), envelope)

        if record is not None:
            heads = tuple(f"head {i}" for i in range(self.num_heads))
            record.add("feature", heads, short_receivers, short_senders, feature_weights)
            degrees = tuple(f"l = {degree}" for degree in self.maps.degrees)
            record.add("geometric", degrees, receivers, senders, geometric_weights)
        values = value.index_select(0, short_senders).view(*feature_weights.shape, value.shape[1] // self.num_heads)
        messages = (feature_weights[..., None] * values).flatten(1)
        inv_messages = torch.zeros_like(inv_features).index_add(0, short_receivers, messages)
        directed = self.maps.repeat(geometric_weights) * pairs.harmonics.flatten(0, 1)
        return inv_messages, torch.zeros_like(ev_features).index_add(0, receivers, directed)

    def _compute_squares(self, ev_features: torch.Tensor, pairs: So3kratesPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return squared differences of SPHC (num_pairs, num_degrees), and the squared sizes (num_pairs, 1) they come from."""
        difference = ev_features.index_select(0, pairs.first) - ev_features.index_select(0, pairs.second)
        sizes = ev_features.detach().square().sum(-1, keepdim=True)
        sizes = sizes.index_select(0, pairs.first) + sizes.index_select(0, pairs.second)
        return self.maps.sum_squares(difference), sizes

    def _compute_filters(self, lengths: torch.Tensor, pairs: So3kratesPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the filters of feature attention (num_short, F) and of geometric attention (num_pairs, F).

        Args:
            lengths: (num_pairs, num_degrees) distances between SPHC.
            pairs: Geometry of the pairs.
        """
        near_lengths = lengths[: pairs.num_short]
        near = self.radial_filter(pairs.radial) + compute_in(self.compute_dtype, self.spherical_filter, near_lengths)
        if pairs.sphc_cutoffs is None:
            return near[0], near[1]
        beyond_cutoff = self.radial_filter.evaluate_one(1, pairs.radial.new_zeros(1, pairs.radial.shape[1]))
        evaluate = functools.partial(self.spherical_filter.evaluate_one, 1)
        far = beyond_cutoff + compute_in(self.compute_dtype, evaluate, lengths[pairs.num_short :])
        return near[0], torch.cat([near[1], far])


def _reduce_heads(
    products: torch.Tensor, filters: torch.Tensor, num_heads: int, envelope: torch.Tensor
) -> torch.Tensor:
    """Return (num_edges, heads): envelope times the sum over a head's features of q_i w_ij k_j over the root of their number.

    Args:
        products: (num_edges, F) q_i k_j, first the pairs as given, then reversed.
        filters: (num_pairs, F).
        num_heads: Heads.
        envelope: (num_edges,) weight of each edge, in the dtype of the result.
    """
    width = filters.shape[1] // num_heads
    filtered = products.view(2, *filters.shape) * filters
    sums = filtered.view(len(products), num_heads, width).sum(-1, dtype=envelope.dtype)
    return sums / math.sqrt(width) * envelope[:, None]


class SelfMixing(ConstantsModule):
    """Couples the SPHC of an atom, two different degrees at a time, to each degree (arXiv 2205.14276).

    Args:
        degrees: Degrees of the SPHC.
        parity: Keep only couplings whose result turns under inversion as its degree does.
    """

    left: torch.Tensor
    right: torch.Tensor
    coefficients: torch.Tensor
    positions: torch.Tensor

    def __init__(self, degrees: tuple[int, ...], parity: bool) -> None:
        super().__init__()
        tables = compute_self_couplings(tuple(degrees), parity)
        for name, table in zip(("left", "right", "coefficients", "positions"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        self.factors = nn.Parameter(SELF_MIXING_STD * torch.randn((len(degrees),) * 3))

    def forward(self, ev_features: torch.Tensor) -> torch.Tensor:
        """Map (num_atoms, ev_dim) to the same shape."""
        products = ev_features.index_select(1, self.left) * ev_features.index_select(1, self.right)
        mixing = self.coefficients.to(products.dtype) * self.factors.flatten()[self.positions]
        return multiply_exactly(products, mixing)


class Interaction(nn.Module):
    """Lets features and SPHC of one atom see each other (arXiv 2205.14276, interaction block).

    With the norms per degree and the self-mixed SPHC chi':
    [a1, a2, b1, b2] = W [x, |chi|] + c;  a3 = W' |chi'| + c';
    x <- (x + a1 + a2 a3) / sqrt(3);  chi_l <- chi_l + b1_l chi_l + b2_l chi'_l.

    Args:
        num_features: F.
        maps: Tables of the degrees.
        parity: See `SelfMixing`.
    """

    def __init__(self, num_features: int, maps: DegreeMaps, parity: bool) -> None:
        super().__init__()
        self.maps = maps
        num_degrees = len(maps.degrees)
        self.sizes = [num_features, num_features, num_degrees, num_degrees]
        self.self_mixing = SelfMixing(maps.degrees, parity)
        self.linear = Linear(num_features + num_degrees, sum(self.sizes))
        self.mixed_linear = Linear(num_degrees, num_features)

    def forward(self, inv_features: torch.Tensor, ev_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (num_atoms, F) and (num_atoms, ev_dim) to the same shapes."""
        squares = self.maps.sum_squares(ev_features)
        sizes = squares.sum(-1, keepdim=True)
        mixed = self.self_mixing(ev_features)
        # A product of two vectors has the size of their square, and its rounding likewise.
        mixed_lengths = compute_lengths(self.maps.sum_squares(mixed), sizes * sizes)
        inputs = torch.cat([inv_features, compute_lengths(squares, sizes)], dim=-1)
        shift, gate, own_factors, mixed_factors = self.linear(inputs).split(self.sizes, dim=-1)
        inv_features = (inv_features + shift + gate * self.mixed_linear(mixed_lengths)) / math.sqrt(3)
        change = self.maps.repeat(own_factors) * ev_features + self.maps.repeat(mixed_factors) * mixed
        return inv_features, ev_features + change


class SphcNorm(nn.Module):
    """chi_l <- g_l chi_l / |chi_l| with a learned factor for each degree; SPHC of length zero stay zero (arXiv 2205.14276).

    Args:
        maps: Tables of the degrees.
    """

    def __init__(self, maps: DegreeMaps) -> None:
        super().__init__()
        self.maps = maps
        self.weight = nn.Parameter(torch.ones(len(maps.degrees)))

    def forward(self, ev_features: torch.Tensor) -> torch.Tensor:
        """Map (num_atoms, ev_dim) to the same shape."""
        squares = self.maps.sum_squares(ev_features)
        vanishing = find_vanishing(squares, squares.sum(-1, keepdim=True))
        factors = torch.where(vanishing, 0.0, self.weight * torch.where(vanishing, 1.0, squares).rsqrt())
        return self.maps.repeat(factors) * ev_features


class So3kratesLayer(nn.Module):
    """Attention and interaction, each followed by normalisation where asked for.

    Args:
        section: Sizes and options.
        maps: Tables of the degrees.
        is_last: Nothing reads this layer's SPHC, so they are not normalised: the factors would never get a gradient.
    """

    def __init__(self, section: So3kratesSection, maps: DegreeMaps, is_last: bool) -> None:
        super().__init__()
        features = section.num_features
        self.attention = So3kratesAttention(section, maps)
        self.attention_norm = build_layer_norm(features, section.layer_norm)
        self.attention_sphc_norm = SphcNorm(maps) if section.sphc_norm else nn.Identity()
        self.interaction = Interaction(features, maps, section.parity)
        self.interaction_norm = build_layer_norm(features, section.layer_norm)
        self.interaction_sphc_norm = SphcNorm(maps) if section.sphc_norm and not is_last else nn.Identity()

    def forward(
        self,
        inv_features: torch.Tensor,
        ev_features: torch.Tensor,
        pairs: So3kratesPairs,
        record: AttentionRecord | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new features.

        Args:
            inv_features: (num_atoms, F).
            ev_features: (num_atoms, ev_dim) SPHC.
            pairs: Geometry of the pairs.
            record: Keeps the attention coefficients.
        """
        inv_messages, ev_messages = self.attention(inv_features, ev_features, pairs, record)
        inv_features = self.attention_norm(inv_features + inv_messages)
        ev_features = self.attention_sphc_norm(ev_features + ev_messages)
        inv_features, ev_features = self.interaction(inv_features, ev_features)
        return self.interaction_norm(inv_features), self.interaction_sphc_norm(ev_features)


class So3krates(AttentionNetwork):
    """Per-atom energies from neighbour pairs and, if non-local, from all pairs of a structure.

    Args:
        section: Sizes and options.
        mean_neighbors: Not used by this model.
        num_embeddings: Rows of the element table.
    """

    def __init__(
        self, section: So3kratesSection, mean_neighbors: float = 1.0, num_embeddings: int = MAX_ATOMIC_NUMBER + 1
    ) -> None:
        super().__init__(section, num_embeddings)
        self.non_local, self.sphc_cutoff, self.initial_sphc = (
            section.non_local, section.sphc_cutoff, section.initial_sphc
        )  # fmt: skip
        last = section.num_layers - 1
        self.layers = nn.ModuleList(So3kratesLayer(section, self.maps, i == last) for i in range(section.num_layers))
        self.readout_hidden = Linear(section.num_features, section.num_features)
        self.readout = Linear(section.num_features, 1)

    def forward(
        self, batch: GraphBatch, vectors: torch.Tensor, record: AttentionRecord | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the learned part of each atom's energy, as `Network` describes.

        Args:
            batch: Structures; their positions are not read.
            vectors: (num_pairs, 3) Å from the first to the second atom of each pair.
            record: Keeps the attention coefficients.
        """
        pairs = carry(self._build_pairs, batch, vectors)
        inv_features = self.embedding(batch.atomic_numbers)
        ev_features = carry(self._start_sphc, len(inv_features), pairs)
        inv_features = self.run_layers(inv_features, ev_features, pairs, record)
        return {"atom_energies": self.run(self._read_out, inv_features)}

    def _read_out(self, inv_features: torch.Tensor) -> torch.Tensor:
        energies: torch.Tensor = self.readout(silu(self.readout_hidden(inv_features)))
        return energies.squeeze(-1)

    def _build_pairs(self, batch: GraphBatch, vectors: torch.Tensor) -> So3kratesPairs:
        num_short = batch.num_short_pairs
        num_pairs = len(vectors) if self.non_local else num_short
        vectors = vectors[:num_pairs]
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        harmonics = self.harmonics(vectors / distances[:, None])
        short_envelope = self.compute_envelope(distances[:num_short], self.cutoff)
        first, second = batch.pair_first[:num_pairs], batch.pair_second[:num_pairs]
        short_first, short_second = first[:num_short], second[:num_short]
        return So3kratesPairs(
            first=first,
            second=second,
            num_short=num_short,
            receivers=torch.cat([first, second]),
            senders=torch.cat([second, first]),
            short_receivers=torch.cat([short_first, short_second]),
            short_senders=torch.cat([short_second, short_first]),
            envelope=torch.cat([short_envelope, distances.new_zeros(num_pairs - num_short)]),
            radial=short_envelope[:, None] * self.radial_basis(distances[:num_short]),
            # Seen from the first atom, the direction from the neighbour to the centre is that of minus the vector.
            harmonics=torch.stack([self.maps.invert(harmonics), harmonics]),
            sphc_cutoffs=self._compute_sphc_cutoffs(batch, vectors.dtype) if self.non_local else None,
        )

    def _compute_sphc_cutoffs(self, batch: GraphBatch, dtype: torch.dtype) -> torch.Tensor:
        """Return (num_atoms,): the fixed cutoff, or one over the number of atoms of each atom's own structure."""
        if self.sphc_cutoff:
            return torch.full_like(batch.graph_index, self.sphc_cutoff, dtype=dtype)
        return (1 / batch.num_atoms.to(dtype)).index_select(0, batch.graph_index)

    def _start_sphc(self, num_atoms: int, pairs: So3kratesPairs) -> torch.Tensor:
        """Return the first SPHC (num_atoms, ev_dim).

        published: sum_j phi_ij Y(u_ij) / sum_j phi_ij, zero for atoms without neighbours (arXiv 2205.14276). An atom that loses
        its last neighbour has SPHC of full length until then, so energies jump there, unlike anywhere else at the cutoff.
        smooth: sum_j phi_ij Y(u_ij) / (1 + sum_j phi_ij), not of the paper: nearly the same for many neighbours, and it goes to
        zero with the last one's phi. (Normalised SPHC keep their length however short they were, and jump all the same.)
        """
        harmonics = pairs.harmonics[:, : pairs.num_short].flatten(0, 1)
        sums = harmonics.new_zeros(num_atoms, harmonics.shape[1])
        if self.initial_sphc == "zero":
            return sums
        weights, receivers = pairs.envelope[: pairs.num_short].repeat(2)[:, None], pairs.short_receivers
        sums = sums.index_add(0, receivers, weights * harmonics)
        totals = sums.new_zeros(num_atoms, 1).index_add(0, receivers, weights)
        if self.initial_sphc == "smooth":
            return sums / (1 + totals)
        # phi may be so small that derivatives of the quotient are beyond the dtype: such neighbours are none.
        has_neighbors = totals > torch.finfo(totals.dtype).eps
        return torch.where(has_neighbors, sums / torch.where(has_neighbors, totals, 1.0), 0.0)
