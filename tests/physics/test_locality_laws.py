"""Laws of locality: smooth where a pair crosses the cutoff, additive beyond it, nothing shared between structures of a batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from structures import (
    CUTOFF,
    OPTIONS,
    PERIODIC,
    SO3LR,
    STATISTICS,
    check_deviations,
    compare,
    compute,
    join,
    make_batch,
    make_crystal,
    make_ion,
    make_molecule,
    make_potential,
    measure,
    move,
    pick,
)

from so3krates_dist.config import TrainSection
from so3krates_dist.data import neighbors
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, collate
from so3krates_dist.model.potential import compute_vectors
from so3krates_dist.train.losses import compute_loss, compute_weights, count_labels

options = pytest.mark.parametrize("options", OPTIONS)

NOT_ADDITIVE = {
    "so3krates_non_local": 0.01372, "so3krates_smooth": 0.2860, "so3lr": 0.8355, "so3lr_endless": 1.3346, "so3lr_ewald": 1.3346,
    "geomatt": -1.8512, "geomatt_list": -1.8512,
}  # fmt: skip
"""Options whose energies of distant molecules do not add up as published: attention, charges or a constant rest join all atoms
of a structure. How much ethanol and methanol 300 Å apart have beyond their sum in eV, with these random weights"""
ADDITIVE = [name for name in OPTIONS if name not in NOT_ADDITIVE]

HOPS = {
    "transformer": 2, "pre_gated": 2, "backbone": 2, "one_degree": 2, "so3krates_scalars": 2, "so3lr_semi_local": 2,
    "repulsive": 3, "so3krates": 3,  # harmonics of the neighbours from the start
    "geomatt_shared": 4, "geomatt_envelope": 6,  # layers times pairs in a walk
}  # fmt: skip
"""How many cutoffs far an atom sees"""

SWITCHES = [
    *((name, CUTOFF) for name in OPTIONS),
    *((name, 1.5) for name in ("repulsive", "so3lr")),  # repulsion of nuclei ends
    *(("so3lr", distance) for distance in (4.5, 8.0, 10.0)),  # switches of electrostatics and dispersion begin and end
]
"""Options with the distances in Å where a term begins or ends"""
switches = pytest.mark.parametrize(("options", "distance"), SWITCHES)
SMOOTH_TWICE = [name for name, section in OPTIONS.items() if getattr(section, "cutoff_function", "") != "cosine"]


def make_atom(atomic_number: int = 6) -> Graph:
    return Graph(atomic_numbers=np.array([atomic_number]), positions=np.array([[0.3, -0.2, 0.7]]), group="atom")


def make_crossing(distance: float) -> Graph:
    """Return C-O with a hydrogen at a distance in Å from the carbon."""
    positions = np.array([[0.0, 0.0, 0.0], [0.4, 1.1, 0.2], [0.0, 0.6 * distance, 0.8 * distance]])
    return Graph(atomic_numbers=np.array([6, 8, 1]), positions=positions)


@switches
def test_energy_and_forces_are_continuous_at_every_cutoff(options: str, distance: float) -> None:
    step = 1e-7
    inside, outside = make_crossing(distance - step), make_crossing(distance + step)
    outputs = compute(make_potential(options), inside, outside)
    forces = outputs["forces"].reshape(2, 3, 3)
    work = 2 * step * forces[0, 2] @ [0.0, 0.6, 0.8]
    # A cosine's slope at the cutoff is proportional to the distance from it, a smooth change over 2e-7 Å comes on top.
    check_deviations(
        {
            "energy without the work done": abs(float(outputs["energy"][1] - outputs["energy"][0] + work)),
            "forces": measure(forces[1], forces[0]),
        },
        {"energy without the work done": 1e-9, "forces": 1e-5},
    )


def test_pairs_come_and_go_where_the_laws_look() -> None:
    for distance in (CUTOFF, 10.0):
        graphs = [build_neighbors(make_crossing(distance + d), CUTOFF, 10.0) for d in (-1e-7, 1e-7)]
        num_pairs = [(len(g.pair_first), g.num_short_pairs) for g in graphs]  # type: ignore[arg-type]
        assert num_pairs == ([(3, 3), (3, 2)] if distance == CUTOFF else [(3, 1), (2, 1)])


def compute_slopes(options: str, start: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return forces at the beginning of a step in the distance of `make_crossing`, and their change along it."""
    outputs = compute(make_potential(options), make_crossing(start), make_crossing(start + step))
    forces = outputs["forces"].reshape(2, 3, 3)
    return forces[0], (forces[1] - forces[0]) / step


@pytest.mark.parametrize("options", SMOOTH_TWICE)
def test_second_derivatives_are_continuous_at_a_smooth_cutoff(options: str) -> None:
    forces, slopes = zip(*(compute_slopes(options, CUTOFF + d, d) for d in (-1e-5, 1e-5)), strict=True)
    assert np.abs(slopes[1]).max() > 1e-5  # the oxygen is still a neighbour
    check_deviations(
        {"forces": measure(forces[1], forces[0]), "slopes": measure(slopes[1], slopes[0])},
        {"forces": 1e-4, "slopes": 2e-3},
    )


