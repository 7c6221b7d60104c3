"""Real spherical harmonics against e3nn, against formulas and against their laws; invariants and the maps between them."""

import math

import numpy as np
import pytest
import torch
from e3nn import o3

from so3krates_dist.model.spherical import (
    DegreeMaps,
    SphericalHarmonics,
    compute_ev_dim,
    compute_lengths,
    compute_self_couplings,
    find_vanishing,
)

ALL_DEGREES = tuple(range(1, 9))


def make_directions(count: int = 200, seed: int = 0) -> torch.Tensor:
    """Return unit vectors in all directions, the axes and the corners of a cube among them."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.cat([torch.eye(3), -torch.eye(3), torch.ones(1, 3), torch.tensor([[1.0, -1.0, 0.0]])])
    vectors = torch.cat([special, torch.randn(count, 3, generator=generator)]).double()
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_equal_e3nn_with_permuted_axes() -> None:
    directions = make_directions()
    expected = o3.spherical_harmonics(list(ALL_DEGREES), directions[:, [1, 2, 0]], False, "integral")
    np.testing.assert_allclose(SphericalHarmonics(ALL_DEGREES)(directions), expected, rtol=0, atol=1e-14)


def test_first_two_degrees_against_their_formulas() -> None:
    """m from -l to l, z polar, no Condon-Shortley sign; l = 1 is (y, z, x)."""
    directions = make_directions()
    x, y, z = directions.T
    first = [math.sqrt(3 / (4 * math.pi)) * v for v in (y, z, x)]
    middle = 0.25 * math.sqrt(5 / math.pi) * (3 * z * z - 1)
    a, b, c, d = (math.sqrt(15 / (4 * math.pi)) * v for v in (x * y, y * z, x * z, (x * x - y * y) / 2))
    expected = torch.stack([*first, a, b, middle, c, d], dim=1)
    np.testing.assert_allclose(SphericalHarmonics((1, 2))(directions), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("degree", ALL_DEGREES)
def test_sum_of_squares(degree: int) -> None:
    """Unsöld's theorem: the sum over m of Y^2 is (2l+1)/(4 pi) in every direction."""
    squares = SphericalHarmonics((degree,))(make_directions()).square().sum(1)
    np.testing.assert_allclose(squares, (2 * degree + 1) / (4 * math.pi), rtol=1e-13)


