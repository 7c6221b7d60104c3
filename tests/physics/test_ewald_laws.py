"""Laws of sums over the reciprocal lattice, and of the derivative by positions and strain that they need.

Independent values: Madelung constants, the energy of a lattice of equal charges, and SO3LR's sum over pairs with a growing cutoff.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from structures import (
    OPTIONS,
    PERIODIC,
    STATISTICS,
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
from test_derivative_laws import differentiate, displace, strain
from torch import nn

from so3krates_dist.graph import Graph, GraphBatch
from so3krates_dist.model import ewald
from so3krates_dist.model.longrange import compute_electrostatics
from so3krates_dist.model.potential import Potential, compute_vectors
from so3krates_dist.units import CODATA_2014_COULOMB_EV_ANGSTROM as COULOMB

methods = pytest.mark.parametrize("method", ["ewald", "pme"])

MADELUNG_ROCK_SALT = 1.7475645946331822
MADELUNG_CESIUM_CHLORIDE = 1.7626747730709
"""Both for the distance of neighbours (e.g. Borwein et al., Lattice Sums Then and Now, 2013)"""
LATTICE_OF_EQUAL_CHARGES = 2.8372974794806
"""Energy of a simple cubic lattice of charges q in a uniform background: -q^2 / (2 L) times this"""


@pytest.fixture
def longrange() -> None:
    pytest.importorskip("torchpme", reason="torch-pme (the extra longrange) is not installed")


class FixedCharges(nn.Module):
    """The Coulomb energy of charges that elements have and neighbours of other elements change, and no other energy."""

    cutoff = reach = 3.0
    sees = frozenset({"cell"})
    uses_positions = True
    checkpointing = "none"

    def __init__(self, method: ewald.Method, damping: float = 2.0) -> None:
        super().__init__()
        self.elements = nn.Parameter(torch.tensor([0.0, 0.8, 0.0, 0.0, 0.0, 0.0, 0.7, -0.3, -1.1]))
        self.reciprocal = ewald.ReciprocalCoulomb(method, damping)

    def forward(self, batch: GraphBatch, vectors: torch.Tensor, record: object = None) -> dict[str, torch.Tensor]:
        charges = self.elements[batch.atomic_numbers]
        flow = (charges[batch.pair_second] - charges[batch.pair_first]) * torch.exp(-vectors.square().sum(1) / 2) / 10
        charges = charges.index_add(0, batch.pair_first, flow).index_add(0, batch.pair_second, flow, alpha=-1)
        energies = self.reciprocal(batch, charges)
        return {"atom_energies": 0 * energies, "physical_energies": energies, "partial_charges": charges}


def make_charged(method: str) -> Potential:
    return Potential(FixedCharges(method).double(), STATISTICS).eval()  # type: ignore[arg-type]


def make_general(name: str = "triclinic") -> Graph:
    """Return a crystal with no atom on a point of PME's mesh: forces jump there, by as much as they are wrong."""
    crystal = make_crystal(name)
    return move(crystal, crystal.positions + 0.0123)


def make_ions(name: str = "rock_salt", shift: float = 0.0) -> tuple[Graph, torch.Tensor]:
    """Return a crystal of ions and their charges in e; the first two have neighbours at 2.82 Å, `shift` moves all atoms."""
    if name == "random":
        rng = np.random.default_rng(3)
        cell = 8 * np.eye(3) + 0.8 * rng.normal(size=(3, 3))
        positions, charges = rng.random((10, 3)) @ cell, rng.normal(size=10)
        charges -= charges.mean()
    elif name == "rock_salt":
        grid = np.stack(np.meshgrid(*[range(2)] * 3, indexing="ij"), -1).reshape(-1, 3)
        cell, positions, charges = 5.64 * np.eye(3), 2.82 * grid, 1.0 - 2.0 * (grid.sum(1) % 2)
    else:
        cell = 2 * 2.82 / math.sqrt(3) * np.eye(3)
        positions, charges = np.stack([np.zeros(3), cell.sum(0) / 2]), np.array([1.0, -1.0])
    positions = positions + shift * np.array([0.31, 0.17, -0.23])
    graph = Graph(
        atomic_numbers=np.full(len(charges), 6), positions=positions, cell=cell, pbc=np.ones(3, bool), group=name
    )
    return graph, torch.from_numpy(charges)


