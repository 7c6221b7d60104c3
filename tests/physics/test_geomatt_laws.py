"""Laws of geometric attention: symmetry, body order, derivatives, locality or its absence, what each order can tell apart."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
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

from so3krates_dist.config import GeomAttEnvelopeSection, GeomAttSection
from so3krates_dist.graph import Graph, collate
from so3krates_dist.model.geomatt import GeomAtt, GeomAttEnvelope, compute_shifted_softplus, compute_smooth_envelope
from so3krates_dist.model.potential import Potential, compute_vectors
from so3krates_dist.model.registry import build_model

CUTOFF = 4.0
GAINS = {2: 4.0, 3: 4.0, 4: 4.0, 5: 6.0}
"""New weights of high orders are almost zero; these make all of them count"""

SIZES: dict[str, Any] = {"num_layers": 2, "num_features": 6, "inner_width": 32, "grid_spacing": 0.2}
SECTIONS: dict[str, GeomAttSection | GeomAttEnvelopeSection] = {
    "published": GeomAttSection(**SIZES, orders=(2, 3, 4)),
    "all_orders": GeomAttSection(**SIZES, orders=(2, 3, 4, 5), algorithm="dense"),
    "list": GeomAttSection(**SIZES, orders=(2, 3, 5), algorithm="neighbor_list"),
    "shared": GeomAttSection(**SIZES, orders=(2, 3, 4, 5), shared_factors=True, algorithm="neighbor_list"),
    "no_bias": GeomAttSection(**SIZES, orders=(3, 4), bias=False, linear_readout=True),
    "envelope": GeomAttEnvelopeSection(**SIZES, orders=(2, 3, 4), cutoff=CUTOFF),
    "envelope_shared": GeomAttEnvelopeSection(**SIZES, orders=(4, 5), shared_factors=True, bias=False, cutoff=CUTOFF),
}
sections = pytest.mark.parametrize("name", SECTIONS)


def make(section: GeomAttSection | GeomAttEnvelopeSection, algorithm: str | None = None, seed: int = 0) -> Potential:
    """Return a potential in evaluation mode with random weights and sizeable attention; `algorithm` does not change the pairs."""
    torch.manual_seed(seed)
    gains = tuple(GAINS[k] for k in section.orders)
    potential = build_model(dataclasses.replace(section, order_gains=gains), STATISTICS).double().eval()
    if algorithm is not None:
        potential.network.algorithm = algorithm  # type: ignore[assignment]
    return potential


def make_pair_of_molecules(distance: float) -> tuple[Graph, Graph]:
    first, second = make_molecule(), make_molecule("CO2", None)
    return first, move(second, second.positions + np.array([0.0, 0.0, distance]))


def draw_rotation(seed: int) -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return rotation if np.linalg.det(rotation) > 0 else -rotation


@sections
def test_energies_are_invariant_and_forces_turn_along(name: str) -> None:
    potential, graph, deviations = make(SECTIONS[name]), make_molecule(), {}
    reference = compute(potential, graph)
    assert np.abs(reference["forces"]).max() > 1e-3
    maps = {"rotation": draw_rotation(1), "inversion": -np.eye(3), "rotation and reflection": -draw_rotation(2)}
    for kind, matrix in maps.items():
        moved = compute(potential, move(graph, graph.positions @ matrix.T + np.array([3.0, -7.0, 1.5])))
        expected = {"energy": reference["energy"], "forces": reference["forces"] @ matrix.T}
        deviations |= {f"{kind} {k}": v for k, v in compare(moved, expected).items()}
    order = np.random.default_rng(3).permutation(graph.num_atoms)
    shuffled = Graph(atomic_numbers=graph.atomic_numbers[order], positions=graph.positions[order])
    expected = {"energy": reference["energy"], "forces": reference["forces"][order]}
    deviations |= {f"permutation {k}": v for k, v in compare(compute(potential, shuffled), expected).items()}
    deviations["net force"] = float(np.abs(reference["forces"].sum(0)).max())
    deviations["net torque"] = float(np.abs(np.cross(graph.positions, reference["forces"]).sum(0)).max())
    check_deviations(deviations, 1e-10)


@sections
def test_attention_does_not_know_elements(name: str) -> None:
    potential, graph = make(SECTIONS[name]), make_molecule()
    other = dataclasses.replace(graph, atomic_numbers=np.roll(graph.atomic_numbers, 2))
    maps, others = (potential.record_attention(make_batch([g], potential.cutoffs)) for g in (graph, other))
    assert len(maps) == SECTIONS[name].num_layers * len(SECTIONS[name].orders)
    for ours, theirs in zip(maps, others, strict=True):
        assert ours.kind == theirs.kind
        assert float(ours.values.abs().max()) > 1e-3
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)


def test_only_shared_factors_make_attention_symmetric() -> None:
    for section in (SECTIONS["shared"], SECTIONS["all_orders"]):
        potential = make(section)
        for kept in potential.record_attention(make_batch([make_molecule()], potential.cutoffs)):
            alpha = kept.values.view(9, 9)
            difference = float((alpha - alpha.T).abs().max() / alpha.abs().max())
            symmetric = section.shared_factors or kept.kind == "order 2"
            assert difference <= 1e-13 if symmetric else difference > 1e-2, kept.kind


@pytest.mark.parametrize("kind", ["published", "no_bias", "shared", "envelope"])
@pytest.mark.parametrize(("order", "num_layers"), [(2, 1), (3, 1), (4, 1), (5, 1), (2, 2), (3, 2)])
def test_body_order(kind: str, order: int, num_layers: int) -> None:
    """Möbius inversion over all subsets of seven atoms: L layers of order k give energies of exactly L (k - 1) + 1 bodies."""
    section = dataclasses.replace(SECTIONS[kind], orders=(order,), num_layers=num_layers, linear_readout=True)
    potential, rng = make(section), np.random.default_rng(4)
    whole = Graph(atomic_numbers=np.array([6, 8, 1, 7, 1, 6, 8]), positions=rng.uniform(0, 3.2, size=(7, 3)))
    subsets = [list(s) for size in range(1, 8) for s in itertools.combinations(range(7), size)]
    graphs = [Graph(atomic_numbers=whole.atomic_numbers[s], positions=whole.positions[s]) for s in subsets]
    potential.statistics = dataclasses.replace(STATISTICS, energy_scale=1.0)
    potential.energy_baselines.zero_()
    energies = compute(potential, *graphs)["energy"]
    terms: dict[frozenset[int], float] = {}
    for subset, energy in zip(subsets, energies, strict=True):
        below = [frozenset(s) for size in range(1, len(subset)) for s in itertools.combinations(subset, size)]
        terms[frozenset(subset)] = float(energy) - sum(terms[s] for s in below)
    largest = {n: max(abs(v) for s, v in terms.items() if len(s) == n) for n in range(1, 8)}
    highest = num_layers * (order - 1) + 1
    assert largest[highest] > 1e-6
    scale = max(1.0, np.abs(energies).max())
    check_deviations({f"{n} bodies": largest[n] / scale for n in range(highest + 1, 8)}, 1e-12)


@sections
def test_forces_are_minus_the_slope_of_the_energy(name: str) -> None:
    potential, graph, step = make(SECTIONS[name]), make_molecule("CH3OH"), 1e-4
    displaced = []
    for atom, axis, sign in itertools.product(range(graph.num_atoms), range(3), (-2, -1, 1, 2)):
        positions = graph.positions.copy()
        positions[atom, axis] += sign * step
        displaced.append(move(graph, positions))
    energies = compute(potential, *displaced)["energy"].reshape(-1, 4)
    slopes = energies @ np.array([1 / 12, -2 / 3, 2 / 3, -1 / 12]) / step
    forces = compute(potential, graph)["forces"]
    assert np.abs(forces).max() > 1e-3
    check_deviations({"forces": measure(forces, -slopes.reshape(-1, 3))}, 1e-9)


@pytest.mark.parametrize("name", ["published", "list", "envelope"])
@pytest.mark.parametrize("molecule", ["C2H2", "CH4"])
def test_second_derivatives_of_linear_and_symmetric_molecules(name: str, molecule: str) -> None:
    section = dataclasses.replace(SECTIONS[name], num_layers=1, num_features=3, inner_width=8)
    potential, graph = make(section), make_molecule(molecule, None)
    batch = make_batch([graph], potential.cutoffs)

    def energy(positions: torch.Tensor) -> torch.Tensor:
        vectors = compute_vectors(dataclasses.replace(batch, positions=positions))
        result: torch.Tensor = potential.network(batch, vectors)["atom_energies"].sum()
        return result

    positions = batch.positions.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(energy, positions)
    assert torch.autograd.gradgradcheck(energy, positions)


def strain_numerically(potential: Potential, graph: Graph, step: float) -> np.ndarray:
    """Return (1/V) dE/dstrain by central differences of fourth order."""
    assert graph.cell is not None
    stress = np.zeros((3, 3))
    for row, column in itertools.product(range(3), range(3)):
        tensor = np.zeros((3, 3))
        tensor[row, column] += step / 2
        tensor[column, row] += step / 2
        moves = [np.eye(3) + sign * tensor for sign in (-2, -1, 1, 2)]
        energies = compute(potential, *(move(graph, graph.positions @ m, graph.cell @ m) for m in moves))["energy"]
        stress[row, column] = energies @ np.array([1 / 12, -2 / 3, 2 / 3, -1 / 12]) / step
    return stress / abs(np.linalg.det(graph.cell))


@pytest.mark.parametrize("algorithm", ["dense", "neighbor_list"])
@pytest.mark.parametrize("crystal", ["triclinic", "self_images"])
def test_stress_is_the_slope_of_the_energy_by_strain(crystal: str, algorithm: str) -> None:
    potential, graph = make(SECTIONS["envelope"], algorithm), make_crystal(crystal)
    stress = compute(potential, graph, stress=True)["stress"][0]
    assert np.abs(stress).max() > 1e-5
    check_deviations({"stress": measure(stress, strain_numerically(potential, graph, 1e-4))}, 1e-9)


def list_directed(graph: Graph, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return receivers, senders and distances of all directed edges, periodic images from explicit loops."""
    repeats = range(-3, 4) if graph.is_periodic else range(1)
    cell = np.zeros((3, 3)) if graph.cell is None else graph.cell
    edges = []
    for shift in itertools.product(repeats, repeats, repeats):
        difference = graph.positions[None] + np.array(shift) @ cell - graph.positions[:, None]
        distances = np.linalg.norm(difference, axis=-1)
        edges += [(i, j, distances[i, j]) for i, j in np.argwhere((distances < reach) & (distances > 0))]
    receivers, senders, distances = zip(*edges, strict=True)
    return np.array(receivers), np.array(senders), np.array(distances)


