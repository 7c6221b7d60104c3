"""The switch and the repulsion of nuclei against the formulas as printed, computed with the standard library."""

import math

import pytest
import torch

from so3krates_dist.model.repulsion import RANGE, NuclearRepulsion, compute_switch, share_pair_energies

COULOMB = 14.399645351950548  # eV Å, CODATA 2014
BOHR = 0.5291772105638411  # Å, CODATA 2014


def switch(distance: float, start: float, end: float) -> float:
    c = (distance - start) / (end - start)

    def rise(t: float) -> float:
        return math.exp(-1 / t) if t > 0 else 0.0

    return rise(1 - c) / (rise(1 - c) + rise(c))


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.5), (5.4, 12.0)])
def test_switch(start: float, end: float) -> None:
    points = [start - 1, start, start + 1e-5, *(start + (end - start) * k / 50 for k in range(1, 50)), end, end + 3.0]
    values = compute_switch(torch.tensor(points, dtype=torch.float64), start, end).tolist()
    assert values == pytest.approx([switch(p, start, end) for p in points], abs=1e-14)
    assert (values[0], values[1], values[-2], values[-1]) == (1.0, 1.0, 0.0, 0.0)


def test_repulsion_starts_as_published() -> None:
    """Ziegler, Biersack and Littmark with their universal screening length, 0.8854 a_0 / (Z_i^0.23 + Z_j^0.23)."""
    a, c = (3.2, 0.9423, 0.4028, 0.2016), (0.1818, 0.5099, 0.2802, 0.02817)
    first, second, distances = [8, 1, 6], [1, 1, 17], [0.96, 0.3, 1.4]
    expected = []
    for z_i, z_j, d in zip(first, second, distances, strict=True):
        reduced = d / (0.8854 * BOHR) * (z_i**0.23 + z_j**0.23)
        screening = sum(w / sum(c) * math.exp(-e * reduced) for w, e in zip(c, a, strict=True))
        expected.append(COULOMB * z_i * z_j / d * screening * switch(d, 0, 1.5) * 0.7)
    envelope = torch.full((3,), 0.7, dtype=torch.float64)
    energies = NuclearRepulsion().double()(
        torch.tensor(first), torch.tensor(second), torch.tensor(distances, dtype=torch.float64), envelope
    )
    assert energies.tolist() == pytest.approx(expected, rel=1e-6)  # parameters start in single precision


def test_repulsion_ends_and_all_its_parameters_learn() -> None:
    repulsion = NuclearRepulsion().double()
    numbers = torch.tensor([6, 6, 6])
    distances = torch.tensor([1.0, RANGE, 3.0], dtype=torch.float64, requires_grad=True)
    energies = repulsion(numbers, numbers, distances, torch.ones(3, dtype=torch.float64))
    assert energies[0] > 1
    assert energies[1:].tolist() == [0, 0]
    (slopes,) = torch.autograd.grad(energies.sum(), distances, create_graph=True)
    assert slopes[0] < -1
    gradients = torch.autograd.grad(slopes.square().sum(), list(repulsion.parameters()))
    assert all(bool(g.isfinite().all()) and float(g.abs().min()) > 0 for g in gradients)


def test_shares_add_up_to_the_pairs() -> None:
    energies = torch.tensor([1.0, 10.0, 100.0])
    shares = share_pair_energies(energies, torch.tensor([0, 0, 2]), torch.tensor([1, 2, 2]), 4)
    assert shares.tolist() == [5.5, 0.5, 105.0, 0.0]  # the last pair is an atom with its own image


def test_no_pairs() -> None:
    empty, numbers = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    energies = NuclearRepulsion()(numbers, numbers, empty, empty)
    assert share_pair_energies(energies, numbers, numbers, 2).tolist() == [0.0, 0.0]
