"""Laws of derivatives: forces, stress, second derivatives and gradients of the weights against differences of what they derive."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from structures import (
    CUTOFF,
    OPTIONS,
    check_deviations,
    compare,
    compute,
    make_batch,
    make_crystal,
    make_molecule,
    make_potential,
    measure,
    move,
)

from so3krates_dist.graph import Graph
from so3krates_dist.model.potential import Potential, compute_vectors

STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
"""First derivative from five points, error of fourth order in the step"""

options = pytest.mark.parametrize("options", OPTIONS)
crystals = pytest.mark.parametrize("name", ["triclinic", "self_images"])


def differentiate(potential: Potential, structures: list[Graph], step: float, field: str = "energy") -> np.ndarray:
    """Return derivatives of a field from structures in groups of four, displaced as in `STENCIL`."""
    outputs = potential(make_batch(structures, potential.cutoff))[field].detach().numpy()
    values = outputs.reshape(len(structures) // len(STENCIL), len(STENCIL), -1)
    return np.einsum("ns...,s->n...", values, np.array(list(STENCIL.values()))) / step


def displace(graph: Graph, step: float) -> list[Graph]:
    """Return the structure with every coordinate displaced by every point of the stencil."""
    structures = []
    for atom, axis, point in itertools.product(range(graph.num_atoms), range(3), STENCIL):
        positions = graph.positions.copy()
        positions[atom, axis] += point * step
        structures.append(move(graph, positions))
    return structures


def strain(graph: Graph, step: float) -> list[Graph]:
    """Return the structure strained along each of the nine components, symmetrically, by every point of the stencil."""
    assert graph.cell is not None
    structures = []
    for row, column, point in itertools.product(range(3), range(3), STENCIL):
        tensor = np.zeros((3, 3))
        tensor[row, column] += point * step / 2
        tensor[column, row] += point * step / 2
        deformation = np.eye(3) + tensor
        structures.append(move(graph, graph.positions @ deformation, graph.cell @ deformation))
    return structures


@options
@pytest.mark.parametrize("name", ["molecule", "triclinic", "self_images"])
def test_forces_are_minus_the_slope_of_the_energy(options: str, name: str) -> None:
    potential = make_potential(options)
    graph = make_molecule("CH3OH") if name == "molecule" else make_crystal(name)
    forces = compute(potential, graph)["forces"]
    slopes = differentiate(potential, displace(graph, 2e-4), 2e-4).reshape(-1, 3)
    assert np.abs(forces).max() > 1e-2
    check_deviations({"forces": measure(forces, -slopes)}, 1e-8)


@options
@crystals
def test_stress_is_the_slope_of_the_energy_by_strain(options: str, name: str) -> None:
    """ASE's sign: (1/V) dE/dstrain, so a structure under pressure has a negative trace."""
    potential, graph = make_potential(options), make_crystal(name)
    assert graph.cell is not None
    stress = compute(potential, graph, stress=True)["stress"][0]
    slopes = differentiate(potential, strain(graph, 1e-4), 1e-4).reshape(3, 3)
    assert np.abs(stress).max() > 1e-3
    check_deviations({"stress": measure(stress, slopes / abs(np.linalg.det(graph.cell)))}, 1e-9)


def test_stress_does_not_depend_on_the_handedness_of_the_cell() -> None:
    """Volumes are positive where the three cell vectors are a left-handed system."""
    potential, graph = make_potential(), make_crystal()
    assert graph.cell is not None
    left = move(graph, graph.positions, graph.cell[[1, 0, 2]])
    assert np.linalg.det(graph.cell) > 0 > np.linalg.det(left.cell)  # type: ignore[arg-type]
    check_deviations(compare(compute(potential, left, stress=True), compute(potential, graph, stress=True)), 1e-12)


def compute_energy_of_positions(potential: Potential, graph: Graph, positions: torch.Tensor) -> torch.Tensor:
    """Return the learned energy with a graph back to the positions, the pairs as they are."""
    batch = dataclasses.replace(make_batch([graph]), positions=positions)
    energies: torch.Tensor = potential.network(batch, compute_vectors(batch)).sum()
    return energies


