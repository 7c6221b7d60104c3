"""Functions of the distance: radial bases and cutoff functions, smooth where the science needs it.

Formulas: arXiv 2205.14276, arXiv 2309.15126 and the SO3LR publication (10.1021/jacs.5c09558).
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from so3krates_dist.model.constants import ConstantsModule

BERNSTEIN_DECAY: Final = 0.9448630809783936
"""1/Å; half an inverse Bohr radius, 0.944863062918464, in single precision as in the authors' code for SO3LR"""


def compute_cosine_cutoff(distances: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return (1 + cos(pi d / cutoff)) / 2 inside the cutoff, 0 outside.

    Args:
        distances: (...) Å.
        cutoff: Å.
    """
    inside = distances < cutoff
    return torch.where(inside, 0.5 * (1 + torch.cos(distances * (math.pi / cutoff))), 0.0)


def compute_polynomial_cutoff(distances: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return 1 - 10 u^3 + 15 u^4 - 6 u^5 with u = d / cutoff, 0 outside; two derivatives vanish at both ends.

    Evaluated as (1 - u)^3 (1 + 3 u + 6 u^2), the same polynomial without its cancellation near the cutoff.

    Args:
        distances: (...) Å.
        cutoff: Å.
    """
    u = (distances / cutoff).clamp(max=1.0)
    rest = 1 - u
    return rest * rest * rest * (1 + u * (3 + 6 * u))


CUTOFF_FUNCTIONS: Final[dict[str, Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "cosine": compute_cosine_cutoff,
    "polynomial": compute_polynomial_cutoff,
}


class PhysNetBasis(ConstantsModule):
    """Gaussians in exp(-d): exp(-beta (exp(-d) - mu_k)^2), mu from exp(-cutoff) to 1 (PhysNet, 10.1021/acs.jctc.9b00181).

    Args:
        num_basis: K, functions in the basis.
        cutoff: Å.
    """

    centers: torch.Tensor

    def __init__(self, num_basis: int, cutoff: float) -> None:
        super().__init__()
        start = math.exp(-cutoff)
        self.register_buffer("centers", torch.linspace(start, 1.0, num_basis, dtype=torch.float64), persistent=False)
        self.beta = (2 / num_basis * (1 - start)) ** -2

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        """Expand distances (num_pairs,) in Å into (num_pairs, K) numbers between 0 and 1."""
        deviation = torch.exp(-distances)[:, None] - self.centers.to(distances.dtype)
        return torch.exp(-self.beta * deviation * deviation)


class BernsteinBasis(ConstantsModule):
    """Bernstein polynomials in X = exp(-gamma d): C(K-1, k) X^k (1 - X)^(K-1-k), which add up to one (SO3LR).

    Evaluated through logarithms, with -expm1(-gamma d) for 1 - X, so that neither short nor long distances underflow; k = 0
    reaches farthest. Distances must be greater than zero.

    Args:
        num_basis: K, functions in the basis.
    """

    exponents: torch.Tensor
    log_binomials: torch.Tensor

    def __init__(self, num_basis: int) -> None:
        super().__init__()
        n = num_basis - 1
        exponents = torch.arange(num_basis, dtype=torch.float64)
        log_binomials = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(num_basis)]
        self.register_buffer("exponents", exponents, persistent=False)
        self.register_buffer("log_binomials", torch.tensor(log_binomials, dtype=torch.float64), persistent=False)

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        """Expand distances (num_pairs,) in Å into (num_pairs, K) numbers between 0 and 1."""
        scaled = -BERNSTEIN_DECAY * distances[:, None]
        k, log_binomials = self.exponents.to(distances.dtype), self.log_binomials.to(distances.dtype)
        log_complement = torch.log(-torch.expm1(scaled))
        return torch.exp(torch.addcmul(log_binomials, k, scaled) + (len(k) - 1 - k) * log_complement)


def build_radial_basis(name: str, num_basis: int, cutoff: float) -> nn.Module:
    """Return the basis that the configuration names: `physnet` or `bernstein`."""
    return RADIAL_BASES[name](num_basis, cutoff)


RADIAL_BASES: Final[dict[str, Callable[[int, float], nn.Module]]] = {
    "physnet": PhysNetBasis,
    "bernstein": lambda num_basis, _cutoff: BernsteinBasis(num_basis),
}
