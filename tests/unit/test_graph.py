"""From structures to a batch: names, shapes, dtypes, offsets, missing labels."""

import dataclasses

import numpy as np
import pytest
import torch

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, Graph, GraphBatch, collate, compute_formula

CUTOFF = 3.0


def make_graph(num_atoms: int, seed: int, **changes) -> Graph:
    rng = np.random.default_rng(seed)
    graph = Graph(
        atomic_numbers=rng.integers(1, 9, num_atoms).astype(np.uint8),
        positions=rng.normal(scale=1.5, size=(num_atoms, 3)).astype(np.float32),
        energy=-1234.567890123 * num_atoms,
        forces=rng.normal(size=(num_atoms, 3)).astype(np.float32),
        total_charge=float(seed % 3 - 1),
        num_unpaired_electrons=float(seed % 2),
        group=f"group{seed}",
    )
    return build_neighbors(dataclasses.replace(graph, **changes), CUTOFF)


def make_crystal(seed: int) -> Graph:
    rng = np.random.default_rng(seed)
    cell = 4.0 * np.eye(3) + rng.normal(scale=0.1, size=(3, 3))
    return make_graph(3, seed, cell=cell, pbc=np.ones(3, bool), stress=rng.normal(size=(3, 3)).astype(np.float32))


def test_element_symbols_are_indexed_by_atomic_number():
    assert len(ELEMENT_SYMBOLS) == MAX_ATOMIC_NUMBER + 1
    assert [ELEMENT_SYMBOLS[z] for z in (1, 6, 8, 26, 79, 118)] == ["H", "C", "O", "Fe", "Au", "Og"]
    assert len(set(ELEMENT_SYMBOLS)) == len(ELEMENT_SYMBOLS)


def test_element_symbols_are_those_of_ase():
    assert tuple(pytest.importorskip("ase.data").chemical_symbols) == ELEMENT_SYMBOLS


@pytest.mark.parametrize(
    ("numbers", "formula"),
    [([6, 6, 8] + 6 * [1], "C2H6O"), ([8, 1, 1], "H2O"), ([17, 11], "ClNa"), ([6], "C"), ([1, 7, 6], "CHN")],
)
def test_formulas_are_in_hill_order(numbers, formula):
    assert compute_formula(np.array(numbers)) == formula


def test_collate_keeps_every_structure_apart():
    graphs = [make_graph(n, seed) for seed, n in enumerate((4, 1, 7, 2))]
    batch = collate(graphs)
    assert batch.num_graphs == 4
    assert batch.num_atoms.tolist() == [4, 1, 7, 2]
    offset = pair_offset = 0
    for index, graph in enumerate(graphs):
        atoms = slice(offset, offset + graph.num_atoms)
        pairs = slice(pair_offset, pair_offset + len(graph.pair_first))
        assert torch.equal(batch.graph_index[atoms], torch.full((graph.num_atoms,), index))
        np.testing.assert_array_equal(batch.atomic_numbers[atoms], graph.atomic_numbers)
        np.testing.assert_array_equal(batch.positions[atoms], graph.positions)
        np.testing.assert_array_equal(batch.forces[atoms], graph.forces)
        np.testing.assert_array_equal(batch.pair_first[pairs] - offset, graph.pair_first)
        np.testing.assert_array_equal(batch.pair_second[pairs] - offset, graph.pair_second)
        offset, pair_offset = offset + graph.num_atoms, pair_offset + len(graph.pair_first)
    assert pair_offset == len(batch.pair_first) == len(batch.pair_second)
    assert batch.group == ("group0", "group1", "group2", "group3")
    assert batch.total_charge.tolist() == [-1, 0, 1, -1]
    assert batch.num_unpaired_electrons.tolist() == [0, 1, 0, 1]


def test_dtypes_and_energies_without_rounding():
    batch = collate([make_graph(3, 0), make_graph(5, 1)], dtype=torch.float32)
    expected = {
        "atomic_numbers": torch.int64, "graph_index": torch.int64, "num_atoms": torch.int64, "pair_first": torch.int64,
        "pair_second": torch.int64, "positions": torch.float32, "forces": torch.float32, "energy": torch.float64,
        "total_charge": torch.float32, "num_unpaired_electrons": torch.float32,
    }  # fmt: skip
    assert {name: getattr(batch, name).dtype for name in expected} == expected
    assert batch.energy.tolist() == [-1234.567890123 * 3, -1234.567890123 * 5]


