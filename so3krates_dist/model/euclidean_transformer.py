"""The Euclidean transformer (Nat. Commun. 15, 6539, 2024; arXiv 2309.15126) with the options of SO3LR's backbone.

The former is pre-normalised or not normalised, the latter (10.1021/jacs.5c09558) post-normalised.
Graph in, one number per atom out; nothing here knows of forces or of units.
"""

import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from so3krates_dist.config import ModelSection
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, GraphBatch
from so3krates_dist.model.attention import EuclideanAttention, PairGeometry
from so3krates_dist.model.layer import RESIDUAL_MLPS, Exchange, Linear, build_layer_norm
from so3krates_dist.model.radial import CUTOFF_FUNCTIONS, build_radial_basis
from so3krates_dist.model.spherical import DegreeMaps, SphericalHarmonics


class EuclideanLayer(nn.Module):
    """Attention, per-atom network, exchange; with normalisation nowhere, before, or after each block."""

    def __init__(self, section: ModelSection, maps: DegreeMaps, mean_neighbors: float) -> None:
        super().__init__()
        features = section.num_features
        self.attention = EuclideanAttention(
            features,
            section.num_heads,
            maps,
            num_radial_basis=section.num_radial_basis,
            filter_widths=(section.radial_filter_width or features, section.spherical_filter_width or features // 4),
            message_scale=mean_neighbors if section.message_scale == "mean_neighbors" else None,
            low_precision=section.precision == "bf16",
        )
        build_inner, build_outer = RESIDUAL_MLPS[section.residual_mlp]
        pre, post = section.normalization == "pre", section.normalization == "post"
        self.pre_attention_norm = build_layer_norm(features, pre)
        self.post_attention_norm = build_layer_norm(features, post)
        self.inner_mlp = build_inner(features)
        self.pre_exchange_norm = build_layer_norm(features, pre)
        self.exchange = Exchange(features, maps)
        self.outer_mlp = build_outer(features)
        self.post_exchange_norm = build_layer_norm(features, post)

    def forward(
        self, inv_features: torch.Tensor, ev_features: torch.Tensor | None, pairs: PairGeometry, recompute: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new features.

        Args:
            inv_features: (num_atoms, F).
            ev_features: (num_atoms, ev_dim); None stands for zero.
            pairs: Geometry of the neighbour pairs.
            recompute: Compute the attention block again in the backward pass instead of keeping its values.
        """
        normed = self.pre_attention_norm(inv_features)
        if recompute:
            inv_messages, ev_messages = checkpoint(
                self.attention, normed, ev_features, pairs, use_reentrant=False, preserve_rng_state=True
            )
        else:
            inv_messages, ev_messages = self.attention(normed, ev_features, pairs)
        inv_features = self.inner_mlp(self.post_attention_norm(inv_features + inv_messages))
        ev_features = ev_messages if ev_features is None else ev_features + ev_messages
        inv_change, ev_change = self.exchange(self.pre_exchange_norm(inv_features), ev_features)
        inv_features = self.post_exchange_norm(self.outer_mlp(inv_features + inv_change))
        return inv_features, ev_features + ev_change


class EuclideanTransformer(nn.Module):
    """Per-atom energies from neighbour pairs.

    Args:
        section: Sizes and options.
        mean_neighbors: Divisor of the attention coefficients where the configuration asks for it.
        num_embeddings: Rows of the element table.
    """

    def __init__(
        self, section: ModelSection, mean_neighbors: float, num_embeddings: int = MAX_ATOMIC_NUMBER + 1
    ) -> None:
        super().__init__()
        self.cutoff = section.cutoff
        self.checkpoint_attention = False
        self.compute_envelope = CUTOFF_FUNCTIONS[section.cutoff_function]
        self.radial_basis = build_radial_basis(section.radial_basis, section.num_radial_basis, section.cutoff)
        self.harmonics = SphericalHarmonics(section.degrees)
        self.maps = DegreeMaps(section.degrees)
        self.embedding = nn.Embedding(num_embeddings, section.num_features)
        nn.init.normal_(self.embedding.weight, std=section.num_features**-0.5)
        self.layers = nn.ModuleList(
            EuclideanLayer(section, self.maps, mean_neighbors) for _ in range(section.num_layers)
        )
        self.readout_hidden = Linear(section.num_features, section.num_features)
        self.readout = Linear(section.num_features, 1)

    def forward(self, batch: GraphBatch, vectors: torch.Tensor) -> torch.Tensor:
        """Return one number per atom, the learned part of its energy in units of the energy scale.

        Args:
            batch: Structures; their positions are not read.
            vectors: (num_pairs, 3) Å from the first to the second atom of each pair.

        Returns:
            (num_atoms,)
        """
        pairs = self._build_pairs(batch, vectors)
        inv_features: torch.Tensor = self.embedding(batch.atomic_numbers)
        ev_features: torch.Tensor | None = None
        recompute = self.checkpoint_attention and torch.is_grad_enabled()
        for layer in self.layers:
            inv_features, ev_features = layer(inv_features, ev_features, pairs, recompute)
        energies: torch.Tensor = self.readout(silu(self.readout_hidden(inv_features)))
        return energies.squeeze(-1)

    def _build_pairs(self, batch: GraphBatch, vectors: torch.Tensor) -> PairGeometry:
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        harmonics = self.harmonics(vectors / distances[:, None])
        return PairGeometry(
            first=batch.pair_first,
            second=batch.pair_second,
            receivers=torch.cat([batch.pair_first, batch.pair_second]),
            senders=torch.cat([batch.pair_second, batch.pair_first]),
            envelope=self.compute_envelope(distances, self.cutoff)[:, None],
            radial=self.radial_basis(distances),
            harmonics=torch.cat([harmonics, self.maps.invert(harmonics)]),
        )
