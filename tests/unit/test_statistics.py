"""Statistics of the training split: robust baselines, scales, neighbour counts."""

import dataclasses
import gc
import json
import weakref

import numpy as np
import pytest

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.statistics import (
    NEIGHBOR_CUTOFFS,
    BaselineSample,
    StatisticsBuilder,
    compute_statistics,
    count_neighbors,
    fit_baselines,
    hash_geometry,
)
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

ISOLATED = {1: -13.6, 6: -1029.0, 7: -1485.0, 8: -2042.0}
BINDING = {1: -2.5, 6: -6.0, 7: -4.0, 8: -3.0}
TRUE = {z: e + BINDING[z] for z, e in ISOLATED.items()}


def make_molecules(num: int, seed: int = 0, noise: float = 0.02) -> list[Graph]:
    generator = np.random.default_rng(seed)
    graphs = []
    for _ in range(num):
        numbers = np.repeat([6, 1, 8, 7], generator.integers([1, 1, 0, 0], [8, 16, 4, 3]))
        energy = sum(TRUE[z] for z in numbers.tolist()) + noise * len(numbers) * generator.standard_normal()
        positions = generator.uniform(0, 6, (len(numbers), 3))
        forces = generator.standard_normal((len(numbers), 3))
        graphs.append(Graph(atomic_numbers=numbers, positions=positions, energy=energy, forces=forces))
    return graphs


def largest_deviation(baselines: dict[int, float]) -> float:
    return max(abs(baselines[z] - TRUE[z]) for z in baselines)


@pytest.mark.parametrize("isolated", [ISOLATED, None])
def test_baselines_are_found_and_hardly_move_when_one_energy_in_a_hundred_is_off_by_500_ev(isolated) -> None:
    graphs = make_molecules(500)
    clean, clean_std = fit_baselines(graphs, isolated)
    for graph in graphs[::100]:
        graph.energy += 500.0
    corrupted, corrupted_std = fit_baselines(graphs, isolated)
    assert largest_deviation(clean) < 0.05
    assert max(abs(corrupted[z] - clean[z]) for z in clean) < 0.01
    assert clean_std == pytest.approx(0.02, rel=0.2)
    assert corrupted_std < 2 * clean_std


def test_one_composition_gives_a_defined_answer_that_sums_to_the_energy() -> None:
    numbers = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1])
    graphs = [Graph(atomic_numbers=numbers, positions=np.zeros((9, 3)), energy=-4215.0 + 0.1 * i) for i in range(11)]
    for isolated in (ISOLATED, None):
        baselines, _ = fit_baselines(graphs, isolated)
        assert sum(baselines[z] for z in numbers.tolist()) == pytest.approx(-4214.5, abs=0.01)
    alone, _ = fit_baselines(graphs, None)
    assert max(alone.values()) - min(alone.values()) < 0.1, "without a prior all elements get the mean energy per atom"
    with_prior, _ = fit_baselines(graphs, ISOLATED)
    assert all(abs(with_prior[z] - ISOLATED[z]) < 20 for z in with_prior), "the rest is shared out as binding energy"


def test_charged_structures_stay_out_of_the_fit_unless_an_element_is_in_no_neutral_one() -> None:
    graphs = make_molecules(200)
    expected, _ = fit_baselines(graphs, None)
    cation = Graph(atomic_numbers=np.array([6, 1, 1, 1]), positions=np.zeros((4, 3)), total_charge=1.0, energy=0.0)
    assert fit_baselines([*graphs, *[cation] * 300], None)[0] == expected
    sodium = Graph(atomic_numbers=np.array([11]), positions=np.zeros((1, 3)), total_charge=1.0, energy=-4409.0)
    assert fit_baselines([*graphs, sodium], None)[0][11] == pytest.approx(-4409.0, abs=1.0)


def test_structures_without_energies_get_the_isolated_atoms_or_zero() -> None:
    graphs = [Graph(atomic_numbers=np.array([1, 8]), positions=np.eye(3)[:2], forces=np.ones((2, 3)))]
    assert fit_baselines(graphs, {1: -13.6}) == ({1: -13.6, 8: 0.0}, None)