def test_weights_are_there_where_any_is_not_one():
    graphs = [make_graph(3, 0), make_graph(2, 1, loss_weight=0.25), make_graph(1, 2)]
    batch = collate(graphs)
    assert batch.loss_weight.tolist() == [1.0, 0.25, 1.0]
    assert batch.loss_weight.dtype == torch.float32
    assert batch.to("cpu", torch.float64).loss_weight.dtype == torch.float64
    assert collate(graphs[::2]).loss_weight is None
    assert collate([]).loss_weight is None


def test_partial_charges_that_some_lack():
    charges = np.array([0.5, -0.5], np.float32)
    batch = collate([make_graph(2, 0, partial_charges=charges), make_graph(1, 1)])
    np.testing.assert_array_equal(batch.partial_charges, [0.5, -0.5, np.nan])
    assert batch.partial_charges.dtype == torch.float32
    assert collate([make_graph(3, 0)]).partial_charges is None


def test_a_batch_of_molecules_has_no_cell():
    batch = collate([make_graph(3, 0)])
    assert batch.cell is batch.pbc is batch.pair_shifts is batch.stress is None


def test_molecules_and_crystals_share_a_batch():
    crystal = make_crystal(1)
    batch = collate([make_graph(3, 0), crystal], dtype=torch.float64)
    assert batch.pbc.tolist() == [[False] * 3, [True] * 3]
    assert batch.cell[0].abs().max() == 0
    np.testing.assert_array_equal(batch.cell[1], crystal.cell)
    shifts = batch.pair_shifts[-len(crystal.pair_first) :]
    np.testing.assert_array_equal(shifts, crystal.pair_shifts)
    assert batch.pair_shifts[: -len(crystal.pair_first)].abs().max() == 0
    vectors = (
        batch.positions[batch.pair_second] - batch.positions[batch.pair_first]
        + torch.einsum("pi,pij->pj", batch.pair_shifts, batch.cell[batch.graph_index[batch.pair_first]])
    )  # fmt: skip
    assert vectors.norm(dim=1).max() < CUTOFF


def list_pairs(batch: GraphBatch, start: int, end: int) -> list[tuple[int, int, tuple[float, ...]]]:
    """Return pairs as (first, second, shift), sorted."""
    shifts = batch.pair_shifts if batch.pair_shifts is not None else torch.zeros(len(batch.pair_first), 3)
    rows = zip(batch.pair_first.tolist(), batch.pair_second.tolist(), map(tuple, shifts.tolist()), strict=True)
    return sorted(list(rows)[start:end])


def test_short_pairs_of_all_structures_come_before_long_ones() -> None:
    """Structures with long pairs, without any, and with pairs whose kind was not said (all short), in one batch."""
    reach = 6.0
    crystal, molecule = (build_neighbors(g, CUTOFF, reach) for g in (make_crystal(1), make_graph(6, 0)))
    plain, unsaid = make_graph(4, 2), dataclasses.replace(make_crystal(3), num_short_pairs=None)
    graphs = [molecule, crystal, plain, make_graph(1, 4), unsaid]
    assert crystal.num_short_pairs < len(crystal.pair_first)
    assert molecule.num_short_pairs < len(molecule.pair_first)
    batch = collate(graphs, torch.float64)
    offsets = np.cumsum([0, *(g.num_atoms for g in graphs)])
    short, long = [], []
    for graph, offset in zip(graphs, offsets, strict=False):
        num_short = len(graph.pair_first) if graph.num_short_pairs is None else graph.num_short_pairs
        shifts = np.zeros((len(graph.pair_first), 3)) if graph.pair_shifts is None else graph.pair_shifts
        for pair, (first, second, shift) in enumerate(zip(graph.pair_first, graph.pair_second, shifts, strict=True)):
            row = (int(first + offset), int(second + offset), tuple(map(float, shift)))
            (short if pair < num_short else long).append(row)
    assert batch.num_short_pairs == len(short)
    assert list_pairs(batch, 0, len(short)) == sorted(short)
    assert list_pairs(batch, len(short), len(batch.pair_first)) == sorted(long)
    vectors = (
        batch.positions[batch.pair_second] - batch.positions[batch.pair_first]
        + torch.einsum("pi,pij->pj", batch.pair_shifts, batch.cell[batch.graph_index[batch.pair_first]])
    )  # fmt: skip
    distances = vectors.norm(dim=1)
    assert distances[: len(short)].max() < CUTOFF
    assert distances[len(short) :].min() >= CUTOFF
    assert distances.max() < reach


