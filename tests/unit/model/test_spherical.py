"""Real spherical harmonics against e3nn, against formulas and against their laws; invariants and the maps between them."""

import math

import numpy as np
import pytest
import torch
from e3nn import o3

from so3krates_dist.model.spherical import DegreeMaps, SphericalHarmonics, compute_ev_dim

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
    """Shared specification, section 1: m from -l to l, z polar, no Condon-Shortley sign; l = 1 is (y, z, x)."""
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
