"""Laws of locality: smooth where a pair crosses the cutoff, additive beyond it, nothing shared between structures of a batch."""

import dataclasses

import numpy as np
import pytest
import torch
from structures import (
    CUTOFF,
    OPTIONS,
    STATISTICS,
    check_deviations,
    compare,
    compute,
    join,
    make_batch,
    make_crystal,
    make_molecule,
    make_potential,
    measure,
    move,
)

from so3krates_dist.config import TrainSection
from so3krates_dist.data import neighbors
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, collate
from so3krates_dist.model.potential import compute_vectors
from so3krates_dist.train.losses import compute_loss, count_labels

options = pytest.mark.parametrize("options", OPTIONS)
SMOOTH_TWICE = [name for name, section in OPTIONS.items() if section.cutoff_function == "polynomial"]


def make_atom(atomic_number: int = 6) -> Graph:
    return Graph(atomic_numbers=np.array([atomic_number]), positions=np.array([[0.3, -0.2, 0.7]]), group="atom")


def make_crossing(offset: float) -> Graph:
    """Return C-O with a hydrogen whose distance from the carbon is the cutoff plus an offset in Å."""
    positions = np.array([[0.0, 0.0, 0.0], [0.4, 1.1, 0.2], [0.0, 0.6, 0.8]])
    positions[2] *= CUTOFF + offset
    return Graph(atomic_numbers=np.array([6, 8, 1]), positions=positions)