def test_batches_without_long_pairs_count_all_as_short() -> None:
    graphs = [make_graph(4, 0), make_crystal(1)]
    assert collate(graphs).num_short_pairs == sum(len(g.pair_first) for g in graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_nothing(dtype: torch.dtype) -> None:
    batch = collate([], dtype)
    assert (batch.num_graphs, batch.num_short_pairs, batch.group) == (0, 0, ())
    assert batch.cell is batch.pbc is batch.pair_shifts is None
    filled = collate([make_graph(3, 0)], dtype)
    for field in dataclasses.fields(GraphBatch):
        empty, some = getattr(batch, field.name), getattr(filled, field.name)
        assert isinstance(empty, torch.Tensor) == isinstance(some, torch.Tensor), field.name
        if isinstance(some, torch.Tensor):
            assert (len(empty), empty.shape[1:], empty.dtype) == (0, some.shape[1:], some.dtype), field.name
    assert batch.to("cpu", torch.float32).num_short_pairs == 0


def test_labels_of_charges_and_ratios() -> None:
    """Dipoles and Hirshfeld ratios, per structure and per atom; nan where a structure has none."""
    ratios = np.array([0.9, 1.1, 0.8])
    labelled = make_graph(3, 0, dipole=np.array([0.1, 0.2, -0.3]), hirshfeld_ratios=ratios)
    batch = collate([make_graph(2, 1), labelled], torch.float64)
    assert torch.isnan(batch.dipole[0]).all()
    assert batch.dipole[1].tolist() == [0.1, 0.2, -0.3]
    assert torch.isnan(batch.hirshfeld_ratios[:2]).all()
    assert batch.hirshfeld_ratios[2:].tolist() == ratios.tolist()
    assert collate([make_graph(2, 1)]).dipole is collate([make_graph(2, 1)]).hirshfeld_ratios is None


def test_missing_labels_become_nan_and_wholly_missing_ones_none():
    with_stress, without = make_crystal(1), make_graph(2, 2, energy=None, forces=None)
    batch = collate([with_stress, without])
    assert torch.isnan(batch.stress[1]).all()
    assert torch.isfinite(batch.stress[0]).all()
    assert batch.energy.isnan().tolist() == [False, True]
    assert batch.forces.isnan().any(dim=1).tolist() == [False] * 3 + [True] * 2
    assert collate([without]).energy is None
    assert collate([without]).forces is None


def test_collate_insists_on_neighbours():
    bare = dataclasses.replace(make_crystal(1), pair_first=None)
    with pytest.raises((AssertionError, TypeError)):
        collate([bare])


def test_batches_change_dtype_but_not_the_energy():
    batch = collate([make_graph(3, 0), make_crystal(1)])
    moved = batch.to("cpu", torch.float64)
    for field in dataclasses.fields(GraphBatch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            floating = before.is_floating_point()
            assert after.dtype == (torch.float64 if floating else before.dtype), field.name
            assert torch.equal(after, before.to(after.dtype)) or field.name in ("stress",), field.name
        else:
            assert after == before
    assert batch.to("cpu").positions.dtype == torch.float32
    lower = moved.to("cpu", torch.float32)
    assert lower.energy.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_batches_hold_the_same():
    batch = collate([make_graph(3, 0), make_crystal(1)])
    pinned = batch.pin_memory()
    assert pinned.positions.is_pinned()
    assert torch.equal(pinned.positions, batch.positions)


def test_periodicity_and_size():
    assert make_crystal(1).is_periodic
    assert not make_graph(2, 0).is_periodic
    assert not make_graph(2, 0, pbc=np.zeros(3, bool)).is_periodic
    assert make_graph(5, 0).num_atoms == 5
