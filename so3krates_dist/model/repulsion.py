"""Repulsion of nuclei at short distances: the screened Coulomb potential of Ziegler, Biersack and Littmark (ZBL), trained.

J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Matter (1985); in the form of the Euclidean
transformer (arXiv 2309.15126) and of SO3LR (10.1021/jacs.5c09558).
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import nn
from torch.nn.functional import softplus

from so3krates_dist.model.exact import multiply_exactly
from so3krates_dist.units import CODATA_2014_BOHR_ANGSTROM, CODATA_2014_COULOMB_EV_ANGSTROM

RANGE: Final = 1.5
"""Å; where the repulsion has vanished, with all its derivatives"""

_EXPONENTS: Final = (3.2, 0.9423, 0.4028, 0.2016)
_WEIGHTS: Final = (0.1818, 0.5099, 0.2802, 0.02817)
_POWER: Final = 0.23
_INVERSE_LENGTH: Final = 1 / (0.8854 * CODATA_2014_BOHR_ANGSTROM)
"""1/Å; the universal screening length is 0.8854 Bohr over the sum of Z^0.23"""

_EDGE: Final = 1e-3
"""Share of the switch's interval at either end where the switch is one or zero to the last bit of float64: exp(-1 / 1e-3)"""


def compute_switch(distances: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """Return a function that goes from one to zero with all derivatives continuous.

    With c = (d - start) / (end - start) and s(t) = exp(-1/t) for t > 0, else 0, it is s(1 - c) / (s(1 - c) + s(c)), evaluated
    as the logistic function of 1/c - 1/(1 - c), the same without any underflow (SO3LR, 10.1021/jacs.5c09558).

    Args:
        distances: (...) Å.
        start: Å; one up to here.
        end: Å; zero from here.
    """
    position = (distances - start) / (end - start)
    inside = (position > _EDGE) & (position < 1 - _EDGE)
    safe = torch.where(inside, position, 0.5)
    return torch.where(inside, torch.sigmoid(1 / safe - 1 / (1 - safe)), (position < 0.5).to(position.dtype))


def _invert_softplus(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor([math.log(math.expm1(value)) for value in values])


class NuclearRepulsion(nn.Module):
    """E = k_e phi(d) Z_i Z_j / d sum_k c_k exp(-a_k rho) switch(d; 0, 1.5 Å), rho = d b (Z_i^p + Z_j^p).

    The weights c_k add up to one; all parameters are kept positive by a softplus and start at the published values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exponents = nn.Parameter(_invert_softplus(_EXPONENTS))
        self.weights = nn.Parameter(_invert_softplus(_WEIGHTS))
        self.power = nn.Parameter(_invert_softplus([_POWER]))
        self.inverse_length = nn.Parameter(_invert_softplus([_INVERSE_LENGTH]))

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, distances: torch.Tensor, envelope: torch.Tensor
    ) -> torch.Tensor:
        """Return the energy of each pair.

        Args:
            first: (num_pairs,) atomic numbers.
            second: (num_pairs,) atomic numbers.
            distances: (num_pairs,) Å, greater than zero.
            envelope: (num_pairs,) the model's cutoff function.

        Returns:
            (num_pairs,) eV, each pair once.
        """
        numbers_first, numbers_second = first.to(distances.dtype), second.to(distances.dtype)
        power = softplus(self.power)
        reduced = distances * softplus(self.inverse_length) * (numbers_first**power + numbers_second**power)
        weights = softplus(self.weights)
        terms = torch.exp(-reduced[:, None] * softplus(self.exponents))
        screening = multiply_exactly(terms, weights / weights.sum())
        coulomb = CODATA_2014_COULOMB_EV_ANGSTROM * numbers_first * numbers_second / distances
        return coulomb * screening * envelope * compute_switch(distances, 0.0, RANGE)


def share_pair_energies(
    pair_energies: torch.Tensor, first: torch.Tensor, second: torch.Tensor, num_atoms: int
) -> torch.Tensor:
    """Return (num_atoms,) energies: half of each pair's (num_pairs,) goes to either of its atoms."""
    halves = pair_energies / 2
    return halves.new_zeros(num_atoms).index_add(0, first, halves).index_add(0, second, halves)