def compute_by_formula(network: GeomAtt | GeomAttEnvelope, graph: Graph) -> torch.Tensor:
    """Return atomic energies from the formulas, factor by factor over a full list of directed edges; no path is used."""
    section_cutoff = network.cutoff if isinstance(network, GeomAttEnvelope) else np.inf
    receivers, senders, distances = (torch.from_numpy(a) for a in list_directed(graph, section_cutoff))
    num_atoms, outputs = graph.num_atoms, []
    zero = network.grid(torch.zeros(1, dtype=torch.float64))[0]
    envelope = (
        compute_smooth_envelope(distances, network.cutoff) if section_cutoff < np.inf else torch.ones_like(distances)
    )
    for stream in network.streams:
        features = network.embedding(torch.from_numpy(graph.atomic_numbers))
        for layer, value in enumerate(stream.values):
            product = None
            for step in range(stream.num_steps):
                p = min(step, stream.self_weight.shape[1] - 1)
                own, bias = stream.self_weight[layer, p] @ zero, torch.zeros(())
                if stream.pair_bias is not None:
                    own, bias = own + stream.self_bias[layer, p], stream.pair_bias[layer, p]
                pairs = (network.grid(distances) @ stream.pair_weight[layer, p].T + bias) * own * envelope[:, None]
                factor = torch.zeros(num_atoms, num_atoms, pairs.shape[1], dtype=torch.float64)
                factor = factor.index_put((receivers, senders), pairs, accumulate=True)
                diagonal = (stream.pair_weight[layer, p] @ zero + bias) * own
                factor = factor + torch.eye(num_atoms, dtype=torch.float64)[..., None] * diagonal
                product = factor if product is None else torch.einsum("nif,ijf->njf", product, factor)
            features = features + stream.scale * product.sum(-1) @ value(features)
        outputs.append(features)
    hidden = network.readout_hidden(torch.cat(outputs, -1))
    energies: torch.Tensor = network.readout(hidden if network.linear_readout else compute_shifted_softplus(hidden))
    return energies[:, 0]