def test_statistics_are_plain_json_with_all_keys() -> None:
    graphs = make_molecules(30)
    graphs[3].total_charge = -1.0
    statistics = compute_statistics(graphs, ISOLATED)
    assert json.loads(json.dumps(statistics)) == statistics
    assert statistics["elements"] == [1, 6, 7, 8]
    counted = sum(int((g.atomic_numbers == 6).sum()) for g in graphs)
    assert statistics["element_counts"]["6"] == counted
    assert set(statistics["energy_baselines"]) == {"1", "6", "7", "8"}
    assert statistics["isolated_atom_energies"] == {str(z): e for z, e in ISOLATED.items()}
    assert statistics["total_charges"] == {"-1": 1, "0": 29}
    assert statistics["num_unpaired_electrons"] == {"0": 30}
    assert statistics["num_periodic"] == 0
    sizes = [g.num_atoms for g in graphs]
    assert statistics["num_atoms"] == {"min": min(sizes), "mean": pytest.approx(np.mean(sizes)), "max": max(sizes)}


def test_force_statistics_are_over_components_and_the_largest_over_norms() -> None:
    graphs = make_molecules(20)
    forces = np.concatenate([g.forces for g in graphs])
    numbers = np.concatenate([g.atomic_numbers for g in graphs])
    statistics = compute_statistics(graphs, None)
    assert statistics["force_rms"] == pytest.approx(np.sqrt(np.mean(forces**2)))
    assert statistics["force_rms_per_element"]["6"] == pytest.approx(np.sqrt(np.mean(forces[numbers == 6] ** 2)))
    assert statistics["max_force"] == pytest.approx(np.linalg.norm(forces, axis=1).max())
    without = compute_statistics([Graph(atomic_numbers=np.array([2]), positions=np.zeros((1, 3)), energy=-79.0)], None)
    assert without["force_rms"] is None
    assert without["isolated_atom_energies"] is None


def test_mean_neighbors_average_over_conformers_not_over_atoms() -> None:
    """A dimer (one neighbour) and four atoms within reach (three neighbours) have two on average, not 2.33."""
    dimer = Graph(atomic_numbers=np.ones(2, int), positions=np.eye(3)[:2])
    square = Graph(atomic_numbers=np.ones(4, int), positions=np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0.0]]))
    counted = count_neighbors([dimer, square])
    assert counted["3.0"] == pytest.approx(2.0)
    assert list(counted) == [f"{c:.1f}" for c in NEIGHBOR_CUTOFFS]


def test_mean_neighbors_count_periodic_images() -> None:
    crystal = Graph(
        atomic_numbers=np.array([29]), positions=np.zeros((1, 3)), cell=2.0 * np.eye(3), pbc=np.ones(3, bool)
    )
    counted = count_neighbors([crystal])
    assert counted["3.0"] == 18, "six at 2 Å and twelve at 2.83 Å"
    assert counted["3.5"] == 26, "eight more at 3.46 Å"
    neighbors = build_neighbors(crystal, 4.5)
    assert counted["4.5"] == 2 * len(neighbors.pair_first)


def test_structures_that_repeat_and_electrons_without_a_partner_are_counted() -> None:
    graphs = make_molecules(6)
    for graph in graphs:
        graph.cell, graph.pbc = 20 * np.eye(3), np.zeros(3, bool)
    graphs[1].pbc = np.array([True, False, False])
    graphs[2].pbc = np.ones(3, bool)
    graphs[4].num_unpaired_electrons = 2.0
    statistics = compute_statistics(graphs, None)
    assert statistics["num_periodic"] == 2
    assert statistics["num_unpaired_electrons"] == {"0": 5, "2": 1}


def test_neighbor_counts_do_not_depend_on_the_order_of_many_conformers() -> None:
    graphs = make_molecules(300)
    assert count_neighbors(graphs) == pytest.approx(count_neighbors(graphs[::-1]))


def test_neighbor_counting_stops_after_enough_atoms(monkeypatch) -> None:
    monkeypatch.setattr("so3krates_dist.data.statistics._MAX_NEIGHBOR_ATOMS", 10)
    dimers = [Graph(atomic_numbers=np.ones(2, int), positions=np.eye(3)[:2] * (1 + i)) for i in range(30)]
    counted = count_neighbors(dimers)["3.0"]
    assert counted in [i / 6 for i in range(7)], "six dimers, the least hashes"


def test_hash_depends_on_seed_elements_and_positions_alone() -> None:
    graph = make_molecules(1)[0]
    stored = Graph(atomic_numbers=graph.atomic_numbers.astype(np.uint8), positions=graph.positions.astype(np.float32))
    assert hash_geometry(graph, 0) == hash_geometry(stored, 0)
    assert hash_geometry(graph, 0) != hash_geometry(graph, 1)
    moved = Graph(atomic_numbers=graph.atomic_numbers, positions=graph.positions + 1e-4)
    assert hash_geometry(moved, 0) != hash_geometry(graph, 0)
    assert 0 <= hash_geometry(graph, 0) < 2**64


