"""SO3LR's long-range terms (10.1021/jacs.5c09558): charges that add up, damped electrostatics, dispersion from Hirshfeld ratios.

All are sums over undirected pairs, each once, and functions of the distance with continuous forces wherever they end.
"""

import math
from typing import Final

import torch

from so3krates_dist.model.constants import ConstantsModule
from so3krates_dist.model.repulsion import compute_switch
from so3krates_dist.units import (
    CODATA_2014_BOHR_ANGSTROM,
    CODATA_2014_COULOMB_EV_ANGSTROM,
    CODATA_2014_FINE_STRUCTURE,
    CODATA_2014_HARTREE_EV,
)

SWITCH_START: Final = 0.45
"""share of the long-range cutoff from where electrostatics is switched to its shifted force"""

DISPERSION_SWITCH_WIDTH: Final = 2.0
"""Å before the long-range cutoff over which dispersion is switched off"""

MAX_DISPERSION_ELEMENT: Final = 86

# Free atoms, hydrogen to radon, in atomic units: Tkatchenko and Scheffler, 10.1103/PhysRevLett.102.073005, and the values for the
# other elements that the codes of this method have since then; as rounded for SO3LR.
# fmt: off
_FREE_POLARIZABILITIES: Final = (
    4.5, 1.38,
    164.2, 38.0, 21.0, 12.0, 7.4, 5.4, 3.8, 2.67,
    162.7, 71.0, 60.0, 37.0, 25.0, 19.6, 15.0, 11.1,
    292.9, 160.0, 120.0, 98.0, 84.0, 78.0, 63.0, 56.0, 50.0, 48.0, 42.0, 40.0, 60.0, 41.0, 29.0, 25.0, 20.0, 16.8,
    319.2, 199.0, 126.74, 119.97, 101.6, 88.42, 80.08, 65.89, 56.1, 23.68, 50.6, 39.7, 70.22, 55.95, 43.67, 37.65, 35.0, 27.3,
    399.9, 275.0, 213.7, 204.7, 215.8, 208.4, 200.2, 192.1, 184.2, 158.3, 169.5, 164.64, 156.3, 150.2, 144.3, 138.9, 137.2,
    99.52, 82.53, 71.04, 63.04, 55.06, 42.51, 39.68, 36.5, 33.9, 69.92, 61.8, 49.02, 45.01, 38.93, 33.54,
)
_FREE_C6: Final = (
    6.5, 1.46,
    1387.0, 214.0, 99.5, 46.6, 24.2, 15.6, 9.52, 6.38,
    1556.0, 627.0, 528.0, 305.0, 185.0, 134.0, 94.6, 64.3,
    3897.0, 2221.0, 1383.0, 1044.0, 832.0, 602.0, 552.0, 482.0, 408.0, 373.0, 253.0, 284.0, 498.0, 354.0, 246.0, 210.0, 162.0,
    129.6,
    4691.0, 3170.0, 1968.58, 1677.91, 1263.61, 1028.73, 1390.87, 609.75, 469.0, 157.5, 339.0, 452.0, 707.05, 587.42, 459.32,
    396.0, 385.0, 285.9,
    6846.0, 5727.0, 3884.5, 3708.33, 3911.84, 3908.75, 3847.68, 3708.69, 3511.71, 2781.53, 3124.41, 2984.29, 2839.95, 2724.12,
    2576.78, 2387.53, 2371.8, 1274.8, 1019.92, 847.93, 710.2, 596.67, 359.1, 347.1, 298.0, 392.0, 717.44, 697.0, 571.0, 530.92,
    457.53, 390.63,
)
# fmt: on

_WIDTH_POLYNOMIAL: Final = (-0.00433008, 0.24428889, 0.04125273, -0.00078893)
"""Width of a quantum Drude oscillator in Bohr by powers of the van der Waals radius in Bohr (10.1021/acs.jctc.3c00797)"""

_MIN_POLARIZABILITY: Final = 1e-3
"""atomic units; its seventh root has no derivative at zero, where untrained Hirshfeld ratios may lie"""

_MAX_RELATIVE: Final = 1e7
"""(R/p)^2 from where dispersion stays as it is, 1e-21 of its largest, beyond 10 000 Å: so that (R/p)^10 fits single precision"""


def neutralize_charges(
    raw_charges: torch.Tensor, total_charge: torch.Tensor, graph_index: torch.Tensor
) -> torch.Tensor:
    """Return (num_atoms,) charges in e that add up to each structure's charge; all its atoms are corrected alike.

    Args:
        raw_charges: (num_atoms,) e.
        total_charge: (num_graphs,) e.
        graph_index: (num_atoms,) the structure of each atom.
    """
    counts = raw_charges.new_zeros(len(total_charge)).index_add(0, graph_index, torch.ones_like(raw_charges))
    excess = total_charge - raw_charges.new_zeros(len(total_charge)).index_add(0, graph_index, raw_charges)
    return raw_charges + (excess / counts.clamp(min=1))[graph_index]


def compute_dipoles(
    charges: torch.Tensor, total_charge: torch.Tensor, positions: torch.Tensor, graph_index: torch.Tensor
) -> torch.Tensor:
    """Return (num_graphs, 3) e Å, the sum of charges times positions as they are given.

    Summed about the mean position, to which the total charge is then added: far from the origin single precision would lose it.

    Args:
        charges: (num_atoms,) e, which add up to the total charge.
        total_charge: (num_graphs,) e.
        positions: (num_atoms, 3) Å.
        graph_index: (num_atoms,) the structure of each atom.
    """
    sums = positions.new_zeros(len(total_charge), 3)
    counts = positions.new_zeros(len(total_charge)).index_add(0, graph_index, torch.ones_like(positions[:, 0]))
    centers = sums.index_add(0, graph_index, positions) / counts.clamp(min=1)[:, None]
    relative = charges[:, None] * (positions - centers[graph_index])
    return sums.index_add(0, graph_index, relative) + total_charge[:, None] * centers