FULL_LISTS = [
    (name, structure)
    for name, section in SECTIONS.items()
    for structure in ("molecule", "triclinic", "self_images")
    if structure == "molecule" or "cell" in section.sees
]


@pytest.mark.parametrize(("name", "structure"), FULL_LISTS)
def test_the_half_list_gives_what_a_full_list_gives(name: str, structure: str) -> None:
    graph = make_molecule() if structure == "molecule" else make_crystal(structure)
    deviations = {}
    for algorithm in ("dense", "neighbor_list"):
        potential = make(SECTIONS[name], algorithm)
        batch = make_batch([graph], potential.cutoffs)
        with torch.no_grad():
            energies = potential.network(batch, compute_vectors(batch))["atom_energies"].numpy()
            expected = compute_by_formula(potential.network, graph).numpy()  # type: ignore[arg-type]
        deviations[algorithm] = measure(energies, expected)
    check_deviations(deviations, 1e-12)


def make_strand(num_atoms: int = 50) -> Graph:
    """Return a chain of more than 15 Å that is wound up loosely, so that pairs are closer and farther than the reach."""
    rng = np.random.default_rng(6)
    angles = 0.6 * np.arange(num_atoms)
    positions = np.stack([2.2 * np.cos(angles), 2.2 * np.sin(angles), 0.4 * np.arange(num_atoms)], -1)
    positions += rng.normal(scale=0.1, size=positions.shape)
    return Graph(atomic_numbers=rng.choice([1, 6, 7, 8], num_atoms), positions=positions)