@options
@pytest.mark.parametrize("name", ["CO2", "C2H2", "CH4", "C6H6"])
def test_second_derivatives_of_symmetric_molecules(options: str, name: str) -> None:
    """Euclidean variables vanish by symmetry here; norms, unlike invariants, have no derivative there (spec section 9, trap 4)."""
    potential, graph = make_potential(options), make_molecule(name, None)
    positions = torch.from_numpy(graph.positions).requires_grad_(True)

    def energy(moved: torch.Tensor) -> torch.Tensor:
        return compute_energy_of_positions(potential, graph, moved)

    assert torch.autograd.gradgradcheck(energy, (positions,), fast_mode=True, atol=1e-5, rtol=1e-4)


@options
def test_force_constants_are_slopes_of_the_forces(options: str) -> None:
    """All second derivatives of a linear molecule; they are finite and symmetric."""
    potential, graph = make_potential(options), make_molecule("C2H2", None)
    positions = torch.from_numpy(graph.positions)
    hessian = torch.autograd.functional.hessian(
        lambda moved: compute_energy_of_positions(potential, graph, moved), positions
    ).reshape(12, 12) * potential.statistics.energy_scale  # fmt: skip
    slopes = differentiate(potential, displace(graph, 2e-4), 2e-4, "forces")
    check_deviations(
        {
            "hessian": measure(hessian.detach().numpy(), -slopes),
            "asymmetry": measure(hessian.detach().numpy(), hessian.detach().numpy().T),
        },
        {"hessian": 1e-7, "asymmetry": 1e-11},
    )


def compute_force_loss(potential: Potential, graphs: list[Graph]) -> torch.Tensor:
    """Return a loss of energy, forces and stress, as in training."""
    stress = all(g.is_periodic for g in graphs)
    outputs = potential.train()(make_batch(graphs), compute_stress=stress)
    rng = torch.Generator().manual_seed(5)
    loss = (outputs["energy"] - 0.3).square().sum()
    targets = torch.randn(outputs["forces"].shape, generator=rng, dtype=torch.float64)
    loss = loss + (outputs["forces"] - targets).square().sum()
    return loss + (100 * outputs["stress"]).square().sum() if stress else loss


@options
@pytest.mark.parametrize("periodic", [False, True])
def test_weight_gradients_of_a_force_loss(options: str, periodic: bool) -> None:
    """The second derivative that training takes: one element of every weight tensor against differences of the loss."""
    potential = make_potential(options)
    graphs = [make_crystal("self_images")] if periodic else [make_molecule("CH3OH"), make_molecule("CO2", None)]
    compute_force_loss(potential, graphs).backward()
    rng, step, deviations = np.random.default_rng(3), 1e-4, {}
    weights = dict(potential.named_parameters())
    names = rng.permutation(list(weights))[:12]
    for name in names:
        weight = weights[str(name)]
        assert weight.grad is not None, name
        index = int(weight.grad.abs().argmax()) if rng.random() < 0.5 else int(rng.integers(weight.numel()))
        losses = []
        for point in STENCIL:
            with torch.no_grad():
                weight.view(-1)[index] += point * step
            losses.append(compute_force_loss(potential, graphs).item())
            with torch.no_grad():
                weight.view(-1)[index] -= point * step
        slope = float(np.dot(losses, list(STENCIL.values()))) / step
        gradient = float(weight.grad.view(-1)[index])
        deviations[str(name)] = abs(gradient - slope) / max(1.0, abs(slope), losses[0])
    check_deviations(deviations, 1e-8)


def test_every_weight_has_a_gradient_from_forces_alone() -> None:
    """Except the last bias, which moves all energies alike."""
    potential = make_potential().train()
    potential(make_batch([make_molecule()]))["forces"].square().sum().backward()
    without = [n for n, p in potential.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # chi is zero in the first layer, so the spherical networks there see no input (but their biases act).
    assert without == ["network.layers.0.attention.spherical_filter.hidden.weight", "network.readout.bias"]


def test_forces_do_not_depend_on_the_list_being_longer_than_the_cutoff() -> None:
    potential, deviations = make_potential(), {}
    for graph in (make_molecule(), make_crystal("self_images")):
        short, longer = (potential(make_batch([graph], cutoff)) for cutoff in (CUTOFF, CUTOFF + 2))
        deviations |= {f"{graph.group} {k}": measure(longer[k].numpy(), short[k].numpy()) for k in short}
    check_deviations(deviations, 1e-12)