def compute_electrostatics(
    charge_products: torch.Tensor, distances: torch.Tensor, damping: float, cutoff: float
) -> torch.Tensor:
    """Return the Coulomb energy of each pair, damped at short distances and with a shifted force at long ones.

    V(r) = erf(r / sigma) / r takes the place of 1/r, between all pairs, bonded ones too. With a cutoff r_L the energy is
    k_e q_i q_j [V(r) - V(r_L) - (1 - f(r)) V'(r_L) (r - r_L)] up to r_L, where f falls from one at 0.45 r_L to zero at r_L.

    Args:
        charge_products: (num_pairs,) e².
        distances: (num_pairs,) Å, greater than zero.
        damping: sigma, Å.
        cutoff: r_L, Å; infinite for none.

    Returns:
        (num_pairs,) eV.
    """
    potential = torch.erf(distances / damping) / distances
    if math.isfinite(cutoff):
        at_cutoff = math.erf(cutoff / damping) / cutoff
        gaussian = 2 / (math.sqrt(math.pi) * damping) * math.exp(-((cutoff / damping) ** 2))
        slope = (gaussian - at_cutoff) / cutoff
        switch = compute_switch(distances, SWITCH_START * cutoff, cutoff)
        shifted = potential - at_cutoff - (1 - switch) * slope * (distances - cutoff)
        potential = torch.where(distances < cutoff, shifted, 0.0)
    return CODATA_2014_COULOMB_EV_ANGSTROM * charge_products * potential


class Dispersion(ConstantsModule):
    """vdW-QDO dispersion (10.1021/acs.jctc.3c00797), damped as in SO3LR; it has no trained parameters.

    E = -[C6 / (R^6 + p^6) + C8 / (R^8 + p^8) + C10 / (R^10 + p^10)] in atomic units, p = 5.08 times the damping factor times
    alpha_ij^(1/7). The mixing rule C6_ij = 2 C6_i C6_j alpha_i alpha_j / (alpha_i^2 C6_j + alpha_j^2 C6_i) reduces to the free
    atoms' times both Hirshfeld ratios, because alpha_i is proportional to the ratio and C6_i to its square.

    Args:
        damping: Factor of the distance below which dispersion is damped.
        cutoff: Å, where it has been switched off; infinite for none.
    """

    polarizabilities: torch.Tensor
    c6: torch.Tensor

    def __init__(self, damping: float, cutoff: float) -> None:
        super().__init__()
        self.damping, self.cutoff = damping, cutoff
        for name, values in (("polarizabilities", _FREE_POLARIZABILITIES), ("c6", _FREE_C6)):
            # Row 0 stands for no element; models with dispersion are refused for elements beyond the tables.
            self.register_buffer(name, torch.tensor((1.0, *values), dtype=torch.float64), persistent=False)

    def forward(
        self,
        numbers: tuple[torch.Tensor, torch.Tensor],
        ratios: tuple[torch.Tensor, torch.Tensor],
        distances: torch.Tensor,
    ) -> torch.Tensor:
        """Return the energy of each pair.

        Args:
            numbers: Atomic numbers of the first and of the second atoms, (num_pairs,) each.
            ratios: Their Hirshfeld ratios, (num_pairs,) each.
            distances: (num_pairs,) Å, greater than zero.

        Returns:
            (num_pairs,) eV.
        """
        polarizability, c6 = self._mix(numbers, ratios)
        root = polarizability ** (1 / 7)
        spread = self._compute_spread(root)
        limit = 2 * 2.54 * self.damping * root  # p, Bohr
        relative = ((distances / (limit * CODATA_2014_BOHR_ANGSTROM)) ** 2).clamp(max=_MAX_RELATIVE)
        ratio = spread / limit**2
        terms = (
            1 / (1 + relative**3)
            + 10 * ratio / (1 + relative**4)  # C8 = 5 C6 / gamma, gamma = 1 / (2 spread)
            + 122.5 * ratio**2 / (1 + relative**5)  # C10 = 245 C6 / (8 gamma^2)
        )
        energies = -CODATA_2014_HARTREE_EV * c6 / limit**6 * terms
        if math.isfinite(self.cutoff):
            energies = energies * compute_switch(distances, self.cutoff - DISPERSION_SWITCH_WIDTH, self.cutoff)
        return energies

    def _mix(
        self, numbers: tuple[torch.Tensor, torch.Tensor], ratios: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pairs' polarizabilities and C6 coefficients in atomic units."""
        dtype = ratios[0].dtype
        alpha_first, alpha_second = (self.polarizabilities.to(dtype)[z] for z in numbers)
        c6_first, c6_second = (self.c6.to(dtype)[z] for z in numbers)
        mean = (alpha_first * ratios[0] + alpha_second * ratios[1]) / 2
        free = alpha_first / (alpha_second * c6_first) + alpha_second / (alpha_first * c6_second)
        return mean.clamp(min=_MIN_POLARIZABILITY), 2 / free * ratios[0] * ratios[1]

    @staticmethod
    def _compute_spread(root: torch.Tensor) -> torch.Tensor:
        """Return the square of the oscillators' width in Bohr² from the seventh root of the polarizability."""
        radius = CODATA_2014_FINE_STRUCTURE ** (-4 / 21) * root
        width = torch.zeros_like(radius)
        for coefficient in reversed(_WIDTH_POLYNOMIAL):
            width = width * radius + coefficient
        return width**2
