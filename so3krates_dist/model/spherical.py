"""Real spherical harmonics and invariants of Euclidean variables; the only importer of e3nn.

Axes: the papers order l = 1 as (y, z, x) of a z-polar frame, e3nn as its input axes. Feeding e3nn (y, z, x) gives the papers'
harmonics; that permutation is in this file and nowhere else.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import nn


def compute_ev_dim(degrees: Sequence[int]) -> int:
    """Return the length of a Euclidean variable: the sum of 2 l + 1 over its degrees."""
    return sum(2 * degree + 1 for degree in degrees)


@functools.cache
def _compute_couplings(max_degree: int) -> tuple[torch.Tensor, ...]:
    """Return for l = 1 ... max_degree the matrix that makes Y_l of u and Y_(l-1), (3 (2l-1), 2l+1) in float64.

    Y_l is the degree-l part of u times Y_(l-1), so up to a factor it is their coupling with e3nn's Wigner 3j symbols; the
    factor follows from one direction, where e3nn's harmonics are the reference.
    """
    from e3nn import o3

    direction = torch.nn.functional.normalize(torch.tensor([[0.36, -0.48, 0.8]], dtype=torch.float64), dim=-1)
    known = [o3.spherical_harmonics(d, direction, False, "integral") for d in range(max_degree + 1)]
    couplings = []
    for degree in range(1, max_degree + 1):
        symbols = o3.wigner_3j(1, degree - 1, degree, dtype=torch.float64).reshape(-1, 2 * degree + 1)
        product = (direction[:, :, None] * known[degree - 1][:, None, :]).reshape(1, -1) @ symbols
        couplings.append(symbols * ((product * known[degree]).sum() / product.square().sum()))
    return tuple(couplings)


class SphericalHarmonics(nn.Module):
    """Orthonormal real spherical harmonics of unit vectors, for a list of degrees.

    Each degree comes from the one below by a product with the vector and a small matrix: a few matrix operations instead of
    one elementwise operation per component, which is what the second derivative of forces multiplies (forward and both
    derivatives on CPU against e3nn's generated polynomials: 2.9 times faster for 360 pairs, 1.2 times for 5000; of a whole
    training step 7 % and nothing, tests/benchmarks/spherical_harmonics.md). Equal to 1e-14, tested.

    Args:
        degrees: Ascending, each at least 1.
    """

    def __init__(self, degrees: Sequence[int]) -> None:
        super().__init__()
        self.degrees = tuple(degrees)
        for degree, coupling in enumerate(_compute_couplings(max(self.degrees)), start=1):
            self.register_buffer(f"coupling_{degree}", coupling, persistent=False)

    def forward(self, directions: torch.Tensor) -> torch.Tensor:
        """Return (num_pairs, ev_dim) harmonics of unit vectors (num_pairs, 3); sum over m of Y^2 is (2l+1)/(4 pi)."""
        permuted = directions[:, [1, 2, 0]]
        harmonics = permuted.new_full((len(permuted), 1), 1 / math.sqrt(4 * math.pi))
        parts = []
        for degree in range(1, self.degrees[-1] + 1):
            product = (permuted[:, :, None] * harmonics[:, None, :]).flatten(1)
            harmonics = product @ getattr(self, f"coupling_{degree}").to(product.dtype)
            if degree in self.degrees:
                parts.append(harmonics)
        return torch.cat(parts, dim=1)


class DegreeMaps(nn.Module):
    """Index tables between one number per degree and one number per (degree, order).

    Args:
        degrees: Degrees of the Euclidean variables.
    """

    degree_of: torch.Tensor
    parity: torch.Tensor
    contraction: torch.Tensor

    def __init__(self, degrees: Sequence[int]) -> None:
        super().__init__()
        lengths = torch.tensor([2 * degree + 1 for degree in degrees])
        degree_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        parity = torch.tensor([(-1.0) ** degree for degree in degrees], dtype=torch.float64)[degree_of]
        contraction = torch.nn.functional.one_hot(degree_of).double() / lengths.double().sqrt()
        self.register_buffer("degree_of", degree_of, persistent=False)
        self.register_buffer("parity", parity, persistent=False)
        self.register_buffer("contraction", contraction, persistent=False)

    def repeat(self, values: torch.Tensor) -> torch.Tensor:
        """Turn one number per degree (..., num_degrees) into one per component (..., ev_dim)."""
        return values.index_select(-1, self.degree_of)

    def invert(self, harmonics: torch.Tensor) -> torch.Tensor:
        """Return the harmonics of the opposite directions: Y_l(-u) = (-1)^l Y_l(u)."""
        return harmonics * self.parity.to(harmonics.dtype)

    def compute_invariants(self, ev_features: torch.Tensor) -> torch.Tensor:
        """Contract (..., ev_dim) to (..., num_degrees): (2l+1)^(-1/2) times the sum of squares of each degree.

        A polynomial, unlike a norm, so all derivatives exist where the variable vanishes.
        """
        return (ev_features * ev_features) @ self.contraction.to(ev_features.dtype)
