"""Laws of So3krates (2022) with each of its options, and where the published model breaks one: how, and by how much."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from structures import (
    STATISTICS,
    check_deviations,
    compare,
    compute,
    join,
    make_batch,
    make_crystal,
    make_molecule,
    measure,
    move,
)

from so3krates_dist.config import So3kratesSection
from so3krates_dist.graph import Graph, collate
from so3krates_dist.model.potential import Potential, compute_vectors
from so3krates_dist.model.registry import build_model

CUTOFF = 4.0
BASE = So3kratesSection(
    num_features=24, num_layers=2, num_heads=4, num_radial_basis=12, cutoff=CUTOFF, radial_filter_width=16,
    spherical_filter_width=8,
)  # fmt: skip
OPTIONS: dict[str, So3kratesSection] = {
    "local": BASE,
    "non_local": dataclasses.replace(BASE, non_local=True),
    "normalised": dataclasses.replace(BASE, non_local=True, layer_norm=True, sphc_norm=True),
    "fixed_sphc_cutoff": dataclasses.replace(BASE, non_local=True, sphc_cutoff=0.2),
    "smooth": dataclasses.replace(BASE, initial_sphc="smooth", cutoff_function="polynomial", radial_basis="bernstein"),
    "zero": dataclasses.replace(BASE, initial_sphc="zero", non_local=True),
    "no_parity": dataclasses.replace(BASE, parity=False, non_local=True),
    "degree_0": dataclasses.replace(BASE, degrees=(0, 1, 2, 3), non_local=True),
}
LOCAL = [name for name, section in OPTIONS.items() if not section.non_local]

options = pytest.mark.parametrize("options", OPTIONS)


def make_potential(
    options: str, dtype: torch.dtype = torch.float64, seed: int = 0, noise: float = 0.1, **changes: object
) -> Potential:
    """Return a potential in evaluation mode; noise makes all weights random, those that start as zero or one too."""
    torch.manual_seed(seed)
    section = dataclasses.replace(OPTIONS[options], **changes)  # type: ignore[arg-type]
    potential = build_model(section, STATISTICS)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return potential.to(dtype=dtype).eval()


def make_atom(atomic_number: int = 6) -> Graph:
    return Graph(atomic_numbers=np.array([atomic_number]), positions=np.array([[0.3, -0.2, 0.7]]), group="atom")


def make_symmetric(name: str) -> Graph:
    """Return a molecule that is symmetric to the last digit; ASE's benzene is so to the sixth."""
    if name != "C6H6":
        return make_molecule(name, None)
    angles = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(6)], axis=1)
    return Graph(atomic_numbers=np.array([6] * 6 + [1] * 6), positions=np.concatenate([1.395 * ring, 2.482 * ring]))


def get_structures(options: str) -> dict[str, Graph]:
    crystals = {} if OPTIONS[options].non_local else {name: make_crystal(name) for name in ("triclinic", "self_images")}
    ring = make_molecule("C6H6")
    ring.positions *= 1.3  # atoms beyond the cutoff, some of which have similar SPHC
    return {"ethanol": make_molecule(), "benzene": ring, **crystals}


def transform(graph: Graph, matrix: np.ndarray) -> Graph:
    return move(graph, graph.positions @ matrix.T, None if graph.cell is None else graph.cell @ matrix.T)


def check_orthogonal(options: str, matrix: np.ndarray) -> None:
    potential, deviations = make_potential(options), {}
    for name, graph in get_structures(options).items():
        before, after = (compute(potential, g) for g in (graph, transform(graph, matrix)))
        assert np.abs(before["forces"]).max() > 1e-3, name  # a potential that is zero keeps every law
        expected = {**before, "forces": before["forces"] @ matrix.T}
        deviations |= {f"{name} {field}": value for field, value in compare(after, expected).items()}
    check_deviations(deviations, 1e-10)


@options
def test_rotation(options: str) -> None:
    check_orthogonal(options, Rotation.from_rotvec([0.7, -1.1, 2.0]).as_matrix())


@pytest.mark.parametrize("options", [name for name, section in OPTIONS.items() if section.parity])
def test_inversion_with_parity(options: str) -> None:
    check_orthogonal(options, -np.eye(3))