@pytest.mark.parametrize("changes", [{}, {"shared_factors": True, "orders": (2, 3, 5)}, {"bias": False}])
def test_the_list_is_exact_for_molecules_larger_than_its_reach(changes: dict[str, Any]) -> None:
    """Published grid and precision; matrices of all pairs against the two ways with pairs up to 6.1 Å."""
    graph = make_strand()
    assert np.ptp(graph.positions[:, 2]) > 15
    section = GeomAttSection(num_features=8, num_layers=2, inner_width=32, **changes)
    exact = make(dataclasses.replace(section, algorithm="dense"))
    expected = compute(exact, graph)
    assert np.abs(expected["forces"]).max() > 1e-3
    deviations = {}
    for algorithm in ("auto", "neighbor_list"):
        potential = make(dataclasses.replace(section, algorithm=algorithm))
        batch = make_batch([graph], potential.cutoffs)
        assert len(batch.pair_first) < 0.7 * 50 * 49 / 2
        outputs = compute(potential, graph)
        deviations[f"{algorithm} energy"] = measure(outputs["energy"], expected["energy"])
        error = np.abs(outputs["forces"] - expected["forces"]).max()
        deviations[f"{algorithm} forces"] = float(error / np.abs(expected["forces"]).max())
    check_deviations(deviations, 5e-12)


