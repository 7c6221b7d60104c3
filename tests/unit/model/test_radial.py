"""Radial bases and cutoff functions against their formulas, at their ends, and in second derivatives."""

import math
import typing

import numpy as np
import pytest
import torch
from scipy.special import comb

from so3krates_dist.config import EuclideanTransformerSection
from so3krates_dist.model.radial import (
    BERNSTEIN_DECAY,
    CUTOFF_FUNCTIONS,
    RADIAL_BASES,
    BernsteinBasis,
    PhysNetBasis,
    build_radial_basis,
    compute_cosine_cutoff,
    compute_polynomial_cutoff,
)

DISTANCES = torch.tensor([1e-3, 0.02, 0.74, 1.1, 2.5, 3.999, 4.0, 5.2, 9.0, 15.0], dtype=torch.float64)
bases = pytest.mark.parametrize("name", RADIAL_BASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def get_choices(field: str) -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(EuclideanTransformerSection)[field])


def test_the_schema_offers_what_there_is() -> None:
    assert get_choices("radial_basis") == tuple(sorted(RADIAL_BASES, reverse=True))
    assert get_choices("cutoff_function") == tuple(sorted(CUTOFF_FUNCTIONS))


@bases
@dtypes
def test_shape_dtype_and_range(name: str, dtype: torch.dtype) -> None:
    values = build_radial_basis(name, 7, 4.0)(DISTANCES.to(dtype))
    assert values.shape == (10, 7)
    assert values.dtype == dtype
    assert values.min() >= 0
    assert values.max() <= 1 + 1e-6


@bases
def test_no_pairs(name: str) -> None:
    assert build_radial_basis(name, 7, 4.0)(torch.zeros(0)).shape == (0, 7)


@bases
@dtypes
def test_second_derivatives_are_finite_from_almost_zero_to_far_beyond_the_cutoff(name: str, dtype: torch.dtype) -> None:
    distances = DISTANCES.to(dtype, copy=True).requires_grad_(True)
    weights = torch.linspace(-1, 1, 32, dtype=dtype)
    energy = (build_radial_basis(name, 32, 4.0)(distances) @ weights).sum()
    (first,) = torch.autograd.grad(energy, distances, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), distances)
    assert torch.isfinite(first).all(), first
    assert torch.isfinite(second).all(), second
    assert first.abs().max() > 1e-2


@bases
def test_derivatives_against_differences(name: str) -> None:
    basis = build_radial_basis(name, 6, 4.0)
    distances = torch.tensor([0.05, 0.9, 3.2, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis, (distances,))
    assert torch.autograd.gradgradcheck(basis, (distances,))


@pytest.mark.parametrize("num_basis", [2, 12, 32])
def test_bernstein_polynomials_add_up_to_one(num_basis: int) -> None:
    sums = BernsteinBasis(num_basis)(DISTANCES).sum(1)
    np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-12)


def test_bernstein_against_its_formula() -> None:
    decay = torch.exp(-BERNSTEIN_DECAY * DISTANCES)
    expected = np.stack([comb(11, k) * decay**k * (1 - decay) ** (11 - k) for k in range(12)], axis=1)
    np.testing.assert_allclose(BernsteinBasis(12)(DISTANCES), expected, rtol=1e-9, atol=1e-14)


def test_bernstein_decay_is_half_an_inverse_bohr_radius() -> None:
    """Rounded to single precision, as in the authors' code: unrounded, SO3LR's energies are off by 1e-6 eV."""
    assert float(np.float32(1 / (2 * 0.5291772105638411))) == BERNSTEIN_DECAY


def test_the_first_bernstein_polynomial_reaches_farthest() -> None:
    distances = torch.linspace(0.01, 15, 3000, dtype=torch.float64)
    peaks = distances[BernsteinBasis(8)(distances).argmax(0)]
    assert (peaks.diff() < 0).all()
    assert BernsteinBasis(8)(torch.tensor([15.0]))[0, 0] > 0.99


def test_bernstein_in_float32_is_accurate_where_logarithms_cancel() -> None:
    exact, single = BernsteinBasis(32)(DISTANCES), BernsteinBasis(32)(DISTANCES.float())
    np.testing.assert_allclose(single.double(), exact, rtol=0, atol=3e-6)


def test_physnet_against_its_formula() -> None:
    num_basis, cutoff = 9, 4.5
    width = (2 / num_basis * (1 - math.exp(-cutoff))) ** -2
    centers = [math.exp(-cutoff) + k * (1 - math.exp(-cutoff)) / (num_basis - 1) for k in range(num_basis)]
    expected = [[math.exp(-width * (math.exp(-d) - c) ** 2) for c in centers] for d in DISTANCES.tolist()]
    np.testing.assert_allclose(PhysNetBasis(num_basis, cutoff)(DISTANCES), expected, rtol=1e-12)


def test_constants_are_no_weights_and_are_not_stored() -> None:
    for name in RADIAL_BASES:
        basis = build_radial_basis(name, 5, 3.0)
        assert not list(basis.parameters())
        assert not basis.state_dict()


@pytest.mark.parametrize("name", CUTOFF_FUNCTIONS)
@dtypes
def test_cutoff_functions_fall_from_one_to_zero_with_flat_ends(name: str, dtype: torch.dtype) -> None:
    cutoff = 4.0
    distances = torch.tensor([0.0, 2.0, cutoff, cutoff + 1e-3, 100.0], dtype=dtype, requires_grad=True)
    values = CUTOFF_FUNCTIONS[name](distances, cutoff)
    np.testing.assert_allclose(values.detach(), [1, 0.5, 0, 0, 0], atol=1e-6)
    assert values[2:].tolist() == [0, 0, 0]
    (slopes,) = torch.autograd.grad(values.sum(), distances, create_graph=True)
    np.testing.assert_allclose(slopes[[0, 2, 3, 4]].detach(), 0, atol=1e-6)
    (curvatures,) = torch.autograd.grad(slopes.sum(), distances)
    assert torch.isfinite(curvatures).all()
    assert curvatures[3:].tolist() == [0, 0]
    scan = CUTOFF_FUNCTIONS[name](torch.linspace(0, 5, 500, dtype=dtype), cutoff)
    assert (scan.diff() <= 1e-6).all()


def test_two_derivatives_of_the_polynomial_vanish_at_both_ends() -> None:
    distances = torch.tensor([0.0, 5.0 - 1e-9], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(compute_polynomial_cutoff(distances, 5.0).sum(), distances, create_graph=True)
    (curvatures,) = torch.autograd.grad(slopes.sum(), distances)
    np.testing.assert_allclose(slopes.detach(), 0, atol=1e-14)
    np.testing.assert_allclose(curvatures, 0, atol=1e-8)


def test_cutoff_functions_against_their_formulas() -> None:
    distances = np.linspace(0, 3.499, 50)
    u = distances / 3.5
    tensor = torch.from_numpy(distances)
    cosine, polynomial = 0.5 * (1 + np.cos(np.pi * u)), 1 - 10 * u**3 + 15 * u**4 - 6 * u**5
    np.testing.assert_allclose(compute_cosine_cutoff(tensor, 3.5), cosine, rtol=0, atol=1e-14)
    np.testing.assert_allclose(compute_polynomial_cutoff(tensor, 3.5), polynomial, rtol=0, atol=1e-14)