def test_mirror_images_differ_without_parity() -> None:
    """What the authors' default does: pseudovectors of the self-mixing enter as vectors. Here a chiral molecule and its image
    differ by 1e-3 to 0.1 eV, and the same weights with parity by rounding."""
    positions = np.array([[0, 0, 0], [1.1, 0, 0], [-0.4, 1.3, 0], [-0.5, -0.6, 1.1], [-0.5, -0.5, -0.9]])
    left = Graph(atomic_numbers=np.array([6, 1, 7, 8, 6]), positions=positions.astype(float))
    right = move(left, -left.positions)
    differences = {}
    for parity in (False, True):
        energies = np.array(
            [
                compute(make_potential("no_parity", seed=s, noise=0.3, parity=parity), left, right)["energy"]
                for s in range(4)
            ]
        )
        differences[parity] = np.abs(np.diff(energies, axis=1))
    assert differences[True].max() < 1e-11
    assert 1e-5 < differences[False].mean() < 1.0


@options
def test_translation_and_permutation(options: str) -> None:
    potential, deviations = make_potential(options), {}
    for name, graph in get_structures(options).items():
        before = compute(potential, graph)
        moved = compute(potential, move(graph, graph.positions + np.array([3.1, -17.3, 8.9])))
        deviations |= {f"{name} moved {field}": value for field, value in compare(moved, before).items()}
        order = np.random.default_rng(1).permutation(graph.num_atoms)
        permuted = dataclasses.replace(
            graph, atomic_numbers=graph.atomic_numbers[order], positions=graph.positions[order]
        )
        expected = {**before, "forces": before["forces"][order]}
        found = compare(compute(potential, permuted), expected)
        deviations |= {f"{name} permuted {field}": value for field, value in found.items()}
    check_deviations(deviations, 1e-10)


@options
def test_forces_are_minus_the_slope_of_the_energy(options: str) -> None:
    potential, deviations = make_potential(options), {}
    stencil, step = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}, 2e-4
    for name, graph in get_structures(options).items():
        if name == "benzene":
            graph = Graph(atomic_numbers=graph.atomic_numbers[:6], positions=1.4 * graph.positions[:6])  # noqa: PLW2901
        slopes = np.zeros((graph.num_atoms, 3))
        for atom in range(graph.num_atoms):
            for axis in range(3):
                moves = [
                    move(
                        graph,
                        graph.positions + point * step * np.eye(3 * graph.num_atoms)[3 * atom + axis].reshape(-1, 3),
                    )
                    for point in stencil
                ]
                slopes[atom, axis] = compute(potential, *moves)["energy"] @ np.array(list(stencil.values())) / step
        deviations[name] = measure(compute(potential, graph)["forces"], -slopes)
    check_deviations(deviations, 1e-8)


def compute_energy_of_positions(potential: Potential, graph: Graph, positions: torch.Tensor) -> torch.Tensor:
    """Return the learned energy with a graph back to the positions, the pairs as they are."""
    batch = dataclasses.replace(make_batch([graph], potential.cutoffs), positions=positions)
    energies: torch.Tensor = potential.network(batch, compute_vectors(batch))["atom_energies"].sum()
    return energies


@options
def test_second_derivatives_of_an_asymmetric_molecule(options: str) -> None:
    potential, graph = make_potential(options), make_molecule("CH3OH")
    positions = torch.from_numpy(graph.positions).requires_grad_(True)

    def energy(moved: torch.Tensor) -> torch.Tensor:
        return compute_energy_of_positions(potential, graph, moved)

    assert torch.autograd.gradgradcheck(energy, (positions,), fast_mode=True, atol=1e-5, rtol=1e-4)


def compute_hessian(potential: Potential, graph: Graph) -> np.ndarray:
    """Return second derivatives (3 num_atoms, 3 num_atoms)."""
    positions = torch.from_numpy(graph.positions)
    hessian = torch.autograd.functional.hessian(
        lambda moved: compute_energy_of_positions(potential, graph, moved), positions
    )  # fmt: skip
    return hessian.reshape(positions.numel(), positions.numel()).numpy()


