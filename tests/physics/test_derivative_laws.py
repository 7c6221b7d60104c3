"""Laws of derivatives: forces, stress, second derivatives and gradients of the weights against differences of what they derive."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from structures import (
    OPTIONS,
    PERIODIC,
    SO3KRATES,
    SO3LR,
    check_deviations,
    compare,
    compute,
    make_batch,
    make_crystal,
    make_ion,
    make_molecule,
    make_potential,
    measure,
    move,
)

from so3krates_dist.graph import Graph
from so3krates_dist.model.potential import Potential, compute_vectors

STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
"""First derivative from five points, error of fourth order in the step"""

WITHOUT_NORMS = [name for name in OPTIONS if name not in SO3KRATES]
"""Options of models that take no norm of Euclidean variables, and so have second derivatives wherever those vanish"""

START_AT_ZERO = ["transformer", "pre_gated", "backbone", "one_degree", "so3krates_scalars", *SO3LR]
"""Options whose Euclidean variables are zero before the first layer"""

options = pytest.mark.parametrize("options", OPTIONS)
periodic = pytest.mark.parametrize("options", PERIODIC)
crystals = pytest.mark.parametrize("name", ["triclinic", "self_images"])


def differentiate(potential: Potential, structures: list[Graph], step: float, field: str = "energy") -> np.ndarray:
    """Return derivatives of a field from structures in groups of four, displaced as in `STENCIL`."""
    outputs = potential(make_batch(structures, potential.cutoffs))[field].detach().numpy()
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


def check_forces(options: str, graph: Graph) -> None:
    potential = make_potential(options)
    forces = compute(potential, graph)["forces"]
    slopes = differentiate(potential, displace(graph, 2e-4), 2e-4).reshape(-1, 3)
    assert np.abs(forces).max() > 1e-2
    check_deviations({"forces": measure(forces, -slopes)}, 1e-8)


@options
@pytest.mark.parametrize(
    "graph", [make_molecule("CH3OH"), make_ion(1.0), make_ion(-1.0)], ids=["molecule", "cation", "anion"]
)
def test_forces_are_minus_the_slope_of_the_energy(options: str, graph: Graph) -> None:
    check_forces(options, graph)


@periodic
@crystals
def test_forces_in_crystals_are_minus_the_slope_of_the_energy(options: str, name: str) -> None:
    check_forces(options, make_crystal(name))


@periodic
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
    """Return the energy without baselines with a graph back to the positions, the pairs as they are."""
    batch = dataclasses.replace(make_batch([graph], potential.cutoffs), positions=positions)
    outputs = potential.as_network(batch, compute_vectors(batch))
    energies = outputs["atom_energies"] * potential.statistics.energy_scale + outputs.get("physical_energies", 0.0)
    return energies.sum()


@pytest.mark.parametrize("options", WITHOUT_NORMS)
@pytest.mark.parametrize("name", ["CO2", "C2H2", "CH4", "C6H6"])
def test_second_derivatives_of_symmetric_molecules(options: str, name: str) -> None:
    """Euclidean variables vanish by symmetry here; norms, unlike invariants, have no derivative there."""
    potential, graph = make_potential(options), make_molecule(name, None)
    positions = torch.from_numpy(graph.positions).requires_grad_(True)

    def energy(moved: torch.Tensor) -> torch.Tensor:
        return compute_energy_of_positions(potential, graph, moved)

    assert torch.autograd.gradgradcheck(energy, (positions,), fast_mode=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", WITHOUT_NORMS)
def test_force_constants_are_slopes_of_the_forces(options: str) -> None:
    """All second derivatives of a linear molecule; they are finite and symmetric."""
    potential, graph = make_potential(options), make_molecule("C2H2", None)
    positions = torch.from_numpy(graph.positions)
    hessian = torch.autograd.functional.hessian(
        lambda moved: compute_energy_of_positions(potential, graph, moved), positions
    ).reshape(12, 12)  # fmt: skip
    slopes = differentiate(potential, displace(graph, 2e-4), 2e-4, "forces")
    check_deviations(
        {
            "hessian": measure(hessian.detach().numpy(), -slopes),
            "asymmetry": measure(hessian.detach().numpy(), hessian.detach().numpy().T),
        },
        {"hessian": 1e-7, "asymmetry": 1e-11},
    )


@pytest.mark.parametrize("options", SO3KRATES)
@pytest.mark.parametrize("name", ["CH3OH", "HCOOH"])
def test_second_derivatives_of_models_with_norms(options: str, name: str) -> None:
    """Where no two atoms have the same SPHC and none has zero ones; what happens elsewhere is in test_so3krates_laws.py."""
    potential, graph = make_potential(options), make_molecule(name)
    positions = torch.from_numpy(graph.positions).requires_grad_(True)

    def energy(moved: torch.Tensor) -> torch.Tensor:
        return compute_energy_of_positions(potential, graph, moved)

    assert torch.autograd.gradgradcheck(energy, (positions,), fast_mode=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", SO3KRATES)
@pytest.mark.parametrize("name", ["CO2", "C2H2", "CH4", "C6H6"])
def test_derivatives_are_finite_where_norms_have_none(options: str, name: str) -> None:
    """Equal and vanishing SPHC in symmetric molecules, exactly and but for rounding (a rotated copy)."""
    potential, graph = make_potential(options), make_molecule(name, None)
    rotation = Rotation.from_rotvec([0.7, -1.1, 2.0]).as_matrix()
    forces = []
    for matrix in (np.eye(3), rotation):
        turned = move(graph, graph.positions @ matrix.T)
        positions = torch.from_numpy(turned.positions).requires_grad_(True)
        (gradient,) = torch.autograd.grad(
            compute_energy_of_positions(potential, turned, positions), positions, create_graph=True
        )
        second = torch.autograd.grad(gradient.square().sum(), [positions, *potential.parameters()], allow_unused=True)
        assert all(torch.isfinite(g).all() for g in second if g is not None)
        assert max(float(g.abs().max()) for g in second if g is not None) < 1e6
        forces.append(-gradient.detach().numpy() @ matrix)
    check_deviations({"forces": measure(forces[1], forces[0])}, 1e-6)


def compute_force_loss(potential: Potential, graphs: list[Graph]) -> torch.Tensor:
    """Return a loss of energy, forces and stress, as in training."""
    stress = all(g.is_periodic for g in graphs)
    outputs = potential.train()(make_batch(graphs, potential.cutoffs), compute_stress=stress)
    rng = torch.Generator().manual_seed(5)
    loss = (outputs["energy"] - 0.3).square().sum()
    targets = torch.randn(outputs["forces"].shape, generator=rng, dtype=torch.float64)
    loss = loss + (outputs["forces"] - targets).square().sum()
    loss = loss + sum((outputs[name].square() - 1).sum() for name in ("dipole", "hirshfeld_ratios") if name in outputs)
    return loss + (100 * outputs["stress"]).square().sum() if stress else loss


@options
def test_weight_gradients_of_a_force_loss(options: str) -> None:
    symmetric = [] if options in SO3KRATES else [make_molecule("CO2", None)]
    check_weight_gradients(options, [make_molecule("CH3OH"), make_ion(-1.0), *symmetric])


@periodic
def test_weight_gradients_of_a_force_and_stress_loss(options: str) -> None:
    check_weight_gradients(options, [make_crystal("self_images")])


def check_weight_gradients(options: str, graphs: list[Graph]) -> None:
    """The second derivative that training takes: one element of some weight tensors against differences of the loss."""
    potential = make_potential(options)
    compute_force_loss(potential, graphs).backward()
    rng, step, deviations = np.random.default_rng(3), 1e-4, {}
    weights = dict(potential.named_parameters())
    names = rng.permutation(list(weights))[:12]
    for name in names:
        weight = weights[str(name)]
        if weight.grad is None:  # a bias that moves no force and is not asked for its energy
            weight.grad = torch.zeros_like(weight)
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


@options
def test_every_weight_has_a_gradient(options: str) -> None:
    """From forces alone where it moves the energy surface, from all outputs together in any case."""
    graphs, without = [make_molecule(), make_ion(1.0), make_ion(-1.0)], []
    for names in (("forces",), None):
        potential = make_potential(options).train()
        outputs = potential(make_batch(graphs, potential.cutoffs))
        sum(values.square().sum() for name, values in outputs.items() if names is None or name in names).backward()
        without.append([n for n, p in potential.named_parameters() if p.grad is None or not p.grad.abs().max() > 0])
    # Where the first Euclidean variables are zero, the spherical networks there see no input (but their biases act).
    blind = ["network.layers.0.attention.spherical_filter.hidden.weight"] if options in START_AT_ZERO else []
    assert without[1] == blind
    constants = ["network.energy_offsets", "network.readout.bias"]  # move all energies alike
    heads = ("network.charge_head", "network.hirshfeld_head") if options == "so3lr_semi_local" else ()
    assert [n for n in without[0] if n not in constants and not n.startswith(heads)] == blind


@pytest.mark.parametrize("options", [name for name, section in OPTIONS.items() if math.isfinite(section.reach)])
def test_nothing_depends_on_the_list_being_longer_than_needed(options: str) -> None:
    """Pairs beyond the reach add nothing, and neither do pairs between the cutoff and the reach that are said to be short."""
    potential, deviations = make_potential(options), {}
    cutoff, reach = potential.cutoffs
    for graph in (make_molecule(), *([make_crystal("self_images")] if options in PERIODIC else [])):
        expected = potential(make_batch([graph], (cutoff, reach)))
        for kind, cutoffs in (("long", (cutoff, reach + 2)), ("short", (cutoff + 2, reach + 2))):
            found = potential(make_batch([graph], cutoffs))
            deviations |= {f"{graph.group} {kind} {k}": measure(found[k].numpy(), expected[k].numpy()) for k in found}
    check_deviations(deviations, 1e-11)