def test_the_cosine_cutoff_bends_at_the_cutoff() -> None:
    """What the polynomial is for; and a check that the law above can fail."""
    _, slopes = zip(*(compute_slopes("transformer", CUTOFF + d, d) for d in (-1e-5, 1e-5)), strict=True)
    assert measure(slopes[1], slopes[0]) > 1e-2


@switches
def test_nothing_jumps_along_a_scan_through_every_cutoff(options: str, distance: float) -> None:
    """Twice as many points halve the largest change between neighbouring points, if there is no jump."""
    potential, changes = make_potential(options), []
    for count in (201, 401):
        outputs = compute(potential, *(make_crossing(d) for d in np.linspace(distance - 0.2, distance + 0.2, count)))
        energies, forces = outputs["energy"], outputs["forces"].reshape(count, 9)
        changes.append((np.abs(np.diff(energies)).max(), np.abs(np.diff(forces, axis=0)).max()))
    ratios = np.array(changes[0]) / np.array(changes[1])
    check_deviations({"energy": abs(ratios[0] - 2), "forces": abs(ratios[1] - 2)}, 0.1)


def measure_distant_molecules(options: str) -> dict[str, float]:
    """Return by how much two molecules 12 Å apart differ from each by itself."""
    potential = make_potential(options)
    first, second = make_molecule(), make_molecule("CO2", 1)
    away = move(second, second.positions + np.array([0.0, 0.0, 3 * CUTOFF]))
    together, alone, other = (
        pick(compute(potential, g), "energy", "forces") for g in (join(first, away), first, second)
    )
    expected = {
        "energy": alone["energy"] + other["energy"], "forces": np.concatenate([alone["forces"], other["forces"]]),
    }  # fmt: skip
    return compare(together, expected)


@pytest.mark.parametrize("options", ADDITIVE)
def test_distant_molecules_add_up(options: str) -> None:
    check_deviations(measure_distant_molecules(options), 1e-12)


@pytest.mark.parametrize("options", NOT_ADDITIVE)
def test_by_how_much_distant_molecules_do_not_add_up(options: str) -> None:
    potential, first, second = make_potential(options), make_molecule(), make_molecule("CH3OH")
    away = move(second, second.positions + np.array([0.0, 0.0, 300.0]))
    together, *alone = (float(compute(potential, g)["energy"][0]) for g in (join(first, away), first, second))
    assert together - sum(alone) == pytest.approx(NOT_ADDITIVE[options], rel=1e-3)


@pytest.mark.parametrize("options", HOPS)
def test_the_reach_is_hops_times_cutoff(options: str) -> None:
    """In a chain of 1.5 Å steps and a cutoff of 4 Å every hop sees two atoms further."""
    potential = make_potential(options)
    positions = np.zeros((16, 3))
    positions[:, 0] = 1.5 * np.arange(16)
    positions += np.random.default_rng(4).uniform(-0.1, 0.1, positions.shape)  # no two atoms have equal surroundings
    graph = Graph(atomic_numbers=np.full(16, 6), positions=positions)
    batch = make_batch([graph], potential.cutoffs)
    leaf = batch.positions.requires_grad_(True)
    energies = potential.as_network(batch, compute_vectors(batch))["atom_energies"]
    (gradient,) = torch.autograd.grad(energies[0], leaf)
    reached = [int(i) for i in torch.nonzero(gradient.abs().sum(1))]
    assert reached == list(range(2 * HOPS[options] + 1))


def test_every_additive_model_has_its_reach_tested() -> None:
    assert sorted(HOPS) == sorted(ADDITIVE)


@options
def test_no_gradient_across_structures_of_a_batch(options: str) -> None:
    """Of any output of a structure by the positions of another."""
    potential = make_potential(options)
    batch = make_batch([make_molecule(), make_ion(1.0), make_molecule("CH4")], potential.cutoffs)
    leaf = batch.positions.requires_grad_(True)
    for name, values in potential.as_network(batch, compute_vectors(batch)).items():
        if not values.requires_grad:
            assert name == "physical_energies", name  # of a model that has none
            assert torch.count_nonzero(values) == 0
            continue
        index = batch.graph_index if len(values) == len(batch.graph_index) else torch.arange(3)
        for number in range(3):
            own = batch.graph_index == number
            (gradient,) = torch.autograd.grad(values[index == number].square().sum(), leaf, retain_graph=True)
            assert torch.count_nonzero(gradient[~own]) == 0, name
            assert torch.count_nonzero(gradient[own]) > 0, name