@options
@pytest.mark.parametrize("name", ["H2", "C2H2", "CH4", "C6H6"])
def test_derivatives_where_sphc_differences_vanish(options: str, name: str) -> None:
    """Norms have no derivative there. Exactly equal SPHC and, in rotated copies, SPHC that are equal up to rounding must be treated
    alike: a difference of 1e-16 taken at its word would give a random direction and second derivatives of 1e16."""
    potential, graph = make_potential(options), make_symmetric(name)
    forces, hessian = compute(potential, graph)["forces"], compute_hessian(potential, graph)
    assert np.isfinite(forces).all()
    assert np.abs(hessian).max() < 1e3
    deviations = {}
    for number in range(3):
        matrix = Rotation.random(random_state=number).as_matrix()
        rotated = transform(graph, matrix)
        big = np.kron(np.eye(graph.num_atoms), matrix)
        deviations[f"forces {number}"] = measure(compute(potential, rotated)["forces"], forces @ matrix.T)
        deviations[f"hessian {number}"] = measure(compute_hessian(potential, rotated), big @ hessian @ big.T)
    check_deviations(deviations, {k: 1e-10 if k.startswith("forces") else 1e-8 for k in deviations})


@options
def test_float32_is_finite_and_close(options: str) -> None:
    single = make_potential(options, torch.float32)
    # Constants in float64 but the same weights: harmonics with constants rounded to float32 are not symmetric to 1e-11.
    double, matrix = make_potential(options), Rotation.random(random_state=4).as_matrix()
    double.load_state_dict(single.state_dict())
    deviations = {}
    for graph in (make_symmetric("CH4"), make_symmetric("C6H6"), make_molecule("C6H6"), make_molecule()):
        rotated = transform(graph, matrix)
        found = compare(compute(single, rotated), compute(double, rotated))
        deviations |= {f"{len(deviations)} {field}": value for field, value in found.items()}
        gradients = [
            torch.autograd.grad(
                potential.train()(make_batch([rotated], potential.cutoffs, dtype))["forces"].square().sum(),
                [w for name, w in potential.named_parameters() if name != "network.readout.bias"],  # a constant
            )
            for potential, dtype in ((single, torch.float32), (double, torch.float64))
        ]
        single.eval(), double.eval()
        joined = [torch.cat([g.flatten() for g in part]).numpy() for part in gradients]
        deviations[f"{len(deviations)} weight gradients"] = measure(*joined)
    check_deviations(deviations, 1e-3)


def make_crossing(offset: float) -> Graph:
    """Return C-O with a hydrogen whose only neighbour is the carbon, at the cutoff plus an offset in Å."""
    positions = np.array([[0.0, 0.0, 0.0], [-1.1, -0.4, -0.2], [0.0, 0.6, 0.8]])
    positions[2] *= CUTOFF + offset
    return Graph(atomic_numbers=np.array([6, 8, 1]), positions=positions)


def cross_the_cutoff(options: str, seed: int = 0, distance: float = 1e-6, **changes: object) -> dict[str, float]:
    """Return by how much energy and forces change where an atom loses its last neighbour."""
    outputs = compute(make_potential(options, seed=seed, **changes), make_crossing(-distance), make_crossing(distance))
    forces = outputs["forces"].reshape(2, 3, 3)
    work = 2 * distance * float(forces[0, 2] @ [0.0, 0.6, 0.8])
    return {
        "energy": abs(float(outputs["energy"][1] - outputs["energy"][0]) + work), "forces": measure(forces[1], forces[0]),
    }  # fmt: skip


@pytest.mark.parametrize("non_local", [False, True])
@pytest.mark.parametrize("initial_sphc", ["smooth", "zero"])
@pytest.mark.parametrize("cutoff_function", ["cosine", "polynomial"])
def test_nothing_jumps_with_smooth_or_zero_sphc(non_local: bool, initial_sphc: str, cutoff_function: str) -> None:
    deviations = cross_the_cutoff(
        "local", non_local=non_local, initial_sphc=initial_sphc, cutoff_function=cutoff_function
    )
    check_deviations(deviations, {"energy": 1e-9, "forces": 1e-4})


