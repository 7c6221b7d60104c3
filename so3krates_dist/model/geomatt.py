"""GeomAtt (Frank and Chmiela, arXiv 2106.02549): attention made of distances alone, and its variant with a smooth cutoff.

Attention of order k is a learned sum over walks of k - 1 pairs: a product of k - 1 matrices over the atoms, summed over channels.
It depends on neither elements nor features, is signed, and has no softmax. Each order is a stream of its own; streams meet in the
readout. The published model couples all atoms of a molecule; the variant lets pair factors vanish at a cutoff.
"""

import abc
import math
from typing import Final, cast

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from so3krates_dist.config import GeomAttEnvelopeSection, GeomAttSection
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, GraphBatch
from so3krates_dist.model.attention import compute_in
from so3krates_dist.model.constants import ConstantsModule
from so3krates_dist.model.geomatt_paths import AttentionPath, MatrixPath, PairRows, choose_path
from so3krates_dist.model.recompute import Checkpointing
from so3krates_dist.model.record import AttentionRecord

EMBEDDING_GAIN: Final = 1.414
"""the authors' gain of the elements' initial vectors"""

_LINEAR_ABOVE: Final = 40.0
"""softplus(x) is x to the last bit of float64 from here on; torch's own limit of 20 leaves a step of 2e-9"""

_ZERO_BEYOND: Final = 0.999
"""u² from where exp(-u² / (1 - u²)) is zero in float64"""


def compute_shifted_softplus(x: torch.Tensor) -> torch.Tensor:
    """Return ln(1 + exp(x)) - ln 2."""
    return softplus(x, threshold=_LINEAR_ABOVE) - math.log(2.0)


