"""Charges, electrostatics and dispersion against the formulas as printed, computed with the standard library."""

import math

import pytest
import torch

from so3krates_dist.model.longrange import (
    MAX_DISPERSION_ELEMENT,
    Dispersion,
    compute_dipoles,
    compute_electrostatics,
    neutralize_charges,
)

COULOMB = 14.399645351950548  # eV Å, CODATA 2014
HARTREE, BOHR, FINE_STRUCTURE = 27.211386024367243, 0.5291772105638411, 0.007297352566206496
DISTANCES = [0.3, 1.0, 3.9, 5.4, 6.5, 9.9, 10.0, 11.0, 11.9]
FREE = {1: (4.5, 6.5), 6: (12.0, 46.6), 8: (5.4, 15.6), 17: (15.0, 94.6)}  # a_0^3, Hartree a_0^6


def switch(distance: float, start: float, end: float) -> float:
    c = (distance - start) / (end - start)

    def rise(t: float) -> float:
        return math.exp(-1 / t) if t > 0 else 0.0

    return rise(1 - c) / (rise(1 - c) + rise(c))


def to_double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_electrostatics_without_end() -> None:
    energies = compute_electrostatics(to_double([0.5, -0.2]), to_double([1.0, 1e4]), 4.0, math.inf)
    assert energies.tolist() == pytest.approx([0.5 * COULOMB * math.erf(0.25), -0.2 * COULOMB / 1e4], rel=1e-13)


def test_electrostatics_with_shifted_force() -> None:
    cutoff, damping, step = 12.0, 4.0, 1e-4

    def potential(r: float) -> float:
        return math.erf(r / damping) / r

    slope = (potential(cutoff + step) - potential(cutoff - step)) / (2 * step)
    expected = []
    for r in DISTANCES:
        shift = (1 - switch(r, 0.45 * cutoff, cutoff)) * slope * (r - cutoff)
        expected.append(COULOMB * -0.3 * (potential(r) - potential(cutoff) - shift))
    distances = to_double([*DISTANCES, cutoff, 15.0])
    energies = compute_electrostatics(torch.full_like(distances, -0.3), distances, damping, cutoff).tolist()
    assert energies[:-2] == pytest.approx(expected, abs=1e-9)
    assert energies[-2:] == [0.0, 0.0]


def compute_dispersion(z: tuple[int, int], v: tuple[float, float], d: float, factor: float) -> float:
    (alpha_i, c6_i), (alpha_j, c6_j) = (
        (FREE[n][0] * ratio, FREE[n][1] * ratio**2) for n, ratio in zip(z, v, strict=True)
    )
    alpha = (alpha_i + alpha_j) / 2
    c6 = 2 * c6_i * c6_j * alpha_i * alpha_j / (alpha_i**2 * c6_j + alpha_j**2 * c6_i)
    radius = FINE_STRUCTURE ** (-4 / 21) * alpha ** (1 / 7)
    width = -0.00078893 * radius**3 + 0.04125273 * radius**2 + 0.24428889 * radius - 0.00433008
    gamma = 1 / (2 * width**2)
    limit, r = factor * 2 * 2.54 * alpha ** (1 / 7), d / BOHR
    terms = ((6, c6), (8, 5 * c6 / gamma), (10, 245 * c6 / (8 * gamma**2)))
    return -HARTREE * sum(c / (r**n + limit**n) for n, c in terms)


@pytest.mark.parametrize("cutoff", [math.inf, 12.0])
def test_dispersion(cutoff: float) -> None:
    distances = to_double(DISTANCES)
    for z in ((1, 1), (6, 8), (17, 1)):
        ratios, damping = (0.63, 1.07), 1.2
        energies = Dispersion(damping, cutoff)(
            (torch.full((9,), z[0]), torch.full((9,), z[1])),
            (torch.full_like(distances, ratios[0]), torch.full_like(distances, ratios[1])),
            distances,
        )
        shares = [1.0 if math.isinf(cutoff) else switch(d, cutoff - 2, cutoff) for d in DISTANCES]
        expected = [s * compute_dispersion(z, ratios, d, damping) for d, s in zip(DISTANCES, shares, strict=True)]
        assert energies.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-15)


def test_untrained_ratios_near_zero_have_finite_derivatives() -> None:
    """Two derivatives of the energy by ratios that are, or nearly are, zero."""
    ratios = to_double([0.0, 1e-12, 1e-6, 0.5]).requires_grad_(True)
    numbers = torch.full((4,), 6)
    energies = Dispersion(1.2, 12.0)((numbers, numbers), (ratios, ratios), torch.full_like(ratios, 3.0))
    (slopes,) = torch.autograd.grad(energies.sum(), ratios, create_graph=True)
    (curvatures,) = torch.autograd.grad(slopes.sum(), ratios)
    assert bool(torch.stack([energies, slopes, curvatures]).isfinite().all())
    assert float(slopes[3].abs().detach()) > 1e-3


def test_free_atoms_tables() -> None:
    """Both end at radon; along a period of the table, a halogen is less polarizable than its alkali metal."""
    dispersion = Dispersion(1.2, 12.0)
    assert len(dispersion.polarizabilities) == len(dispersion.c6) == MAX_DISPERSION_ELEMENT + 1
    for z, (alpha, c6) in FREE.items():
        assert (float(dispersion.polarizabilities[z]), float(dispersion.c6[z])) == (alpha, c6)
    for alkali, halogen in ((3, 9), (11, 17), (19, 35), (37, 53), (55, 85)):
        assert dispersion.polarizabilities[alkali] > 3 * dispersion.polarizabilities[halogen]
        assert dispersion.c6[alkali] > 3 * dispersion.c6[halogen]


def test_tables_survive_single_precision() -> None:
    dispersion = Dispersion(1.2, 12.0).float().double()
    assert torch.equal(dispersion.c6, Dispersion(1.2, 12.0).c6)
    assert dispersion.state_dict() == {}


def test_charges_of_each_structure_add_up() -> None:
    raw, index = to_double([0.3, -0.1, 0.9, 0.4]), torch.tensor([0, 0, 2, 2])
    charges = neutralize_charges(raw, to_double([1.0, 5.0, -1.0]), index)
    assert charges.tolist() == pytest.approx([0.7, 0.3, -0.25, -0.75])


def test_dipoles_keep_their_digits_far_from_the_origin() -> None:
    charges, index = torch.tensor([0.4, -0.4, 1.0]), torch.tensor([0, 0, 1])
    positions = torch.tensor([[1000.0, 0, 0], [1000.5, 0, 0], [0, 3.0, 0]])
    dipoles = compute_dipoles(charges, torch.tensor([0.0, 1.0]), positions, index)
    assert dipoles.flatten().tolist() == pytest.approx([-0.2, 0, 0, 0, 3.0, 0], abs=1e-7)


def test_nothing_comes_of_nothing() -> None:
    empty, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert len(neutralize_charges(empty, empty, index)) == 0
    assert compute_dipoles(empty, empty, torch.zeros(0, 3), index).shape == (0, 3)
    assert len(compute_electrostatics(empty, empty, 4.0, 12.0)) == 0
    assert len(Dispersion(1.2, 12.0)((index, index), (empty, empty), empty)) == 0