def test_published_sphc_jump_with_the_last_neighbour() -> None:
    """The weighted mean of one neighbour's harmonics does not depend on its weight, however small: the atom's SPHC have full length
    up to the cutoff and none beyond. With these weights energies jump by 0.02 to 0.1 eV (force scale 1.3 eV/Å)."""
    jumps = [cross_the_cutoff("local", seed)["energy"] for seed in range(4)]
    assert min(jumps) > 1e-3
    assert max(jumps) < 2


def test_normalised_sphc_jump_even_if_they_start_smoothly() -> None:
    """SPHC that go to zero with the neighbour are stretched to full length, as long as they are not zero."""
    jump = cross_the_cutoff("local", distance=1e-3, initial_sphc="smooth", sphc_norm=True)["energy"]
    assert jump > 1e-4


@options
def test_a_batch_equals_its_structures_one_by_one(options: str) -> None:
    """Also where the spherical cutoff is one over the number of atoms, which differs between them."""
    potential = make_potential(options)
    graphs = [
        make_molecule(),
        make_atom(),
        make_molecule("CO2", None),
        make_molecule("H2", None),
        make_molecule("C6H6"),
    ]
    together, singles = compute(potential, *graphs), [compute(potential, g) for g in graphs]
    expected = {name: np.concatenate([s[name] for s in singles]) for name in together}
    check_deviations(compare(together, expected), 1e-12)


@options
def test_no_gradient_across_structures_of_a_batch(options: str) -> None:
    potential = make_potential(options)
    batch = make_batch([make_molecule(), make_molecule("CO2"), make_molecule("CH4")], potential.cutoffs)
    leaf = batch.positions.requires_grad_(True)
    energies = potential.network(batch, compute_vectors(batch))["atom_energies"]
    for number in range(3):
        own = batch.graph_index == number
        (gradient,) = torch.autograd.grad(energies[own].sum(), leaf, retain_graph=True)
        assert torch.count_nonzero(gradient[~own]) == 0
        assert torch.count_nonzero(gradient[own]) > 0


@options
def test_one_atom(options: str) -> None:
    potential = make_potential(options)
    outputs = compute(potential, make_atom(6))
    assert np.isfinite(outputs["energy"]).all()
    np.testing.assert_array_equal(outputs["forces"], np.zeros((1, 3)))
    assert compute(potential, make_atom(8))["energy"] != outputs["energy"]


@options
@pytest.mark.parametrize("graphs", [[], [make_atom()], [make_molecule(), make_molecule("H2", None)]])
def test_every_weight_has_a_gradient_whatever_the_batch(options: str, graphs: list[Graph]) -> None:
    """Processes that got nothing must reduce the same gradients as the others."""
    potential = make_potential(options).train()
    batch = make_batch(graphs, potential.cutoffs) if graphs else collate([], torch.float64)
    outputs = potential(batch)
    loss = outputs["energy"].square().sum() + outputs["forces"].square().sum()
    names, weights = zip(*potential.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True))
    assert [name for name, g in gradients.items() if g is None or not torch.isfinite(g).all()] == []
    if len(graphs) == 2:
        zero = [name for name, g in gradients.items() if not torch.count_nonzero(g)]  # type: ignore[arg-type]
        # SPHC that start as zero have no differences in the first layer.
        assert zero == ["network.layers.0.attention.spherical_filter.hidden.weight"] * (options == "zero")


