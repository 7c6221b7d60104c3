"""Real spherical harmonics and invariants of Euclidean variables; the only importer of e3nn.

Axes: the papers order l = 1 as (y, z, x) of a z-polar frame, e3nn as its input axes. Feeding e3nn (y, z, x) gives the papers'
harmonics; that permutation is in this file and nowhere else.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch

from so3krates_dist.model.constants import ConstantsModule
from so3krates_dist.model.exact import multiply_exactly


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


@functools.cache
def compute_self_couplings(degrees: tuple[int, ...], parity: bool) -> tuple[torch.Tensor, ...]:
    """Return how products of the components of two different degrees couple to each degree (arXiv 2205.14276, self-mixing).

    Coefficients are e3nn's Wigner 3j symbols (Frobenius norm 1 for each triple of degrees) times (-1)^(l1 + l2 + l3), the sign
    in the authors' table. They are the same in every right-handed frame, so the order of axes needs no further care.

    Args:
        degrees: Ascending degrees of the Euclidean variables.
        parity: Leave out triples with odd l1 + l2 + l3: their products are pseudotensors, which inversion turns the other way.

    Returns:
        (num_products,) components l1 m1 and (num_products,) components l2 m2 of the products with l1 < l2; (num_products,
        ev_dim) coefficients to l3 m3 in float64; and (num_products, ev_dim) the position of (l3, l1, l2) in a flat table of
        num_degrees^3 factors.
    """
    from e3nn import o3

    lengths = [2 * degree + 1 for degree in degrees]
    slices = [slice(end - length, end) for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
    ev_dim, count = sum(lengths), len(degrees)
    dense = torch.zeros(ev_dim, ev_dim, ev_dim, dtype=torch.float64)
    for (i, first), (j, second), (k, third) in itertools.product(enumerate(degrees), repeat=3):
        odd = (first + second + third) % 2 == 1
        if i < j and abs(first - second) <= third <= first + second and not (parity and odd):
            symbols = o3.wigner_3j(first, second, third, dtype=torch.float64)
            dense[slices[i], slices[j], slices[k]] = -symbols if odd else symbols
    degree_of = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))
    left, right = torch.nonzero(degree_of[:, None] < degree_of[None, :], as_tuple=True)
    positions = (degree_of[None, :] * count + degree_of[left, None]) * count + degree_of[right, None]
    return left, right, dense[left, right], positions


def find_vanishing(squares: torch.Tensor, sizes: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return where a length counts as zero: below eps^(2/3) of the dtype, relative to what it is computed from where that is large.

    Vectors that symmetry makes equal differ by rounding, a few eps times their size. A norm has no derivative at zero, and
    beside it one of size 1 in a direction that only rounding has chosen and a second one of 1 / norm, so such remainders must
    count as zero. The limit, 4e-11 in float64 and 2e-5 in float32, is far above rounding after many layers. Shorter lengths have no
    derivative; forces in float32 show it where SPHC of degree 0, which start almost equal, are among the degrees.

    Args:
        squares: (...) squared lengths.
        sizes: Squared lengths of the vectors whose sums or differences these are, of a shape that can be broadcast.
    """
    limit = torch.finfo(squares.dtype).eps ** (4 / 3)
    return torch.le(squares, limit * (1 + sizes))


def compute_lengths(squares: torch.Tensor, sizes: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return square roots, zero with zero derivatives where `find_vanishing` says so; all derivatives are finite.

    Args:
        squares: (...) squared lengths.
        sizes: As in `find_vanishing`.
    """
    vanishing = find_vanishing(squares, sizes)
    return torch.where(vanishing, 0.0, torch.where(vanishing, 1.0, squares).sqrt())


class SphericalHarmonics(ConstantsModule):
    """Orthonormal real spherical harmonics of unit vectors, for a list of degrees.

    Each degree comes from the one below by a product with the vector and a small matrix: a few matrix operations instead of
    one elementwise operation per component, which is what the second derivative of forces multiplies (forward and both
    derivatives on CPU against e3nn's generated polynomials: 2.9 times faster for 360 pairs, 1.2 times for 5000; of a whole
    training step 7 % and nothing, tests/benchmarks/spherical_harmonics.md). Equal to 1e-14, tested.

    Args:
        degrees: Ascending, each at least 0.
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
        parts = [harmonics] if self.degrees[0] == 0 else []
        for degree in range(1, self.degrees[-1] + 1):
            product = (permuted[:, :, None] * harmonics[:, None, :]).flatten(1)
            harmonics = multiply_exactly(product, getattr(self, f"coupling_{degree}").to(product.dtype))
            if degree in self.degrees:
                parts.append(harmonics)
        return torch.cat(parts, dim=1)


class DegreeMaps(ConstantsModule):
    """Index tables between one number per degree and one number per (degree, order).

    Args:
        degrees: Degrees of the Euclidean variables.
    """

    degree_of: torch.Tensor
    parity: torch.Tensor
    contraction: torch.Tensor
    membership: torch.Tensor

    def __init__(self, degrees: Sequence[int]) -> None:
        super().__init__()
        self.degrees = tuple(degrees)
        lengths = torch.tensor([2 * degree + 1 for degree in degrees])
        degree_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        parity = torch.tensor([(-1.0) ** degree for degree in degrees], dtype=torch.float64)[degree_of]
        membership = torch.nn.functional.one_hot(degree_of).double()
        contraction = membership / lengths.double().sqrt()
        self.register_buffer("degree_of", degree_of, persistent=False)
        self.register_buffer("parity", parity, persistent=False)
        self.register_buffer("contraction", contraction, persistent=False)
        self.register_buffer("membership", membership, persistent=False)

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
        return multiply_exactly(ev_features * ev_features, self.contraction.to(ev_features.dtype))

    def sum_squares(self, ev_features: torch.Tensor) -> torch.Tensor:
        """Return (..., num_degrees) squared lengths of each degree of (..., ev_dim)."""
        return multiply_exactly(ev_features * ev_features, self.membership.to(ev_features.dtype))
