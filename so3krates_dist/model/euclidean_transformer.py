"""The Euclidean transformer (Nat. Commun. 15, 6539, 2024; arXiv 2309.15126) with the options of SO3LR's backbone.

The former is pre-normalised or not normalised, the latter (10.1021/jacs.5c09558) post-normalised.
Graph in, one number per atom out; nothing here knows of forces.
"""

import torch
from torch import nn
from torch.nn.functional import silu

from so3krates_dist.config import EuclideanTransformerSection, So3lrSection
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, GraphBatch
from so3krates_dist.model.attention import EuclideanAttention, PairGeometry
from so3krates_dist.model.layer import (
    RESIDUAL_MLPS,
    AttentionNetwork,
    Exchange,
    Linear,
    build_layer_norm,
)
from so3krates_dist.model.recompute import carry
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.repulsion import NuclearRepulsion, share_pair_energies
from so3krates_dist.model.spherical import DegreeMaps


class EuclideanLayer(nn.Module):
    """Attention, per-atom network, exchange; with normalisation nowhere, before, or after each block."""

    def __init__(
        self, section: EuclideanTransformerSection | So3lrSection, maps: DegreeMaps, mean_neighbors: float
    ) -> None:
        super().__init__()
        features = section.num_features
        widths = section.radial_filter_width or features, section.spherical_filter_width or max(features // 4, 1)
        self.attention = EuclideanAttention(
            features,
            section.num_heads,
            maps,
            num_radial_basis=section.num_radial_basis,
            filter_widths=widths,
            message_scale=mean_neighbors if section.message_scale == "mean_neighbors" else None,
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
        self,
        inv_features: torch.Tensor,
        ev_features: torch.Tensor | None,
        pairs: PairGeometry,
        record: AttentionRecord | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new features.

        Args:
            inv_features: (num_atoms, F).
            ev_features: (num_atoms, ev_dim); None stands for zero.
            pairs: Geometry of the neighbour pairs.
            record: Keeps the attention coefficients.
        """
        normed = self.pre_attention_norm(inv_features)
        inv_messages, ev_messages = self.attention(normed, ev_features, pairs, record)
        inv_features = self.inner_mlp(self.post_attention_norm(inv_features + inv_messages))
        ev_features = ev_messages if ev_features is None else ev_features + ev_messages
        inv_change, ev_change = self.exchange(self.pre_exchange_norm(inv_features), ev_features)
        inv_features = self.post_exchange_norm(self.outer_mlp(inv_features + inv_change))
        return inv_features, ev_features + ev_change


class EuclideanBackbone(AttentionNetwork):
    """From structures to features of their atoms; what the Euclidean transformer and SO3LR have in common.

    Args:
        section: Sizes and options.
        mean_neighbors: Divisor of the attention coefficients where the configuration asks for it.
        num_embeddings: Rows of the element table.
    """

    def __init__(
        self,
        section: EuclideanTransformerSection | So3lrSection,
        mean_neighbors: float,
        num_embeddings: int = MAX_ATOMIC_NUMBER + 1,
    ) -> None:
        super().__init__(section, num_embeddings)
        self.sphc_normalization = section.sphc_normalization
        self.layers = nn.ModuleList(
            EuclideanLayer(section, self.maps, mean_neighbors) for _ in range(section.num_layers)
        )
        self.final_norm = build_layer_norm(section.num_features, section.final_norm)

    def embed(self, batch: GraphBatch) -> torch.Tensor:
        """Return the first features (num_atoms, F)."""
        features: torch.Tensor = self.embedding(batch.atomic_numbers)
        return features

    def compute_features(
        self, batch: GraphBatch, vectors: torch.Tensor, record: AttentionRecord | None
    ) -> tuple[torch.Tensor, PairGeometry]:
        """Return the last features (num_atoms, F), and the short pairs.

        Args:
            batch: Structures; their positions are not read.
            vectors: (num_pairs, 3) Å from the first to the second atom of each pair.
            record: Keeps the attention coefficients.
        """
        pairs = carry(self._build_pairs, batch, vectors)
        inv_features = self.embed(batch)
        ev_features = carry(self._start_ev_features, inv_features, pairs)
        inv_features = self.run_layers(inv_features, ev_features, pairs, record)
        return self.run(self.final_norm, inv_features), pairs

    def _start_ev_features(self, inv_features: torch.Tensor, pairs: PairGeometry) -> torch.Tensor | None:
        """Return the first Euclidean variables; None stands for zero."""
        if not self.sphc_normalization:
            return None
        weights = pairs.envelope / self.sphc_normalization
        directed = torch.cat([weights, weights]) * pairs.harmonics
        return directed.new_zeros(len(inv_features), directed.shape[1]).index_add(0, pairs.receivers, directed)

    def _build_pairs(self, batch: GraphBatch, vectors: torch.Tensor) -> PairGeometry:
        vectors = vectors[: batch.num_short_pairs]
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        harmonics = self.harmonics(vectors / distances[:, None])
        first, second = batch.pair_first[: len(vectors)], batch.pair_second[: len(vectors)]
        return PairGeometry(
            first=first,
            second=second,
            receivers=torch.cat([first, second]),
            senders=torch.cat([second, first]),
            distances=distances,
            envelope=self.compute_envelope(distances, self.cutoff)[:, None],
            radial=self.radial_basis(distances),
            harmonics=torch.cat([harmonics, self.maps.invert(harmonics)]),
        )


def compute_repulsion(repulsion: NuclearRepulsion, batch: GraphBatch, pairs: PairGeometry) -> torch.Tensor:
    """Return (num_atoms,) each atom's share of the repulsion of nuclei, eV."""
    first, second = batch.atomic_numbers[pairs.first], batch.atomic_numbers[pairs.second]
    energies: torch.Tensor = repulsion(first, second, pairs.distances, pairs.envelope.squeeze(-1))
    return share_pair_energies(energies, pairs.first, pairs.second, len(batch.atomic_numbers))


class EuclideanTransformer(EuclideanBackbone):
    """Per-atom energies from neighbour pairs.

    Args:
        section: Sizes and options.
        mean_neighbors: Divisor of the attention coefficients where the configuration asks for it.
        num_embeddings: Rows of the element table.
    """

    def __init__(
        self,
        section: EuclideanTransformerSection,
        mean_neighbors: float,
        num_embeddings: int = MAX_ATOMIC_NUMBER + 1,
    ) -> None:
        super().__init__(section, mean_neighbors, num_embeddings)
        self.readout_hidden = Linear(section.num_features, section.num_features)
        self.readout = Linear(section.num_features, 1)
        self.repulsion = NuclearRepulsion() if section.zbl else None

    def forward(
        self, batch: GraphBatch, vectors: torch.Tensor, record: AttentionRecord | None = None
    ) -> dict[str, torch.Tensor]:
        """Return each atom's energy, as `Network` describes."""
        inv_features, pairs = self.compute_features(batch, vectors, record)
        outputs: dict[str, torch.Tensor] = self.run(self._read_out, batch, inv_features, pairs)
        return outputs

    def _read_out(self, batch: GraphBatch, inv_features: torch.Tensor, pairs: PairGeometry) -> dict[str, torch.Tensor]:
        outputs = {"atom_energies": self.readout(silu(self.readout_hidden(inv_features))).squeeze(-1)}
        if self.repulsion is not None:
            outputs["physical_energies"] = compute_repulsion(self.repulsion, batch, pairs)
        return outputs
