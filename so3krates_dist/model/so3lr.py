"""SO3LR (10.1021/jacs.5c09558): a Euclidean transformer that knows charge and spin, with nuclear repulsion and long-range physics.

The network gives three things for each atom: a semi-local energy, a partial charge and a Hirshfeld ratio. Charges feed damped
electrostatics, ratios feed vdW-QDO dispersion. Charges add up to the structure's charge, and the embeddings of charge and spin
look at all atoms of a structure, so energies of distant charged fragments do not add up (the structure is what counts as one).
"""

import math
from typing import Final

import torch
from torch import nn
from torch.nn.functional import silu, softplus

from so3krates_dist.config import So3lrSection
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, GraphBatch
from so3krates_dist.model.attention import PairGeometry
from so3krates_dist.model.euclidean_transformer import EuclideanBackbone, compute_repulsion
from so3krates_dist.model.layer import Linear
from so3krates_dist.model.longrange import (
    MAX_DISPERSION_ELEMENT,
    Dispersion,
    compute_dipoles,
    compute_electrostatics,
    neutralize_charges,
)
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.repulsion import NuclearRepulsion, share_pair_energies

NUM_HEAD_ELEMENTS: Final = 100
"""Rows of the heads' element tables"""


def build_table(num_rows: int, width: int) -> nn.Embedding:
    """Return an element table with the paper's initial values: normal, of variance 1 / width."""
    table = nn.Embedding(num_rows, width)
    nn.init.normal_(table.weight, std=width**-0.5)
    return table


class ElectronEmbedding(nn.Module):
    """Spreads a number of a structure (its charge, or its unpaired electrons) over the features of its atoms.

    t_i = softplus(E[Z_i] . k_s / sqrt(F)), a_i = psi t_i / sum_i t_i, h_i = a_i v_s, e_i = h_i + silu(silu(h_i) W0) W1, where s
    is 0 for psi >= 0 and 1 for psi < 0. Zero for psi = 0, always computed: no branch depends on the data.

    Args:
        num_embeddings: Rows of the element table.
        num_features: F.
    """

    def __init__(self, num_embeddings: int, num_features: int) -> None:
        super().__init__()
        self.elements = build_table(num_embeddings, num_features)
        self.keys = build_table(2, num_features)
        self.values = build_table(2, num_features)
        self.first = Linear(num_features, num_features, bias=False)
        self.second = Linear(num_features, num_features, bias=False)

    def forward(self, batch: GraphBatch, amount: torch.Tensor) -> torch.Tensor:
        """Return (num_atoms, F) for the amount (num_graphs,) of each structure."""
        signs = (amount < 0).long()[batch.graph_index]
        elements, keys = self.elements(batch.atomic_numbers), self.keys(signs)
        shares = softplus((elements * keys).sum(-1) / math.sqrt(keys.shape[-1]))
        sums = shares.new_zeros(batch.num_graphs).index_add(0, batch.graph_index, shares)
        parts = (amount.to(shares.dtype) / sums.clamp(min=torch.finfo(sums.dtype).tiny))[batch.graph_index] * shares
        spread = parts[:, None] * self.values(signs)
        embedded: torch.Tensor = spread + self.second(silu(self.first(silu(spread))))
        return embedded