def test_orthonormal_over_the_sphere() -> None:
    """Gauss-Legendre in cos(theta) and equal steps in phi integrate products up to degree 8 exactly."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    angles = 2 * np.pi * np.arange(20) / 20
    z, phi = np.meshgrid(nodes, angles, indexing="ij")
    planar = np.sqrt(1 - z**2)
    directions = torch.from_numpy(np.stack([planar * np.cos(phi), planar * np.sin(phi), z], -1).reshape(-1, 3))
    weight = np.repeat(weights, 20) * 2 * np.pi / 20
    values = SphericalHarmonics((1, 2, 3, 4))(directions).numpy()
    np.testing.assert_allclose(values.T @ (weight[:, None] * values), np.eye(24), atol=1e-13)


def test_degrees_may_have_gaps() -> None:
    directions = make_directions()
    full, some = SphericalHarmonics((1, 2, 3, 4, 5))(directions), SphericalHarmonics((2, 5))(directions)
    assert torch.equal(some, torch.cat([full[:, 3:8], full[:, 24:35]], dim=1))


def test_parity() -> None:
    degrees = (1, 2, 3, 4)
    harmonics, directions = SphericalHarmonics(degrees), make_directions()
    inverted = DegreeMaps(degrees).invert(harmonics(directions))
    np.testing.assert_allclose(harmonics(-directions), inverted, rtol=0, atol=1e-15)


def test_rotation_mixes_only_orders_of_one_degree() -> None:
    """And by an orthogonal matrix per degree, so invariants of differences do not change."""
    from scipy.spatial.transform import Rotation

    degrees = (1, 2, 3)
    rotation = torch.from_numpy(Rotation.from_rotvec([0.4, -1.3, 0.8]).as_matrix())
    harmonics, directions, maps = SphericalHarmonics(degrees), make_directions(), DegreeMaps(degrees)
    before, after = harmonics(directions), harmonics(directions @ rotation.T)
    matrix = torch.linalg.lstsq(before, after).solution
    np.testing.assert_allclose(before @ matrix, after, atol=1e-13)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(15), atol=1e-12)
    same_degree = maps.degree_of[:, None] == maps.degree_of[None, :]
    assert matrix[~same_degree].abs().max() < 1e-13
    changed, unchanged = (maps.compute_invariants(v[5:] - v[:-5]) for v in (after, before))
    np.testing.assert_allclose(changed, unchanged, atol=1e-13)


def test_derivatives_against_differences() -> None:
    harmonics = SphericalHarmonics(ALL_DEGREES)
    vectors = (1.7 * make_directions(4)).requires_grad_(True)

    def compute(moved: torch.Tensor) -> torch.Tensor:
        return harmonics(moved / torch.linalg.vector_norm(moved, dim=-1, keepdim=True))

    assert torch.autograd.gradcheck(compute, (vectors,), fast_mode=True)
    assert torch.autograd.gradgradcheck(compute, (vectors,), fast_mode=True)


def test_float32_and_no_pairs() -> None:
    harmonics, directions = SphericalHarmonics(ALL_DEGREES), make_directions()
    single = harmonics(directions.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, harmonics(directions), rtol=0, atol=3e-6)
    assert harmonics(torch.zeros(0, 3)).shape == (0, 80)


def test_nothing_is_stored_or_learned() -> None:
    for module in (SphericalHarmonics((1, 2)), DegreeMaps((1, 2))):
        assert not module.state_dict()
        assert not list(module.parameters())


def test_length_of_euclidean_variables() -> None:
    assert [compute_ev_dim(degrees) for degrees in ((1,), (2,), (1, 2, 3), (1, 2, 3, 4), ALL_DEGREES)] == [
        3, 5, 15, 24, 80,
    ]  # fmt: skip


def test_invariants_against_their_formula() -> None:
    maps = DegreeMaps((1, 3))
    values = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [values[:, :3].square().sum(1) / math.sqrt(3), values[:, 3:].square().sum(1) / math.sqrt(7)], 1
    )
    np.testing.assert_allclose(maps.compute_invariants(values), expected, rtol=1e-14)


def test_invariants_have_derivatives_where_the_variable_vanishes() -> None:
    maps, zeros = DegreeMaps((1, 2)), torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(maps.compute_invariants(zeros).sum(), zeros, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), zeros)
    assert first.tolist() == [[0.0] * 8]
    np.testing.assert_allclose(second[0], [2 / math.sqrt(3)] * 3 + [2 / math.sqrt(5)] * 5)


def test_repeat_gives_every_order_the_number_of_its_degree() -> None:
    repeated = DegreeMaps((1, 2)).repeat(torch.tensor([[10.0, 20.0]]))
    assert repeated.tolist() == [[10.0] * 3 + [20.0] * 5]


def test_degree_zero_is_a_constant() -> None:
    directions = make_directions()
    with_zero = SphericalHarmonics((0, 2))(directions)
    np.testing.assert_allclose(with_zero[:, 0], 1 / math.sqrt(4 * math.pi), rtol=1e-15)
    assert torch.equal(with_zero[:, 1:], SphericalHarmonics((2,))(directions))
    assert SphericalHarmonics((0,))(directions).shape == (len(directions), 1)
    assert DegreeMaps((0, 1)).invert(torch.ones(1, 4)).tolist() == [[1.0, -1.0, -1.0, -1.0]]


def test_sums_of_squares() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 1.0, 0.0, 1.0, 0.0, 2.0]])
    assert DegreeMaps((1, 2)).sum_squares(values).tolist() == [[14.0, 6.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lengths_and_their_derivatives_where_the_vector_vanishes(dtype: torch.dtype) -> None:
    """Exactly or up to rounding; what is far above rounding keeps its derivatives."""
    eps = torch.finfo(dtype).eps
    vectors = torch.tensor([[0.0, 0.0], [3 * eps, -eps], [3.0, 4.0], [3e-3, 4e-3]], dtype=dtype, requires_grad=True)
    lengths = compute_lengths(vectors.square().sum(1))
    np.testing.assert_allclose(lengths.detach(), [0, 0, 5, 5e-3], rtol=1e-6)
    (first,) = torch.autograd.grad(lengths.sum(), vectors, create_graph=True)
    np.testing.assert_allclose(first.detach(), [[0, 0], [0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
    (second,) = torch.autograd.grad(first[:, 0].sum(), vectors)
    np.testing.assert_allclose(second, [[0, 0], [0, 0], [0.128, -0.096], [128, -96]], rtol=2e-4)


def test_the_limit_grows_with_what_a_difference_is_made_of() -> None:
    """1e-9 is rounding of numbers of size 1e4 with some layers behind them, not of size 1."""
    squares = torch.full((2,), 1e-18, dtype=torch.float64)
    assert find_vanishing(squares, torch.tensor([1.0, 1e8], dtype=torch.float64)).tolist() == [False, True]


@pytest.mark.parametrize("parity", [False, True])
def test_self_couplings_are_normalised_and_only_between_different_degrees(parity: bool) -> None:
    degrees = (0, 1, 2, 3)
    left, right, coefficients, positions = compute_self_couplings(degrees, parity)
    degree_of = DegreeMaps(degrees).degree_of
    assert bool((degree_of[left] < degree_of[right]).all())
    norms = torch.zeros(64, dtype=torch.float64).index_add(0, positions.flatten(), coefficients.square().flatten())
    for k, third in enumerate(degrees):
        for i, first in enumerate(degrees):
            for j, second in enumerate(degrees):
                allowed = i < j and second - first <= third <= first + second
                allowed = allowed and not (parity and (first + second + third) % 2)
                assert float(norms[(k * 4 + i) * 4 + j]) == pytest.approx(1.0 if allowed else 0.0, abs=1e-14)


def couple(values: torch.Tensor, degrees: tuple[int, ...], parity: bool) -> torch.Tensor:
    left, right, coefficients, _ = compute_self_couplings(degrees, parity)
    return (values[:, left] * values[:, right]) @ coefficients


@pytest.mark.parametrize("parity", [False, True])
def test_self_couplings_turn_with_the_frame(parity: bool) -> None:
    from scipy.spatial.transform import Rotation

    degrees, maps = (1, 2, 3), DegreeMaps((1, 2, 3))
    harmonics, directions = SphericalHarmonics(degrees), make_directions()
    rotation = torch.from_numpy(Rotation.from_rotvec([0.4, -1.3, 0.8]).as_matrix())
    matrix = torch.linalg.lstsq(harmonics(directions), harmonics(directions @ rotation.T)).solution
    values = torch.randn(4, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(
        couple(values @ matrix, degrees, parity), couple(values, degrees, parity) @ matrix, atol=1e-12
    )
    inverted = couple(maps.invert(values), degrees, parity) - maps.invert(couple(values, degrees, parity))
    assert (float(inverted.abs().max()) < 1e-14) == parity


def test_self_couplings_against_vectors() -> None:
    """Of v (degree 1) and the traceless u u^T (degree 2): the vector (u u^T - 1/3) v, and the symmetric product of u and v x u."""
    u, v = make_directions(1)[-1:], make_directions(1, seed=1)[-1:]
    one, two = SphericalHarmonics((1,)), SphericalHarmonics((2,))
    coupled = couple(torch.cat([one(v), two(u)], dim=1), (1, 2), parity=False)
    vector = u * (u * v).sum() - v / 3
    expected = one(vector)  # linear in the vector, whatever its length
    factor = float((coupled[:, :3] * expected).sum() / expected.square().sum())
    np.testing.assert_allclose(coupled[:, :3], factor * expected, atol=1e-14)
    cross = torch.linalg.cross(v, u)
    product = two(torch.nn.functional.normalize(u + cross / cross.norm(), dim=1)) - two(
        torch.nn.functional.normalize(u - cross / cross.norm(), dim=1)
    )
    pseudo = float((coupled[:, 3:] * product).sum() / product.square().sum())
    np.testing.assert_allclose(coupled[:, 3:], pseudo * product, atol=1e-14)
    assert min(abs(factor), abs(pseudo)) > 1e-2