def repeat(graph: Graph, times: int = 2) -> Graph:
    """Return a cell that many times as long along its second vector."""
    assert graph.cell is not None
    positions = np.concatenate([graph.positions + image * graph.cell[1] for image in range(times)])
    numbers = np.tile(graph.atomic_numbers, times)
    return dataclasses.replace(move(graph, positions, graph.cell * [[1], [times], [1]]), atomic_numbers=numbers)


def compute_points(graph: Graph, charges: torch.Tensor, method: str, cutoff: float) -> float:
    batch = make_batch([graph], (cutoff,))
    energies = ewald.compute_point_charge_energies(batch, compute_vectors(batch), charges, cutoff, method)  # type: ignore[arg-type]
    return float(energies.sum())


@methods
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "constant"), [("rock_salt", MADELUNG_ROCK_SALT), ("cesium_chloride", MADELUNG_CESIUM_CHLORIDE)]
)
def test_madelung_constants(name: str, constant: float, shift: float, method: str, longrange: None) -> None:
    """Ewald to 1e-9, PME to 1e-6 at any place of the ions between mesh points; neither depends on where the sums are split."""
    graph, charges = make_ions(name, shift)
    energies = {cutoff: compute_points(graph, charges, method, cutoff) for cutoff in (4.0, 6.0, 9.0)}
    found = {f"{cutoff} A": abs(-2 * e / len(charges) * 2.82 / COULOMB - constant) for cutoff, e in energies.items()}
    check_deviations(found, 1e-9 if method == "ewald" else 1e-6)


@methods
def test_a_net_charge_has_a_uniform_background(method: str, longrange: None) -> None:
    """Point charges in a cubic lattice; damped, the background interacts as they do, and adds pi sigma^2 q^2 / (2 V)."""
    length, damping = 8.0, 1.0
    graph = Graph(
        atomic_numbers=np.array([6]), positions=np.ones((1, 3)), cell=length * np.eye(3), pbc=np.ones(3, bool)
    )
    charge = torch.tensor([0.7], dtype=torch.float64)
    lattice = -0.5 * COULOMB * 0.7**2 * LATTICE_OF_EQUAL_CHARGES / length
    damped = float(ewald.ReciprocalCoulomb(method, damping)(make_batch([graph]), charge))  # type: ignore[arg-type]
    deviations = {
        "points": measure(compute_points(graph, charge, method, 6.0), lattice),
        "damped": measure(damped, lattice + 0.5 * COULOMB * 0.7**2 * math.pi * damping**2 / length**3),
    }
    check_deviations(deviations, 1e-9 if method == "ewald" else 1e-6)


def compute_damped(graph: Graph, charges: torch.Tensor, method: str, damping: float = 4.0) -> dict[str, np.ndarray]:
    """Return energies of the atoms and their derivatives by positions, strain and charges."""
    batch = make_batch([graph])
    assert batch.cell is not None
    leaves = batch.positions, torch.zeros(3, 3, dtype=torch.float64), charges.clone()
    positions, deformation, values = (leaf.requires_grad_(True) for leaf in leaves)
    matrix = torch.eye(3, dtype=torch.float64) + (deformation + deformation.T) / 2
    moved = dataclasses.replace(batch, positions=positions @ matrix, cell=batch.cell @ matrix)
    energies = ewald.ReciprocalCoulomb(method, damping)(moved, values)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(energies.sum(), (positions, deformation, values))
    names = ("energies", "positions", "strain", "charges")
    return {name: t.detach().numpy() for name, t in zip(names, (energies, *gradients), strict=True)}