@options
def test_gradients_of_a_force_loss_against_differences(options: str) -> None:
    potential = make_potential(options).train()
    batch = make_batch([make_molecule("CH3OH"), make_molecule("CO2")], potential.cutoffs)

    def compute_loss() -> torch.Tensor:
        loss: torch.Tensor = potential(batch)["forces"].square().sum()
        return loss

    names = [
        "embedding.weight", "layers.0.attention.radial_filter.hidden.weight", "layers.0.attention.spherical_filter.bias",
        "layers.1.attention.geometric_projections.weight", "layers.1.attention.feature_projections.bias",
        "layers.0.interaction.self_mixing.factors", "layers.1.interaction.mixed_linear.weight", "readout_hidden.weight",
    ]  # fmt: skip
    weights = [potential.network.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(compute_loss(), weights)
    deviations, step = {}, 1e-5
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        position = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
        values = []
        for change in (step, -2 * step, step):  # the last one puts it back
            with torch.no_grad():
                weight[position] += change
            values.append(float(compute_loss().detach()))
        assert gradient.abs().max() > 1e-8, name
        expected = float(gradient[position])
        deviations[name] = abs((values[0] - values[1]) / (2 * step) - expected) / abs(expected)
    check_deviations(deviations, 1e-5)


def make_cumulene(num_carbons: int, angle: float) -> Graph:
    """Return H2C(=C)...=CH2 along z, one end turned about the axis."""
    carbons = np.stack([np.zeros(num_carbons), np.zeros(num_carbons), 1.31 * np.arange(num_carbons)], axis=1)
    ends = []
    for end, phase in ((0, 0.0), (num_carbons - 1, angle)):
        outwards = -0.55 if end == 0 else 0.55
        for turn in (0.0, np.pi):
            direction = np.array([0.93 * np.cos(phase + turn), 0.93 * np.sin(phase + turn), outwards])
            ends.append(carbons[end] + direction)
    numbers = np.array([6] * num_carbons + [1] * 4)
    return Graph(atomic_numbers=numbers, positions=np.concatenate([carbons, np.array(ends)]))


def compute_rotation_profile(options: str, seed: int = 0, **changes: object) -> np.ndarray:
    """Return energies of a cumulene against the angle of one end, 19.7 Å from the other, with a cutoff of 3 Å."""
    potential = make_potential(options, seed=seed, cutoff=3.0, **changes)
    return compute(potential, *(make_cumulene(16, angle) for angle in np.linspace(0, np.pi / 2, 7)))["energy"]


@pytest.mark.parametrize("changes", [{}, {"initial_sphc": "smooth"}, {"layer_norm": True, "sphc_norm": True}])
def test_a_local_model_does_not_see_both_ends_of_a_cumulene(changes: dict[str, object]) -> None:
    """Two layers and the first SPHC reach 3 x 3 Å; an atom that sees both ends would have to reach half of 19.7 Å."""
    assert np.ptp(compute_rotation_profile("local", **changes)) < 1e-10


def test_a_local_model_sees_both_ends_of_a_short_cumulene() -> None:
    """A check that the law above can fail."""
    energies = compute(make_potential("local", cutoff=3.0), *(make_cumulene(4, angle) for angle in (0.0, 0.7)))[
        "energy"
    ]
    assert np.ptp(energies) > 1e-6


@pytest.mark.parametrize("options", ["non_local", "normalised", "degree_0"])
def test_a_non_local_model_sees_both_ends_of_a_cumulene(options: str) -> None:
    ranges = [np.ptp(compute_rotation_profile(options, seed)) for seed in range(3)]
    assert min(ranges) > 1e-6


def compute_excess(potential: Potential, distance: float) -> float:
    """Return the energy of two molecules at a distance in Å, less their energies alone."""
    first, second = make_molecule(), make_molecule("CH3OH")
    away = move(second, second.positions + np.array([0.0, 0.0, distance]))
    energies = [float(compute(potential, g)["energy"][0]) for g in (join(first, away), first, second)]
    return energies[0] - energies[1] - energies[2]


@pytest.mark.parametrize("options", LOCAL)
def test_distant_molecules_add_up_in_a_local_model(options: str) -> None:
    check_deviations({"energy": abs(compute_excess(make_potential(options), 30.0))}, 1e-12)


@pytest.mark.parametrize("sphc_cutoff", [0.0, 0.1])
def test_distant_molecules_do_not_add_up_in_a_non_local_model(sphc_cutoff: float) -> None:
    """The softmax runs over all atoms and its cutoff is one over their number, or any share of them; distance does not matter.
    Two alcohols 300 Å apart have 1e-3 eV less than alone with these weights (force scale 1.3 eV/Å), 0.1 eV with a fixed cutoff."""
    potentials = [make_potential("non_local", seed=seed, sphc_cutoff=sphc_cutoff) for seed in range(3)]
    excess = np.array([[compute_excess(p, distance) for distance in (300.0, 3e7)] for p in potentials])
    assert np.abs(excess).min() > 1e-4
    # Only directions between them change, by the ratio of their sizes to the distance.
    np.testing.assert_allclose(excess[:, 0], excess[:, 1], rtol=0.1)