def test_no_conformers_is_an_error() -> None:
    with pytest.raises(DataError, match="training split must hold conformers; got 0"):
        compute_statistics([], None)


# ------------------------------------------------------------------------------------------------- conformer by conformer


def test_sums_are_those_of_all_atoms_at_once_whatever_their_number(monkeypatch) -> None:
    graphs = make_molecules(90)
    for graph in graphs[::4]:
        graph.forces = None
    for graph in graphs[1::5]:
        graph.energy = None
    found = compute_statistics(graphs, ISOLATED)
    labelled = [g for g in graphs if g.forces is not None]
    numbers, forces = (np.concatenate([getattr(g, n) for g in labelled]) for n in ("atomic_numbers", "forces"))
    assert found["force_rms"] == pytest.approx(np.sqrt(np.mean(forces**2)), rel=1e-11)
    for z in (1, 6, 7, 8):
        expected = np.sqrt(np.mean(forces[numbers == z] ** 2))
        assert found["force_rms_per_element"][str(z)] == pytest.approx(expected, rel=1e-11)
    baselines, _ = fit_baselines([g for g in graphs if g.energy is not None], ISOLATED)
    assert found["energy_baselines"] == pytest.approx({str(z): e for z, e in baselines.items()}, rel=1e-11)
    for size in (1, 7, 90):
        monkeypatch.setattr("so3krates_dist.data.statistics._GROUP", size)
        other = compute_statistics(graphs, ISOLATED)
        assert other["force_rms_per_element"] == pytest.approx(found["force_rms_per_element"], rel=1e-11)
        assert {k: v for k, v in other.items() if "force" not in k} == {
            k: v for k, v in found.items() if "force" not in k
        }


def test_the_numbers_are_those_of_the_first_version() -> None:
    """Printed by the version that had all conformers in memory."""
    found = compute_statistics(make_molecules(300), ISOLATED)
    baselines = {"1": -16.1045120121, "6": -1035.01282343, "7": -1488.99121101, "8": -2044.97357024}
    forces = {"1": 0.997976633345, "6": 1.00458434389, "7": 1.01906184688, "8": 1.01768666473}
    assert found["energy_baselines"] == pytest.approx(baselines, rel=1e-11)
    assert found["force_rms_per_element"] == pytest.approx(forces, rel=1e-11)
    scalars = [found[name] for name in ("energy_residual_std_per_atom", "force_rms", "max_force")]
    assert scalars == pytest.approx([0.0190856547113, 1.00338455776, 4.81332232624], rel=1e-11)
    assert found["mean_neighbors"]["5.0"] == pytest.approx(10.1136870685, rel=1e-11)
    assert found["num_atoms"] == {"min": 2, "mean": 14.5866666667, "max": 26}


def test_baselines_are_fitted_to_the_first_conformers_and_to_those_with_rare_elements(monkeypatch) -> None:
    monkeypatch.setattr("so3krates_dist.data.statistics.MAX_FIT_CONFORMERS", 50)
    monkeypatch.setattr("so3krates_dist.data.statistics.MIN_FIT_CONFORMERS", 5)
    graphs = make_molecules(300)
    salts = [
        Graph(atomic_numbers=np.array([11, 8, 1]), positions=np.eye(3), energy=-4400.0 + TRUE[8] + TRUE[1] + 0.3 * i)
        for i in (-1, 0, 1, 0, 0, 1e6, 1e6)  # the last two come when there are enough of them
    ]
    sample = BaselineSample()
    for graph in [*graphs, *salts]:
        sample.add(graph.atomic_numbers, graph.energy, graph.total_charge)
    assert len(sample) == 55
    assert sample.elements == [1, 6, 7, 8, 11]
    baselines, std = sample.fit(ISOLATED, sample.elements)
    assert baselines == fit_baselines([*graphs[:50], *salts[:5]], ISOLATED)[0]
    assert baselines[11] == pytest.approx(-4400.0, abs=0.5)
    residuals = sample.compute_residuals(baselines)
    assert len(residuals) == 55
    assert np.std(residuals) == pytest.approx(std, rel=1e-6)
    assert fit_baselines([*graphs, *salts], ISOLATED)[0] == baselines


def test_nothing_of_the_conformers_is_kept_alive() -> None:
    """Conformers are views of whole blocks: a kept one would keep its block in memory."""
    builder = StatisticsBuilder()
    alive = []
    for number in range(3):
        for graph in make_molecules(1024, seed=number):
            block = np.concatenate([graph.positions, graph.positions])
            alive.append(weakref.ref(block))
            builder.add(dataclasses.replace(graph, positions=block[: graph.num_atoms]))
    del graph, block
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0