@pytest.mark.parametrize("damping", [1.0, 4.0])
def test_what_is_left_out(damping: float, longrange: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the largest value, of a random neutral cell: Ewald 1e-9; PME 1e-6 for energies, 1e-4 for forces.

    Found for SO3LR's damping of 4 Å: Ewald 2e-12 (energies), 6e-11 (forces), 3e-10 (strain); PME 5e-8, 3e-6 and 8e-7.
    """
    graph, charges = make_ions("random")
    values = {method: compute_damped(graph, charges, method, damping) for method in ("ewald", "pme")}
    monkeypatch.setattr(ewald, "EWALD_TRUNCATION", 12.0)
    exact = compute_damped(graph, charges, "ewald", damping)
    for method, limits in {"ewald": (1e-9, 1e-9, 5e-9, 1e-9), "pme": (1e-6, 1e-4, 2e-5, 1e-6)}.items():
        found = {n: float(np.abs(values[method][n] - v).max() / np.abs(v).max()) for n, v in exact.items()}
        check_deviations(
            {f"{method} {n}": v for n, v in found.items()},
            dict(zip((f"{method} {n}" for n in found), limits, strict=True)),
        )


def compute_with_cutoff(graph: Graph, charges: torch.Tensor, cutoff: float) -> tuple[float, np.ndarray]:
    """Return energy and forces, at fixed charges, of SO3LR's electrostatics with a cutoff."""
    batch = make_batch([graph], (cutoff,))
    vectors = compute_vectors(batch).requires_grad_(True)
    products = charges[batch.pair_first] * charges[batch.pair_second]
    energy = compute_electrostatics(products, torch.linalg.vector_norm(vectors, dim=1), 4.0, cutoff).sum()
    (gradient,) = torch.autograd.grad(energy, vectors)
    forces = torch.zeros_like(batch.positions).index_add(0, batch.pair_first, gradient)
    return energy.item(), forces.index_add(0, batch.pair_second, gradient, alpha=-1).numpy()


def test_the_cutoff_scheme_tends_to_ewald(longrange: None) -> None:
    """A neutral cell: E(r_L) = E + k_e sum_i q_i^2 V(r_L) / 2 + O(r_L^-2), V(r_L) = 1 / r_L; forces at fixed charges O(r_L^-2).

    The shift by V(r_L) makes each sphere neutral but for its centre, which does not interact with itself: that is the first
    term, the same for all positions. The rest comes from the jump of the second derivative at r_L and changes its sign. Here
    the energy is -15.45 eV and the first term 1.21 eV at 48 Å; the rest stays below 150 eV Å² / r_L² and is 0.04 eV there.
    """
    graph, charges = make_ions("random")
    limit = compute_damped(graph, charges, "ewald")
    leading = COULOMB * float(charges.square().sum()) / 2
    deviations, limits = {}, {}
    for cutoff in (12.0, 17.0, 24.0, 34.0, 48.0):
        energy, forces = compute_with_cutoff(graph, charges, cutoff)
        difference = energy - float(limit["energies"].sum())
        deviations[f"energy {cutoff}"] = abs(difference - leading * math.erf(cutoff / 4) / cutoff)
        deviations[f"forces {cutoff}"] = float(np.abs(forces + limit["positions"]).max())
        limits |= {f"energy {cutoff}": 150 / cutoff**2, f"forces {cutoff}": 75 / cutoff**2}
    check_deviations(deviations, limits)
    assert difference == pytest.approx(leading / 48, rel=0.04)


@methods
@pytest.mark.parametrize("name", ["triclinic", "self_images"])
def test_forces_and_stress_are_slopes_of_the_energy(method: str, name: str, longrange: None) -> None:
    """The charges change with the distances. PME too: its energy is interpolated, and this is its exact derivative."""
    potential, graph = make_charged(method), make_general(name)
    check_slopes(potential, graph, 1e-9)


def check_slopes(potential: Potential, graph: Graph, limit: float) -> None:
    """Compare forces and stress of a crystal with differences of its energy."""
    assert graph.cell is not None
    found = compute(potential, graph, stress=True)
    forces = -differentiate(potential, displace(graph, 2e-4), 2e-4).reshape(-1, 3)
    stress = differentiate(potential, strain(graph, 1e-4), 1e-4).reshape(3, 3) / abs(np.linalg.det(graph.cell))
    assert np.abs(forces).max() > 1e-2
    assert np.abs(stress).max() > 1e-4
    check_deviations({"forces": measure(found["forces"], forces), "stress": measure(found["stress"][0], stress)}, limit)


@methods
def test_second_derivatives(method: str, longrange: None) -> None:
    """By positions, cell and charges, all mixed; what training on forces and stress takes."""
    graph = make_general("self_images")
    batch = make_batch([graph])
    assert batch.cell is not None
    charges = torch.tensor([0.4, -0.7], dtype=torch.float64)
    leaves = [leaf.clone().requires_grad_(True) for leaf in (batch.positions, batch.cell, charges)]
    module = ewald.ReciprocalCoulomb(method, 2.0)  # type: ignore[arg-type]
    points = make_batch([graph], (3.0,))

    def damped(positions: torch.Tensor, cell: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return module(dataclasses.replace(batch, positions=positions, cell=cell), values).sum()

    def undamped(positions: torch.Tensor, cell: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        moved = dataclasses.replace(points, positions=positions, cell=cell)
        vectors = compute_vectors(moved)
        return ewald.compute_point_charge_energies(moved, vectors, values, 3.0, method).sum()  # type: ignore[arg-type]

    for energy in (damped, undamped):
        assert torch.autograd.gradcheck(energy, leaves, fast_mode=True, atol=1e-6, rtol=1e-5)
        assert torch.autograd.gradgradcheck(energy, leaves, fast_mode=True, atol=1e-5, rtol=1e-4)
    hessian = torch.autograd.functional.hessian(damped, tuple(leaves))
    assert all(torch.isfinite(block).all() for row in hessian for block in row)


@methods
def test_weight_gradients_of_a_loss_of_forces_and_stress(method: str, longrange: None) -> None:
    """Charges of elements are trained through forces and stress, also beside a molecule; against differences of the loss."""
    potential = make_charged(method).train()
    graphs = [make_crystal("triclinic"), make_molecule("CH3OH"), make_crystal("self_images")]
    check_weight_gradients(potential, graphs, "network.elements", 1e-6)


def compute_loss(potential: Potential, graphs: list[Graph]) -> torch.Tensor:
    outputs = potential(make_batch(graphs, potential.cutoffs), compute_stress=True)
    generator = torch.Generator().manual_seed(5)
    targets = torch.randn(outputs["forces"].shape, generator=generator, dtype=torch.float64)
    loss = (outputs["energy"] - 0.3).square().sum() + (outputs["forces"] - targets).square().sum()
    return loss + (100 * torch.nan_to_num(outputs["stress"])).square().sum()


def check_weight_gradients(potential: Potential, graphs: list[Graph], prefix: str, limit: float) -> None:
    """Compare the largest element of each weight's gradient with the slope of the loss."""
    parameters = {name: p for name, p in potential.named_parameters() if name.startswith(prefix)}
    assert parameters
    gradients = torch.autograd.grad(compute_loss(potential, graphs), list(parameters.values()))
    step, deviations = 1e-4, {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        index = int(gradient.abs().argmax())
        element = parameter.data.view(-1)
        start, losses = float(element[index]), []
        for point in (-2, -1, 1, 2):
            element[index] = start + point * step
            losses.append(float(compute_loss(potential, graphs).detach()))
        element[index] = start
        slope = (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)
        deviations[name] = measure(float(gradient.reshape(-1)[index]), slope)
    check_deviations(deviations, limit)


@methods
def test_symmetries(method: str, longrange: None) -> None:
    """Lattice translations, rotations with the cell, order of the atoms; other translations move atoms against PME's mesh."""
    potential, graph = make_charged(method), make_crystal()
    assert graph.cell is not None
    expected = compute(potential, graph, stress=True)
    moved = graph.positions + np.array([[1, 0, 0], [0, -2, 1], [3, 0, 0], [0, 0, -1]]) @ graph.cell
    order = np.array([2, 0, 3, 1])
    permuted = dataclasses.replace(move(graph, graph.positions[order]), atomic_numbers=graph.atomic_numbers[order])
    back = compute(potential, permuted, stress=True)
    for field in ("forces", "partial_charges"):
        back[field] = back[field][np.argsort(order)]
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = compute(potential, move(graph, graph.positions @ rotation, graph.cell @ rotation), stress=True)
    turned["forces"] = turned["forces"] @ rotation.T
    turned["stress"] = rotation @ turned["stress"] @ rotation.T
    slid = compute(potential, move(graph, graph.positions + np.array([0.3, 0.1, -0.7])), stress=True)
    found = {
        "lattice": compute(potential, move(graph, moved), stress=True),
        "order": back,
        "rotation": turned,
        "translation": slid,
    }
    deviations = {
        f"{change} {field}": value
        for change, values in found.items()
        for field, value in compare(values, expected).items()
    }
    limits = dict.fromkeys(deviations, 1e-10)
    if method == "pme":
        limits |= {name: 1e-4 for name in limits if name.startswith("translation")}
    check_deviations(deviations, limits)


def test_energies_are_continuous_on_the_mesh(longrange: None) -> None:
    """An atom passes a point of PME's mesh, and the middle between two, where an odd number of nodes would make a jump."""
    graph, charges = make_ions("random")
    graph = move(graph, graph.positions, 8 * np.eye(3))
    spacing = 8 / ewald._round_mesh(8 * ewald.MESH_POINTS_PER_WIDTH * math.sqrt(2) / 4)
    deviations = {}
    for name, place in {"point": 5.0, "middle": 5.5}.items():
        energies = []
        for step in (-1e-9, 1e-9):
            positions = graph.positions.copy()
            positions[0] = place * spacing + step
            energies.append(compute_damped(move(graph, positions), charges, "pme")["energies"])
        deviations[name] = float(np.abs(energies[1] - energies[0]).max())
    check_deviations(deviations, 2e-9)


@pytest.mark.parametrize(("method", "limit"), [("ewald", 1e-9), ("pme", 1e-5)])
def test_a_doubled_cell_is_the_same_crystal(method: str, limit: float, longrange: None) -> None:
    """Twice the energy, the same forces and stress; one element of both has a net charge in the cell."""
    potential, graph = make_charged(method), make_crystal()
    single, double = (compute(potential, g, stress=True) for g in (graph, repeat(graph)))
    baselines = np.array([STATISTICS.energy_baselines[int(z)] for z in graph.atomic_numbers]).sum()
    deviations = {
        "energy": measure(double["energy"] - 2 * baselines, 2 * (single["energy"] - baselines)),
        "forces": measure(double["forces"], np.tile(single["forces"], (2, 1))),
        "stress": measure(double["stress"], single["stress"]),
    }
    check_deviations(deviations, limit)


@methods
def test_batch_equals_singles(method: str, longrange: None) -> None:
    potential = make_charged(method)
    graphs = [make_crystal("self_images"), make_molecule("H2O"), make_crystal(), make_molecule("CH4")]
    batch = compute(potential, *graphs, stress=True)
    singles = [compute(potential, graph, stress=True) for graph in graphs]
    joined = {name: np.concatenate([single[name] for single in singles]) for name in batch}
    check_deviations(compare(drop_nan(batch), drop_nan(joined)), 1e-12)


def drop_nan(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return values without the stress of molecules, which is nan."""
    return {name: v[~np.isnan(v).any((1, 2))] if name == "stress" else v for name, v in values.items()}


@pytest.mark.parametrize(
    ("options", "structures"),
    [(name, "molecules") for name in OPTIONS]
    + [(name, kind) for name in PERIODIC for kind in ("one_atom", "crystals", "mixture")],
)
def test_both_ways_to_forces_and_stress_are_the_same(options: str, structures: str) -> None:
    """Derivatives by positions and strain of models for which those by the pair vectors are enough."""
    graphs = {
        "molecules": [make_molecule("CH3OH"), make_molecule("CO2", None)],
        "crystals": [make_crystal(), make_crystal("self_images")],
        "mixture": [make_molecule("H2O"), make_crystal(), make_molecule("CH4"), make_crystal("self_images")],
        "one_atom": [make_molecule("O", None)],
    }[structures]
    potential = make_potential(options)
    expected = compute(potential, *graphs, stress=True)
    potential.network.uses_positions = True  # type: ignore[assignment]
    found = compute(potential, *graphs, stress=True)
    assert np.isnan(found["stress"]).any((1, 2)).tolist() == [not g.is_periodic for g in graphs]
    check_deviations(compare(drop_nan(found), drop_nan(expected)), 1e-12)


@pytest.mark.parametrize("periodic", [False, True])
def test_both_ways_give_the_same_gradients_of_the_weights(periodic: bool) -> None:
    """Of a loss of energy, forces and stress in training mode; one graph of derivatives is longer than the other."""
    graphs = [make_crystal("self_images"), make_molecule("H2O")] if periodic else [make_molecule("CH3OH")]
    gradients = []
    for uses_positions in (False, True):
        potential = make_potential().train()
        potential.network.uses_positions = uses_positions  # type: ignore[assignment]
        compute_loss(potential, graphs).backward()
        gradients.append({name: p.grad.numpy() for name, p in potential.named_parameters() if p.grad is not None})
    check_deviations(compare(*gradients), 1e-11)


def test_nothing_at_all_by_positions() -> None:
    """An empty batch, as a process gets it where a step has fewer conformers than processes."""
    potential = make_potential()
    potential.network.uses_positions = True  # type: ignore[assignment]
    for stress in (False, True):
        outputs = potential.train()(make_batch([]), compute_stress=stress)
        assert {name: len(value) for name, value in outputs.items()} == dict.fromkeys(outputs, 0)
        (outputs["energy"].sum() + outputs["forces"].sum()).backward()


@methods
@pytest.mark.parametrize("name", ["triclinic", "self_images"])
def test_so3lr_derivatives(method: str, name: str, longrange: None) -> None:
    """Forces and stress of the whole model, whose charges come from its features."""
    potential, graph = make_potential("so3lr", electrostatics=method), make_general(name)
    assert np.abs(compute(potential, graph)["partial_charges"]).max() > 0.1
    check_slopes(potential, graph, 1e-8)


@methods
def test_so3lr_weight_gradients(method: str, longrange: None) -> None:
    """A loss of energies, forces and stress of a crystal and a molecule; weights of the charges and of the first layer."""
    potential = make_potential("so3lr", electrostatics=method).train()
    graphs = [make_crystal("self_images"), make_molecule("H2O")]
    check_weight_gradients(potential, graphs, "network.charge_head", 1e-6)
    check_weight_gradients(potential, graphs, "network.layers.0", 1e-6)


@methods
def test_so3lr_differs_from_its_cutoff_scheme(method: str, longrange: None) -> None:
    """By k_e sum_i q_i^2 / (2 r_L) in the energy of a neutral crystal, see above, or of a neutral molecule smaller than r_L."""
    graphs = [make_crystal(), make_molecule("CH3OH")]
    reciprocal = make_potential("so3lr", electrostatics=method, long_range_cutoff=24.0)
    pairs = make_potential("so3lr", electrostatics="cutoff", long_range_cutoff=24.0)
    found, expected = compute(reciprocal, *graphs, stress=True), compute(pairs, *graphs, stress=True)
    squares = np.square(expected["partial_charges"])
    leading = COULOMB * np.array([squares[:4].sum(), squares[4:].sum()]) / 2 / 24
    np.testing.assert_allclose(expected["energy"] - found["energy"], leading, rtol=0.1)
    check_deviations({"charges": measure(found["partial_charges"], expected["partial_charges"])}, 1e-11)
    assert measure(found["stress"][0], expected["stress"][0]) < 0.02


@methods
def test_so3lr_sums_over_all_pairs_of_a_molecule(method: str, longrange: None) -> None:
    """As its pair term does that has no end; beside a crystal, which is summed otherwise."""
    reciprocal = make_potential("so3lr", electrostatics=method, dispersion=False)
    pairs = make_potential("so3lr", electrostatics="cutoff", dispersion=False, long_range_cutoff=0.0)
    assert reciprocal.cutoffs == (4.0, 4.0), "no term of it has a long-range cutoff"
    molecules = [make_molecule(), make_molecule("H2O")]
    expected = compute(pairs, *molecules)
    found = compute(reciprocal, molecules[0], make_crystal(), molecules[1])
    atoms = np.r_[:9, 13:16]
    picked = {k: v[[0, 2]] if len(v) == 3 else v[atoms] for k, v in found.items()}
    check_deviations(compare(picked, expected), 1e-12)


@pytest.mark.parametrize(("method", "lengths"), [("ewald", (20.0, 40.0, 80.0)), ("pme", (20.0, 40.0))])
def test_a_molecule_is_the_same_in_a_growing_box(method: str, lengths: tuple[float, ...], longrange: None) -> None:
    """But for its dipole's interaction with its images, -2 pi k_e mu^2 / (3 L^3) (Makov and Payne, 10.1103/PhysRevB.51.4014)."""
    potential, molecule = make_potential("so3lr", electrostatics=method), make_molecule()
    alone, deviations = compute(potential, molecule), {}
    for length in lengths:
        box = dataclasses.replace(molecule, cell=length * np.eye(3), pbc=np.ones(3, bool))
        found = compute(potential, box)
        leading = -2 * math.pi * COULOMB * float(np.square(alone["dipole"]).sum()) / 3 / length**3
        deviations[f"energy {length}"] = abs(float(found["energy"][0] - alone["energy"][0]) - leading) * length**5
        deviations[f"forces {length}"] = float(np.abs(found["forces"] - alone["forces"]).max()) * length**3
    limits = {name: 6e3 if name.startswith("energy") else 700 for name in deviations}
    check_deviations(deviations, limits)


def test_second_derivatives_of_molecules(longrange: None) -> None:
    """By positions and charges; no structure has a share in another's."""
    batch = make_batch([make_molecule("H2O"), make_crystal("self_images"), make_molecule("CO2")])
    module = ewald.ReciprocalCoulomb("ewald", 2.0)
    charges = torch.tensor([0.4, -0.7, 0.2, 0.3, -0.1, 0.5, -0.6, 0.8], dtype=torch.float64, requires_grad=True)
    positions = batch.positions.clone().requires_grad_(True)

    def evaluate(moved: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return module(dataclasses.replace(batch, positions=moved), values)

    def add(moved: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return evaluate(moved, values).sum()

    assert torch.autograd.gradcheck(add, (positions, charges), fast_mode=True, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(add, (positions, charges), fast_mode=True, atol=1e-5, rtol=1e-4)
    energies = evaluate(positions, charges)
    for number in range(3):
        own = batch.graph_index == number
        gradients = torch.autograd.grad(energies[own].sum(), (positions, charges), retain_graph=True)
        assert all(bool(g[own].any()) and not bool(g[~own].any()) for g in gradients), number