def compute_smooth_envelope(distances: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return exp(-u² / (1 - u²)) with u = d / cutoff, 0 outside: 1 at zero, all derivatives vanish at the cutoff.

    The form is that of SpookyNet's cutoff function (Unke et al., arXiv 2105.00304).

    Args:
        distances: (...) Å.
        cutoff: Å.
    """
    squared = (distances / cutoff).square()
    inside = squared < _ZERO_BEYOND
    safe = torch.where(inside, squared, 0.0)
    return torch.where(inside, torch.exp(-safe / (1 - safe)), 0.0)


class GaussianGrid(ConstantsModule):
    """Gaussians exp(-gamma (d - mu_m)²) at mu_m = start + m spacing; the grid's end carries none.

    Args:
        start: Å.
        end: Å.
        spacing: Å.
        precision: 1/Å², gamma.
    """

    centers: torch.Tensor

    def __init__(self, start: float, end: float, spacing: float, precision: float) -> None:
        super().__init__()
        count = round((end - start) / spacing)
        centers = start + spacing * torch.arange(count, dtype=torch.float64)
        self.register_buffer("centers", centers, persistent=False)
        self.precision = precision

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        """Expand distances (num_pairs,) in Å into (num_pairs, D)."""
        return torch.exp(-self.precision * (distances[:, None] - self.centers.to(distances.dtype)).square())

    def expand_zero(self) -> torch.Tensor:
        """Return (D,), the expansion of an atom's distance from itself: a constant, no distance is computed."""
        return torch.exp(-self.precision * self.centers.square())


class Stream(nn.Module):
    """Attention of one order, layer after layer: v_i <- v_i + sum_j alpha_ij (W v_j + b).

    alpha_ij = scale sum_f [A^1_f ... A^(k-1)_f]_ij with A^p_ij,f = (W0^p g(0) + b0^p)_f (W^p g(d_ij) + b^p)_f.

    Args:
        section: Sizes and options.
        order: k.
        gain: Factor of the initial pair factors.
        num_centers: D.
    """

    compute_dtype: torch.dtype | None = None
    """of maps of values and of products of matrices; None: that of the features. See `Potential.set_precision`. The expansion of
    distances stays as it is, and so do products along the list of pairs, which are sums in place"""

    def __init__(
        self, section: GeomAttSection | GeomAttEnvelopeSection, order: int, gain: float, num_centers: int
    ) -> None:
        super().__init__()
        self.order, self.num_steps = order, order - 1
        self.scale = section.grid_spacing / len(section.orders)
        channels = section.inner_width // 2 ** (order - 2)
        shape = (section.num_layers, 1 if section.shared_factors else self.num_steps, channels)
        bound = num_centers**-0.5

        def draw(*sizes: int, factor: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes).uniform_(-bound, bound).mul_(factor))

        self.self_weight = draw(*shape, num_centers)
        self.pair_weight = draw(*shape, num_centers, factor=gain)
        self.self_bias = draw(*shape) if section.bias else None
        self.pair_bias = draw(*shape, factor=gain) if section.bias else None
        self.values = nn.ModuleList(
            nn.Linear(section.num_features, section.num_features) for _ in range(section.num_layers)
        )

    def fold(self, zero: torch.Tensor) -> torch.Tensor:
        """Return the maps from [g(d), 1] to pair factors, (layers, factors, channels, D + 1).

        The constant vector of the reference atom goes into them; order 2 needs the sum of its channels only.

        Args:
            zero: (D,) g(0).
        """
        reference = self.self_weight @ zero
        if self.self_bias is not None:
            reference = reference + self.self_bias
        bias = torch.zeros_like(reference) if self.pair_bias is None else self.pair_bias
        weights = reference[..., None] * torch.cat([self.pair_weight, bias[..., None]], dim=-1)
        return weights.sum(2, keepdim=True) if self.num_steps == 1 else weights

    def forward(
        self, features: torch.Tensor, path: AttentionPath, weights: torch.Tensor, factors: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the stream's last features.

        Args:
            features: In the layout of the path.
            path: How attention is applied.
            weights: From `fold`.
            factors: The path's expansion of the weights; None: made here.
        """
        if factors is None:
            (factors,) = path.expand([weights])
        dtype = self.compute_dtype
        operators = path.build_operators(weights, factors, self.num_steps, features.shape[-1], dtype)
        for value, attend in zip(self.values, operators, strict=True):
            features = features + attend(self.scale * compute_in(dtype, value, features).to(features.dtype))
        return features


class _GeomAtt(nn.Module, abc.ABC):
    """What the published model and its variant have in common; they differ in the pairs and in what becomes of far ones.

    Args:
        section: Sizes and options.
        mean_neighbors: Not used.
        num_embeddings: Rows of the element table.
    """

    uses_positions = False
    """whether energies depend on positions and cell other than through the pair vectors"""

    def __init__(
        self,
        section: GeomAttSection | GeomAttEnvelopeSection,
        mean_neighbors: float,
        num_embeddings: int = MAX_ATOMIC_NUMBER + 1,
    ) -> None:
        super().__init__()
        self.cutoff, self.reach, self.sees = section.cutoff, section.reach, section.sees
        self.algorithm = section.algorithm
        self.checkpointing: Checkpointing = "none"
        self.grid = GaussianGrid(section.grid_start, section.grid_end, section.grid_spacing, section.gaussian_precision)
        self.embedding = nn.Embedding(num_embeddings, section.num_features)
        bound = EMBEDDING_GAIN * math.sqrt(3 / section.num_features)
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        gains = section.order_gains or (1.0,) * len(section.orders)
        self.streams = nn.ModuleList(
            Stream(section, order, gain, len(self.grid.centers))
            for order, gain in zip(section.orders, gains, strict=True)
        )
        width = section.num_features * len(section.orders)
        self.linear_readout = section.linear_readout
        self.readout_hidden = nn.Linear(width, max(1, width // 2))
        self.readout = nn.Linear(max(1, width // 2), 1)

    def forward(
        self, batch: GraphBatch, vectors: torch.Tensor, record: AttentionRecord | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the learned part of each atom's energy, as `Network` describes."""
        pairs = self._expand_pairs(batch, vectors if math.isinf(self.reach) else vectors[: batch.num_short_pairs])
        zero = self.grid.expand_zero().to(vectors.dtype)
        weights = [stream.fold(zero) for stream in self._list_streams()]
        if record is not None:
            self._record(record, MatrixPath(batch, pairs), weights)
        path = choose_path(batch, pairs, self.algorithm)
        features = path.collect(self._run_streams(path, path.spread(self.embedding(batch.atomic_numbers)), weights))
        hidden = self.readout_hidden(features)
        energies: torch.Tensor = self.readout(hidden if self.linear_readout else compute_shifted_softplus(hidden))
        return {"atom_energies": energies.squeeze(-1)}

    def _list_streams(self) -> list[Stream]:
        return [cast(Stream, stream) for stream in self.streams]

    def _run_streams(self, path: AttentionPath, features: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """Return the last features of all streams, one after the other."""
        if self.checkpointing != "none" and torch.is_grad_enabled():
            results = [
                checkpoint(stream, features, path, folded, None, use_reentrant=False, preserve_rng_state=True)
                for stream, folded in zip(self._list_streams(), weights, strict=True)
            ]
        else:
            expanded = path.expand(weights)
            results = [
                stream(features, path, folded, factors)
                for stream, folded, factors in zip(self._list_streams(), weights, expanded, strict=True)
            ]
        return torch.cat(results, dim=-1)

    def _record(self, record: AttentionRecord, matrices: MatrixPath, weights: list[torch.Tensor]) -> None:
        """Keep alpha of every order for all ordered pairs of atoms, layer by layer; images of one pair are summed."""
        receivers, senders = matrices.list_pairs()
        for layer in range(len(weights[0])):
            record.layer = layer
            for stream, folded in zip(self._list_streams(), weights, strict=True):
                # One order of one layer at a time: all pairs times all channels is what fills the memory.
                (factors,) = matrices.expand([folded[layer : layer + 1]])
                alpha = stream.scale * matrices.compute_alpha(factors, stream.num_steps)[0]
                values = alpha[matrices.is_pair][:, None]
                record.add(f"order {stream.order}", ("attention",), receivers, senders, values)

    def _expand_pairs(self, batch: GraphBatch, vectors: torch.Tensor) -> PairRows:
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        first, second = batch.pair_first[: len(vectors)], batch.pair_second[: len(vectors)]
        return self._build_rows(first, second, distances)

    @abc.abstractmethod
    def _build_rows(self, first: torch.Tensor, second: torch.Tensor, distances: torch.Tensor) -> PairRows:
        """Return the expansion of the pairs' distances."""


class GeomAtt(_GeomAtt):
    """The published model: attention between all atoms of a molecule, which tends to a constant at large distance.

    1.1 Å beyond the grid's end factors are their constants but for exp(-26) of the last Gaussian, so that pairs need to be listed
    up to there only: energies and forces are then within 5e-12 of those with all pairs.
    """

    def _build_rows(self, first: torch.Tensor, second: torch.Tensor, distances: torch.Tensor) -> PairRows:
        rows = torch.cat([self.grid(distances), torch.zeros_like(distances)[:, None]], dim=-1)
        zero = self.grid.expand_zero().to(distances.dtype)
        return PairRows(first, second, rows, torch.cat([zero, zero.new_zeros(1)]), has_tail=True)


class GeomAttEnvelope(_GeomAtt):
    """The variant: pair factors of different atoms times a smooth envelope, so that energies of distant molecules add up.

    Periodic images are atoms like others; an atom is its own reference atom once, at distance zero.
    """

    def _build_rows(self, first: torch.Tensor, second: torch.Tensor, distances: torch.Tensor) -> PairRows:
        expanded = torch.cat([self.grid(distances), torch.ones_like(distances)[:, None]], dim=-1)
        rows = compute_smooth_envelope(distances, self.cutoff)[:, None] * expanded
        zero = self.grid.expand_zero().to(distances.dtype)
        return PairRows(first, second, rows, torch.cat([zero, zero.new_ones(1)]), has_tail=False)