def compute_slopes(options: str, offset: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return forces at the two ends of a step, beginning at an offset from the cutoff and leading away from it."""
    outputs = compute(make_potential(options), make_crossing(offset), make_crossing(offset + step))
    forces = outputs["forces"].reshape(2, 3, 3)
    return forces[0], (forces[1] - forces[0]) / step


@options
def test_energy_and_forces_are_continuous_at_the_cutoff(options: str) -> None:
    distance = 1e-7
    inside, outside = make_crossing(-distance), make_crossing(distance)
    pairs = [len(build_neighbors(g, CUTOFF).pair_first) for g in (inside, outside)]  # type: ignore[arg-type]
    assert pairs == [3, 2]
    outputs = compute(make_potential(options), inside, outside)
    forces = outputs["forces"].reshape(2, 3, 3)
    # A cosine's slope at the cutoff is proportional to the distance from it, a smooth change over 2e-7 Å comes on top.
    check_deviations(
        {
            "energy without the work done": abs(
                float(outputs["energy"][1] - outputs["energy"][0] + 2 * distance * forces[0, 2] @ [0.0, 0.6, 0.8])
            ),
            "forces": measure(forces[1], forces[0]),
        },
        {"energy without the work done": 1e-9, "forces": 1e-5},
    )


@pytest.mark.parametrize("options", SMOOTH_TWICE)
def test_second_derivatives_are_continuous_at_the_polynomial_cutoff(options: str) -> None:
    forces, slopes = zip(*(compute_slopes(options, side * 1e-5, side * 1e-5) for side in (-1, 1)), strict=True)
    assert np.abs(slopes[1]).max() > 1e-3  # the oxygen is still a neighbour
    check_deviations(
        {"forces": measure(forces[1], forces[0]), "slopes": measure(slopes[1], slopes[0])},
        {"forces": 1e-4, "slopes": 2e-3},
    )


def test_the_cosine_cutoff_bends_at_the_cutoff() -> None:
    """What the polynomial is for; and a check that the law above can fail."""
    _, slopes = zip(*(compute_slopes("transformer", side * 1e-5, side * 1e-5) for side in (-1, 1)), strict=True)
    assert measure(slopes[1], slopes[0]) > 1e-2


@options
def test_nothing_jumps_along_a_scan_through_the_cutoff(options: str) -> None:
    """Twice as many points halve the largest change between neighbouring points, if there is no jump."""
    potential, changes = make_potential(options), []
    for count in (401, 801):
        outputs = compute(potential, *(make_crossing(offset) for offset in np.linspace(-0.2, 0.2, count)))
        energies, forces = outputs["energy"], outputs["forces"].reshape(count, 9)
        changes.append((np.abs(np.diff(energies)).max(), np.abs(np.diff(forces, axis=0)).max()))
    ratios = np.array(changes[0]) / np.array(changes[1])
    check_deviations({"energy": abs(ratios[0] - 2), "forces": abs(ratios[1] - 2)}, 0.1)


@options
def test_distant_molecules_add_up(options: str) -> None:
    potential, first, second = make_potential(options), make_molecule(), make_molecule("CO2", None)
    away = move(second, second.positions + np.array([0.0, 0.0, 3 * CUTOFF]))
    together, alone, other = (compute(potential, g) for g in (join(first, away), first, second))
    expected = {
        "energy": alone["energy"] + other["energy"], "forces": np.concatenate([alone["forces"], other["forces"]]),
    }  # fmt: skip
    check_deviations(compare(together, expected), 1e-12)


@options
def test_the_reach_is_layers_times_cutoff(options: str) -> None:
    """In a chain of 1.5 Å steps and a cutoff of 4 Å two layers see four atoms to either side, not the fifth."""
    potential = make_potential(options)
    positions = np.zeros((14, 3))
    positions[:, 0] = 1.5 * np.arange(14)
    positions[:, 1] = 0.3 * (np.arange(14) % 2)
    graph = Graph(atomic_numbers=np.full(14, 6), positions=positions)
    batch = make_batch([graph])
    leaf = batch.positions.requires_grad_(True)
    energies = potential.network(batch, compute_vectors(batch))
    (gradient,) = torch.autograd.grad(energies[0], leaf)
    reached = [int(i) for i in torch.nonzero(gradient.abs().sum(1))]
    assert reached == [0, 1, 2, 3, 4]


@options
def test_no_gradient_across_structures_of_a_batch(options: str) -> None:
    potential = make_potential(options)
    batch = make_batch([make_molecule(), make_molecule("CO2"), make_molecule("CH4")])
    leaf = batch.positions.requires_grad_(True)
    energies = potential.network(batch, compute_vectors(batch))
    for number in range(3):
        own = batch.graph_index == number
        (gradient,) = torch.autograd.grad(energies[own].sum(), leaf, retain_graph=True)
        assert torch.count_nonzero(gradient[~own]) == 0
        assert torch.count_nonzero(gradient[own]) > 0


@options
def test_a_batch_equals_its_structures_one_by_one(options: str) -> None:
    potential = make_potential(options)
    graphs = [make_molecule(), make_crystal(), make_atom(), make_crystal("self_images"), make_molecule("CO2", None)]
    together = compute(potential, *graphs)
    singles = [compute(potential, g) for g in graphs]
    expected = {name: np.concatenate([s[name] for s in singles]) for name in together}
    check_deviations(compare(together, expected), 1e-12)
    crystals = [make_crystal(), make_crystal("self_images")]
    stress = compute(potential, *crystals, stress=True)["stress"]
    expected_stress = np.concatenate([compute(potential, g, stress=True)["stress"] for g in crystals])
    check_deviations({"stress": measure(stress, expected_stress)}, 1e-12)


@options
def test_one_atom(options: str) -> None:
    potential = make_potential(options)
    outputs = compute(potential, make_atom(6))
    assert np.isfinite(outputs["energy"]).all()
    assert outputs["energy"].shape == (1,)
    np.testing.assert_array_equal(outputs["forces"], np.zeros((1, 3)))
    assert compute(potential, make_atom(8))["energy"] != outputs["energy"]
    loss = sum(v.square().sum() for v in potential.train()(make_batch([make_atom()])).values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)
    assert potential.network.embedding.weight.grad[6].abs().max() > 0  # type: ignore[union-attr,index]


def test_one_atom_alone_in_a_crystal_feels_no_force_but_stress() -> None:
    atom = dataclasses.replace(make_atom(), cell=2.7 * np.eye(3), pbc=np.ones(3, bool))
    outputs = compute(make_potential(), atom, stress=True)
    trace = np.trace(outputs["stress"][0]) / 3
    check_deviations(
        {
            "forces": float(np.abs(outputs["forces"]).max()),
            "anisotropy": float(np.abs(outputs["stress"][0] - trace * np.eye(3)).max()),
        },
        1e-12,
    )
    assert abs(trace) > 1e-4


@options
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
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {"energy": (0,), "forces": (0, 3)}
    loss, errors = compute_loss(outputs, batch, [4.0, 12.0, 0.0], TrainSection(), STATISTICS.energy_scale)
    loss.backward()
    assert loss.item() == 0
    assert errors.tolist() == [0, 0]
    assert count_labels(batch) == [0, 0, 0]
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.count_nonzero(g) == 0 for g in gradients)
    assert potential.eval()(batch)["energy"].shape == (0,)


@options
def test_both_neighbour_searches_give_one_energy(options: str) -> None:
    """The cell list and numpy's all pairs."""
    potential, deviations = make_potential(options), {}
    for graph in (make_molecule(), make_molecule("C6H6", None), make_molecule("CO2", None)):
        outputs = []
        for search in (neighbors._pairs_from_cell_list, neighbors._pairs_of_molecule):
            first, second, shifts = search(graph, CUTOFF)
            listed = dataclasses.replace(graph, pair_first=first, pair_second=second, pair_shifts=shifts)
            outputs.append(compute(potential, listed))
        deviations |= {f"{graph.group} {field}": value for field, value in compare(*outputs).items()}
    check_deviations(deviations, 1e-12)