@options
def test_a_batch_equals_its_structures_one_by_one(options: str) -> None:
    potential = make_potential(options)
    crystals = [make_crystal(), make_crystal("self_images")] if options in PERIODIC else []
    graphs = [
        make_molecule(),
        *crystals[:1],
        make_atom(),
        make_ion(-1.0),
        *crystals[1:],
        make_molecule("CO2", 1),
        make_ion(1.0),
    ]
    together, singles = compute(potential, *graphs), [compute(potential, g) for g in graphs]
    expected = {name: np.concatenate([s[name] for s in singles]) for name in together}
    check_deviations(compare(together, expected), 1e-12)
    if crystals:
        stress = compute(potential, *crystals, stress=True)["stress"]
        expected_stress = np.concatenate([compute(potential, g, stress=True)["stress"] for g in crystals])
        check_deviations({"stress": measure(stress, expected_stress)}, 1e-12)


@options
def test_one_atom(options: str) -> None:
    potential = make_potential(options)
    outputs = compute(potential, make_atom(6))
    assert all(np.isfinite(values).all() for values in outputs.values())
    assert outputs["energy"].shape == (1,)
    np.testing.assert_array_equal(outputs["forces"], np.zeros((1, 3)))
    assert compute(potential, make_atom(8))["energy"] != outputs["energy"]
    batch = make_batch([make_atom()], potential.cutoffs)
    loss = sum(v.square().sum() for v in potential.train()(batch).values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)
    assert potential.network.embedding.weight.grad[6].abs().max() > 0  # type: ignore[union-attr,index]


@pytest.mark.parametrize("options", PERIODIC)
def test_one_atom_alone_in_a_crystal_feels_no_force_but_stress(options: str) -> None:
    atom = dataclasses.replace(make_atom(), cell=2.7 * np.eye(3), pbc=np.ones(3, bool))
    outputs = compute(make_potential(options), atom, stress=True)
    trace = np.trace(outputs["stress"][0]) / 3
    check_deviations(
        {
            "forces": float(np.abs(outputs["forces"]).max()),
            "anisotropy": float(np.abs(outputs["stress"][0] - trace * np.eye(3)).max()),
        },
        1e-12,
    )
    assert abs(trace) > 1e-5


@pytest.mark.parametrize("options", ADDITIVE)
def test_two_atoms_without_neighbours_are_two_atoms(options: str) -> None:
    potential = make_potential(options)
    apart = Graph(atomic_numbers=np.array([6, 8]), positions=np.array([[0.0, 0, 0], [0, 0, CUTOFF]]))
    outputs = compute(potential, apart)
    alone = sum(float(compute(potential, make_atom(z))["energy"][0]) for z in (6, 8))
    check_deviations({"energy": measure(outputs["energy"][0], alone)}, 1e-14)
    np.testing.assert_array_equal(outputs["forces"], np.zeros((2, 3)))


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_takes_part(options: str, dtype: torch.dtype) -> None:
    """A process without conformers still goes through the step; its gradients are zeros, not nan."""
    potential = make_potential(options, dtype).train()
    batch = collate([], dtype)
    outputs = potential(batch)
    tails = {"forces": (3,), "dipole": (3,)}
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {k: (0, *tails.get(k, ())) for k in outputs}
    others = {"dipole_weight": 1.0, "charges_weight": 1.0, "hirshfeld_weight": 1.0} if "dipole" in outputs else {}
    section = TrainSection(**others)
    counts, weights = [4.0, 12.0, 0.0, 3.0, 4.0, 4.0], compute_weights(0, section)
    loss, errors = compute_loss(outputs, batch, counts, section, weights, STATISTICS.energy_scale)
    loss.backward()
    assert loss.item() == 0
    assert errors.tolist() == [0, 0]
    assert count_labels(batch) == [0] * 6
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.count_nonzero(g) == 0 for g in gradients)
    assert potential.eval()(batch)["energy"].shape == (0,)


@pytest.mark.parametrize("options", [name for name, section in OPTIONS.items() if math.isfinite(section.reach)])
def test_both_neighbour_searches_give_one_energy(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell list and numpy's all pairs."""
    potential, outputs = make_potential(options), []
    graphs = [make_molecule(), make_molecule("C6H6", None), make_molecule("CO2", 1)]
    for limit in (neighbors.MAX_ATOMS_ALL_PAIRS, 0):
        monkeypatch.setattr(neighbors, "MAX_ATOMS_ALL_PAIRS", limit)
        outputs.append(compute(potential, *graphs))
    check_deviations(compare(*outputs), 1e-12)


@pytest.mark.parametrize("options", SO3LR)
def test_partial_charges_add_up_to_the_charge(options: str) -> None:
    """Exactly, in molecules and crystals; and dipoles are those of the charges."""
    potential, deviations = make_potential(options), {}
    crystals = [dataclasses.replace(make_crystal(), total_charge=2.0)] if options in PERIODIC else []
    for graph in (make_molecule(), make_ion(1.0), make_ion(-1.0), make_atom(), *crystals):
        outputs = compute(potential, graph)
        charges = outputs["partial_charges"]
        deviations[f"{graph.group} {graph.total_charge} charge"] = abs(float(charges.sum()) - graph.total_charge)
        dipole = (charges[:, None] * graph.positions).sum(0)
        deviations[f"{graph.group} {graph.total_charge} dipole"] = measure(outputs["dipole"][0], dipole)
    check_deviations(deviations, 1e-13)