@sections
def test_a_batch_equals_its_structures_one_by_one(name: str) -> None:
    """Small structures are padded to the size of the largest; matrices and lists."""
    graphs = [
        make_molecule(),
        make_molecule("CO2", None),
        Graph(atomic_numbers=np.array([8]), positions=np.zeros((1, 3))),
    ]
    graphs += [make_molecule("C6H6", 2)]
    if "cell" in SECTIONS[name].sees:
        graphs += [make_crystal(), make_crystal("self_images")]
    for algorithm in ("dense", "neighbor_list"):
        potential = make(SECTIONS[name], algorithm)
        singles = [compute(potential, g) for g in graphs]
        expected = {field: np.concatenate([s[field] for s in singles]) for field in singles[0]}
        check_deviations(compare(compute(potential, *graphs), expected), 1e-12)
        np.testing.assert_array_equal(singles[2]["forces"], np.zeros((1, 3)))


def collect_gradients(potential: Potential, *graphs: Graph) -> dict[str, torch.Tensor]:
    """Return gradients of all weights by a loss of energies and forces."""
    outputs = potential.train()(make_batch(graphs, potential.cutoffs))
    loss = (outputs["energy"] - 1.0).square().sum() + outputs["forces"].square().sum()
    names, weights = zip(*potential.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


@sections
def test_every_weight_learns_and_both_paths_agree(name: str) -> None:
    graphs = [make_molecule(), make_molecule("CO2", 1)]
    dense, listed = (collect_gradients(make(SECTIONS[name], a), *graphs) for a in ("dense", "neighbor_list"))
    recomputed = make(SECTIONS[name], "neighbor_list")
    recomputed.network.checkpointing = "blocks"  # type: ignore[assignment]
    again = collect_gradients(recomputed, *graphs)
    for key, gradient in dense.items():
        reached = gradient[[1, 6, 8]] if "embedding" in key else gradient
        assert torch.count_nonzero(reached) == reached.numel(), key
    scale = {key: max(1e-3, float(g.abs().max())) for key, g in dense.items()}
    check_deviations({k: float((listed[k] - g).abs().max()) / scale[k] for k, g in dense.items()}, 1e-9)
    check_deviations({k: float((again[k] - g).abs().max()) / scale[k] for k, g in listed.items()}, 1e-12)


@pytest.mark.parametrize("algorithm", ["dense", "neighbor_list"])
def test_the_envelope_is_smooth_at_the_cutoff(algorithm: str) -> None:
    """Forces and their slopes on both sides, near the cutoff and in a scan through it."""
    potential = make(SECTIONS["envelope"], algorithm)

    def make_crossing(offset: float) -> Graph:
        positions = np.array([[0.0, 0.0, 0.0], [0.4, 1.1, 0.2], [0.0, 0.6, 0.8]])
        positions[2] *= CUTOFF + offset
        return Graph(atomic_numbers=np.array([6, 8, 1]), positions=positions)

    near = [compute(potential, make_crossing(offset)) for offset in (-1e-7, 1e-7)]
    check_deviations({"forces": measure(near[1]["forces"], near[0]["forces"])}, 1e-6)
    changes = []
    for count in (401, 801):
        forces = compute(potential, *map(make_crossing, np.linspace(-0.2, 0.2, count)))["forces"].reshape(count, 9)
        slopes = np.diff(forces, axis=0) * count
        changes.append([np.abs(np.diff(forces, axis=0)).max(), np.abs(np.diff(slopes, axis=0)).max()])
    ratios = np.divide(*changes)  # twice as many points halve the largest change, if there is no jump
    check_deviations({"forces": abs(ratios[0] - 2), "slopes": abs(ratios[1] - 2)}, 0.1)


def measure_coupling(potential: Potential, distance: float) -> tuple[float, float]:
    """Return what the energy of two molecules has beyond their sum, and how far forces of one depend on the other's inner shape."""
    first, second = make_pair_of_molecules(distance)
    together, alone, other = (compute(potential, g) for g in (join(first, second), first, second))
    bent = move(second, second.positions + np.array([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, 0.1]]))
    changed = compute(potential, join(first, bent))
    excess = float(together["energy"][0] - alone["energy"][0] - other["energy"][0])
    forces = changed["forces"] - together["forces"]
    return excess, float(np.abs(forces[: first.num_atoms]).max())