class ChargeHead(nn.Module):
    """Partial charges before they are made to add up.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.offsets = build_table(NUM_HEAD_ELEMENTS, 1)
        self.hidden = Linear(num_features, num_features)
        self.output = Linear(num_features, 1)

    def forward(self, inv_features: torch.Tensor, atomic_numbers: torch.Tensor) -> torch.Tensor:
        """Map (num_atoms, F) to (num_atoms,) e."""
        charges: torch.Tensor = self.output(silu(self.hidden(inv_features))) + self.offsets(atomic_numbers)
        return charges.squeeze(-1)


class HirshfeldHead(nn.Module):
    """Hirshfeld ratios: |b[Z] + E[Z] . k / sqrt(F/2)| with k from the features.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        width = max(num_features // 2, 1)
        self.offsets = build_table(NUM_HEAD_ELEMENTS, 1)
        self.queries = build_table(NUM_HEAD_ELEMENTS, width)
        self.hidden = Linear(num_features, width)
        self.output = Linear(width, width)

    def forward(self, inv_features: torch.Tensor, atomic_numbers: torch.Tensor) -> torch.Tensor:
        """Map (num_atoms, F) to (num_atoms,) ratios."""
        keys, queries = self.output(silu(self.hidden(inv_features))), self.queries(atomic_numbers)
        products = (queries * keys).sum(-1) / math.sqrt(queries.shape[-1])
        ratios: torch.Tensor = (self.offsets(atomic_numbers).squeeze(-1) + products).abs()
        return ratios


class So3lr(EuclideanBackbone):
    """Energies, partial charges, dipoles and Hirshfeld ratios from pairs of atoms near and far.

    Args:
        section: Sizes and options.
        mean_neighbors: Divisor of the attention coefficients.
        num_embeddings: Rows of the backbone's element tables.
    """

    max_element = MAX_DISPERSION_ELEMENT
    """highest atomic number in the tables of the heads and of dispersion"""

    def __init__(
        self, section: So3lrSection, mean_neighbors: float, num_embeddings: int = MAX_ATOMIC_NUMBER + 1
    ) -> None:
        super().__init__(section, mean_neighbors, num_embeddings)
        features, electrostatics = section.num_features, section.electrostatics
        self.charge_embedding = ElectronEmbedding(num_embeddings, features) if section.charge_embedding else None
        self.spin_embedding = ElectronEmbedding(num_embeddings, features) if section.spin_embedding else None
        self.readout_hidden = Linear(features, features)
        self.readout = Linear(features, 1)
        self.energy_factors = nn.Parameter(torch.ones(num_embeddings))
        self.energy_offsets = nn.Parameter(torch.zeros(num_embeddings))
        self.charge_head = ChargeHead(features)
        self.hirshfeld_head = HirshfeldHead(features)
        self.long_range_cutoff = section.long_range_cutoff or math.inf
        self.electrostatic_damping = section.electrostatic_damping
        self.cuts_electrostatics = section.cuts_electrostatics
        self.repulsion = NuclearRepulsion() if section.zbl else None
        self.dispersion = Dispersion(section.dispersion_damping, self.long_range_cutoff) if section.dispersion else None
        self.reciprocal: nn.Module | None = None
        if electrostatics in ("ewald", "pme"):
            from so3krates_dist.model.ewald import ReciprocalCoulomb

            self.reciprocal = ReciprocalCoulomb(electrostatics, section.electrostatic_damping)
            self.uses_positions = True

    def embed(self, batch: GraphBatch) -> torch.Tensor:
        """Return the first features (num_atoms, F): the sum of all embeddings over the square root of their number."""
        parts = [super().embed(batch)]
        if self.charge_embedding is not None:
            parts.append(self.charge_embedding(batch, batch.total_charge))
        if self.spin_embedding is not None:
            parts.append(self.spin_embedding(batch, batch.num_unpaired_electrons))
        return torch.stack(parts).sum(0) / math.sqrt(len(parts))

    def forward(
        self, batch: GraphBatch, vectors: torch.Tensor, record: AttentionRecord | None = None
    ) -> dict[str, torch.Tensor]:
        """Return energies and the other outputs, as `Network` describes.

        Dipoles are in e Å from positions as they are given: of charged structures they depend on the origin, of periodic ones
        on which image of an atom is meant.
        """
        inv_features, pairs = self.compute_features(batch, vectors, record)
        outputs: dict[str, torch.Tensor] = self.run(self._read_out, batch, vectors, inv_features, pairs)
        return outputs

    def _read_out(
        self, batch: GraphBatch, vectors: torch.Tensor, inv_features: torch.Tensor, pairs: PairGeometry
    ) -> dict[str, torch.Tensor]:
        numbers = batch.atomic_numbers
        learned = self.readout(silu(self.readout_hidden(inv_features))).squeeze(-1)
        raw_charges = self.charge_head(inv_features, numbers)
        charges = neutralize_charges(raw_charges, batch.total_charge, batch.graph_index)
        ratios = self.hirshfeld_head(inv_features, numbers)
        physical = self._compute_long_range(batch, vectors, charges, ratios)
        if self.repulsion is not None:
            physical = physical + compute_repulsion(self.repulsion, batch, pairs)
        if self.reciprocal is not None:
            physical = physical + self.reciprocal(batch, charges)
        return {
            "atom_energies": self.energy_factors[numbers] * learned + self.energy_offsets[numbers],
            "physical_energies": physical,
            "partial_charges": charges,
            "dipole": compute_dipoles(charges, batch.total_charge, batch.positions, batch.graph_index),
            "hirshfeld_ratios": ratios,
        }

    def _compute_long_range(
        self, batch: GraphBatch, vectors: torch.Tensor, charges: torch.Tensor, ratios: torch.Tensor
    ) -> torch.Tensor:
        """Return each atom's share of dispersion and of electrostatics with a cutoff, eV."""
        first, second = batch.pair_first, batch.pair_second
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        energies = torch.zeros_like(distances)
        if self.cuts_electrostatics:
            products = charges[first] * charges[second]
            coulomb = compute_electrostatics(products, distances, self.electrostatic_damping, self.long_range_cutoff)
            energies = energies + coulomb
        if self.dispersion is not None:
            numbers = batch.atomic_numbers[first], batch.atomic_numbers[second]
            energies = energies + self.dispersion(numbers, (ratios[first], ratios[second]), distances)
        return share_pair_energies(energies, first, second, len(charges))