@pytest.mark.parametrize("algorithm", ["dense", "neighbor_list"])
@pytest.mark.parametrize("name", ["envelope", "envelope_shared", "no_bias"])
def test_distant_molecules_add_up_with_an_envelope_or_without_bias(name: str, algorithm: str) -> None:
    excess, coupling = measure_coupling(make(SECTIONS[name], algorithm), 20.0)
    check_deviations({"energy": abs(excess), "forces": coupling}, 1e-12)


@pytest.mark.parametrize("algorithm", ["dense", "neighbor_list"])
def test_the_published_model_couples_molecules_at_any_distance(algorithm: str) -> None:
    """With biases attention tends to a constant: a mean field that does not know distances. A property, not a wish.

    With these weights two molecules have 14 meV less than alone, and forces of one change by 0.4 meV/Å with the other's shape.
    """
    measured = {
        distance: measure_coupling(make(SECTIONS["published"], algorithm), distance) for distance in (20.0, 50.0)
    }
    assert measured[20.0] == pytest.approx((-0.013790, 4.0073e-4), rel=1e-3)
    check_deviations({"excess": measure(*(np.array(measured[d]) for d in (20.0, 50.0)))}, 1e-12)


SHAPES = {
    "angles": (np.radians([[0, 60], [0, 120]]), {2: True, 3: False, 4: False, 5: False}),
    "dihedrals": (np.radians([[0, 45, 135, 180], [0, 45, 90, 225]]), {2: True, 3: True, 4: False, 5: False}),
}
"""Neighbours on a unit circle around an atom, two arrangements; and which order takes them for the same.

The second pair has the same distances from the centre and the same multiset of distances between neighbours.
"""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_what_each_order_tells_apart(shape: str, order: int) -> None:
    """The sum of the centre's attention (grid of 0 to 2 Å, spacing 0.1, precision 10; one layer), as in the paper's shapes."""
    section = GeomAttSection(
        orders=(order,), num_layers=1, num_features=1, inner_width=16, grid_end=2.0, grid_spacing=0.1,
        gaussian_precision=10.0, algorithm="dense",
    )  # fmt: skip
    potential, sums = make(section), []
    angles, same = SHAPES[shape]
    for arrangement in angles:
        ring = np.stack([np.cos(arrangement), np.sin(arrangement), np.zeros_like(arrangement)], -1)
        graph = Graph(atomic_numbers=np.full(len(ring) + 1, 6), positions=np.concatenate([np.zeros((1, 3)), ring]))
        (kept,) = potential.record_attention(make_batch([graph], potential.cutoffs))
        sums.append(float(kept.values[kept.receivers == 0].sum()))
    difference = abs(sums[1] - sums[0]) / max(map(abs, sums))
    assert difference <= 1e-13 if same[order] else difference > 1e-3, sums


@sections
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_takes_part(name: str, dtype: torch.dtype) -> None:
    for algorithm in ("dense", "neighbor_list"):
        potential = make(SECTIONS[name], algorithm).to(dtype).train()
        outputs = potential(collate([], dtype))
        assert {k: tuple(v.shape) for k, v in outputs.items()} == {"energy": (0,), "forces": (0, 3)}
        (outputs["energy"].sum() + outputs["forces"].sum()).backward()
        gradients = [p.grad for p in potential.parameters()]
        assert all(g is not None and torch.count_nonzero(g) == 0 for g in gradients)


@sections
def test_float32_is_as_good_as_it_can_be(name: str) -> None:
    potential, graph = make(SECTIONS[name]), make_molecule()
    expected = compute(potential, graph)
    outputs = compute(potential.float(), graph)
    check_deviations(compare(outputs, expected), {"energy": 2e-6, "forces": 2e-5})
